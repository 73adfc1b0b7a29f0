"""The kernel of a product with few rows or few columns: each sum is a dot product of two runs.

Both factors have their depth side by side in memory, so vectors run along it and nothing is copied.
A long depth of few sums is cut into parts of a fixed length, whose sums are added in order.
"""

from __future__ import annotations

from dataclasses import dataclass

from flame.core.dtypes import DType
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Ref
from flame.kernel.values import Register, Value, const, fma, read
from flame.ops.contraction.blocking import native_lanes
from flame.ops.contraction.factors import Factor, Reader, open_both
from flame.ops.contraction.fusion import Epilogue, PlainStore

BLOCK = 32  # runs of the longer side that one iteration takes
PART = 32768  # depth of one part
FEW_BLOCKS = 16  # so few iterations leave threads idle
LONG_RUNS = {1: 8, 2: 4, 3: 4, 4: 4}  # sums of a tile: runs of the short side -> of the longer one


@dataclass(frozen=True)
class Dots:
    """Sums over (batch, long, short): runs of ``long`` with each run of ``short``."""

    long: Factor
    short: Factor
    batch: Shape
    depth: int
    dtype: DType

    @property
    def parts(self) -> int:
        blocks = -(-self.long.width // BLOCK)
        for size in self.batch:
            blocks *= size
        return -(-self.depth // PART) if blocks < FEW_BLOCKS else 1


def dot_kernels(dots: Dots, epilogue: Epilogue) -> tuple[list[BoundKernel], list[int]]:
    """Kernels, and bytes of temporaries; the epilogue gets (batch..., long, short)."""
    if dots.parts == 1:
        return [_dot_kernel(dots, epilogue)], []
    shape = (dots.parts, *dots.batch, dots.long.width, dots.short.width)
    partial = tensor_type(dots.dtype, shape)
    kernels = [
        _dot_kernel(dots, PlainStore(partial, Ref("temporary", 0))),
        _add_parts(partial, epilogue),
    ]
    return kernels, [partial.span * dots.dtype.itemsize]


def _dot_kernel(dots: Dots, epilogue: Epilogue) -> BoundKernel:
    """One sum for each pair of runs, or one for each part of the depth."""
    k = KernelBuilder("dots")
    readers = open_both(k, dots.long, dots.short, dots.dtype)
    epilogue.declare(k)
    count, few = dots.long.width, dots.short.width
    together = min(4, few)
    tile = min(LONG_RUNS[together], count)
    groups = -(-few // together)
    sums = k.local(dots.dtype, (groups * together, BLOCK + LONG_RUNS[1]))
    extents = (dots.parts, *dots.batch, -(-count // BLOCK))
    depth = min(dots.depth, PART) if dots.parts > 1 else dots.depth
    work = BLOCK * few * depth // native_lanes(dots.dtype)
    with k.parallel(*extents, work=work) as (part, *index, block):
        begin, length = const(0), k.size(dots.depth)
        if dots.parts > 1:
            begin = part * PART
            length = values.binary("min", length - begin, const(PART))
        start = block * BLOCK
        size = values.binary("min", k.size(count) - start, const(BLOCK))
        steps = values.binary("udiv", size + (tile - 1), const(tile))
        with k.loop(steps) as step, k.loop(k.size(groups)) as group:
            runs = [
                _clamped(start + step * tile + i, k.size(count), tile, count) for i in range(tile)
            ]
            others = [
                _clamped(group * together + j, k.size(few), together, few) for j in range(together)
            ]
            totals = _products(k, readers, index, (runs, others), (begin, length), dots.depth)
            for i in range(tile):
                for j in range(together):
                    row = group * together + j
                    k.store(sums, (row, step * tile + i), read(totals[i][j]))
        outer = (part, *index) if dots.parts > 1 else tuple(index)
        with k.loop(k.size(few)) as other, k.vector(size, 1) as v:
            epilogue.store(k, (*outer, start + v, other), sums[other, v])
    return k.bind()


def _clamped(index: Value, size: Value, tile: int, extent: int) -> Value:
    """Runs beyond the last one are the last one again."""
    return index if extent % tile == 0 else values.binary("min", index, size - 1)


def _products(
    k: KernelBuilder, readers: tuple[Reader, Reader], batch: list[Value],
    runs: tuple[list[Value], list[Value]], depth: tuple[Value, Value], extent: int,
) -> list[list[Register]]:  # fmt: skip
    """The sums of a tile, as registers."""
    begin, length = depth
    dtype = readers[0].dtype
    lanes = native_lanes(dtype)
    totals = [[k.register(const(0, dtype)) for _ in runs[1]] for _ in runs[0]]
    whole = values.binary("udiv", length, const(lanes))

    def load(v: Value) -> tuple[list[Value], list[Value]]:
        left, right = (
            [reader.element(batch, begin + v, run) for run in side]
            for reader, side in zip(readers, runs, strict=True)
        )
        return left, right

    with k.vector(lanes) as v:
        sums = [[k.register(const(0, dtype)) for _ in runs[1]] for _ in runs[0]]
        with k.loop(whole) as step:
            left, right = load(step * lanes + v)
            for x, row in zip(left, sums, strict=True):
                for y, total in zip(right, row, strict=True):
                    k.assign(total, fma(x, y, read(total)))
        for row, into in zip(sums, totals, strict=True):
            for total, target in zip(row, into, strict=True):
                k.accumulate(target, "add", read(total))
    if extent % lanes:
        rest = length - whole * lanes
        with k.vector(rest) as v:
            left, right = load(whole * lanes + v)
            for x, into in zip(left, totals, strict=True):
                for y, target in zip(right, into, strict=True):
                    k.accumulate(target, "add", x * y)
    return totals


def _add_parts(partial: TensorType, epilogue: Epilogue) -> BoundKernel:
    """The sums of all parts, in order."""
    k = KernelBuilder("add_parts")
    source = k.tensor("temporary", 0, partial)
    epilogue.declare(k)
    parts, *outer, columns = partial.shape
    with (
        k.parallel(*outer, work=parts * columns) as index,
        k.vector(k.size(columns), 1) as v,
    ):
        at = source.at((const(0), *index, v))
        total = k.register(const(0, partial.dtype))
        with k.loop(k.size(parts)) as part:
            value = values.load(source.buffer, at + part * source.strides[0])
            k.assign(total, read(total) + value)
        epilogue.store(k, (*index, v), read(total))
    return k.bind()
