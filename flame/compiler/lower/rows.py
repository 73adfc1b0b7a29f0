"""Kernels of groups whose reductions stay in a row: several passes over a row that is in cache.

Invariant: a row is all points that share the kept loops; rows along memory have vectors along the
row, rows side by side have vectors across them (`flame.ops.rows`). What a reduction gives, and what
is computed of it, lives in registers.
"""

from __future__ import annotations

import math

from flame.compiler.lower.operands import bind, kernel_name, numbers_of, strides_of
from flame.compiler.lower.passes import Passes, passes_of
from flame.compiler.lower.pointwise import unroll_of
from flame.compiler.lower.scalars import Scalars, inner_dtype, weight_of
from flame.compiler.lower.space import Access, Space
from flame.core.dtypes import DType
from flame.graph import Node, Symbol, tensor_of
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.program import identity
from flame.kernel.values import Register, Value, const
from flame.ops.loops import Nest
from flame.ops.reductions import Reduction
from flame.ops.rows import Index, RowLoops, Rows, rows_of

Write = tuple[Operand, Index, Value]


def kept_stores(space: Space) -> list[Access]:
    """Results with one element a row."""
    sums = {node.outputs[0] for node in space.crossed}
    return [
        s for s in space.stores if s.symbol not in sums and set(s.steps).isdisjoint(space.reduced)
    ]


def rows_in(space: Space) -> Rows:
    """The rows of a space, ordered by its loops."""
    accesses = (*space.accesses, *space.stores)
    lead = tuple(math.prod(space.sizes[i + 1 :]) for i in range(len(space.loops)))
    row = [i for i, atom in enumerate(space.loops) if atom in space.reduced]
    return rows_of(space.sizes, row, [lead, *strides_of(space, accesses)])


def lower_rows(space: Space) -> Lowering:
    """One kernel over rows."""
    return RowKernel(space).lowering()


class RowKernel:
    """Writes the kernel; `crossed` adds sums over the rows to it."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.k = k = KernelBuilder(kernel_name(space))
        self.rows = rows = rows_in(space)
        nest = Nest(
            (*rows.kept.sizes, *rows.row.sizes),
            tuple(
                (*a, *b) for a, b in zip(rows.kept.strides[1:], rows.row.strides[1:], strict=True)
            ),
        )
        self.bound: dict[Access, Operand] = bind(k, space, (*space.accesses, *space.stores), nest)
        self.numbers = numbers_of(k, space)
        self.loops = RowLoops(k, rows, flat=space.on_gpu)
        self.count = k.size(rows.length)
        self.passes: Passes = passes_of(space)
        self.loops.unroll = min(self.loops.unroll, self._unroll())
        self.stash = self._scratch()

    def _unroll(self) -> int:
        heaviest = 0
        for number in range(self.passes.count):
            nodes = {n for n, _ in self.passes.visited(number) if n in self.space.full}
            total = sum(weight_of(n) for n in nodes if not isinstance(n.op, Reduction))
            heaviest = max(heaviest, total)
        return unroll_of(heaviest)

    def _scratch(self) -> dict[Symbol, Operand]:
        """Room for one row of each stashed value, in sizes of powers of two."""
        found = {}
        for symbol in self.passes.stash:
            length = 1 << max(0, self.rows.length - 1).bit_length()
            dtype = inner_dtype(symbol)
            if self.rows.columns:
                found[symbol] = self.k.scratch(dtype, (length, self.loops.width))
            elif self.space.on_gpu:  # in registers
                found[symbol] = self.k.local(dtype, (length,))
            else:
                found[symbol] = self.k.scratch(dtype, (length,))
        return found

    def lowering(self) -> Lowering:
        with self.loops.each_row(passes=self.passes.count) as row:
            self.visit(row)
        return self.k.finish()

    def visit(self, row: Index) -> None:
        """All passes over one row."""
        first = (*row, *(const(0) for _ in self.rows.row.sizes))
        known: dict[Symbol, Value] = {}
        self._kept(-1, first, known)
        for number in range(self.passes.count):
            self._pass(number, row, known)
            self._kept(number, first, known)
        writes = [(self.bound[s], first, known[s.symbol]) for s in kept_stores(self.space)]
        if writes:
            self.k.store_all(writes)

    def more(self, number: int, index: Index, scalars: Scalars) -> list[Write]:
        """Writes of pass ``number`` that another kind of kernel adds."""
        return []

    def _kept(self, number: int, first: Index, known: dict[Symbol, Value]) -> None:
        """Values at the kept level that pass ``number`` has made known."""
        scalars = Scalars(self.space, self.numbers, lambda a: self.bound[a][first], known)
        for symbol in self.passes.kept(number):
            scalars.of(symbol)

    def _pass(self, number: int, row: Index, known: dict[Symbol, Value]) -> None:
        k, passes = self.k, self.passes
        folds = [(node, *start_fold(k, node)) for node in passes.reductions(number)]
        stores = passes.stores(number)
        kept = [s for s in passes.stash if passes.first[s] == number]
        if not (folds or stores or kept or passes.crossed(number)):
            return
        with self.loops.each(row) as index:
            here = dict(known)
            for symbol, room in self.stash.items():
                if passes.first[symbol] < number:
                    here[symbol] = room[self._place(index)]
            for symbol, access in passes.reload.items():
                if passes.first[symbol] < number:
                    here[symbol] = self.bound[access][index]
            scalars = Scalars(self.space, self.numbers, lambda a: self.bound[a][index], here)
            for node, total, register in folds:
                fold(k, scalars, node, total, register)
            writes = [(self.bound[s], index, scalars.of(s.symbol)) for s in stores]
            writes += [(self.stash[s], self._place(index), scalars.of(s)) for s in kept]
            writes += self.more(number, index, scalars)
            if writes:
                k.store_all(writes)
        for node, _, register in folds:
            known[node.outputs[0]] = finish_fold(node, values.read(register), self.count)

    def _place(self, index: Index) -> Index:
        """Where a point of the row stands in scratch."""
        inner = index[len(self.rows.kept.sizes) :]
        place = const(0)
        for i, size in zip(inner, self.loops.sizes, strict=True):
            place = place * size + i
        return (place, self.loops.lane) if self.rows.columns else (place,)


def total_of(node: Node) -> DType:
    """The dtype in which a reduction is summed."""
    assert isinstance(node.op, Reduction)
    source, made = tensor_of(node.inputs[0]).dtype, tensor_of(node.outputs[0]).dtype
    return node.op.total_dtype(source, made)


def start_fold(k: KernelBuilder, node: Node) -> tuple[DType, Register]:
    """The dtype of a reduction's total, and a register for it."""
    assert isinstance(node.op, Reduction)
    total = total_of(node)
    return total, k.register(const(identity(node.op.combine, total), total))


def fold(k: KernelBuilder, scalars: Scalars, node: Node, total: DType, register: Register) -> None:
    """Add the element of this point to a reduction's total."""
    assert isinstance(node.op, Reduction)
    prepared = node.op.prepared(tensor_of(node.inputs[0]).dtype, total)
    k.accumulate(register, node.op.combine, prepared(scalars.operand(node, 0)))


def finish_fold(node: Node, total: Value, count: Value) -> Value:
    """A reduction's result, of its total."""
    assert isinstance(node.op, Reduction)
    return node.op.finished(total, count, inner_dtype(node.outputs[0]))
