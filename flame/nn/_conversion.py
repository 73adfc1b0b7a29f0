"""The arguments of `Module.to`: a device, a dtype, both, or a tensor that has both.

A dtype applies to floating-point parameters and buffers only, so counters and indices keep theirs;
a memory format to those of four and five dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError
from flame.tensor import Tensor

__all__ = ["converter"]


def converter(*args: Any, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    """The conversion that `Module.to(*args, **kwargs)` asks for, as a function of one tensor."""
    kwargs = dict(kwargs)
    memory_format = kwargs.pop("memory_format", None)
    device, dtype = _parse(args, kwargs)
    if dtype is not None and not dtype.is_floating_point:
        raise DTypeError(
            f"Module.to: takes a floating-point dtype, got {dtype.name}; "
            "convert single tensors with Tensor.to"
        )

    def convert(tensor: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if device is not None:
            options["device"] = device
        if dtype is not None and tensor.is_floating_point():
            options["dtype"] = dtype
        if memory_format is not None and tensor.ndim in (4, 5):
            options["memory_format"] = memory_format
        return tensor.to(**options) if options else tensor

    return convert


def _parse(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, DType | None]:
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    like = kwargs.pop("tensor", None)
    kwargs.pop("non_blocking", None)  # a hint that changes no result
    if kwargs:
        raise ArgumentError(f"Module.to: unknown arguments {sorted(kwargs)}")
    for value in args:
        if isinstance(value, bool):  # non_blocking, by position
            continue
        if isinstance(value, Tensor):
            like = value
        elif isinstance(value, DType):
            dtype = value
        elif value is not None:
            device = value
    if like is not None:
        device, dtype = like.device, like.dtype
    return device, dtype
