"""The kernel of attention: scores of a block of queries and keys live in scratch memory alone.

For a block of queries, blocks of keys pass by; the greatest score so far and the sum of powers
are kept for each query, and what was summed before is scaled down when a greater score is met.
Source: Dao and others, "FlashAttention: fast and memory-efficient exact attention", 2022; the
running softmax is Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from __future__ import annotations

import math

from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering
from flame.kernel.values import Value, const, read
from flame.ops.attention.dropping import Dropping
from flame.ops.attention.tiles import (
    KEYS,
    LEAST_ITEMS,
    LOG2_E,
    BoundRows,
    Mask,
    Packing,
    Rows,
    Tile,
    clear,
    flat,
    give,
    product,
    query_tile,
    source,
    take,
    turn,
)
from flame.ops.elementwise import compute_dtype
from flame.ops.loops import Nest, broadcast_strides, coalesce
from flame.render.math.exponential import vanishing_exp2


def over_batch(types: tuple[TensorType | None, ...], batch: Shape) -> Nest:
    """The batch's dimensions, merged where all operands (batch, rows, columns) allow it."""
    strides = []
    for t in types:
        if t is None:
            strides.append((0,) * len(batch))
        else:
            outer = tensor_type(t.dtype, t.shape[:-2], t.strides[:-2])
            strides.append(broadcast_strides(outer, batch))
    return coalesce(batch, strides)


def column(type_: TensorType) -> TensorType:
    """(..., L) as (..., L, 1)."""
    return tensor_type(type_.dtype, (*type_.shape, 1), (*type_.strides, 1))


def matrix(type_: TensorType) -> TensorType:
    """A mask of less than two dimensions as one of two."""
    if type_.ndim >= 2:
        return type_
    missing = 2 - type_.ndim
    return tensor_type(type_.dtype, (1,) * missing + type_.shape, (0,) * missing + type_.strides)


def attend(
    types: tuple[TensorType, TensorType, TensorType, TensorType | None],
    outputs: tuple[TensorType, ...],
    *,
    causal: bool,
    scale: float,
    dropout: float,
) -> Lowering:
    """Of (query, key, value, mask [, seed, offset]): (out, log_sum)."""
    dtype, out = compute_dtype(types[0].dtype), outputs[0]
    if not math.prod(out.shape[:-1]):
        return Lowering(())
    # half of a block's last scores come before their keys
    wasted = 1 / out.shape[-2] if causal else 0.0
    tile = query_tile(dtype, out.shape[-2], wasted=wasted)
    packing = Packing(dtype, tile, whole=math.prod(out.shape[:-2]) >= LEAST_ITEMS)
    rows = (packing.rows(1, types[1]), packing.rows(2, types[2]))
    made = _Forward(types, rows, outputs, tile, causal=causal, scale=scale, dropout=dropout)
    return Lowering((*packing.kernels, made.kernel()), tuple(packing.temporaries))


