"""Convolutions whose kernel is 1 in each dimension, as matrix products.

With channels last, rows are positions: result (positions, O) = source (positions, C) @ weight^T, in
register tiles that read and write the tensors themselves. Positions that a stride picks are
gathered to rows in scratch memory, and for the input gradient put back between zeros. With channels
first, columns are positions, and products of whole images are the vendor's library's.

Invariant: what one iteration does depends on shapes alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flame.core import dtypes
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Operand, Role
from flame.kernel.program import Matrix
from flame.kernel.values import Value, const, fma, read
from flame.ops.convolution.blocking import Tile, tile_for
from flame.ops.convolution.geometry import Geometry, Phase
from flame.ops.convolution.packing import pack_weight, packed_weight_type
from flame.ops.convolution.winograd_stages import flat

BLOCK = 96  # positions of an iteration: whole register tiles of 6 and 8
LEAST = 256  # pairs of channels below which the weights are not worth packing
COLUMNS = 256  # positions of a library product, at least


@dataclass(frozen=True)
class Plan:
    """Layouts of a convolution of ``source`` (more positions) to ``result``; ``last``: channels
    last.
    """

    source: TensorType
    result: TensorType
    stride: Shape
    last: bool

    @property
    def strided(self) -> bool:
        return any(s != 1 for s in self.stride)

    @property
    def positions(self) -> int:
        """Of an image of the result."""
        return math.prod(self.result.shape[2:])

    @property
    def total(self) -> int:
        return self.result.shape[0] * self.positions


def plan_for(source: TensorType, result: TensorType, g: Geometry) -> Plan | None:
    """The plan where these kernels are the better ones; the types have three spatial dimensions."""
    if source.dtype not in (dtypes.float32, dtypes.float64) or g.groups != 1:
        return None
    if any(n != 1 for n in g.kernel) or any(g.padding) or not result.numel:
        return None
    if min(source.shape[1], result.shape[1]) < 8 or source.shape[1] * result.shape[1] < LEAST:
        return None
    wanted = tuple(-(-n // s) for n, s in zip(source.shape[2:], g.stride, strict=True))
    if wanted != result.shape[2:]:
        return None
    if dense_last(source) and dense_last(result):
        return Plan(source, result, g.stride, last=True)
    plan = Plan(source, result, g.stride, last=False)
    whole = source.contiguous and result.contiguous
    return plan if whole and not plan.strided and plan.positions >= COLUMNS else None


def dense_last(x: TensorType) -> bool:
    """Whether (N, C, D, H, W) lies in memory as (N, D, H, W, C)."""
    expected = 1
    for axis in (1, 4, 3, 2, 0):
        if x.shape[axis] != 1 and x.strides[axis] != expected:
            return False
        expected *= x.shape[axis]
    return True


def memory_of(k: KernelBuilder, role: Role, position: int, x: TensorType) -> Operand:
    """A dense operand addressed by one offset."""
    return k.tensor(role, position, tensor_type(x.dtype, (2,), (1,)))


class Picked:
    """The positions of the source that a stride picks, for positions of the result."""

    def __init__(self, k: KernelBuilder, plan: Plan) -> None:
        self.k, self.plan = k, plan
        self.sizes = [k.size(n) for n in plan.result.shape[2:]]
        self.source_sizes = [k.size(n) for n in plan.source.shape[2:]]
        self.steps = [k.size(s) for s in plan.stride]

    def place(self, position: Value) -> Value:
        """The number of the source's position."""
        rest = position
        index: list[Value] = []
        for size in reversed(self.sizes):
            index.insert(0, values.binary("urem", rest, size))
            rest = values.binary("udiv", rest, size)
        place = rest
        for size, i, step in zip(self.source_sizes, index, self.steps, strict=True):
            place = place * size + i * step
        return place

    def gather(
        self, source: Operand, rows: Operand, begin: Value, count: Value, channels: Value
    ) -> None:
        """rows[i] = the channels of the position ``begin`` + i of the result."""
        with self.k.loop(count) as i:
            start = self.place(begin + i) * channels
            with self.k.vector(channels, 4) as v:
                self.k.store(rows, (i, v), values.load(source.buffer, start + v))


# --- forward and input gradient -------------------------------------------------------------------


def lower(
    plan: Plan, weight: TensorType, bias: TensorType | None, phase: Phase, *, forward: bool
) -> Lowering:
    """The convolution, or its input gradient."""
    if not plan.last:
        return Lowering((_columns(plan, weight, bias, forward=forward),))
    x, out = (plan.source, plan.result) if forward else (plan.result, plan.source)
    tile = tile_for(x.dtype, out.shape[1])
    packed = packed_weight_type(x.dtype, 1, x.shape[1], out.shape[1], tile, (1, 1, 1))
    pack = pack_weight(
        weight, 1, packed, 0, phase, summed_axis=1 if forward else 0, lanes=out.shape[1]
    )
    rows = _Rows(plan, packed, bias, tile, forward=forward)
    return Lowering((pack, rows.kernel()), (packed.numel * packed.dtype.itemsize,))


