"""Winograd kernels of the weight gradients of 3 x 3 convolutions with stride 1.

dw = G^T [sum over tiles of (A dy A^T) * (B^T x B)] G. An iteration takes a block of the weight
(some channels of the source, some of the result) and a fixed part of the tiles; it transforms a few
tiles of both at a time in scratch memory and adds one product for each point. Parts are added up in
order by a second kernel, so results do not depend on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

from flame.core import dtypes
from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Operand
from flame.kernel.program import Matrix
from flame.kernel.values import Value, const, read
from flame.ops.convolution.blocking import vector_bytes
from flame.ops.convolution.geometry import Geometry
from flame.ops.convolution.windows import GAP, Strips, Window, round_up
from flame.ops.convolution.winograd import LEAST_CHANNELS, LEAST_SIZE
from flame.ops.convolution.winograd_stages import (
    TAPS,
    add_outer_products,
    flat,
    load_points,
    transform_strip,
)  # fmt: skip
from flame.ops.convolution.winograd_transforms import Transform, both_dimensions, transform

LEAST_ITEMS = 16
TOGETHER = 32  # tiles, at most, that are transformed at a time
BLOCK = 64  # channels of a block, at most, on either side


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
        return max(min(self.tiles, TOGETHER), -(-self.tiles // wanted))

    @property
    def parts(self) -> int:
        return -(-self.tiles // self.span)

    @property
    def together(self) -> int:
        return -(-self.span // -(-self.span // TOGETHER))

    @property
    def partial(self) -> TensorType:
        shape = (self.parts, *self.blocks, self.rows * TAPS, self.lanes)
        return tensor_type(dtypes.float32, shape)


def _block(channels: int) -> int:
    return min(BLOCK, round_up(channels, vector_bytes() // 4))


def plan_for(g: TensorType, x: TensorType, geometry: Geometry) -> Plan | None:
    """The plan where these kernels are the better ones; the types have three spatial dimensions."""
    if x.dtype is not dtypes.float32 or geometry.groups != 1 or geometry.kernel != (1, 3, 3):
        return None
    if geometry.stride != (1, 1, 1) or geometry.dilation != (1, 1, 1):
        return None
    if geometry.padding[0] or x.shape[2] != 1 or g.shape[2] != 1:
        return None
    few = min(x.shape[1], g.shape[1]) < LEAST_CHANNELS
    if few or min(g.shape[3:]) < LEAST_SIZE or not g.numel:
        return None
    size = g.shape[3], g.shape[4]
    before = geometry.padding[1], geometry.padding[2]
    return Plan(transform(4), x.shape[0], size, before, x.shape[1], g.shape[1])


def lower(plan: Plan, g: TensorType, x: TensorType, out: TensorType) -> Lowering:
    """The kernels: operands 0 and 1 are the result's gradient and the source."""
    main = _Gradient(plan, g, x, out).kernel()
    if plan.parts == 1:
        return Lowering((main,))
    return Lowering((main, _add_parts(plan, out)), (plan.partial.numel * 4,))


