"""The kernels of attention's backward pass: probabilities are computed anew, block by block.

With P the probabilities and D a number for each query (its row of grad * out, summed):

    dS = P (grad valueᵀ - D)    dquery = scale dS key    dkey = scale dSᵀ query    dvalue = Pᵀ grad

With dropout, which multiplies by Z, these are dS = P (Z grad valueᵀ - D) and dvalue = (P Z)ᵀ grad.

An entry of the batch is one iteration, or a few that share its queries: each sums gradients of all
keys and values in temporary memory, which are then added up in a fixed order.
Source: Dao and others, "FlashAttention: fast and memory-efficient exact attention", 2022.
"""

from __future__ import annotations

import math

from flame.core.types import TensorType
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering
from flame.kernel.values import Value, cast, const, read
from flame.ops.attention.dropping import Dropping
from flame.ops.attention.forward import column, matrix, over_batch
from flame.ops.attention.sums import BoundSums, Sums
from flame.ops.attention.tiles import (
    KEYS,
    LEAST_ITEMS,
    LOG2_E,
    BoundRows,
    Mask,
    Packing,
    Source,
    clear,
    give,
    product,
    query_tile,
    source,
    take,
    turn,
)
from flame.ops.elementwise import compute_dtype
from flame.render.math.exponential import vanishing_exp2

Inputs = tuple[TensorType | None, ...]


def attend_backward(
    types: Inputs, outputs: tuple[TensorType, ...], *, causal: bool, scale: float, dropout: float
) -> Lowering:
    """Of (grad, shift, query, key, value, mask, out, log_sum [, seed, offset]): (dquery, dkey,
    dvalue). ``types``: of the tensors."""
    return _Backward(types, outputs, causal=causal, scale=scale, dropout=dropout).lowering()


