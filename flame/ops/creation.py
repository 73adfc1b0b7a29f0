"""Tensors from sizes: full and what is made of it, arange and what is made of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core import dtypes
from flame.core.device import check_device
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, ShapeError
from flame.core.handle import is_tensor
from flame.core.types import Shape, TensorType, like_strides, tensor_type
from flame.kernel.builder import KernelBuilder, Lowering
from flame.kernel.values import Value, cast, select
from flame.ops.elementwise import compute_dtype, nest_of, walk
from flame.ops.op import NOT_DIFFERENTIABLE, Op, Sample, Types, empty_of

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "arange",
    "empty",
    "empty_like",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "zeros",
    "zeros_like",
]
METHODS = ("fill_", "zero_")


def _infer_full(
    types: Types, *, shape: Shape, dtype: DType, strides: Shape | None = None, device: str = "cpu"
) -> TensorType:
    if any(size < 0 for size in shape):
        raise ShapeError(f"full: sizes must not be negative, got {shape}")
    return tensor_type(dtype, shape, strides, device)


def _lower_full(types: Types, outputs: tuple[TensorType, ...], **attributes: Any) -> Lowering:
    return _fill("full", types, outputs, lambda numbers, position: numbers[0])


def _fill(name: str, types: Types, outputs: tuple[TensorType, ...], value: Any) -> Lowering:
    """Store ``value(numbers, position)`` at every position of a dense output."""
    (out,) = outputs
    k = KernelBuilder(name)
    numbers = [k.number(i, t) for i, t in enumerate(types) if isinstance(t, type)]
    nest = nest_of((), outputs)
    target = k.tensor("output", 0, tensor_type(out.dtype, nest.sizes, nest.strides[0]))
    compute = compute_dtype(out.dtype)

    def body(index: tuple[Value, ...]) -> None:
        k.store(target, index, cast(value(numbers, target.at(index)), compute))

    walk(k, nest, body, light=True, device=out.device)
    return k.finish()


_full = Op(
    "full",
    inputs=("value",),
    infer=_infer_full,
    lower=_lower_full,
    vjp=NOT_DIFFERENTIABLE,
    reference=lambda value, *, shape, dtype, **_: np.full(shape, value, dtype.numpy),
    samples=[
        Sample((2.5,), {"shape": (3, 4), "dtype": dtypes.float32}),
        Sample((True,), {"shape": (), "dtype": dtypes.bool_}),
        Sample((7,), {"shape": (0, 2), "dtype": dtypes.int16}),
    ],
)


def _infer_arange(types: Types, *, count: int, dtype: DType, device: str = "cpu") -> TensorType:
    return tensor_type(dtype, (count,), None, device)


def _lower_arange(types: Types, outputs: tuple[TensorType, ...], **attributes: Any) -> Lowering:
    whole = all(t is int for t in types)
    compute = dtypes.int64 if whole else dtypes.float64

    def value(numbers: list[Value], position: Value) -> Value:
        start, step = (cast(n, compute) for n in numbers)
        return start + cast(position, compute) * step

    return _fill("arange", types, outputs, value)


_arange = Op(
    "arange",
    inputs=("start", "step"),
    infer=_infer_arange,
    lower=_lower_arange,
    vjp=NOT_DIFFERENTIABLE,
    reference=lambda start, step, *, count, dtype, **_: (start + np.arange(count) * step).astype(
        dtype.numpy
    ),
    samples=[
        Sample((1, 2), {"count": 9, "dtype": dtypes.int64}),
        Sample((0.5, 0.25), {"count": 5, "dtype": dtypes.float32}),
        Sample((0, 1), {"count": 0, "dtype": dtypes.int32}),
    ],
)


def shape_of(*size: Any) -> Shape:
    """Sizes given one by one, or as one sequence."""
    if len(size) == 1 and not isinstance(size[0], int) and hasattr(size[0], "__iter__"):
        size = tuple(size[0])
    try:
        return tuple([s.__index__() for s in size])
    except (AttributeError, TypeError):
        raise ShapeError(f"sizes must be integers, got {size!r}") from None


def _finish(made: Tensor, requires_grad: bool) -> Tensor:
    return made.requires_grad_() if requires_grad else made


def full(
    size: Any,
    fill_value: Any,
    *,
    dtype: DType | None = None,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """A tensor of shape ``size`` filled with a number; its dtype defaults to the number's."""
    if dtype is None:
        dtype = dtypes.of_scalar(type(fill_value), dtypes.get_default_dtype())
    shape, device = shape_of(size), check_device(device)
    return _finish(_full(fill_value, shape=shape, dtype=dtype, device=device), requires_grad)