class _Gradient:
    def __init__(self, plan: Plan, g: TensorType, x: TensorType, out: TensorType) -> None:
        self.plan, self.t = plan, plan.transform
        self.k = k = KernelBuilder("winograd_gradient")
        gradient, source = k.tensor("input", 0, g), k.tensor("input", 1, x)
        if plan.parts == 1:
            self.target, self.out = None, k.tensor("output", 0, out)
        else:
            self.target = k.tensor("temporary", 0, plan.partial)
        n, m, part, points = self.t.size, self.t.results, plan.together, self.t.points
        self.strips = Strips(k, plan.grid, part)
        columns = self.strips.most
        self.source = Window(
            k, source, x, rows=n, columns=(columns - 1) * m + n, depth=plan.rows
        )  # fmt: skip
        self.gradient = Window(k, gradient, g, rows=m, columns=columns * m, depth=plan.lanes)
        f32 = dtypes.float32
        self.left = k.scratch(f32, (points, part * plan.rows + GAP))
        self.right = k.scratch(f32, (points, part * plan.lanes + GAP))
        self.sums = k.scratch(f32, (points, plan.rows * plan.lanes + GAP))
        if self.target is None:
            self.result = k.scratch(f32, (plan.rows * TAPS, plan.lanes))

    def kernel(self) -> BoundKernel:
        k, plan = self.k, self.plan
        work = plan.span * plan.rows * plan.lanes
        with k.parallel(plan.parts, *plan.blocks, work=work) as (part, row, lane):
            begin = part * k.size(plan.span)
            end = values.binary("min", k.size(plan.tiles), begin + k.size(plan.span))
            step = k.size(plan.together)
            count = values.binary("udiv", end - begin + (step - 1), step)
            with k.loop(count) as i:
                low = begin + i * step
                high = values.binary("min", low + step, end)
                self._transform(low, high, row * plan.rows, lane * plan.lanes)
                with k.when(i < 1):
                    self._multiply(high - low, fresh=True)
                with k.when(i > 0):
                    self._multiply(high - low, fresh=False)
            self._finish(part, row, lane)
        return k.bind()

    def _transform(self, begin: Value, end: Value, row: Value, lane: Value) -> None:
        k, m, before = self.k, self.t.results, self.plan.before
        with self.strips.over(begin, end) as (image, line, column, count, first):
            top, left = line * m, column * m
            self.source.fill(
                image, top - k.size(before[0]), left - k.size(before[1]),
                (count - 1) * m + self.t.size, row,
            )  # fmt: skip
            self.gradient.fill(image, top, left, count * m, lane)
            for window, target, one, columns in (
                (self.source, self.left, self.t.source, self.t.size),
                (self.gradient, self.right, self.t.gradient, m),
            ):
                offset = first * window.depth
                transform_strip(k, one, window, columns, m, count, target, offset)

    def _multiply(self, tiles: Value, *, fresh: bool) -> None:
        """sums[point] (+)= left[point]^T @ right[point]."""
        rows, lanes, zero = self.plan.rows, self.plan.lanes, const(0)
        with self.k.loop(self.t.points) as point:
            left = self.left, self.left.at((point, zero))
            right = self.right, self.right.at((point, zero))
            target = self.sums.at((point, zero))
            add_outer_products(
                self.k, self.sums, target, left, right, (rows, lanes), tiles, fresh=fresh
            )

    def _finish(self, part: Value, row: Value, lane: Value) -> None:
        k, rows, lanes = self.k, self.plan.rows, self.plan.lanes
        zero = const(0)
        target = self.result if self.target is None else self.target
        place = zero if self.target is None else target.at((part, row, lane, zero, zero))
        with k.loop(rows) as c, k.vector(lanes, 1) as v:
            grid = load_points(self.sums, c * lanes + v, self.t.size)
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


def _add_parts(plan: Plan, out: TensorType) -> BoundKernel:
    """The sum of all parts, in order, in the weight's layout."""
    k = KernelBuilder("winograd_gradient_sum")
    source = k.tensor("temporary", 0, plan.partial)
    target = k.tensor("output", 0, out)
    lanes, together = plan.lanes, 16
    rows = k.scratch(dtypes.float32, (together * TAPS, lanes))
    per_block = plan.rows // together
    work = plan.parts * together * TAPS * lanes // 8
    with k.parallel(*plan.blocks, per_block, work=work) as (row, lane, part):
        base = source.at((const(0), row, lane, part * (together * TAPS), const(0)))
        with k.loop(together * TAPS) as i, k.vector(lanes, lanes * 4 // vector_bytes()) as v:
            at = base + i * lanes + v
            total = k.register(values.load(source.buffer, at))
            with k.loop(k.size(plan.parts - 1)) as s:
                value = values.load(source.buffer, at + (s + 1) * source.strides[0])
                k.assign(total, read(total) + value)
            k.store(rows, (i, v), read(total))
        first = row * plan.rows + part * together
        with k.when(first < k.size(plan.summed)):
            store_weights(k, plan, rows, target, first, lane * lanes, const(together))
    return k.bind()
