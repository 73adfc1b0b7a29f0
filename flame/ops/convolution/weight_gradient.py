"""The kernels of a convolution's weight gradient.

For each tap it is a product over positions: a few neighbouring source elements (channels, and taps
along the last dimension, of one position) times a few vectors of the output gradient's channels.
Such a tile of sums stays in registers over a chunk of positions, then in a worker's scratch
memory. Ranges of positions that different iterations sum are added up in a fixed order at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from flame.core.dtypes import DType
from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Ref
from flame.kernel.program import Matrix
from flame.kernel.values import Value, cast, const, read
from flame.ops.convolution.blocking import Tile, vector_bytes
from flame.ops.convolution.contraction import product_sum
from flame.ops.convolution.geometry import Phase
from flame.ops.convolution.packing import COLUMNS, flat_of, table_type, turnable
from flame.ops.elementwise import compute_dtype

CHUNK = 128
ROWS = 192
LEAST_ITEMS = 32


@dataclass(frozen=True)
class Layout:
    """Sizes of the sums: (splits, groups, blocks, outer taps, run, lanes)."""

    merged: bool
    run: int
    taps: tuple[int, int, int]
    rows: int  # of a tile
    splits: int
    span: int  # chunks of a split
    positions: int

    def partial_type(self, dtype: DType, groups: int, blocks: int, lanes: int) -> TensorType:
        taps = self.taps[0] * self.taps[1] * self.taps[2]
        return tensor_type(dtype, (self.splits, groups, blocks, taps, self.run, lanes))


def layout_for(source: TensorType, phase: Phase, tile: Tile, blocks: int) -> Layout:
    """How the sums of a packed source are cut."""
    channels = source.shape[5]
    axes = phase.axes
    merged = axes[2].dilation == 1 and source.strides[4] == channels
    run = channels * axes[2].taps if merged else channels
    taps = (axes[0].taps, axes[1].taps, 1 if merged else axes[2].taps)
    rows = min(tile.positions, run)
    extent = phase.extent
    positions = source.shape[0] * extent[0] * extent[1] * extent[2]
    chunks = max(1, -(-positions // CHUNK))
    items = source.shape[1] * blocks * taps[0] * taps[1] * taps[2] * -(-run // ROWS)
    splits = max(1, min(chunks, -(-LEAST_ITEMS // max(items, 1)))) if items < LEAST_ITEMS else 1
    span = -(-chunks // splits)
    return Layout(merged, run, taps, rows, -(-chunks // span), span, positions)


def packed_gradient_type(g: TensorType, dtype: DType, groups: int, tile: Tile) -> TensorType:
    """(groups, blocks, positions, lanes)."""
    positions = g.shape[0] * g.shape[2] * g.shape[3] * g.shape[4]
    return tensor_type(dtype, (groups, tile.blocks(g.shape[1] // groups), positions, tile.lanes))


def pack_gradient(g: TensorType, position: int, packed: TensorType, temporary: int) -> BoundKernel:
    """Copy the output's gradient (N, C, D, H, W) with the channels of a block side by side."""
    if turnable(g.dtype, packed.dtype) and (g.strides[4] == 1 or g.shape[4] == 1):
        return _turn_gradient(g, position, packed, temporary)
    k = KernelBuilder("pack_gradient")
    source = k.tensor("input", position, g)
    target = k.tensor("temporary", temporary, packed)
    groups, blocks, _, lanes = packed.shape
    own = k.size(g.shape[1] // groups)
    d_count, h_count, w_count = (k.size(s) for s in g.shape[2:])
    work = g.shape[4] * lanes
    with k.parallel(g.shape[0], groups, blocks, g.shape[2], g.shape[3], work=work) as at:
        n, group, block, d, h = at
        row = ((n * d_count + d) * h_count + h) * w_count
        with k.loop(w_count) as w, k.vector(lanes, 1) as v:
            channel = block * lanes + v
            inside = channel < own
            channel = group * own + values.binary("min", channel, own - 1)
            value = cast(source.load(n, channel, d, h, w), compute_dtype(g.dtype))
            value = values.select(inside, value, const(0, value.dtype))
            k.store(target, (group, block, row + w, v), value)
    return k.bind()


def _turn_gradient(g: TensorType, position: int, packed: TensorType, temporary: int) -> BoundKernel:
    """As `pack_gradient`, for rows that lie side by side."""
    n_count, channels, *sizes = g.shape
    strides = list(g.strides)
    for axis in (1, 0):
        if sizes[axis] == 1 or strides[2 + axis] == sizes[2]:
            sizes[2], sizes[axis] = sizes[2] * sizes[axis], 1
        else:
            break
    g = tensor_type(g.dtype, (n_count, channels, *sizes), tuple(strides))
    k = KernelBuilder("turn_gradient")
    source = k.tensor("input", position, g)
    target = k.tensor("temporary", temporary, packed)
    groups, blocks, _, lanes = packed.shape
    own = k.size(channels // groups)
    d_count, h_count, w_count = (k.size(s) for s in sizes)
    with k.parallel(n_count, groups, blocks, *sizes[:2], work=sizes[2] * lanes // 4) as at:
        n, group, block, d, h = at
        row = ((n * d_count + d) * h_count + h) * w_count
        height = values.binary("min", own - block * lanes, const(lanes))
        index = (n, group * own + block * lanes, d, h, const(0))
        place = target.at((group, block, const(0), const(0))) + row * lanes
        k.transpose(
            height, w_count, Matrix(source.buffer, source.at(index), source.strides[1]),
            Matrix(target.buffer, place, const(lanes)),
        )  # fmt: skip
        if (channels // groups) % lanes:
            with k.when(height < lanes), k.loop(w_count) as w, k.vector(const(lanes) - height) as v:
                zero = const(0, packed.dtype)
                k.store(flat_of(target), (place + w * lanes + height + v,), zero)
    return k.bind()


def sum_products(
    source: tuple[Ref, TensorType], gradient: tuple[Ref, TensorType], partial: tuple[int,
    TensorType], table: int, phase: Phase, tile: Tile, layout: Layout,
) -> BoundKernel:  # fmt: skip
    """partial[split, group, block, tap, run, lanes]: sums over the split's positions."""
    k = KernelBuilder("weight_gradient")
    x = k.tensor(source[0].role, source[0].position, source[1])
    g = k.tensor(gradient[0].role, gradient[0].position, gradient[1])
    begins = k.tensor("temporary", table, table_type(source[1].shape[0], phase))
    out = k.tensor("temporary", partial[0], partial[1])
    groups, blocks, _, lanes = gradient[1].shape
    dtype = partial[1].dtype
    rows = layout.rows
    tiles = -(-layout.run // rows)
    together = max(1, ROWS // rows)
    sums = k.scratch(dtype, (together * rows, lanes))
    steps = [s * _step(k, a.dilation) for s, a in zip(x.strides[2:5], phase.axes, strict=True)]
    work = layout.span * CHUNK * together * rows * tile.vectors
    outer = (layout.splits, groups, blocks, *layout.taps, -(-tiles // together))
    with k.parallel(*outer, work=work) as (split, group, block, td, th, tw, part):
        begin = part * together
        count = values.binary("min", k.size(tiles) - begin, const(together))
        offset = group * x.strides[1] + td * steps[0] + th * steps[1] + tw * steps[2]
        columns = g.at((group, block, const(0), const(0)))
        last = k.size(layout.run) - rows
        with k.vector(lanes, tile.vectors) as v:
            zero = k.register(const(0, dtype))
            with k.loop(count * rows) as row:
                k.store(sums, (row, v), read(zero))
        first = split * k.size(layout.span)
        chunks = values.binary(
            "min", k.size(-(-layout.positions // CHUNK)) - first, k.size(layout.span)
        )
        with k.loop(chunks) as chunk:
            start = (first + chunk) * CHUNK
            length = values.binary("min", k.size(layout.positions) - start, const(CHUNK))
            with k.loop(count) as t:
                column = offset + values.binary("min", (begin + t) * rows, last)
                with k.vector(lanes, tile.vectors) as v:
                    totals = [k.register(sums[t * rows + i, v]) for i in range(rows)]
                    with k.loop(length) as p:
                        here = begins[start + p] + column
                        vector = values.load(g.buffer, columns + (start + p) * lanes + v)
                        for i, total in enumerate(totals):
                            value = values.load(x.buffer, here + i)
                            k.assign(total, product_sum(value, vector, read(total)))
                    for i, total in enumerate(totals):
                        k.store(sums, (t * rows + i, v), read(total))
        tap = (td * k.size(layout.taps[1]) + th) * k.size(layout.taps[2]) + tw
        with k.loop(count) as t, k.loop(rows) as row, k.vector(lanes, tile.vectors) as v:
            place = values.binary("min", (begin + t) * rows, last) + row
            k.store(out, (split, group, block, tap, place, v), sums[t * rows + row, v])
    return k.bind()


def add_partials(
    partial: tuple[int, TensorType], weight: TensorType, phase: Phase, layout: Layout
) -> BoundKernel:
    """weight (O, C of a group, D, H, W) = the sum of the partial sums, in order.

    Rows of a few channels and all taps are added up in scratch memory, then turned.
    """
    k = KernelBuilder("add_weight_gradients")
    source = k.tensor("temporary", partial[0], partial[1])
    out = k.tensor("output", 0, weight)
    splits, groups, blocks, _, _, lanes = partial[1].shape
    dtype = partial[1].dtype
    summed, count = weight.shape[1], weight.shape[2] * weight.shape[3] * weight.shape[4]
    together = min(summed, max(1, COLUMNS // count))
    rows = k.scratch(dtype, (max(COLUMNS, count), lanes))
    own, other, all_taps = k.size(weight.shape[0] // groups), k.size(summed), k.size(count)
    unroll = lanes * max(dtype.itemsize, 4) // vector_bytes()
    # in a run the taps along W stand outside the channels, so in memory it is as if not merged
    work = together * count * lanes * splits // 4
    with k.parallel(groups, blocks, -(-summed // together), work=work) as (g, b, part):
        begin = part * k.size(together)
        length = values.binary("min", other - begin, k.size(together))
        base = source.at((const(0), g, b, const(0), const(0), const(0)))
        with k.loop(all_taps) as t, k.loop(length) as c, k.vector(lanes, unroll) as v:
            index = base + (t * other + begin + c) * lanes + v
            total = k.register(values.load(source.buffer, index))
            with k.loop(k.size(splits - 1)) as s:
                value = values.load(source.buffer, index + (s + 1) * source.strides[0])
                k.assign(total, read(total) + value)
            k.store(rows, (c * all_taps + t, v), read(total))
        channels = values.binary("min", own - b * lanes, const(lanes))
        first = g * own + b * lanes
        if turnable(dtype, weight.dtype):
            place = out.at((first, *[const(0)] * 4)) + begin * all_taps
            k.transpose(
                length * all_taps, channels, Matrix(rows.buffer, const(0), const(lanes)),
                Matrix(out.buffer, place, other * all_taps),
            )  # fmt: skip
        else:
            place = begin * all_taps
            with k.loop(channels) as o, k.vector(length * all_taps, 1) as j:
                target = (first + o) * other * all_taps + place + j
                value = values.load(rows.buffer, j * lanes + o)
                k.store(flat_of(out), (target,), value)
    return k.bind()


def _step(k: KernelBuilder, number: int) -> Value:
    return const(number) if number in (0, 1) else k.size(number)
