"""The two ops behind all indexing by tensors: take_at reads, put_at writes.

An element's address in ``x`` is the sum over x's dimensions of a coordinate times a stride.
``axes`` says where each coordinate comes from: a number d >= 0 is the loop over output dimension
d, and -1 - n is the element of index tensor n at the same place. So gather, index_select,
embedding, advanced indexing and their gradients are all calls of these two.

Invariants: no index is used before it was checked; writes that can collide run one after the other
in row-major order of the indices, so the result is the same on every run and with any number of
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flame.core import dtypes
from flame.core.errors import DTypeError, IndexRangeError, ShapeError
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const
from flame.ops.elementwise import compute_dtype
from flame.ops.loops import by_stride, coalesce
from flame.ops.op import Arg, Joint, Op, Sample, Types
from flame.ops.schedules import block_of

REPORTED = 1 << 58  # indices beyond are reported as this


class OutOfRange(IndexRangeError):
    """A bad index, before the caller's names for the op and the dimension are known."""

    def __init__(self, operand: int, index: int) -> None:
        super().__init__(f"index {index} of index tensor {operand} is out of range")
        self.operand, self.index = operand, index


def failure(code: int, types: Types) -> OutOfRange:
    """The error for what `Check.report` stored."""
    return OutOfRange(code % 8, code // 8)


def check_types(name: str, x_shape: Shape, indices: Sequence[Any], axes: tuple[int, ...]) -> Shape:
    """The shape of the index tensors, which is that of the elements addressed."""
    shape: Shape = tuple(indices[0].shape)
    for i in indices:
        if not isinstance(i, TensorType) or i.dtype not in (dtypes.int64, dtypes.int32):
            found = i.dtype.name if isinstance(i, TensorType) else i
            raise DTypeError(f"{name}: indices must be int64 or int32 tensors, got {found}")
        if i.shape != shape:
            raise ShapeError(f"{name}: index shapes {i.shape} and {shape} differ")
    if len(axes) != len(x_shape):
        raise ShapeError(f"{name}: {len(axes)} coordinates for a tensor of shape {x_shape}")
    for axis, source in enumerate(axes):
        if source < 0 and x_shape[axis] == 0 and 0 not in shape:
            raise OutOfRange(-1 - source, 0)
        if source >= 0 and shape[source] > x_shape[axis]:
            raise ShapeError(
                f"{name}: an index of shape {shape} reaches beyond dimension {axis} of {x_shape}"
            )
    return shape


def direct_steps(x: TensorType, rank: int, axes: tuple[int, ...]) -> Shape:
    """Elements of x from one output index to the next, by the coordinates that follow it."""
    steps = [0] * rank
    for axis, source in enumerate(axes):
        if source >= 0:
            steps[source] += x.strides[axis]
    return tuple(steps)


class Check:
    """Bounds checks: the smallest and largest index seen by an iteration, reported at its end."""

    def __init__(
        self, k: KernelBuilder, error: Operand, sizes: Sequence[Value], wrap: bool
    ) -> None:
        self.k, self.error, self.sizes, self.wrap = k, error, sizes, wrap
        zero = const(0)
        self.low = [k.register(zero) for _ in sizes]
        self.high = [k.register(zero) for _ in sizes]

    def offset(self, found: Sequence[Value], jumps: Sequence[Value]) -> tuple[Value, Value]:
        """(offset in x, whether all indices are good); notes the indices."""
        total, good = const(0), const(True, dtypes.bool_)
        for n, (raw, size, jump) in enumerate(zip(found, self.sizes, jumps, strict=True)):
            self.k.accumulate(self.low[n], "min", raw)
            self.k.accumulate(self.high[n], "max", raw)
            good = values.binary("and", good, self._fits(raw, size))
            place = values.select(raw < 0, raw + size, raw) if self.wrap else raw
            total = total + place * jump
        return total, good

    def _fits(self, raw: Value, size: Value) -> Value:
        lowest = -size if self.wrap else const(0)
        return values.binary("and", raw >= lowest, raw < size)

    def report(self) -> None:
        for n, size in enumerate(self.sizes):
            low, high = values.read(self.low[n]), values.read(self.high[n])
            bad = values.select(self._fits(low, size), high, low)
            bounded = values.binary(
                "min", values.binary("max", bad, const(-REPORTED)), const(REPORTED)
            )
            code = bounded * 8 + n
            fits = values.binary("and", self._fits(low, size), self._fits(high, size))
            self.k.store_all(
                [(self.error, (const(0),), const(1)), (self.error, (const(1),), code)],
                where=~fits,
            )


def error_slot(k: KernelBuilder) -> Operand:
    return k.tensor("error", 0, tensor_type(dtypes.int64, (2,)))


def indexed_dims(axes: tuple[int, ...], count: int) -> list[int]:
    """The dimension of x that each index tensor addresses."""
    return [axes.index(-1 - n) for n in range(count)]


# --- reading --------------------------------------------------------------------------------------


def infer_take(types: Types, *, axes: tuple[int, ...], wrap: bool) -> TensorType:
    """The elements addressed, in fresh memory."""
    x, *indices = types
    assert isinstance(x, TensorType)
    return tensor_type(x.dtype, check_types("take_at", x.shape, indices, axes), None, x.device)


def lower_take(
    types: Types, outputs: tuple[TensorType, ...], *, axes: tuple[int, ...], wrap: bool
) -> Lowering:
    """One kernel: the index tensors are read, checked, and turned into offsets."""
    x, (out,) = types[0], outputs
    assert isinstance(x, TensorType)
    indices = [t for t in types[1:] if isinstance(t, TensorType)]
    steps = [out.strides, direct_steps(x, out.ndim, axes), *(i.strides for i in indices)]
    nest = coalesce(out.shape, steps, by_stride(out.strides, out.shape))
    k = KernelBuilder("take_at")
    source = k.tensor("input", 0, tensor_type(x.dtype, nest.sizes, nest.strides[1]))
    found = [
        k.tensor("input", n + 1, tensor_type(i.dtype, nest.sizes, nest.strides[n + 2]))
        for n, i in enumerate(indices)
    ]
    target = k.tensor("output", 0, tensor_type(out.dtype, nest.sizes, nest.strides[0]))
    error = error_slot(k)
    addressed = indexed_dims(axes, len(indices))
    sizes = [k.size(x.shape[a]) for a in addressed]
    jumps = [k.stride(x.strides[a]) for a in addressed]
    varying = bool(nest.sizes) and any(s[-1] for s in nest.strides[2:])

    def run(outer: tuple[Value, ...], extent: Value, start: Value | None) -> None:
        check = Check(k, error, sizes, wrap)

        def offset_at(index: tuple[Value, ...]) -> tuple[Value, Value]:
            return check.offset([cast(f[index], dtypes.int64) for f in found], jumps)

        def copy(index: tuple[Value, ...], known: tuple[Value, Value]) -> None:
            at, good = known
            value = values.load(source.buffer, source.at(index) + at, good if varying else None)
            k.store(target, index, value)

        if not nest.sizes:
            at, good = offset_at(())
            k.store(target, (), values.load(source.buffer, at, good))
        elif varying:
            with k.vector(extent, 2) as v:
                index = (*outer, v if start is None else start + v)
                copy(index, offset_at(index))
        else:
            known = offset_at((*outer, const(0)))
            with k.when(known[1]), k.vector(extent, 4) as v:
                copy((*outer, v if start is None else start + v), known)
        check.report()

    _rows(k, nest.sizes, run, out.device)
    return k.finish()


def _rows(
    k: KernelBuilder,
    sizes: Shape,
    run: Callable[[tuple[Value, ...], Value, Value | None], None],
    device: str,
) -> None:
    """``run(outer counters, extent, start)`` for pieces of the innermost dimension."""
    if len(sizes) <= 1:
        count = sizes[0] if sizes else 1
        size = block_of(count, device)
        with k.parallel(-(-count // size), work=size) as (block,):
            start = block * size
            run((), values.binary("min", k.size(count) - start, const(size)), start)
        return
    with k.parallel(*sizes[:-1], work=sizes[-1]) as outer:
        run(outer, k.size(sizes[-1]), None)


def _take_reference(x: Any, *indices: Any, axes: tuple[int, ...], wrap: bool) -> Any:
    return x[at_coordinates(indices, axes)]


def at_coordinates(indices: Sequence[Any], axes: tuple[int, ...]) -> Any:
    grid = np.indices(np.shape(indices[0]))
    return tuple(grid[a] if a >= 0 else indices[-1 - a] for a in axes)


def _take_vjp(
    g: Any, x_type: TensorType, indices: Any, axes: tuple[int, ...], wrap: bool, needs: Any
) -> Any:
    from flame.ops.conversion import convert
    from flame.ops.indexed_writes import put_at

    wide = convert(g, dtype=compute_dtype(g.dtype))  # sums of half-width floats want more bits
    spread = put_at(None, wide, *indices, axes=axes, shape=x_type.shape, combine="add", wrap=wrap)
    return (spread, *(None for _ in indices))


def index_arg(*shape: int, low: int = 0, high: int = 4) -> Arg:
    return Arg(shape, low, high, kind="index")


_READS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((Arg((4, 3)), index_arg(5, 3)), {"axes": (-1, 1)}),
    ((Arg((3, 4)), index_arg(2, 6)), {"axes": (0, -1)}),
    ((Arg((3, 4)), index_arg(5, 3)), {"axes": (1, -1)}),
    ((Arg((9,)), index_arg(2, 3, low=-9, high=9)), {"axes": (-1,), "wrap": True}),
    ((Arg((4, 3, 2)), index_arg(2, 2), index_arg(2, 2, high=2)), {"axes": (-1, 1, -2)}),
    ((Arg((4, 70)), index_arg(3, 70)), {"axes": (-1, 1)}),
    ((Arg((4, 3)), index_arg(0, 3)), {"axes": (-1, 1)}),
    ((Arg((1,)), index_arg(high=1)), {"axes": (-1,)}),
]  # fmt: skip

take_at = Op(
    "take_at",
    inputs=("x", "*indices"),
    infer=infer_take,
    lower=lower_take,
    vjp=Joint(_take_vjp),
    reference=_take_reference,
    samples=[Sample(inputs, {"wrap": False, **attributes}) for inputs, attributes in _READS],
    failure=failure,
)
