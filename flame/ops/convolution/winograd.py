"""Winograd kernels of 3 x 3 convolutions with stride 1, and of their input gradients.

One kernel transforms the weights; one does the rest. Its iteration is a block of tiles: windows of
the source, padded with zeros, are copied to scratch memory (`windows`), transformed there into one
matrix (tiles, channels) for each point, multiplied with the matrix of weights of that point, and
transformed back. All of it stays in the second-level cache.

Layouts: transformed source (points, tiles, channels), transformed weights (blocks of results'
channels, points, channels, lanes), products (points, tiles, lanes), each with a gap between points,
as distances that are powers of two would fall into the same places of a cache.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from flame.core import dtypes
from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Operand
from flame.kernel.program import Matrix
from flame.kernel.values import Value, const, fma, read
from flame.ops.convolution.blocking import Tile, tile_for, vector_bytes
from flame.ops.convolution.geometry import Contraction
from flame.ops.convolution.packing import COLUMNS
from flame.ops.convolution.windows import GAP, Strips, Window, round_up
from flame.ops.convolution.winograd_transforms import Transform, both_dimensions, transform

TAPS = 9
LEAST_CHANNELS = 16
LEAST_SIZE = 3  # of results: below, tiles are mostly empty
CHUNK = 128  # channels summed in one go: their weights stay in the first-level cache, errors small
SCRATCH_BYTES = 1 << 20  # of transformed source


@dataclass(frozen=True)
class Plan:
    """Sizes of one convolution. ``before``: zeros in front of the source's height and width."""

    transform: Transform
    tile: Tile
    images: int
    size: tuple[int, int]
    before: tuple[int, int]
    flipped: bool
    summed: int
    channels: int

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles along height and width."""
        m = self.transform.results
        return -(-self.size[0] // m), -(-self.size[1] // m)

    @property
    def tiles(self) -> int:
        return self.images * self.grid[0] * self.grid[1]

    @property
    def depth(self) -> int:
        """Channels summed over, with zeros up to whole vectors."""
        return round_up(self.summed, vector_bytes() // 4)

    @property
    def blocks(self) -> int:
        return self.tile.blocks(self.channels)

    @property
    def part(self) -> int:
        """Tiles of a block, whole register tiles."""
        rows = self.tile.positions
        most = SCRATCH_BYTES // (self.transform.points * self.depth * 4)
        most = max(rows, min(most, 36) // rows * rows)
        parts = -(-self.tiles // most)
        return round_up(-(-self.tiles // parts), rows)

    @property
    def weights(self) -> TensorType:
        plane = self.depth * self.tile.lanes + GAP
        return tensor_type(dtypes.float32, (self.blocks, self.transform.points, plane))


def plan_for(x: TensorType, out: TensorType, c: Contraction, groups: int) -> Plan | None:
    """The plan where these kernels are the better ones; the types have three spatial dimensions."""
    if x.dtype is not dtypes.float32 or groups != 1 or len(c.phases) != 1:
        return None
    axes = c.phases[0].axes
    if any(abs(a.stride) != 1 or a.spread != 1 or a.step != 1 or a.dilation != 1 for a in axes):
        return None
    outer = axes[0]
    if (outer.taps, outer.extent, outer.start, c.low[0], x.shape[2]) != (1, 1, 0, 0, 1):
        return None
    if axes[1].taps != 3 or axes[2].taps != 3:
        return None
    size = axes[1].extent, axes[2].extent
    few = min(x.shape[1], out.shape[1]) < LEAST_CHANNELS
    if few or min(size) < LEAST_SIZE:
        return None
    before = c.low[1] - axes[1].start, c.low[2] - axes[2].start
    return Plan(
        transform(4), tile_for(x.dtype, out.shape[1]), x.shape[0], size, before,
        axes[1].stride < 0, x.shape[1], out.shape[1],
    )  # fmt: skip


def lower(
    plan: Plan, x: TensorType, weight: TensorType, bias: TensorType | None, out: TensorType,
    *, summed_axis: int,
) -> Lowering:  # fmt: skip
    """The kernels; ``summed_axis`` of the weight is 1 for forward, 0 for the gradient."""
    weights = transform_weights(plan, weight, summed_axis=summed_axis)
    main = _Products(plan, x, bias, out).kernel()
    return Lowering((weights, main), (plan.weights.numel * 4,))


# --- weights --------------------------------------------------------------------------------------


def load_weights(
    k: KernelBuilder, source: Operand, weight: TensorType, rows: Operand, *, summed_axis: int,
    first: Value, begin: Value, length: Value, lanes: int, together: int,
) -> None:  # fmt: skip
    """rows[channel summed over * 9 + tap, lane]: channels ``first``... side by side in lanes, zeros
    beyond the last one; ``together``, at most, channels summed over from ``begin``.
    """
    lane_axis = 1 - summed_axis
    height = values.binary("min", k.size(weight.shape[lane_axis]) - first, const(lanes))
    if weight.shape[lane_axis] % lanes or weight.shape[summed_axis] % together:
        with k.vector(together * TAPS * lanes, 1) as v:
            k.store(Operand(rows.buffer, (1,), (const(1),)), (v,), const(0, dtypes.float32))
    if not weight.contiguous:
        with k.loop(length) as s, k.nest((3, 3)) as (i, j), k.vector(height, 1) as v:
            index = (first + v, begin + s) if summed_axis == 1 else (begin + s, first + v)
            value = source.load(*index, const(0), i, j)
            k.store(rows, (s * TAPS + i * 3 + j, v), value)
        return
    if summed_axis == 1:
        place = source.at((first, begin, *_ORIGIN))
        k.transpose(
            height, length * TAPS, Matrix(source.buffer, place, source.strides[0]),
            Matrix(rows.buffer, const(0), const(lanes)),
        )  # fmt: skip
        return
    with k.loop(length) as s:
        place = source.at((begin + s, first, *_ORIGIN))
        k.transpose(
            height, const(TAPS), Matrix(source.buffer, place, const(TAPS)),
            Matrix(rows.buffer, s * (TAPS * lanes), const(lanes)),
        )  # fmt: skip


_ORIGIN = (const(0), const(0), const(0))


def transform_weights(plan: Plan, weight: TensorType, *, summed_axis: int) -> BoundKernel:
    """G w G^T of all pairs of channels into temporary 0."""
    k = KernelBuilder("winograd_weights")
    t, lanes = plan.transform, plan.tile.lanes
    source = k.tensor("input", 1, weight)
    target = k.tensor("temporary", 0, plan.weights)
    together = min(plan.depth, COLUMNS // TAPS)
    rows = k.scratch(dtypes.float32, (together * TAPS, lanes))
    parts = -(-plan.depth // together)
    with k.parallel(plan.blocks, parts, work=together * lanes * 8) as (block, part):
        begin = part * together
        load_weights(
            k, source, weight, rows, summed_axis=summed_axis, first=block * lanes, begin=begin,
            length=values.binary("min", k.size(plan.summed) - begin, const(together)),
            lanes=lanes, together=together,
        )  # fmt: skip
        base = target.at((block, const(0), const(0)))
        count = values.binary("min", k.size(plan.depth) - begin, const(together))
        with k.loop(count) as s, k.vector(lanes, 1) as v:
            taps = [[rows[s * TAPS + _tap(i, j, plan), v] for j in range(3)] for i in range(3)]
            results = both_dimensions(k, t.weight, taps)
            store_points(k, target, base + (begin + s) * lanes + v, results)
    return k.bind()


def _tap(i: int, j: int, plan: Plan) -> int:
    return 8 - i * 3 - j if plan.flipped else i * 3 + j


def store_points(k: KernelBuilder, target: Operand, offset: Value, grid: list[list[Value]]) -> None:
    """Values of all points of a tile; ``target``'s last but one stride lies between points."""
    flat = Operand(target.buffer, (1,), (const(1),))
    distance = target.strides[-2]
    number = 0
    for row in grid:
        for value in row:
            k.store(flat, (offset + distance * number,), value)
            number += 1


