"""Regions in which operations choose the precision that suits them.

Source of the method: Micikevicius et al., "Mixed Precision Training", 2018; which operation takes
which precision is PyTorch's table for CUDA, on every device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from flame.core import dtypes
from flame.core.autocast import DEVICE_TYPES, Settings, enter, leave
from flame.core.autocast import autocast as current
from flame.core.dtypes import DType
from flame.core.errors import DeviceError, DTypeError
from flame.core.handle import is_tensor
from flame.ops.conversion import convert

__all__ = [
    "autocast",
    "custom_bwd",
    "custom_fwd",
    "get_autocast_dtype",
    "is_autocast_available",
    "is_autocast_enabled",
]

F = TypeVar("F", bound=Callable[..., Any])

LOWER: Final = (dtypes.bfloat16, dtypes.float16)


class autocast:
    """Inside, operations run in the precision that suits them. Context manager and decorator.

    Matrix products, convolutions and attention take their floating operands in ``dtype``; sums,
    exponentials, norms and losses take them in float32; where operands of both meet, the wider one
    counts. float64 is never cast. Casts are recorded, so a gradient has the dtype of what it
    belongs to; a backward pass runs in the types that the forward pass chose, inside of a region
    or outside. Parameters stay as they are: keep them in float32.

    The cast of a parameter is kept until the outermost region ends (unless ``cache_enabled`` is
    False), and made anew after the parameter was changed in place. Regions nest, belong to their
    thread, and a compiled function is recorded anew for another region.

    Args:
        device_type: "cpu" or "cuda": operands on devices of this type are cast.
        dtype: bfloat16 or float16; by default bfloat16 on the CPU and float16 on CUDA, or what a
            region around this one has. float16 needs a `GradScaler`.
        enabled: False switches casts off inside.
        cache_enabled: whether casts of parameters are kept; by default as around.

    Raises:
        DeviceError: another device type.
        DTypeError: another dtype.
    """

    def __init__(
        self,
        device_type: str,
        dtype: DType | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        self.device = _device_type("autocast", device_type)
        self.fast_dtype = current.settings.dtype(self.device) if dtype is None else dtype
        if self.fast_dtype not in LOWER:
            raise DTypeError(f"autocast: dtype must be bfloat16 or float16, got {dtype!r}")
        self._enabled = bool(enabled)
        self._caches = cache_enabled
        self._before: list[tuple[Settings, bool]] = []

    def __enter__(self) -> Self:
        around = current.settings
        caches = around.caches if self._caches is None else bool(self._caches)
        settings = around.changed(self.device, self._enabled, self.fast_dtype, caches)
        self._before.append(enter(settings))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        leave(self._before.pop())

    def __call__(self, function: F) -> F:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            # a region of its own for each call: they may overlap in several threads
            with autocast(self.device, self.fast_dtype, self._enabled, self._caches):
                return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]  # functools.wraps keeps the signature

    def __repr__(self) -> str:
        return f"autocast({self.device!r}, dtype={self.fast_dtype!r}, enabled={self._enabled})"


def is_autocast_enabled(device_type: str = "cuda") -> bool:
    """Whether this thread is in a region that casts operands on ``device_type``."""
    return current.settings.enabled(_device_type("is_autocast_enabled", device_type))


def get_autocast_dtype(device_type: str) -> DType:
    """The dtype that regions for ``device_type`` cast to here."""
    return current.settings.dtype(_device_type("get_autocast_dtype", device_type))


def is_autocast_available(device_type: str) -> bool:
    """Whether `autocast` knows this device type."""
    return device_type in DEVICE_TYPES


def custom_fwd(
    fwd: Callable[..., Any] | None = None,
    *,
    device_type: str,
    cast_inputs: DType | None = None,
) -> Any:
    """Decorates ``forward`` of an `autograd.Function` for use inside of autocast regions.

    cast_inputs: floating arguments on ``device_type`` are cast to it, and ``forward`` runs outside
    of autocast; without it, ``forward`` runs as the region says. Decorate ``backward`` by
    `custom_bwd`.
    """
    device = _device_type("custom_fwd", device_type)
    if fwd is None:
        return functools.partial(custom_fwd, device_type=device, cast_inputs=cast_inputs)
    forward = fwd

    @functools.wraps(fwd)
    def decorated(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        ctx._autocast_dtype = get_autocast_dtype(device)
        ctx._used_autocast = current.on and is_autocast_enabled(device)
        if cast_inputs is None or not ctx._used_autocast:
            return forward(ctx, *args, **kwargs)
        ctx._used_autocast = False
        cast = functools.partial(_cast, device=device, dtype=cast_inputs)
        with autocast(device, enabled=False):
            return forward(ctx, *map(cast, args), **{k: cast(v) for k, v in kwargs.items()})

    return decorated


def custom_bwd(bwd: Callable[..., Any] | None = None, *, device_type: str) -> Any:
    """Decorates ``backward`` of an `autograd.Function`: it runs with the autocast state that
    ``forward``, decorated by `custom_fwd`, ran with.
    """
    device = _device_type("custom_bwd", device_type)
    if bwd is None:
        return functools.partial(custom_bwd, device_type=device)
    backward = bwd

    @functools.wraps(bwd)
    def decorated(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        with autocast(device, ctx._autocast_dtype, ctx._used_autocast):
            return backward(ctx, *args, **kwargs)

    return decorated


def _cast(x: Any, *, device: str, dtype: DType) -> Any:
    """An argument of a custom function, with the tensors in containers cast."""
    if is_tensor(x):
        wanted = x.dtype.kind == "f" and x.dtype is not dtypes.float64
        return convert(x, dtype=dtype) if wanted and x.device.type == device else x
    if isinstance(x, dict):
        return {key: _cast(value, device=device, dtype=dtype) for key, value in x.items()}
    if isinstance(x, (list, tuple)) and not hasattr(x, "_fields"):
        return type(x)([_cast(each, device=device, dtype=dtype) for each in x])
    return x


def _device_type(name: str, device_type: Any) -> str:
    if device_type not in DEVICE_TYPES:
        raise DeviceError(
            f"{name}: the device type must be 'cpu' or 'cuda', got {device_type!r}"
            + ("; leave the number out" if str(device_type).partition(":")[0] == "cuda" else "")
        )
    return str(device_type)