def zeros(
    *size: Any, dtype: DType | None = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """A tensor of zeros, of the default dtype unless given."""
    dtype = dtype or dtypes.get_default_dtype()
    return full(shape_of(*size), 0, dtype=dtype, device=device, requires_grad=requires_grad)


def ones(
    *size: Any, dtype: DType | None = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """A tensor of ones, of the default dtype unless given."""
    dtype = dtype or dtypes.get_default_dtype()
    return full(shape_of(*size), 1, dtype=dtype, device=device, requires_grad=requires_grad)


def empty(
    *size: Any, dtype: DType | None = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """A tensor whose values are not set."""
    shape = shape_of(*size)
    if any(s < 0 for s in shape):
        raise ShapeError(f"empty: sizes must not be negative, got {shape}")
    type_ = tensor_type(dtype or dtypes.get_default_dtype(), shape, None, check_device(device))
    return _finish(empty_of(type_), requires_grad)


def full_like(
    input: Tensor,
    fill_value: Any,
    *,
    dtype: DType | None = None,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """As `full`, with the shape, layout and dtype of ``input``."""
    type_ = input.type
    made = _full(
        fill_value,
        shape=type_.shape,
        dtype=dtype or type_.dtype,
        strides=like_strides(type_.shape, type_),
        device=type_.device if device is None else check_device(device),
    )
    return _finish(made, requires_grad)


def zeros_like(input: Tensor, **options: Any) -> Tensor:
    return full_like(input, 0, **options)


def ones_like(input: Tensor, **options: Any) -> Tensor:
    return full_like(input, 1, **options)


def empty_like(
    input: Tensor, *, dtype: DType | None = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    return empty(
        input.shape,
        dtype=dtype or input.dtype,
        device=device or input.type.device,
        requires_grad=requires_grad,
    )


def fill_(input: Tensor, value: Any) -> Tensor:
    """Set every element to a number (or to a 0-d tensor's value), in place."""
    if is_tensor(value):
        return input.copy_(value)
    type_ = input.type
    _full.into((input,), value, shape=type_.shape, dtype=type_.dtype, device=type_.device)
    return input


def zero_(input: Tensor) -> Tensor:
    """Set every element to 0, in place."""
    return fill_(input, 0)


def arange(
    start: Any,
    end: Any = None,
    step: Any = 1,
    *,
    dtype: DType | None = None,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """start, start + step, ... below ``end`` (exclusive), a 1-d tensor; int64 for integers."""
    if end is None:
        start, end = 0, start
    start, end, step = (_number("arange", v) for v in (start, end, step))
    if step == 0 or not all(math.isfinite(v) for v in (start, end, step)):
        raise ArgumentError(f"arange: step must not be 0 and all finite, got {start, end, step}")
    if (end - start) * step < 0:
        raise ArgumentError(f"arange: from {start} to {end} is not reached in steps of {step}")
    whole = all(isinstance(v, int) for v in (start, end, step))
    dtype = dtype or (dtypes.int64 if whole else dtypes.get_default_dtype())
    if dtype.kind in "iu":  # integers count in whole steps, as in PyTorch
        start, end, step, whole = int(start), int(end), int(step), True
        if step == 0:
            raise ArgumentError("arange: the step is 0 as an integer; give a floating dtype")
    count = max(0, -((start - end) // step)) if whole else math.ceil((end - start) / step)
    kind = int if whole else float
    made = _arange(kind(start), kind(step), count=count, dtype=dtype, device=check_device(device))
    return _finish(made, requires_grad)


def _number(name: str, value: Any) -> Any:
    """A Python number, out of a 0-d tensor or a NumPy number too."""
    if isinstance(value, (int, float)):
        return value
    if not hasattr(value, "item"):
        raise ArgumentError(f"{name} takes numbers, got {type(value).__name__}")
    return value.item()


def _lower_linspace(types: Types, outputs: tuple[TensorType, ...], **attributes: Any) -> Lowering:
    def value(numbers: list[Value], position: Value) -> Value:
        start, end, step, last = (cast(n, dtypes.float64) for n in numbers)
        place = cast(position, dtypes.float64)
        up, down = start + place * step, end - (last - place) * step
        return select(place + place < last + 1.0, up, down)

    return _fill("linspace", types, outputs, value)


def _linspace_reference(
    start: Any, end: Any, step: Any, last: Any, *, count: int, dtype: DType, **_: Any
) -> Any:
    place = np.arange(count)
    return np.where(2 * place < last + 1, start + place * step, end - (last - place) * step).astype(
        dtype.numpy
    )


_linspace = Op(
    "linspace",
    inputs=("start", "end", "step", "last"),
    infer=_infer_arange,
    lower=_lower_linspace,
    vjp=NOT_DIFFERENTIABLE,
    reference=_linspace_reference,
    samples=[
        Sample((0.0, 1.0, 0.25, 4), {"count": 5, "dtype": dtypes.float32}),
        Sample((3.0, 3.0, 0.0, 0), {"count": 1, "dtype": dtypes.float64}),
    ],
)


def linspace(
    start: Any,
    end: Any,
    steps: int,
    *,
    dtype: DType | None = None,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """``steps`` numbers from start to end, both included; exact at both ends."""
    if steps < 0:
        raise ArgumentError(f"linspace: steps must not be negative, got {steps}")
    dtype = dtype or dtypes.get_default_dtype()
    kind = int if dtype.kind in "iu" else float
    start, end = (float(kind(_number("linspace", v))) for v in (start, end))
    step = (end - start) / (steps - 1) if steps > 1 else 0.0
    device = check_device(device)
    made = _linspace(start, end, step, max(steps - 1, 0), count=steps, dtype=dtype, device=device)
    return _finish(made, requires_grad)


def eye(
    n: int,
    m: int | None = None,
    *,
    dtype: DType | None = None,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """The identity matrix, (n, m)."""
    rows, columns = (arange(k, device=device) for k in (n, n if m is None else m))
    made = (rows.unsqueeze(1) == columns).to(dtype or dtypes.get_default_dtype())
    return _finish(made, requires_grad)
