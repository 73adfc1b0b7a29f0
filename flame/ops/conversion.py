"""Changes of dtype, and copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, ShapeError
from flame.core.handle import is_tensor
from flame.core.types import TensorType, contiguous_strides, like_strides, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const, select
from flame.ops.copies_cuda import lower_turn
from flame.ops.elementwise import compute_dtype, nest_of, walk
from flame.ops.loops import Nest
from flame.ops.op import Arg, Op, Sample, Types

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "channels_last", "channels_last_3d", "clone", "contiguous_format", "preserve_format",
]  # fmt: skip
METHODS = ("clone", "contiguous", "copy_")

# Orders of dimensions in memory; layouts are strides, and these are their names.
contiguous_format: Final = "contiguous_format"
preserve_format: Final = "preserve_format"
channels_last: Final = "channels_last"
channels_last_3d: Final = "channels_last_3d"

TILE: Final = 64  # rows and columns of a part that is transposed in the cache


def _infer(types: Types, *, dtype: DType | None = None, contiguous: bool = False) -> TensorType:
    (x,) = types
    assert isinstance(x, TensorType)
    strides = contiguous_strides(x.shape) if contiguous else like_strides(x.shape, x)
    return tensor_type(dtype or x.dtype, x.shape, strides, x.device)


def _lower(types: Types, outputs: tuple[TensorType, ...], **attributes: Any) -> Lowering:
    (x,), (out,) = types, outputs
    assert isinstance(x, TensorType)
    k = KernelBuilder("copy")
    nest = nest_of(types, outputs)
    source = k.tensor("input", 0, tensor_type(x.dtype, nest.sizes, nest.strides[0]))
    target = k.tensor("output", 0, tensor_type(out.dtype, nest.sizes, nest.strides[1]))
    same = x.dtype is out.dtype

    def read(index: tuple[Value, ...]) -> Value:
        value = source[index]
        return value if same else converted(value, x.dtype, out.dtype)

    crossing = _crossing(nest)
    if crossing is None:
        walk(
            k,
            nest,
            lambda index: k.store(target, index, read(index)),
            light=True,
            device=out.device,
        )
    else:
        _transpose(k, nest, crossing, target, read)
    return k.finish()


def _lower_cuda(types: Types, outputs: tuple[TensorType, ...], **attributes: Any) -> Lowering:
    (x,), (out,) = types, outputs
    assert isinstance(x, TensorType)
    turned = lower_turn(x, out, nest_of(types, outputs))
    return _lower(types, outputs, **attributes) if turned is None else turned


def _crossing(nest: Nest) -> int | None:
    """The dimension in which the source is contiguous, where the target is so in another: a
    transpose of many elements."""
    if not nest.sizes or nest.strides[1][-1] != 1 or nest.strides[0][-1] in (0, 1):
        return None
    for dim, (size, step) in enumerate(zip(nest.sizes, nest.strides[0], strict=True)):
        if step == 1 and size >= 8 and nest.sizes[-1] >= 8 and size * nest.sizes[-1] >= TILE * TILE:
            return dim
    return None


def _transpose(
    k: KernelBuilder, nest: Nest, dim: int, target: Operand, read: Callable[..., Value]
) -> None:
    """Square tiles by way of a small buffer: rows of the source are read whole, then rows of the
    target are written whole. A row of the buffer has an odd length, so that its columns fall on
    different lines of the cache."""
    last = len(nest.sizes) - 1
    tile = k.scratch(target.dtype, (TILE, TILE + 1))
    rest = [d for d in range(last) if d != dim]
    counts = [-(-nest.sizes[d] // TILE) for d in (dim, last)]
    extents = [nest.sizes[d] for d in rest]
    with k.parallel(*extents, *counts, work=TILE * TILE) as (*outer, high, wide):
        place = dict(zip(rest, outer, strict=True))
        first, left = high * TILE, wide * TILE
        rows = values.binary("min", k.size(nest.sizes[dim]) - first, values.const(TILE))
        columns = values.binary("min", k.size(nest.sizes[last]) - left, values.const(TILE))

        def at(row: Value, column: Value) -> tuple[Value, ...]:
            known = {**place, dim: first + row, last: left + column}
            return tuple(known[d] for d in range(last + 1))

        with k.loop(columns) as column, k.vector(rows, 2) as row:
            k.store(tile, (column, row), read(at(row, column)))
        with k.loop(rows) as row, k.vector(columns, 1) as column:
            k.store(target, at(row, column), tile[column, row])


def converted(value: Any, source: DType, target: DType) -> Any:
    """Conversion by value; what no integer holds, NaN first of all, becomes the smallest one."""
    number = cast(value, compute_dtype(source))
    if number.dtype.kind != "f" or target not in (dtypes.int64, dtypes.int32):
        return cast(number, target)
    holds = abs(number) < 2.0 ** (target.bits - 1)
    return select(holds, cast(number, target), const(-(1 << (target.bits - 1)), target))


def _reference(x: Any, *, dtype: DType | None = None, contiguous: bool = False) -> Any:
    return np.array(x, None if dtype is None else dtype.numpy)


copy = Op(
    "copy",
    inputs=("x",),
    infer=_infer,
    lower=_lower,
    lower_cuda=_lower_cuda,
    vjp=(lambda g: g,),  # the engine gives it the dtype of the input
    reference=_reference,
    samples=[Sample((Arg((3, 5)),)), Sample((Arg(()),)), Sample((Arg((0, 4)),)),
             Sample((Arg((2, 3, 4)),), {"contiguous": True}),
             Sample((Arg((70, 3, 130)),), {"contiguous": True})],
)  # fmt: skip


def convert(input: Tensor, *, dtype: DType) -> Tensor:
    """``input`` in another dtype; itself where it has that dtype already."""
    if input.dtype is dtype:
        return input
    result: Tensor = copy(input, dtype=dtype)
    return result


def clone(input: Tensor, *, memory_format: Any = None) -> Tensor:
    """A copy in new memory, with the layout kept, or that of ``memory_format``."""
    if memory_format in (None, preserve_format):
        order = None
    else:
        order = format_order("clone", memory_format, input.ndim)
    if order is not None:
        return _in_order(input, order)
    result: Tensor = copy(input, contiguous=memory_format == contiguous_format)
    return result


def contiguous(input: Tensor, memory_format: Any = None) -> Tensor:
    """``input`` in row-major order, or in that of ``memory_format``; itself where it is so."""
    order = format_order("contiguous", memory_format, input.ndim)
    if order is not None:
        return input if in_order(input.type, order) else _in_order(input, order)
    if input.type.contiguous:
        return input
    result: Tensor = copy(input, contiguous=True)
    return result


def format_order(name: str, memory_format: Any, rank: int) -> tuple[int, ...] | None:
    """The dimensions from the outermost in memory to the innermost; None for row-major order."""
    if memory_format in (None, contiguous_format, preserve_format):
        return None
    wanted = {channels_last: 4, channels_last_3d: 5}.get(memory_format)
    if wanted is None:
        raise ArgumentError(f"{name}: {memory_format!r} is no memory format")
    if rank != wanted:
        raise ShapeError(f"{name}: {memory_format} is for {wanted} dimensions, got {rank}")
    return (0, *range(2, rank), 1)


def in_order(type_: TensorType, order: tuple[int, ...]) -> bool:
    """Whether the elements lie row by row when the dimensions are taken in ``order``."""
    shape = tuple(type_.shape[d] for d in order)
    return tensor_type(type_.dtype, shape, tuple(type_.strides[d] for d in order)).contiguous


def _in_order(input: Tensor, order: tuple[int, ...]) -> Tensor:
    from flame.ops.shapes import inverse, permute

    return permute(copy(permute(input, order), contiguous=True), inverse(order))


def copy_(input: Tensor, src: Any, non_blocking: bool = False) -> Tensor:
    """Write ``src`` (a tensor or number, broadcast and converted) into ``input``, in place."""
    from flame.ops.shapes import expand

    if not is_tensor(src):
        from flame.ops.creation import full

        src = full((), src, dtype=input.dtype, device=input.device)
    if src.type.device != input.type.device:
        from flame.ops.transfer import move

        src = move(src, input.type.device)
    if src.shape != input.shape:
        src = expand(src, input.shape)
    if src.dtype is not input.dtype:
        src = convert(src, dtype=input.dtype)
    copy.into((input,), src)
    return input


def _to(dtype: DType) -> Callable[..., Tensor]:
    def method(self: Tensor, memory_format: Any = None) -> Tensor:
        return convert(self, dtype=dtype)

    method.__doc__ = f"This tensor as {dtype.name}; itself where it is that already."
    return method


OPERATORS: Final[dict[str, Callable[..., Any]]] = {
    "double": _to(dtypes.float64),
    "float": _to(dtypes.float32),
    "half": _to(dtypes.float16),
    "bfloat16": _to(dtypes.bfloat16),
    "long": _to(dtypes.int64),
    "int": _to(dtypes.int32),
    "short": _to(dtypes.int16),
    "char": _to(dtypes.int8),
    "byte": _to(dtypes.uint8),
    "bool": _to(dtypes.bool_),
    "type_as": lambda self, other: self.to(other),
}
