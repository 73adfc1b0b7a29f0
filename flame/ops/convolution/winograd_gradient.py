"""Winograd kernels of the weight gradients of 3 x 3 convolutions with stride 1.

dw = G^T [sum over tiles of (A dy A^T) * (B^T x B)] G. An iteration takes a block of the weight
(some channels of the source, some of the result) and a fixed part of the tiles; it transforms a few
tiles of both at a time in scratch memory and adds one product for each point. Parts are added up in
order by a second kernel, so results do not depend on the number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flame.core import dtypes
from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Operand
from flame.kernel.program import Matrix
from flame.kernel.values import Value, const, read
from flame.ops.convolution.blocking import vector_bytes
from flame.ops.convolution.geometry import Geometry
from flame.ops.convolution.sharing import shared
from flame.ops.convolution.windows import (
    GAP,
    Strips,
    Window,
    extent_of,
    round_up,
    split_index,
)  # fmt: skip
from flame.ops.convolution.winograd import suits
from flame.ops.convolution.winograd_stages import (
    TAPS,
    add_outer_products,
    flat,
    load_points,
    transform_strip,
)  # fmt: skip
from flame.ops.convolution.winograd_transforms import (
    Transform,
    both_dimensions,
    strided,
    unstrided,
)  # fmt: skip

LEAST_ITEMS = 16
TOGETHER = 32  # tiles, at most, that are transformed at a time
BLOCK = 64  # channels of a block, at most, on either side
MANY_POINTS = 64  # from which fewer tiles are taken, so that all stays in the cache


@dataclass(frozen=True)
class Plan:
    """Sizes of a weight gradient: blocks of channels of source and result, parts of the tiles."""

    transform: Transform
    images: int
    size: tuple[int, int]
    before: tuple[int, int]
    summed: int
    channels: int

    @property
    def grid(self) -> tuple[int, int]:
        m = self.transform.results
        return -(-self.size[0] // m), -(-self.size[1] // m)

    @property
    def rows(self) -> int:
        """Channels of the source in a block."""
        return _block(self.summed)

    @property
    def lanes(self) -> int:
        """Channels of the result in a block."""
        return _block(self.channels)

    @property
    def blocks(self) -> tuple[int, int]:
        return -(-self.summed // self.rows), -(-self.channels // self.lanes)

    @property
    def tiles(self) -> int:
        return self.images * self.grid[0] * self.grid[1]

    @property
    def span(self) -> int:
        """Tiles of a part."""
        wanted = -(-LEAST_ITEMS // (self.blocks[0] * self.blocks[1]))
        return max(min(self.tiles, self.most), -(-self.tiles // wanted))

    @property
    def parts(self) -> int:
        return -(-self.tiles // self.span)

    @property
    def together(self) -> int:
        return -(-self.span // -(-self.span // self.most))

    @property
    def most(self) -> int:
        """Tiles, at most, that are transformed at a time."""
        return TOGETHER if self.transform.points < MANY_POINTS else TOGETHER // 2

    @property
    def partial(self) -> TensorType:
        shape = (self.parts, *self.blocks, self.rows * TAPS, self.lanes)
        return tensor_type(dtypes.float32, shape)


def _block(channels: int) -> int:
    return min(BLOCK, round_up(channels, vector_bytes() // 4))


def plan_for(g: TensorType, x: TensorType, geometry: Geometry) -> Plan | None:
    """The plan where these kernels are the better ones; the types have three spatial dimensions."""
    if x.dtype is not dtypes.float32 or not suits(geometry, x, g):
        return None
    t = unstrided() if geometry.stride[2] == 1 else strided()
    size = g.shape[3], g.shape[4]
    before = geometry.padding[1], geometry.padding[2]
    return Plan(t, x.shape[0], size, before, x.shape[1], g.shape[1])


def lower(plan: Plan, g: TensorType, x: TensorType, out: TensorType) -> Lowering:
    """The kernels: operands 0 and 1 are the result's gradient and the source."""
    main = shared(_Gradient(plan, g, x, out).kernel())
    if plan.parts == 1:
        return Lowering((main,))
    return Lowering((main, shared(_add_parts(plan, out))), (plan.partial.numel * 4,))


