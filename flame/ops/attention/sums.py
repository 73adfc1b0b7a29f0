"""Gradients of keys and values, which blocks of queries add to one after the other.

An entry of the batch that is one iteration of the parallel loop has its sums in scratch memory, if
they stay in the cache there; several iterations have sums of their own in temporary memory, which
are then added up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flame.core.dtypes import DType
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Operand
from flame.kernel.values import Value, const, read
from flame.ops.attention.tiles import KEYS, SCRATCH_BYTES, flat, product, source, width_tile


class Sums:
    """The sums of one operand: (batch, splits, keys, columns), whole blocks of whole tiles."""

    def __init__(
        self, output: int, type_: TensorType, batch: Shape, dtype: DType, sizes: Shape,
        splits: int, factor: float, temporaries: list[int],
    ) -> None:  # fmt: skip
        """``output``: which one of the op, of this type, with these strides over ``sizes``.

        Times ``factor`` they are the gradient.
        """
        self.output, self.type, self.batch, self.dtype = output, type_, batch, dtype
        self.sizes, self.splits, self.factor = sizes, splits, factor
        self.keys, self.width = type_.shape[-2:]
        self.tile, self.pieces = width_tile(dtype, self.width)
        self.columns = self.tile.lanes * self.pieces
        blocks = -(-self.keys // KEYS)
        self.entry = blocks * KEYS * self.columns  # elements of one split
        # by powers of two, as the number of rows stands in the kernel's text
        rows = KEYS * (1 << max(0, blocks - 1).bit_length())
        self.local = splits == 1 and rows * self.columns * dtype.itemsize <= SCRATCH_BYTES
        self.capacity = rows
        self.position = len(temporaries)
        if not self.local:
            count = splits * self.entry
            for size in sizes:
                count *= size
            temporaries.append(max(1, count) * dtype.itemsize)

    def bind(self, k: KernelBuilder) -> Operand:
        """Indexed by (offset of the split, key, column)."""
        if self.local:
            whole = k.scratch(self.dtype, (self.capacity, self.columns))
        else:
            whole = k.tensor("temporary", self.position, tensor_type(self.dtype, (2,), (1,)))
        return Operand(whole.buffer, (1, 1, 1), (const(1), const(self.columns), const(1)))

    def rows(self, k: KernelBuilder, count: int) -> Operand:
        """Scratch memory for so many rows as wide as these, padding included."""
        made = k.scratch(self.dtype, (count, self.columns))
        return Operand(made.buffer, (count, self.width), made.strides)

    def place(self, k: KernelBuilder, index: Sequence[Value], split: Value) -> Value:
        """Where the sums of a split begin."""
        if self.local:
            return const(0)
        number = const(0)
        for i, size in zip(index, self.sizes, strict=True):
            number = number * k.size(size) + i
        return (number * k.size(self.splits) + split) * k.size(self.entry)

    def add(self) -> BoundKernel:
        """The kernel that adds up the splits."""
        k = KernelBuilder("attention_sums")
        given = self.bind(k)
        out = source(k, "output", self.output, self.type, self.batch)
        entry = k.size(self.entry)
        work = max(1, KEYS * self.columns * self.splits // 8)
        with k.parallel(*self.sizes, -(-self.keys // KEYS), work=work) as (*at, block):
            key, index = block * KEYS, tuple(at)
            keys = values.binary("min", k.size(self.keys) - key, const(KEYS))
            begin = self.place(k, index, const(0))
            with k.loop(keys) as j, k.vector(self.width) as v:
                total = k.register(given[begin, key + j, v])
                with k.loop(k.size(self.splits - 1)) as split:
                    other = given[begin + (split + 1) * entry, key + j, v]
                    k.assign(total, read(total) + other)
                offset = out.at(index) + (key + j) * out.row + v * out.column
                made = read(total) * const(self.factor, self.dtype)
                k.store(flat(out.operand), (offset,), made)
        return k.bind()


class BoundSums:
    """Sums in the kernel that makes them."""

    def __init__(self, k: KernelBuilder, sums: Sums) -> None:
        self.k, self.sums, self.memory = k, sums, sums.bind(k)
        self.whole = sums.splits == 1
        if self.whole:
            self.out = source(k, "output", sums.output, sums.type, sums.batch)
        self.place = const(0)

    def begin(self, index: Sequence[Value], split: Value, rows: Operand) -> None:
        """For an entry of the batch; ``rows`` of `Sums.rows` will be summed."""
        k, sums = self.k, self.sums
        self.place = sums.place(k, index, split)
        padding = sums.columns - sums.width
        if padding:  # whatever lies there may be numbers that are slow to compute with
            with k.loop(rows.shape[0]) as r, k.vector(padding) as v:
                offset = r * sums.columns + sums.width + v
                k.store(flat(rows), (offset,), const(0.0, sums.dtype))

    def accumulate(
        self, key: Value, keys: Value, queries: Value, seen: Value,
        left: Callable[[Value, Value], Value], right: Callable[[Value, Value], Value],
    ) -> None:  # fmt: skip
        """sums[key + j] += the sum over queries of left(j, q) * right(q, columns).

        Keys from ``seen`` on have no sums yet.
        """
        sums, memory, zero = self.sums, self.memory, const(0.0, self.sums.dtype)
        tiles = values.binary("udiv", keys + (sums.tile.height - 1), const(sums.tile.height))
        place = self.place + key * sums.columns

        def start(j: Value, v: Value) -> Value:
            return values.select(key + j >= seen, zero, memory[place, j, v])

        product(
            self.k, memory, sums.tile, tiles, queries, left, right, start,
            pieces=sums.pieces, base=(place,),
        )  # fmt: skip

    def finish(self, index: tuple[Value, ...], seen: Value) -> None:
        """Zeros for keys from ``seen`` on; the gradient, if no other split adds to it."""
        k, sums, zero = self.k, self.sums, const(0.0, self.sums.dtype)
        if not self.whole:
            first = self.place + seen * sums.columns
            with k.vector(k.size(sums.entry) - seen * sums.columns, 4) as v:
                k.store(flat(self.memory), (first + v,), zero)
            return
        out, factor = self.out, const(sums.factor, sums.dtype)
        with k.loop(k.size(sums.keys)) as j:
            missing = j >= seen
            with k.vector(sums.width) as v:
                found = self.memory[self.place, j, v] * factor
                offset = out.at(index) + j * out.row + v * out.column
                k.store(flat(out.operand), (offset,), values.select(missing, zero, found))