class _Backward:
    def __init__(
        self, types: Inputs, outputs: tuple[TensorType, ...], *, causal: bool, scale: float,
        dropout: float,
    ) -> None:  # fmt: skip
        grad, shift, query, key, value, mask, out, log_sum = types
        assert grad is not None
        assert query is not None
        assert key is not None
        assert value is not None
        assert out is not None
        assert log_sum is not None
        mask = None if mask is None else matrix(mask)
        shifted = None if shift is None else column(shift)
        self.types = (grad, shifted, query, key, value, mask, out, column(log_sum))
        self.outputs, self.causal, self.scale, self.dropout = outputs, causal, scale, dropout
        self.dtype = compute_dtype(query.dtype)
        self.queries, self.keys = query.shape[-2], key.shape[-2]
        self.width, self.value_width = query.shape[-1], value.shape[-1]
        self.tile = query_tile(self.dtype, self.queries)
        self.query_blocks = -(-self.queries // self.tile.lanes)
        entries = max(1, math.prod(grad.shape[:-2]))
        wanted = min(self.query_blocks, -(-LEAST_ITEMS // entries))
        self.span = -(-self.query_blocks // max(1, wanted))  # blocks of queries of a split
        self.splits = max(1, -(-self.query_blocks // max(1, self.span)))
        self.packing = Packing(self.dtype, self.tile, whole=self.splits == 1)
        self.rows = (self.packing.rows(3, key), self.packing.rows(4, value))
        operands = (*self.types[:3], *(r.type for r in self.rows), *self.types[5:], *outputs)
        self.nest = over_batch(operands, grad.shape[:-2])
        self.temporaries = self.packing.temporaries
        factors = (1 / LOG2_E, 1.0)  # queries are in units of log 2
        self.sums = [
            Sums(
                1 + i, outputs[1 + i], self.nest.strides[9 + i], self.dtype, self.nest.sizes,
                self.splits, factors[i], self.temporaries,
            )
            for i in range(2)
        ]  # fmt: skip

    def lowering(self) -> Lowering:
        kernels = [*self.packing.kernels, _Blocks(self).kernel()]
        if self.splits > 1:
            kernels += [sums.add() for sums in self.sums]
        bound = tuple(kernel for kernel in kernels if kernel.extent)
        return Lowering(bound, tuple(self.temporaries))


class _Blocks:
    """The kernel that goes through all pairs of a block of queries and one of keys."""

    def __init__(self, plan: _Backward) -> None:
        self.plan, self.tile, self.dtype = plan, plan.tile, plan.dtype
        self.k = k = KernelBuilder("attention_backward")
        strides, dtype, lanes = plan.nest.strides, plan.dtype, plan.tile.lanes
        self.mask = Mask(k, 5, plan.tile, dtype, plan.types[5], strides[5], causal=plan.causal)
        self.dropping: Dropping | None = None
        if plan.dropout:
            self.dropping = Dropping(
                k, 8, plan.tile, plan.dropout, plan.nest.sizes, plan.queries, plan.keys
            )
        tensors = [(i, t) for i, t in enumerate(plan.types) if t is not None and i not in (3, 4, 5)]
        made = {i: source(k, "input", i, t, strides[i]) for i, t in tensors}
        self.grad, self.query, self.out, self.log_sum = (made[i] for i in (0, 2, 6, 7))
        self.shift = made.get(1)
        self.key = BoundRows(k, plan.rows[0], strides[3])
        self.value = BoundRows(k, plan.rows[1], strides[4])
        self.target = source(k, "output", 0, plan.outputs[0], strides[8])
        key_sums, value_sums = plan.sums
        self.gradients = (BoundSums(k, key_sums), BoundSums(k, value_sums))
        self.query_rows, self.grad_rows = key_sums.rows(k, lanes), value_sums.rows(k, lanes)
        self.query_turned = k.scratch(dtype, (plan.width, lanes))
        self.grad_turned = k.scratch(dtype, (plan.value_width, lanes))
        self.weights, self.slopes = (k.scratch(dtype, (KEYS, lanes)) for _ in range(2))
        # of P Z
        self.dropped = self.weights
        if self.dropping is not None:
            self.dropped = k.scratch(dtype, (KEYS, lanes))
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
            for gradient, rows in zip(
                self.gradients, (self.query_rows, self.grad_rows), strict=True
            ):
                gradient.begin(index, split, rows)
            seen = k.register(const(0))
            self.key.prepare(index)
            self.value.prepare(index)
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
                    self._block(index, (begin, count), (key, keys), read(seen))
                self._finish(index, begin, count)
                k.assign(seen, limit)
            for gradient in self.gradients:
                gradient.finish(index, read(seen))
        return k.bind()

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
            delta = read(total)
            if self.shift is not None:
                delta = delta - self._row(self.shift, index, begin + q, const(0))
            k.store(self.delta, (q,), delta)

    def _row(self, given: Source, index: tuple[Value, ...], row: Value, place: Value) -> Value:
        offset = given.at(index) + row * given.row + place * given.column
        return cast(given.load(offset), self.dtype)

    def _block(
        self, index: tuple[Value, ...], queries: tuple[Value, Value], some: tuple[Value, Value],
        seen: Value,
    ) -> None:  # fmt: skip
        """One block of keys; ``queries`` and ``some`` keys: the first one, and how many.

        Keys from ``seen`` on have no gradients yet.
        """
        k, tile, plan = self.k, self.tile, self.plan
        (begin, count), (key, keys) = queries, some
        tiles = values.binary("udiv", keys + (tile.height - 1), const(tile.height))
        product(
            k, self.weights, tile, tiles, plan.width,
            lambda j, d: self.key.load(key + j, d), lambda d, v: self.query_turned[d, v],
        )  # fmt: skip
        self.mask.apply(self.weights, index, begin, count, key, keys)
        with k.vector(tile.lanes, tile.vectors) as v:
            base = k.register(self.base[v])
            with k.loop(keys) as j:
                power = vanishing_exp2(self.weights[j, v] - read(base))
                k.store(self.weights, (j, v), power)
        if self.dropping is not None:
            self.dropping.apply(self.weights, self.dropped, index, begin, key, self.dropping.gain)
        self.gradients[1].accumulate(
            key, keys, count, seen,
            lambda j, q: self.dropped[j, q], lambda q, v: self.grad_rows[q, v],
        )  # fmt: skip
        product(
            k, self.slopes, tile, tiles, plan.value_width,
            lambda j, d: self.value.load(key + j, d), lambda d, v: self.grad_turned[d, v],
        )  # fmt: skip
        with k.vector(tile.lanes, tile.vectors) as v:
            delta = k.register(self.delta[v])
            with k.loop(keys) as j:
                k.store(self.slopes, (j, v), self._slope(j, v, read(delta)))
        product(
            k, self.total, tile, self.total.shape[0] // tile.height, keys,
            lambda d, j: self.key.load(key + j, d), lambda j, v: self.slopes[j, v],
            lambda d, v: self.total[d, v],
        )  # fmt: skip
        self.gradients[0].accumulate(
            key, keys, count, seen,
            lambda j, q: self.slopes[j, q], lambda q, v: self.query_rows[q, v],
        )  # fmt: skip

    def _slope(self, j: Value, v: Value, delta: Value) -> Value:
        """An element of dS; `slopes` holds grad valueᵀ."""
        if self.dropping is None:
            return self.weights[j, v] * (self.slopes[j, v] - delta)
        return self.dropped[j, v] * self.slopes[j, v] - self.weights[j, v] * delta

    def _finish(self, index: tuple[Value, ...], begin: Value, count: Value) -> None:
        k, width = self.k, self.plan.width
        scale = const(self.plan.scale, self.dtype)
        with k.loop(width) as d, k.vector(self.tile.lanes, self.tile.vectors) as v:
            k.store(self.total, (d, v), self.total[d, v] * scale)
        offset = self.target.at(index) + begin * self.target.row
        give(k, self.total, width, count, self.target, offset, self.spare)