class _Gradient:
    def __init__(self, plan: Plan, g: TensorType, x: TensorType, out: TensorType) -> None:
        self.plan, self.t = plan, plan.transform
        self.k = k = KernelBuilder("winograd_gradient")
        gradient, source = k.tensor("input", 0, g), k.tensor("input", 1, x)
        if plan.parts == 1:
            self.target, self.out = None, k.tensor("output", 0, out)
        else:
            self.target = _flat_partial(k)
        t, m, part, points = self.t, self.t.results, plan.most, self.t.points
        self.strips = Strips(k, plan.grid, plan.together)
        columns = self.strips.most
        self.source = Window(
            k, source, x, rows=t.reach, columns=(columns - 1) * t.step + t.reach, depth=plan.rows
        )  # fmt: skip
        self.gradient = Window(k, gradient, g, rows=m, columns=columns * m, depth=plan.lanes)
        f32 = dtypes.float32
        self.left = k.scratch(f32, (points, part * plan.rows + GAP))
        self.right = k.scratch(f32, (points, part * plan.lanes + GAP))
        self.sums = k.scratch(f32, (t.weights**2, plan.rows * plan.lanes + GAP))
        if self.target is None:
            self.result = k.scratch(f32, (plan.rows * TAPS, plan.lanes))

    def kernel(self) -> BoundKernel:
        k, plan = self.k, self.plan
        work = plan.span * plan.rows * plan.lanes
        extents = plan.parts, *plan.blocks
        with k.parallel(math.prod(extents), work=work) as (p,):
            part, row, lane = split_index(k, p, extents)
            begin = part * k.size(plan.span)
            end = values.binary("min", k.size(plan.tiles), begin + k.size(plan.span))
            step = extent_of(k, plan.together)
            count = values.binary("udiv", end - begin + (step - 1), step)
            with k.loop(count) as i:
                low = begin + i * step
                high = values.binary("min", low + step, end)
                self._transform(low, high, row * plan.rows, lane * plan.lanes)
                self._multiply(high - low, i < 1)
            self._finish(part, row, lane)
        return k.bind()

    def _transform(self, begin: Value, end: Value, row: Value, lane: Value) -> None:
        k, t, before = self.k, self.t, self.plan.before
        with self.strips.over(begin, end) as (image, line, column, count, first):
            self.source.fill(
                image, line * t.step - k.size(before[0]), column * t.step - k.size(before[1]),
                (count - 1) * t.step + t.reach, row,
            )  # fmt: skip
            self.gradient.fill(image, line * t.results, column * t.results, count * t.results, lane)
            transform_strip(
                k, t.source, self.source, t.reach, t.step, count, self.left,
                first * self.source.depth,
            )  # fmt: skip
            transform_strip(
                k, t.gradient, self.gradient, t.results, t.results, count, self.right,
                first * self.gradient.depth,
            )  # fmt: skip

    def _multiply(self, tiles: Value, first: Value) -> None:
        """sums[weight of point] (+)= left[point]^T @ right[point]; ``first``: sums are new."""
        k, zero, shape = self.k, const(0), (self.plan.rows, self.plan.lanes)
        with k.loop(self.t.points) as point:
            left = self.left, self.left.at((point, zero))
            right = self.right, self.right.at((point, zero))
            number, alone = self.t.weight_of(point)
            target = self.sums.at((number, zero))
            fresh = first & alone
            with k.when(fresh):
                add_outer_products(k, self.sums, target, left, right, shape, tiles, fresh=True)
            with k.when(~fresh):
                add_outer_products(k, self.sums, target, left, right, shape, tiles, fresh=False)

    def _finish(self, part: Value, row: Value, lane: Value) -> None:
        k, rows, lanes = self.k, self.plan.rows, self.plan.lanes
        zero = const(0)
        target = self.result if self.target is None else self.target
        place = zero
        if self.target is not None:
            blocks = [extent_of(k, n) for n in self.plan.blocks]
            place = ((part * blocks[0] + row) * blocks[1] + lane) * (rows * TAPS * lanes)
        with k.loop(rows) as c, k.vector(lanes, 1) as v:
            grid = load_points(self.sums, c * lanes + v, self.t.weights)
            for i, line in enumerate(both_dimensions(k, self.t.weight_result, grid)):
                for j, value in enumerate(line):
                    at = place + c * (TAPS * lanes) + (i * 3 + j) * lanes
                    k.store(flat(target), (at + v,), value)
        if self.target is None:
            store_weights(
                k, self.plan, self.result, self.out, row * rows, lane * lanes, const(rows)
            )


def store_weights(
    k: KernelBuilder, plan: Plan, rows: Operand, out: Operand, first: Value, lane: Value,
    most: Value,
) -> None:  # fmt: skip
    """Turn rows (channels of the source from ``first``, taps; channels of the result from ``lane``)
    into their places of the weight.
    """
    count = values.binary("min", k.size(plan.summed) - first, most)
    width = values.binary("min", k.size(plan.channels) - lane, const(plan.lanes))
    place = out.at((lane, first, const(0), const(0), const(0)))
    k.transpose(
        count * TAPS, width, Matrix(rows.buffer, const(0), const(plan.lanes)),
        Matrix(out.buffer, place, k.size(plan.summed * TAPS)),
    )  # fmt: skip


def _flat_partial(k: KernelBuilder) -> Operand:
    """`Plan.partial` addressed by one offset."""
    return k.tensor("temporary", 0, tensor_type(dtypes.float32, (2,), (1,)))


def _add_parts(plan: Plan, out: TensorType) -> BoundKernel:
    """The sum of all parts, in order, in the weight's layout."""
    k = KernelBuilder("winograd_gradient_sum")
    source, target = _flat_partial(k), k.tensor("output", 0, out)
    lanes, together = plan.lanes, 16
    rows = k.scratch(dtypes.float32, (together * TAPS, lanes))
    per_block = plan.rows // together
    work = plan.parts * together * TAPS * lanes // 8
    extents = *plan.blocks, per_block
    with k.parallel(math.prod(extents), work=work) as (p,):
        row, lane, part = split_index(k, p, extents)
        rows_before = (row * extent_of(k, plan.blocks[1]) + lane) * plan.rows + part * together
        base = rows_before * (TAPS * lanes)
        step = k.size(plan.blocks[0] * plan.blocks[1] * plan.rows * TAPS * lanes)
        with k.loop(together * TAPS) as i, k.vector(lanes, lanes * 4 // vector_bytes()) as v:
            at = base + i * lanes + v
            total = k.register(values.load(source.buffer, at))
            with k.loop(extent_of(k, plan.parts) - 1) as s:
                value = values.load(source.buffer, at + (s + 1) * step)
                k.assign(total, read(total) + value)
            k.store(rows, (i, v), read(total))
        first = row * plan.rows + part * together
        with k.when(first < k.size(plan.summed)):
            store_weights(k, plan, rows, target, first, lane * lanes, const(together))
    return k.bind()
