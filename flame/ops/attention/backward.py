"""The kernels of attention's backward pass: probabilities are computed anew, block by block.

With P the probabilities and D a number for each query (its row of grad * out, summed):

    dS = P (grad valueᵀ - D)    dquery = scale dS key    dkey = scale dSᵀ query    dvalue = Pᵀ grad

An entry of the batch is one iteration, or a few that share its queries: each sums gradients of all
keys and values in temporary memory, which are then added up in a fixed order.
Source: Dao and others, "FlashAttention: fast and memory-efficient exact attention", 2022.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const, read
from flame.ops.attention.forward import column, matrix, over_batch
from flame.ops.attention.tiles import (
    KEYS,
    LOG2_E,
    Mask,
    Source,
    Tile,
    clear,
    flat,
    give,
    product,
    query_tile,
    source,
    take,
    turn,
    width_tile,
)
from flame.ops.elementwise import compute_dtype
from flame.render.math.exponential import vanishing_exp2

LEAST_ITEMS = 32  # iterations wanted, to keep threads evenly busy
Inputs = tuple[TensorType | None, ...]


def attend_backward(
    types: Inputs, outputs: tuple[TensorType, ...], *, causal: bool, scale: float
) -> Lowering:
    """Of (grad, shift, query, key, value, mask, out, log_sum): (dquery, dkey, dvalue)."""
    return _Backward(types, outputs, causal=causal, scale=scale).lowering()


class _Sums:
    """Gradients of keys or values: (batch, splits, keys, columns) in temporary memory."""

    def __init__(self, position: int, type_: TensorType, of: _Backward) -> None:
        self.position, self.target = position, type_
        self.tile, self.pieces = width_tile(of.dtype, type_.shape[-1])
        self.width, self.columns = type_.shape[-1], self.tile.lanes * self.pieces
        self.entry = of.key_blocks * KEYS * self.columns  # elements of one split
        count = max(1, of.splits * math.prod(of.nest.sizes) * self.entry)
        self.type = tensor_type(of.dtype, (count,))
        self.bytes = count * of.dtype.itemsize

    def bind(self, k: KernelBuilder) -> Operand:
        """Indexed by (offset of the split, key, column)."""
        whole = k.tensor("temporary", self.position, self.type)
        return Operand(whole.buffer, (1, 1, 1), (const(1), const(self.columns), const(1)))

    def rows(self, k: KernelBuilder, count: int) -> Operand:
        """Scratch memory for so many rows as wide as these, padding included."""
        made = k.scratch(self.type.dtype, (count, self.columns))
        return Operand(made.buffer, (count, self.width), made.strides)


class _Backward:
    def __init__(
        self, types: Inputs, outputs: tuple[TensorType, ...], *, causal: bool, scale: float
    ) -> None:
        grad, shift, query, key, value, mask, out, log_sum = types
        assert grad is not None
        assert shift is not None
        assert query is not None
        assert key is not None
        assert value is not None
        assert out is not None
        assert log_sum is not None
        mask = None if mask is None else matrix(mask)
        self.types = (grad, column(shift), query, key, value, mask, out, column(log_sum))
        self.outputs, self.causal, self.scale = outputs, causal, scale
        self.dtype = compute_dtype(query.dtype)
        self.queries, self.keys = query.shape[-2], key.shape[-2]
        self.width, self.value_width = query.shape[-1], value.shape[-1]
        self.nest = over_batch((*self.types, *outputs), grad.shape[:-2])
        self.tile = query_tile(self.dtype, self.queries)
        self.query_blocks = -(-self.queries // self.tile.lanes)
        self.key_blocks = -(-self.keys // KEYS)
        entries = max(1, math.prod(self.nest.sizes))
        wanted = min(self.query_blocks, -(-LEAST_ITEMS // entries))
        self.span = -(-self.query_blocks // max(1, wanted))  # blocks of queries of a split
        self.splits = max(1, -(-self.query_blocks // max(1, self.span)))
        self.sums = [_Sums(i, outputs[1 + i], self) for i in range(2)]

    def lowering(self) -> Lowering:
        kernels = [_Blocks(self).kernel(), *(self._add(i) for i in range(2))]
        bound = [kernel for kernel in kernels if kernel.extent]
        return Lowering(tuple(bound), tuple(s.bytes for s in self.sums))

    def _add(self, which: int) -> BoundKernel:
        """The gradient of keys (0) or values (1): the sums of all splits, in order."""
        sums = self.sums[which]
        k = KernelBuilder("attention_sums")
        given = sums.bind(k)
        out = source(k, "output", 1 + which, sums.target, self.nest.strides[9 + which])
        factor = const(1.0 if which else 1 / LOG2_E, self.dtype)
        splits, entry = k.size(self.splits), k.size(sums.entry)
        work = max(1, KEYS * sums.columns * self.splits // 8)
        with k.parallel(*self.nest.sizes, self.key_blocks, work=work) as (*index, block):
            key = block * KEYS
            keys = values.binary("min", k.size(self.keys) - key, const(KEYS))
            begin = _number(k, index, self.nest.sizes) * splits * entry
            place = out.at(tuple(index)) + key * out.row
            with k.loop(keys) as j, k.vector(sums.width) as v:
                total = k.register(given[begin, key + j, v])
                with k.loop(k.size(self.splits - 1)) as split:
                    other = given[begin + (split + 1) * entry, key + j, v]
                    k.assign(total, read(total) + other)
                offset = place + j * out.row + v * out.column
                k.store(flat(out.operand), (offset,), read(total) * factor)
        return k.bind()


def _number(k: KernelBuilder, index: Sequence[Value], sizes: Sequence[int]) -> Value:
    """The row-major number of an entry of the batch."""
    number = const(0)
    for i, size in zip(index, sizes, strict=True):
        number = number * k.size(size) + i
    return number


class _Blocks:
    """The kernel that goes through all pairs of a block of queries and one of keys."""

    def __init__(self, plan: _Backward) -> None:
        self.plan, self.tile, self.dtype = plan, plan.tile, plan.dtype
        self.k = k = KernelBuilder("attention_backward")
        strides, dtype, lanes = plan.nest.strides, plan.dtype, plan.tile.lanes
        self.mask = Mask(k, 5, plan.tile, dtype, plan.types[5], strides[5], causal=plan.causal)
        tensors = [(i, t) for i, t in enumerate(plan.types) if t is not None and i != 5]
        made = {i: source(k, "input", i, t, strides[i]) for i, t in tensors}
        self.grad, self.shift, self.query, self.key, self.value = (made[i] for i in range(5))
        self.out, self.log_sum = made[6], made[7]
        self.target = source(k, "output", 0, plan.outputs[0], strides[8])
        key_sums, value_sums = plan.sums
        self.key_gradient, self.value_gradient = key_sums.bind(k), value_sums.bind(k)
        self.query_rows, self.grad_rows = key_sums.rows(k, lanes), value_sums.rows(k, lanes)
        self.query_turned = k.scratch(dtype, (plan.width, lanes))
        self.grad_turned = k.scratch(dtype, (plan.value_width, lanes))
        # tiles of sums may read a little beyond the last key
        self.key_rows = k.scratch(dtype, (KEYS + self.tile.height, plan.width))
        self.value_rows = k.scratch(dtype, (KEYS, plan.value_width))
        self.weights, self.slopes = (k.scratch(dtype, (KEYS, lanes)) for _ in range(2))
        self.total = k.scratch(dtype, (self.tile.rows(plan.width), lanes))
        self.spare = k.scratch(dtype, (lanes, plan.width))
        self.base, self.delta = (k.scratch(dtype, (lanes,)) for _ in range(2))

    def kernel(self) -> BoundKernel:
        k, plan, lanes = self.k, self.plan, self.tile.lanes
        blocks, span = k.size(plan.query_blocks), k.size(plan.span)
        each = lanes * (3 * plan.width + 2 * plan.value_width + 16) // 32
        work = max(1, plan.span * plan.keys * each)
        with k.parallel(*plan.nest.sizes, plan.splits, work=work) as (*at, split):
            index = tuple(at)
            number = _number(k, index, plan.nest.sizes) * k.size(plan.splits) + split
            places = [number * k.size(s.entry) for s in plan.sums]
            for sums, place in zip(plan.sums, places, strict=True):
                self._clear(sums, place)
            self.mask.begin()
            first = split * span
            with k.loop(values.binary("min", blocks - first, span)) as part:
                begin = (first + part) * lanes
                count = values.binary("min", k.size(plan.queries) - begin, const(lanes))
                self._start(index, begin, count)
                limit = self.mask.limit(k.size(plan.keys), begin)
                with k.loop(values.binary("udiv", limit + (KEYS - 1), const(KEYS))) as block:
                    key = block * KEYS
                    keys = values.binary("min", limit - key, const(KEYS))
                    self._block(index, (begin, count), (key, keys), places)
                self._finish(index, begin, count)
        return k.bind()

    def _clear(self, sums: _Sums, place: Value) -> None:
        k = self.k
        operand = self.value_gradient if sums.position else self.key_gradient
        with k.vector(k.size(sums.entry), 4) as v:
            k.store(flat(operand), (place + v,), const(0.0, self.dtype))

    def _start(self, index: tuple[Value, ...], begin: Value, count: Value) -> None:
        """What all keys need of a block of queries."""
        k, tile, zero = self.k, self.tile, const(0.0, self.dtype)
        for given, rows, turned, scale in (
            (self.query, self.query_rows, self.query_turned, self.plan.scale * LOG2_E),
            (self.grad, self.grad_rows, self.grad_turned, 1.0),
        ):
            take(k, given, given.at(index) + begin * given.row, count, rows, scale)
            clear(k, rows, count, tile.lanes)
            turn(k, rows, tile.lanes, turned)
        with k.vector(tile.lanes, tile.vectors) as v:
            k.store(self.base, (v,), zero)
            k.store(self.delta, (v,), zero)
            with k.loop(self.total.shape[0]) as d:
                k.store(self.total, (d, v), zero)
        with k.vector(count) as v:
            found = self._row(self.log_sum, index, begin + v, const(0))
            k.store(self.base, (v,), found * const(LOG2_E, self.dtype))
        with k.loop(count) as q:
            total = k.register(zero)
            with k.vector(self.plan.value_width) as v:
                other = self._row(self.out, index, begin + q, v)
                k.accumulate(total, "add", self.grad_rows[q, v] * other)
            shift = self._row(self.shift, index, begin + q, const(0))
            k.store(self.delta, (q,), read(total) - shift)

    def _row(self, given: Source, index: tuple[Value, ...], row: Value, place: Value) -> Value:
        offset = given.at(index) + row * given.row + place * given.column
        return cast(given.load(offset), self.dtype)

    def _block(
        self, index: tuple[Value, ...], queries: tuple[Value, Value], some: tuple[Value, Value],
        places: list[Value],
    ) -> None:  # fmt: skip
        """One block of keys; ``queries`` and ``some`` keys: the first one, and how many."""
        k, tile, plan = self.k, self.tile, self.plan
        (begin, count), (key, keys) = queries, some
        for given, rows in ((self.key, self.key_rows), (self.value, self.value_rows)):
            take(k, given, given.at(index) + key * given.row, keys, rows)
        tiles = _tiles(keys, tile)
        product(
            k, self.weights, tile, tiles, plan.width,
            lambda j, d: self.key_rows[j, d], lambda d, v: self.query_turned[d, v],
        )  # fmt: skip
        self.mask.apply(self.weights, index, begin, count, key, keys)
        with k.vector(tile.lanes, tile.vectors) as v:
            base = k.register(self.base[v])
            with k.loop(keys) as j:
                power = vanishing_exp2(self.weights[j, v] - read(base))
                k.store(self.weights, (j, v), power)
        self._sum(1, places, key, keys, count)
        product(
            k, self.slopes, tile, tiles, plan.value_width,
            lambda j, d: self.value_rows[j, d], lambda d, v: self.grad_turned[d, v],
        )  # fmt: skip
        with k.vector(tile.lanes, tile.vectors) as v:
            delta = k.register(self.delta[v])
            with k.loop(keys) as j:
                slope = self.weights[j, v] * (self.slopes[j, v] - read(delta))
                k.store(self.slopes, (j, v), slope)
        product(
            k, self.total, tile, self.total.shape[0] // tile.height, keys,
            lambda d, j: self.key_rows[j, d], lambda j, v: self.slopes[j, v],
            lambda d, v: self.total[d, v],
        )  # fmt: skip
        self._sum(0, places, key, keys, count)

    def _sum(self, which: int, places: list[Value], key: Value, keys: Value, count: Value) -> None:
        """Add to the gradient of keys (0) or values (1)."""
        sums = self.plan.sums[which]
        out = (self.key_gradient, self.value_gradient)[which]
        left = (self.slopes, self.weights)[which]
        right = (self.query_rows, self.grad_rows)[which]
        place = places[which] + key * sums.columns
        product(
            self.k, out, sums.tile, _tiles(keys, sums.tile), count,
            lambda j, q: left[j, q], lambda q, v: right[q, v], lambda j, v: out[place, j, v],
            pieces=sums.pieces, base=(place,),
        )  # fmt: skip

    def _finish(self, index: tuple[Value, ...], begin: Value, count: Value) -> None:
        k, width = self.k, self.plan.width
        scale = const(self.plan.scale, self.dtype)
        with k.loop(width) as d, k.vector(self.tile.lanes, self.tile.vectors) as v:
            k.store(self.total, (d, v), self.total[d, v] * scale)
        offset = self.target.at(index) + begin * self.target.row
        give(k, self.total, width, count, self.target, offset, self.spare)


def _tiles(rows: Value, tile: Tile) -> Value:
    return values.binary("udiv", rows + (tile.height - 1), const(tile.height))
