"""For which device types operations run in a lower precision; a property of the thread.

Invariant: interpreters look at ``autocast.on`` alone. It is False where no device type has autocast
enabled, and inside of a function whose operands were cast already.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal, NamedTuple, TypeVar

from flame.core import dtypes
from flame.core.dtypes import DType

T = TypeVar("T")

# What autocast does with the floating operands of an operation (float64 is never cast):
# lower: cast to the region's dtype; float32: cast to float32; widest: float32 if one of them is;
# plain: left as they are, and what the function is composed of is not looked at either.
# unsafe: float32 on the CPU, an error on CUDA (as in PyTorch, whose tables differ here).
Policy = Literal["lower", "float32", "widest", "plain", "unsafe"]

DEVICE_TYPES: Final = ("cpu", "cuda")


class Settings(NamedTuple):
    """What is enabled. Hashable: a compiled function keeps a program for each."""

    cpu: bool = False
    cuda: bool = False
    cpu_dtype: DType = dtypes.bfloat16
    cuda_dtype: DType = dtypes.float16
    caches: bool = True

    def enabled(self, device_type: str) -> bool:
        return self.cuda if device_type == "cuda" else self.cpu

    def dtype(self, device_type: str) -> DType:
        return self.cuda_dtype if device_type == "cuda" else self.cpu_dtype

    def changed(self, device_type: str, enabled: bool, dtype: DType, caches: bool) -> Settings:
        """These settings with others for one device type."""
        if device_type == "cuda":
            return self._replace(cuda=enabled, cuda_dtype=dtype, caches=caches)
        return self._replace(cpu=enabled, cpu_dtype=dtype, caches=caches)


class _Autocast(threading.local):
    settings = Settings()
    on = False
    depth = 0  # regions that are open; the casts of parameters are forgotten after the last
    casts: dict[Any, Any] | None = None  # of leaves, by identity, dtype and grad mode


autocast = _Autocast()


def enter(settings: Settings) -> tuple[Settings, bool]:
    """Open a region; returns what `leave` puts back."""
    before = autocast.settings, autocast.on
    autocast.settings = settings
    autocast.on = settings.cpu or settings.cuda
    autocast.depth += 1
    if autocast.casts is None:
        autocast.casts = {}
    return before


def leave(before: tuple[Settings, bool]) -> None:
    """Close the region that `enter` opened."""
    autocast.settings, autocast.on = before
    autocast.depth -= 1
    if not autocast.depth:
        autocast.casts = None


@contextmanager
def as_then(settings: Settings, on: bool) -> Iterator[None]:
    """Inside, operations run as they did under these settings: for what is computed again."""
    before = autocast.settings, autocast.on
    autocast.settings, autocast.on = settings, on
    try:
        yield
    finally:
        autocast.settings, autocast.on = before


def plain(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """``function(*args, **kwargs)`` without casts inside."""
    if not autocast.on:
        return function(*args, **kwargs)
    autocast.on = False
    try:
        return function(*args, **kwargs)
    finally:
        autocast.on = True