def load_points(source: Operand, offset: Value, size: int) -> list[list[Value]]:
    """What `store_points` stored, in its order."""
    distance = source.strides[-2]
    return [
        [values.load(source.buffer, offset + distance * (i * size + j)) for j in range(size)]
        for i in range(size)
    ]


# --- the main kernel ------------------------------------------------------------------------------


class _Products:
    def __init__(self, plan: Plan, x: TensorType, bias: TensorType | None, out: TensorType) -> None:
        self.plan, self.t, self.lanes = plan, plan.transform, plan.tile.lanes
        self.k = k = KernelBuilder("winograd")
        self.source = k.tensor("input", 0, x)
        self.weights = k.tensor("temporary", 0, plan.weights)
        self.bias = None if bias is None else k.tensor("input", 2, bias)
        self.out, self.out_type = k.tensor("output", 0, out), out
        n, part, points = self.t.size, plan.part, self.t.points
        self.strips = Strips(k, plan.grid, part)
        columns = self.strips.most
        self.window = Window(
            k, self.source, x, rows=n, columns=(columns - 1) * self.t.results + n,
            depth=plan.depth,
        )  # fmt: skip
        f32 = dtypes.float32
        self.transformed = k.scratch(f32, (points, part * plan.depth + GAP))
        self.products = k.scratch(f32, (points, part * self.lanes + GAP))
        # the results of a strip, (rows, columns, lanes)
        self.results = k.scratch(f32, (self.t.results, columns * self.t.results, self.lanes))

    def kernel(self) -> BoundKernel:
        k, plan = self.k, self.plan
        parts = -(-plan.tiles // plan.part)
        work = plan.part * plan.depth * plan.blocks * self.lanes
        with k.parallel(parts, work=work) as (p,):
            begin = p * k.size(plan.part)
            length = values.binary("min", k.size(plan.tiles) - begin, k.size(plan.part))
            end = begin + length
            self._transform_source(begin, end)
            groups = values.binary(
                "udiv", length + (plan.tile.positions - 1), const(plan.tile.positions)
            )
            with k.loop(k.size(plan.blocks)) as block:
                with k.loop(self.t.points) as point:
                    self._multiply(block, point, groups)
                self._transform_back(begin, end, block)
        return k.bind()

    def _transform_source(self, begin: Value, end: Value) -> None:
        k, m, depth = self.k, self.t.results, self.plan.depth
        with self.strips.over(begin, end) as (image, row, column, count, first):
            top = row * m - k.size(self.plan.before[0])
            left = column * m - k.size(self.plan.before[1])
            self.window.fill(image, top, left, (count - 1) * m + self.t.size)
            with k.loop(count) as tile, k.vector(depth, 1) as v:
                at = self.window.at(tile * m) + v
                grid = self.window.grid(at, self.t.size)
                results = both_dimensions(k, self.t.source, grid)
                store_points(k, self.transformed, (first + tile) * depth + v, results)

    def _multiply(self, block: Value, point: Value, groups: Value) -> None:
        """products[point] = transformed[point] @ weights[block, point]."""
        k, depth = self.k, self.plan.depth
        pieces = -(-depth // CHUNK)
        chunk = -(-depth // pieces)
        weights = self.weights.at((block, point, const(0)))
        with k.loop(groups) as group:
            self._register_tile(point, group, weights, const(0), const(chunk), fresh=True)
        if pieces > 1:
            with k.loop(pieces - 1) as piece:
                begin = (piece + 1) * chunk
                length = values.binary("min", const(depth) - begin, const(chunk))
                with k.loop(groups) as group:
                    self._register_tile(point, group, weights, begin, length, fresh=False)

    def _register_tile(
        self, point: Value, group: Value, weights: Value, begin: Value, length: Value, *,
        fresh: bool,
    ) -> None:  # fmt: skip
        k, depth, lanes = self.k, self.plan.depth, self.lanes
        rows = self.plan.tile.positions
        source = self.transformed.at((point, group * (rows * depth)))
        target = self.products.at((point, group * (rows * lanes)))
        flat = Operand(self.products.buffer, (1,), (const(1),))
        with k.vector(lanes, self.plan.tile.vectors) as v:
            zero = const(0, dtypes.float32)
            sums = [k.register(zero) for _ in range(rows)]
            with k.loop(length) as c:
                vector = values.load(self.weights.buffer, weights + (begin + c) * lanes + v)
                for i, total in enumerate(sums):
                    value = values.load(self.transformed.buffer, source + begin + c + i * depth)
                    k.assign(total, fma(value, vector, read(total)))
            for i, total in enumerate(sums):
                at = target + v + i * lanes
                k.store(flat, (at,), read(total) if fresh else flat[at] + read(total))

    def _transform_back(self, begin: Value, end: Value, block: Value) -> None:
        k, m, lanes = self.k, self.t.results, self.lanes
        channel = block * lanes
        own = k.size(self.plan.channels)
        with self.strips.over(begin, end) as (image, row, column, count, first):
            with k.loop(count) as tile, k.vector(lanes, 1) as v:
                start = None
                if self.bias is not None:
                    start = self.bias.load(channel + v, where=channel + v < own)
                grid = load_points(self.products, (first + tile) * lanes + v, self.t.size)
                results = both_dimensions(k, self.t.result, grid)
                for i, j in itertools.product(range(m), range(m)):
                    value = results[i][j] if start is None else results[i][j] + start
                    k.store(self.results, (const(i), tile * m + j, v), value)
            height = values.binary("min", k.size(self.plan.size[0]) - row * m, const(m))
            width = values.binary("min", k.size(self.plan.size[1]) - column * m, count * m)
            with k.loop(height) as line:
                self._store_row((image, channel, row * m + line, column * m), line, width)

    def _store_row(
        self, index: tuple[Value, Value, Value, Value], line: Value, width: Value
    ) -> None:
        """Results of ``width`` neighbouring positions, and of a block of channels, from ``index``
        (image, channel, row, column): here, and only here, results leave the kernel.
        """
        k, lanes, channels = self.k, self.lanes, self.plan.channels
        image, channel, row, column = index
        place = self.out.at((image, channel, const(0), row, column))
        count = const(lanes)
        if channels % lanes:
            count = values.binary("min", k.size(channels) - channel, const(lanes))
        flat = Operand(self.out.buffer, (1,), (const(1),))
        if self.out_type.strides[1] == 1:
            with k.loop(width) as j, k.vector(count, 1) as v:
                k.store(flat, (place + j * self.out.strides[4] + v,), self.results[line, j, v])
            return
        begin = self.results.at((line, const(0), const(0)))
        k.transpose(
            width, count,
            Matrix(self.results.buffer, begin, const(lanes)),
            Matrix(self.out.buffer, place, self.out.strides[1]),
        )  # fmt: skip