class _Rows:
    """Positions as rows, ``BLOCK`` of them in an iteration."""

    def __init__(
        self, plan: Plan, packed: TensorType, bias: TensorType | None, tile: Tile, *, forward: bool
    ) -> None:
        x, out = (plan.source, plan.result) if forward else (plan.result, plan.source)
        self.plan, self.tile, self.forward = plan, tile, forward
        self.k = k = KernelBuilder("pointwise")
        self.source, self.out = memory_of(k, "input", 0, x), memory_of(k, "output", 0, out)
        self.weights = k.tensor("temporary", 0, packed)
        self.bias = None if bias is None else k.tensor("input", 2, bias)
        self.summed, self.channels, self.dtype = x.shape[1], out.shape[1], x.dtype
        self.picked = Picked(k, plan) if plan.strided else None
        if plan.strided and forward:
            self.rows = k.scratch(x.dtype, (BLOCK, self.summed))

    def kernel(self) -> BoundKernel:
        k, plan, tile = self.k, self.plan, self.tile
        total, inner = k.size(plan.total), k.size(self.summed)
        blocks = tile.blocks(self.channels)
        work = BLOCK * tile.vectors * blocks * self.summed
        with k.parallel(-(-plan.total // BLOCK), work=work) as (part,):
            begin = part * BLOCK
            count = values.binary("min", total - begin, const(BLOCK))
            left = self.source, begin * inner
            if self.picked is not None and self.forward:
                self.picked.gather(self.source, self.rows, begin, count, inner)
                left = self.rows, const(0)
            groups = values.binary("udiv", count + (tile.positions - 1), const(tile.positions))
            with k.loop(k.size(blocks)) as block, k.loop(groups) as group:
                self._tile(left, begin, group * tile.positions, count, block)
            if self.picked is not None and not self.forward:
                self._fill(begin, count)
        return k.bind()

    def _tile(
        self, left: tuple[Operand, Value], begin: Value, first: Value, count: Value, block: Value
    ) -> None:
        """A register tile: rows from ``first`` of the block that starts at ``begin``."""
        k, tile, lanes = self.k, self.tile, self.tile.lanes
        inner, own = k.size(self.summed), k.size(self.channels)
        zero = const(0)
        weights = self.weights.at((zero, block, zero, zero, zero))
        starts, places = [], []
        for i in range(tile.positions):
            # rows beyond the last one are computed as the last one, and not stored
            row = values.binary("min", first + i, count - 1)
            starts.append(k.register(left[1] + row * inner))
            place = begin + row
            if self.picked is not None and not self.forward:
                place = self.picked.place(place)
            places.append(k.register(place * own))
        with k.vector(lanes, tile.vectors) as v:
            sums = [k.register(const(0, self.dtype)) for _ in starts]
            with k.loop(inner) as c:
                vector = values.load(self.weights.buffer, weights + c * lanes + v)
                for total, start in zip(sums, starts, strict=True):
                    value = values.load(left[0].buffer, read(start) + c)
                    k.assign(total, fma(value, vector, read(total)))
            channel = block * lanes + v
            ragged = self.channels % lanes
            inside = channel < own if ragged else None
            for i, (total, at) in enumerate(zip(sums, places, strict=True)):
                here = first + i < count
                self._store(read(at), channel, read(total), here, inside)

    def _store(
        self, place: Value, channel: Value, value: Value, here: Value, inside: Value | None
    ) -> None:
        """Some channels of a position to their place: here, and only here, results leave the
        kernel.
        """
        if self.bias is not None:
            value = value + self.bias.load(channel, where=inside)
        where = here if inside is None else here & inside
        self.k.store(flat(self.out), (place + channel,), value, where)

    def _fill(self, begin: Value, count: Value) -> None:
        """Positions that the stride left out are the bias, or 0: those that follow each position
        of a block, up to the next one in each dimension.
        """
        k = self.k
        assert self.picked is not None
        own = k.size(self.channels)
        sizes, steps = self.picked.source_sizes, self.picked.steps
        with k.loop(count) as i:
            start = self.picked.place(begin + i)
            rest = start
            index: list[Value] = []
            for size in reversed(sizes):
                index.insert(0, values.binary("urem", rest, size))
                rest = values.binary("udiv", rest, size)
            extents = [
                values.binary("min", size - at, step)
                for size, at, step in zip(sizes, index, steps, strict=True)
            ]
            with k.nest(extents) as (d, h, w):
                place = start + (d * sizes[1] + h) * sizes[2] + w
                with k.when(d + h + w > 0), k.vector(own, 4) as v:
                    value = const(0, self.dtype) if self.bias is None else self.bias[v]
                    k.store(flat(self.out), (place * own + v,), value)


def _columns(
    plan: Plan, weight: TensorType, bias: TensorType | None, *, forward: bool
) -> BoundKernel:
    """Positions as columns: result (O, positions) = weight @ source (C, positions), each image."""
    x, out = (plan.source, plan.result) if forward else (plan.result, plan.source)
    k = KernelBuilder("pointwise_columns")
    source, target = memory_of(k, "input", 0, x), memory_of(k, "output", 0, out)
    weights = memory_of(k, "input", 1, weight)
    other = None if bias is None else k.tensor("input", 2, bias)
    summed, channels, positions = x.shape[1], out.shape[1], plan.positions
    own, inner, total = k.size(channels), k.size(summed), k.size(positions)
    parts = -(-positions // COLUMNS)
    work = COLUMNS * channels * summed // 16
    with k.parallel(x.shape[0], parts, work=work) as (image, part):
        begin = part * COLUMNS
        count = values.binary("min", total - begin, const(COLUMNS))
        place = image * (own * total) + begin
        k.gemm(
            own, count, inner,
            Matrix(weights.buffer, const(0), k.size(weight.shape[1]), transposed=not forward),
            Matrix(source.buffer, image * (inner * total) + begin, total),
            Matrix(target.buffer, place, total),
        )  # fmt: skip
        if other is not None:
            with k.loop(own) as c, k.vector(count, 4) as v:
                at = place + c * total + v
                k.store(flat(target), (at,), values.load(target.buffer, at) + other[c])
    return k.bind()