class _Forward:
    def __init__(
        self, types: tuple[TensorType, TensorType, TensorType, TensorType | None],
        rows: tuple[Rows, Rows], outputs: tuple[TensorType, ...], tile: Tile, *, causal: bool,
        scale: float, dropout: float,
    ) -> None:  # fmt: skip
        query, key, value, mask = types
        out, log_sum = outputs
        mask = None if mask is None else matrix(mask)
        self.scale = scale
        self.dtype = dtype = compute_dtype(query.dtype)
        self.queries, self.keys = query.shape[-2], key.shape[-2]
        self.width, self.value_width = query.shape[-1], value.shape[-1]
        operands = (query, rows[0].type, rows[1].type, mask, out, column(log_sum))
        self.nest = nest = over_batch(operands, out.shape[:-2])
        self.tile = tile
        self.k = k = KernelBuilder("attention")
        self.query = source(k, "input", 0, query, nest.strides[0])
        self.key = BoundRows(k, rows[0], nest.strides[1])
        self.value = BoundRows(k, rows[1], nest.strides[2])
        self.mask = Mask(k, 3, tile, dtype, mask, nest.strides[3], causal=causal)
        self.dropping: Dropping | None = None
        if dropout:
            self.dropping = Dropping(k, 4, tile, dropout, nest.sizes, self.queries, self.keys)
        self.out = source(k, "output", 0, out, nest.strides[4])
        self.log_sum = source(k, "output", 1, column(log_sum), nest.strides[5])
        lanes = tile.lanes
        self.rows = k.scratch(dtype, (lanes, self.width))
        self.turned = k.scratch(dtype, (self.width, lanes))
        self.spare = k.scratch(dtype, (lanes, self.value_width))
        self.scores = k.scratch(dtype, (KEYS, lanes))
        self.total = k.scratch(dtype, (tile.rows(self.value_width), lanes))
        self.peak, self.mass, self.decay = (k.scratch(dtype, (1, lanes)) for _ in range(3))

    def kernel(self) -> BoundKernel:
        k, lanes = self.k, self.tile.lanes
        blocks = -(-self.queries // lanes)
        # a copy in scratch memory serves all blocks that follow
        span = 1 if self.key.copy is None and self.value.copy is None else blocks
        work = max(1, span * self.keys * lanes * (self.width + self.value_width + 16) // 32)
        with k.parallel(*self.nest.sizes, -(-blocks // span), work=work) as (*at, split):
            index, first = tuple(at), split * k.size(span)
            self.key.prepare(index)
            self.value.prepare(index)
            with k.loop(values.binary("min", k.size(blocks) - first, k.size(span))) as part:
                begin = (first + part) * lanes
                count = values.binary("min", k.size(self.queries) - begin, const(lanes))
                self._start(index, begin, count)
                limit = self.mask.limit(k.size(self.keys), begin)
                with k.loop(values.binary("udiv", limit + (KEYS - 1), const(KEYS))) as block:
                    key = block * KEYS
                    keys = values.binary("min", limit - key, const(KEYS))
                    self._block(index, begin, count, key, keys)
                self._finish(index, begin, count)
        return k.bind()

    def _start(self, index: tuple[Value, ...], begin: Value, count: Value) -> None:
        k, tile, dtype = self.k, self.tile, self.dtype
        offset = self.query.at(index) + begin * self.query.row
        take(k, self.query, offset, count, self.rows, self.scale * LOG2_E)
        clear(k, self.rows, count, tile.lanes)
        turn(k, self.rows, tile.lanes, self.turned)
        self.mask.begin()
        with k.vector(tile.lanes, tile.vectors) as v:
            k.store(self.peak, (const(0), v), const(-math.inf, dtype))
            k.store(self.mass, (const(0), v), const(0.0, dtype))
            with k.loop(self.total.shape[0]) as d:
                k.store(self.total, (d, v), const(0.0, dtype))

    def _block(
        self, index: tuple[Value, ...], begin: Value, count: Value, key: Value, keys: Value
    ) -> None:
        """One block of keys."""
        k, tile = self.k, self.tile
        tiles = values.binary("udiv", keys + (tile.height - 1), const(tile.height))
        product(
            k, self.scores, tile, tiles, self.width,
            lambda j, d: self.key.load(key + j, d), lambda d, v: self.turned[d, v],
        )  # fmt: skip
        self.mask.apply(self.scores, index, begin, count, key, keys)
        self._weigh(keys)
        if self.dropping is not None:
            self.dropping.apply(self.scores, self.scores, index, begin, key)
        product(
            k, self.total, tile, self.total.shape[0] // tile.height, keys,
            lambda d, j: self.value.load(key + j, d), lambda j, v: self.scores[j, v],
            lambda d, v: self.total[d, v] * self.decay[const(0), v],
        )  # fmt: skip

    def _weigh(self, keys: Value) -> None:
        """Scores to powers of two, relative to the greatest score that each query has met."""
        k, dtype, first = self.k, self.dtype, const(0)
        with k.vector(self.tile.lanes, self.tile.vectors) as v:
            peak = k.register(self.peak[first, v])
            with k.loop(keys) as j:
                score = self.scores[j, v]
                greater = values.compare("gt", score, read(peak))
                k.assign(peak, values.select(greater, score, read(peak)))
            none = values.compare("eq", read(peak), const(-math.inf, dtype))
            base = k.register(values.select(none, const(0.0, dtype), read(peak)))
            decay = k.register(vanishing_exp2(self.peak[first, v] - read(base)))
            mass = k.register(self.mass[first, v] * read(decay))
            with k.loop(keys) as j:
                # a register, as the store makes what was loaded stale
                power = k.register(vanishing_exp2(self.scores[j, v] - read(base)))
                k.store(self.scores, (j, v), read(power))
                k.assign(mass, read(mass) + read(power))
            k.store(self.peak, (first, v), read(peak))
            k.store(self.decay, (first, v), read(decay))
            k.store(self.mass, (first, v), read(mass))

    def _finish(self, index: tuple[Value, ...], begin: Value, count: Value) -> None:
        k, dtype, first = self.k, self.dtype, const(0)
        with k.vector(self.tile.lanes, self.tile.vectors) as v:
            mass = self.mass[first, v]
            none = values.compare("eq", mass, const(0.0, dtype))
            zero = const(0.0, dtype)
            gain = const(1.0 if self.dropping is None else self.dropping.gain, dtype)
            factor = k.register(values.select(none, zero, gain / mass))
            log_sum = (self.peak[first, v] + values.unary("log2", mass)) * (1 / LOG2_E)
            k.store(self.decay, (first, v), values.select(none, zero, log_sum))
            with k.loop(self.value_width) as d:
                k.store(self.total, (d, v), self.total[d, v] * read(factor))
        offset = self.log_sum.at(index) + begin * self.log_sum.row
        with k.vector(count) as v:
            place = offset + v * self.log_sum.row
            k.store(flat(self.log_sum.operand), (place,), self.decay[first, v])
        offset = self.out.at(index) + begin * self.out.row
        give(k, self.total, self.value_width, count, self.out, offset, self.spare)
