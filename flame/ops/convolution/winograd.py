"""Winograd kernels of 3 x 3 convolutions with stride 1, and of their input gradients.

With many tiles, one kernel transforms the weights and another does the rest: its iteration is a
block of tiles, whose transformed source, products and results stay in the second-level cache.

With few tiles and many channels the transformed weights would be the most that is written and read.
Then one kernel transforms the source, and an iteration of the other takes a block of channels of
the result: it transforms the weights of a few channels summed over at a time, in scratch memory,
and adds up products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flame.core import dtypes
from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, const
from flame.ops.convolution.blocking import Tile, tile_for, vector_bytes
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
from flame.ops.convolution.winograd_stages import (
    Products,
    Results,
    Weights,
    flat,
    transform_strip,
)  # fmt: skip
from flame.ops.convolution.winograd_transforms import (
    Transform,
    strided,
    strided_gradient,
    unstrided,
)  # fmt: skip

LEAST_CHANNELS = 16
LEAST_SIZE = 3  # of results: below, tiles are mostly empty
# channels summed in one go: their weights stay in the first-level cache, and rounding errors small
CHUNK = 64
USUAL_CHUNKS = 8  # that scratch memory is for, at least, so that texts are shared
SCRATCH_BYTES = 1 << 20  # of transformed source
PRODUCT_BYTES = 1 << 19


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
    def blocks(self) -> int:
        """Blocks of the result's channels."""
        return self.tile.blocks(self.channels)

    @property
    def few_tiles(self) -> bool:
        return 2 * self.tiles <= self.channels

    @property
    def chunk(self) -> int:
        """Channels summed over that are transformed together, whole vectors of them."""
        pieces = -(-self.summed // CHUNK)
        return round_up(-(-self.summed // pieces), vector_bytes() // 4)

    @property
    def chunks(self) -> int:
        return -(-self.summed // self.chunk)

    @property
    def capacity(self) -> int:
        """Tiles of a block that scratch memory is for: whole register tiles."""
        most = PRODUCT_BYTES // (self.transform.points * self.tile.lanes * 4)
        return most // self.tile.positions * self.tile.positions

    @property
    def part(self) -> int:
        """Tiles of a block, whole register tiles."""
        rows, most = self.tile.positions, self.capacity
        if not self.few_tiles:
            channels = self.chunks * self.chunk
            most = min(most, SCRATCH_BYTES // (self.transform.points * channels * 4))
        parts = -(-self.tiles // max(rows, most // rows * rows))
        return round_up(-(-self.tiles // parts), rows)

    @property
    def parts(self) -> int:
        return -(-self.tiles // self.part)

    @property
    def weights(self) -> tuple[int, int]:
        """Transformed weights of a block and a chunk: (different weights, elements of each)."""
        return self.transform.weights**2, self.chunk * self.tile.lanes + GAP

    @property
    def source(self) -> tuple[int, int]:
        """Transformed source of a block of tiles and a chunk: (points, elements of each)."""
        return self.transform.points, self.capacity * self.chunk + GAP

    @property
    def transformed(self) -> TensorType:
        """What lies in memory between both kernels."""
        if self.few_tiles:
            shape = (self.parts, self.chunks, *self.source)
        else:
            shape = (self.blocks, self.chunks, *self.weights)
        return tensor_type(dtypes.float32, shape)

    def between(self, k: KernelBuilder) -> Operand:
        """The temporary of this type, with distances of planes that stand in the text."""
        shape = self.transformed.shape
        memory = k.tensor("temporary", 0, tensor_type(dtypes.float32, (2,), (1,)))
        plane, one = const(shape[3]), const(1)
        chunk = const(shape[2] * shape[3])
        strides = (chunk * extent_of(k, self.chunks), chunk, plane, one)
        return Operand(memory.buffer, shape, strides)


def suits(g: Geometry, x: TensorType, out: TensorType) -> bool:
    """Whether a geometry is one of these kernels', for types with three spatial dimensions."""
    plane = g.kernel == (1, 3, 3) and g.dilation == (1, 1, 1) and g.groups == 1
    level = g.padding[0] == 0 and x.shape[2] == out.shape[2] == 1
    if not plane or not level or g.stride not in ((1, 1, 1), (1, 2, 2)):
        return False
    enough = min(x.shape[1], out.shape[1]) >= LEAST_CHANNELS
    return enough and min(*out.shape[3:], *x.shape[3:]) >= LEAST_SIZE and out.numel > 0


def plan_for(x: TensorType, out: TensorType, g: Geometry, *, forward: bool) -> Plan | None:
    """The plan where these kernels are the better ones; the types have three spatial dimensions."""
    if x.dtype is not dtypes.float32 or not suits(g, x, out):
        return None
    padding, t = g.padding[1:], unstrided()
    before = padding if forward else (2 - padding[0], 2 - padding[1])
    if g.stride[2] == 2:
        t = strided() if forward else strided_gradient()
        if not forward:
            if padding[0] % 2 == 0 or padding[1] % 2 == 0:
                return None  # other elements than the first are tap 1's
            before = -(padding[0] // 2), -(padding[1] // 2)
    flipped = g.stride[2] == 1 and not forward
    return Plan(
        t, tile_for(x.dtype, out.shape[1]), x.shape[0], (out.shape[3], out.shape[4]),
        (before[0], before[1]), flipped, x.shape[1], out.shape[1],
    )  # fmt: skip


@dataclass(frozen=True)
class Operands:
    """The types of a convolution; the weight is summed over its axis ``summed_axis``."""

    x: TensorType
    weight: TensorType
    bias: TensorType | None
    out: TensorType
    summed_axis: int


def lower(plan: Plan, operands: Operands) -> Lowering:
    """The kernels of a convolution or its input gradient."""
    if plan.few_tiles:
        kernels = _transform_source(plan, operands), _multiply_weights(plan, operands)
    else:
        kernels = _transform_weights(plan, operands), _multiply_tiles(plan, operands)
    return Lowering(tuple(map(shared, kernels)), (plan.transformed.numel * 4,))


def _weights(k: KernelBuilder, plan: Plan, operands: Operands, most: int) -> Weights:
    return Weights(
        k, 1, operands.weight, plan.transform, summed_axis=operands.summed_axis,
        flipped=plan.flipped, lanes=plan.tile.lanes, most=most,
    )  # fmt: skip


def _products(k: KernelBuilder, plan: Plan) -> Products:
    tile = plan.tile
    return Products(
        k, plan.transform, part=plan.capacity, rows=tile.positions, lanes=tile.lanes,
        vectors=tile.vectors, gap=GAP,
    )  # fmt: skip


class _Source:
    """Tiles of the source on the way to their points, a chunk of channels at a time."""

    def __init__(self, k: KernelBuilder, plan: Plan, x: TensorType, strips: Strips) -> None:
        self.k, self.plan, self.strips = k, plan, strips
        t = plan.transform
        columns = (strips.most - 1) * t.step + t.reach
        self.window = Window(
            k, k.tensor("input", 0, x), x, rows=t.reach, columns=columns, depth=plan.chunk
        )

    def transform(
        self, begin: Value, end: Value, channel: Value, target: Operand, offset: Value
    ) -> None:
        k, plan, t = self.k, self.plan, self.plan.transform
        before = plan.before
        with self.strips.over(begin, end) as (image, row, column, count, first):
            top = row * t.step - k.size(before[0])
            left = column * t.step - k.size(before[1])
            self.window.fill(image, top, left, (count - 1) * t.step + t.reach, channel)
            place = offset + first * self.window.depth
            transform_strip(k, t.source, self.window, t.reach, t.step, count, target, place)
        # the rest of the last register tile is multiplied too: what lay there may be denormal, and
        # a hundred times slower than zeros
        depth, rows, length = self.window.depth, plan.tile.positions, end - begin
        rest = values.binary("udiv", length + (rows - 1), const(rows)) * rows - length
        with k.when(rest > 0), k.loop(t.points) as point, k.vector(rest * depth, 1) as v:
            at = offset + point * target.strides[-2] + length * depth + v
            k.store(flat(target), (at,), const(0, dtypes.float32))


def _block(k: KernelBuilder, plan: Plan, part: Value) -> tuple[Value, Value, Value]:
    """(first tile, end, register tiles) of a block of tiles."""
    begin = part * k.size(plan.part)
    length = values.binary("min", k.size(plan.tiles) - begin, k.size(plan.part))
    rows = plan.tile.positions
    return begin, begin + length, values.binary("udiv", length + (rows - 1), const(rows))


# --- many tiles -----------------------------------------------------------------------------------


def _transform_weights(plan: Plan, operands: Operands) -> BoundKernel:
    """All transformed weights, (blocks, chunks, weights, channels, lanes), into temporary 0."""
    k = KernelBuilder("winograd_weights")
    lanes, together = plan.tile.lanes, vector_bytes() // 4
    weights = _weights(k, plan, operands, together)
    target = plan.between(k)
    extents = plan.blocks, plan.chunks, plan.chunk // together
    with k.parallel(math.prod(extents), work=together * lanes * 8) as (p,):
        block, chunk, part = split_index(k, p, extents)
        offset = target.at((block, chunk, const(0), part * (together * lanes)))
        begin = chunk * plan.chunk + part * together
        weights.transform(block * lanes, begin, const(together), target, offset)
    return k.bind()


def _multiply_tiles(plan: Plan, operands: Operands) -> BoundKernel:
    """An iteration: a block of tiles, all channels."""
    k, t, lanes = KernelBuilder("winograd"), plan.transform, plan.tile.lanes
    strips = Strips(k, plan.grid, plan.part)
    source = _Source(k, plan, operands.x, strips)
    weights = plan.between(k)
    products = _products(k, plan)
    results = Results(k, t, strips, operands.out, operands.bias, lanes)
    transformed = k.scratch(dtypes.float32, (max(plan.chunks, USUAL_CHUNKS), *plan.source))
    work = plan.part * plan.summed * plan.channels
    with k.parallel(plan.parts, work=work) as (part,):
        begin, end, groups = _block(k, plan, part)
        chunks = extent_of(k, plan.chunks)
        with k.loop(chunks) as chunk:
            offset = transformed.at((chunk, const(0), const(0)))
            source.transform(begin, end, chunk * plan.chunk, transformed, offset)
        with k.loop(extent_of(k, plan.blocks)) as block:
            with k.loop(t.points) as point:

                def add(chunk: Value, point: Value, block: Value, *, fresh: bool) -> None:
                    left = transformed.at((chunk, point, const(0)))
                    right = weights.at((block, chunk, t.weight_of(point)[0], const(0)))
                    products.add(
                        point, groups, (transformed, left, plan.chunk), (weights, right),
                        const(plan.chunk), fresh=fresh,
                    )  # fmt: skip

                add(const(0), point, block, fresh=True)
                with k.loop(chunks - 1) as chunk:
                    add(chunk + 1, point, block, fresh=False)
            results.write(products.memory, begin, end, block * lanes)
    return k.bind()


# --- few tiles ------------------------------------------------------------------------------------


def _transform_source(plan: Plan, operands: Operands) -> BoundKernel:
    """The transformed source, (blocks, chunks, points, tiles, channels), into temporary 0."""
    k = KernelBuilder("winograd_source")
    source = _Source(k, plan, operands.x, Strips(k, plan.grid, plan.part))
    target = plan.between(k)
    extents = plan.parts, plan.chunks
    with k.parallel(math.prod(extents), work=plan.part * plan.chunk * 16) as (p,):
        part, chunk = split_index(k, p, extents)
        begin, end, _ = _block(k, plan, part)
        offset = target.at((part, chunk, const(0), const(0)))
        source.transform(begin, end, chunk * plan.chunk, target, offset)
    return k.bind()


def _multiply_weights(plan: Plan, operands: Operands) -> BoundKernel:
    """An iteration: a block of channels and a block of tiles."""
    k, t, lanes = KernelBuilder("winograd_few"), plan.transform, plan.tile.lanes
    strips = Strips(k, plan.grid, plan.part)
    weights = _weights(k, plan, operands, plan.chunk)
    source = plan.between(k)
    products = _products(k, plan)
    results = Results(k, t, strips, operands.out, operands.bias, lanes)
    transformed = k.scratch(dtypes.float32, plan.weights)
    extents = plan.blocks, plan.parts
    work = plan.part * plan.summed * lanes
    with k.parallel(math.prod(extents), work=work) as (p,):
        block, part = split_index(k, p, extents)
        begin, end, groups = _block(k, plan, part)
        with k.loop(extent_of(k, plan.chunks)) as chunk:
            weights.transform(
                block * lanes, chunk * plan.chunk, const(plan.chunk), transformed, const(0)
            )

            def multiply(chunk: Value, *, fresh: bool) -> None:
                with k.loop(t.points) as point:
                    left = source.at((part, chunk, point, const(0)))
                    right = transformed.at((t.weight_of(point)[0], const(0)))
                    products.add(
                        point, groups, (source, left, plan.chunk), (transformed, right),
                        const(plan.chunk), fresh=fresh,
                    )  # fmt: skip

            with k.when(chunk < 1):
                multiply(chunk, fresh=True)
            with k.when(chunk > 0):
                multiply(chunk, fresh=False)
        results.write(products.memory, begin, end, block * lanes)
    return k.bind()
