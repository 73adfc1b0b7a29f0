"""Whether operations are recorded for a backward pass; a property of the thread."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class _Mode(threading.local):
    enabled = True
    inference = False
    anomaly = False


mode = _Mode()


class _Switch:
    """A context manager and decorator that sets one field of the mode."""

    def __init__(self, **fields: bool) -> None:
        self._fields = fields
        self._before: list[dict[str, bool]] = []

    def __enter__(self) -> Self:
        self._before.append({name: getattr(mode, name) for name in self._fields})
        for name, value in self._fields.items():
            setattr(mode, name, value)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, value in self._before.pop().items():
            setattr(mode, name, value)

    def __call__(self, function: F) -> F:
        fields = self._fields

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with _Switch(**fields):
                return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]  # functools.wraps keeps the signature


class no_grad(_Switch):
    """Inside, operations are not recorded. Context manager and decorator."""

    def __init__(self) -> None:
        super().__init__(enabled=False)


class enable_grad(_Switch):
    """Inside, operations are recorded again."""

    def __init__(self) -> None:
        super().__init__(enabled=True)


class set_grad_enabled(_Switch):
    """Record operations inside, or not. Takes effect at once, also without ``with``."""

    def __init__(self, mode: bool) -> None:
        super().__init__(enabled=mode)
        self.__enter__()
        self._entered = True

    def __enter__(self) -> Self:
        if getattr(self, "_entered", False):
            self._entered = False
            return self
        return super().__enter__()


class inference_mode(_Switch):
    """As `no_grad`: nothing is recorded inside."""

    def __init__(self, mode: bool = True) -> None:
        super().__init__(enabled=not mode, inference=mode)


class detect_anomaly(_Switch):
    """Inside, a backward pass that gives NaN raises, and names the line of the forward call."""

    def __init__(self, check_nan: bool = True) -> None:
        super().__init__(anomaly=check_nan)


def is_grad_enabled() -> bool:
    """Whether operations are recorded in this thread."""
    return mode.enabled


def is_inference_mode_enabled() -> bool:
    return mode.inference
