"""Kernels of groups with long reductions to few results: parts of the loops, then their totals.

Invariants: the first kernel visits every point once, folds all reductions of the group over each
part, and writes the results at the full level; the second one folds the parts, in order, and
computes and writes what stands at the kept level. The cut depends on shapes alone, never on the
number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flame.compiler.lower.atoms import Atom
from flame.compiler.lower.operands import bind, kernel_name, numbers_of, strides_of
from flame.compiler.lower.pointwise import unroll_of
from flame.compiler.lower.rows import finish_fold, fold, start_fold, total_of
from flame.compiler.lower.scalars import Scalars, weight_of
from flame.compiler.lower.space import Access, Space
from flame.core.dtypes import DType
from flame.core.types import Shape, contiguous_strides, tensor_type
from flame.graph import Node, Symbol
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering
from flame.kernel.values import Register, Value, const
from flame.ops import schedules
from flame.ops.loops import Nest, coalesce
from flame.ops.reductions import CHUNK, COLUMNS, Reduction
from flame.ops.rows import unroll_for

SHORT_RUN = 64  # elements along memory that are few for the threads of a warp

Registers = Sequence[tuple[DType, Register]]
Place = dict[int, Value]  # counters or extents by loop


@dataclass(frozen=True)
class _Nest:
    """Loops after merging, none of them over kept and reduced atoms; the strides of operands."""

    sizes: Shape
    strides: tuple[Shape, ...]
    reduced: tuple[bool, ...]


def _merged(space: Space, strides: Sequence[Shape]) -> _Nest:
    """The loops of a space as few as its operands allow."""
    classes = [atom in space.reduced for atom in space.loops]
    sizes: list[int] = []
    found: list[list[int]] = [[] for _ in strides]
    reduced: list[bool] = []
    begin = 0
    for end in range(1, len(classes) + 1):
        if end < len(classes) and classes[end] == classes[begin]:
            continue
        run = coalesce(space.sizes[begin:end], [s[begin:end] for s in strides])
        sizes += run.sizes
        reduced += [classes[begin]] * len(run.sizes)
        for mine, more in zip(found, run.strides, strict=True):
            mine += more
        begin = end
    return _Nest(tuple(sizes), tuple(map(tuple, found)), tuple(reduced))


def lower_parts(space: Space) -> Lowering:
    """Two kernels, and a temporary for each reduction."""
    return _Parts(space).lowering()


class _Parts:
    def __init__(self, space: Space) -> None:
        self.space = space
        self.folds = [node for node in space.nodes if isinstance(node.op, Reduction)]
        full = {s.symbol for s in space.stores if space.covers(s)}
        self.full_stores = [s for s in space.stores if s.symbol in full]
        self.kept_stores = [s for s in space.stores if s.symbol not in full]
        late = {n for n in space.nodes if n not in space.full}
        self.late_reads = self._read_by(late)
        self.early_reads = self._read_by(set(space.full))
        self.totals = [total_of(node) for node in self.folds]
        self.gpu = space.on_gpu

    def _read_by(self, nodes: set[Node]) -> list[Access]:
        found = {a: None for (n, _), a in self.space.reads.items() if n in nodes}
        return list(found)

    def lowering(self) -> Lowering:
        space, kept = self.space, self.space.kept
        accesses = [*self.early_reads, *self.full_stores]
        partial = _row_major(space.loops, space.reduced)
        self.nest = _merged(space, [*strides_of(space, accesses), partial])
        self.axis = max(
            (i for i, gone in enumerate(self.nest.reduced) if gone),
            key=lambda i: self.nest.sizes[i],
        )
        count = math.prod(a.size for a in space.reduced)
        size = self.nest.sizes[self.axis]
        self.kept_count = math.prod(a.size for a in kept)
        columns = min(self.kept_count, COLUMNS) if not self.nest.reduced[-1] else 1
        # short runs of memory leave threads idle, so all reduced loops are one
        self.flat = self.gpu and self.nest.reduced[-1] and self.nest.sizes[-1] < SHORT_RUN
        if self.flat:
            size = count
        if self.gpu:
            self.step = schedules.part_step(size, min(size, self._cut(count)))
        else:
            self.step = max(1, CHUNK * size // max(count * columns, 1))
        self.parts = -(-size // self.step)
        first = self._first(accesses)
        second = self._second()
        nbytes = [self.parts * self.kept_count * total.itemsize for total in self.totals]
        return Lowering((first, second), tuple(nbytes))

    def _cut(self, count: int) -> int:
        """About how many parts a GPU takes."""
        if self.nest.reduced[-1]:
            return schedules.row_parts(count, self.kept_count)
        storing = bool(self.full_stores)
        return schedules.column_parts(count, self.kept_count, storing=storing)

    def _partial_strides(self, kept: Shape) -> Shape:
        """Strides of partial totals (parts, *kept): a GPU sums parts that lie side by side."""
        return (1, *(self.parts * s for s in kept)) if self.gpu else (self.kept_count, *kept)

    def _first(self, accesses: Sequence[Access]) -> BoundKernel:
        """Each part by itself: its point of every loop, and its totals."""
        nest = self.nest
        self.k = k = KernelBuilder(f"{kernel_name(self.space)}_parts")
        self.bound = bind(k, self.space, accesses, Nest(nest.sizes, nest.strides))
        strides, shape = self._partial_strides(nest.strides[-1]), (self.parts, *nest.sizes)
        self.partial = [
            k.tensor("temporary", i, tensor_type(total, shape, strides))
            for i, total in enumerate(self.totals)
        ]
        self.numbers = numbers_of(k, self.space)
        nodes = [n for n in self.space.full if not isinstance(n.op, Reduction)]
        last = len(nest.sizes) - 1
        self.unroll = min(unroll_of(sum(map(weight_of, nodes))), unroll_for(nest.sizes[last]))
        outer = [i for i, gone in enumerate(nest.reduced) if not gone and i != last]
        extents = {i: k.size(n) for i, n in enumerate(nest.sizes)}
        width = k.size(self.step)
        if self.flat:
            count = k.size(math.prod(n for n, r in zip(nest.sizes, nest.reduced, strict=True) if r))
            with k.parallel(self.parts, *(nest.sizes[i] for i in outer), work=CHUNK) as counters:
                self.part, *kept = counters
                self._flat_run(dict(zip(outer, kept, strict=True)), extents, count, width)
            return k.bind()
        blocks = [] if nest.reduced[last] else [-(-nest.sizes[last] // COLUMNS)]
        sizes = [nest.sizes[i] for i in outer]
        with k.parallel(self.parts, *sizes, *blocks, work=CHUNK) as (self.part, *counters):
            self.begin = self.part * width
            extents[self.axis] = values.binary("min", extents[self.axis] - self.begin, width)
            place = dict(zip(outer, counters, strict=False))
            if blocks:
                self._side_by_side(place, extents, counters[-1] * COLUMNS)
            else:
                self._along(place, extents)
        return k.bind()

    def _side_by_side(self, place: Place, extents: Place, start: Value) -> None:
        """A block of kept points in vectors, the reduced loops inside."""
        k, last = self.k, len(self.nest.sizes) - 1
        folded = [i for i, gone in enumerate(self.nest.reduced) if gone]
        extent = values.binary("min", extents[last] - start, const(COLUMNS))
        with k.vector(extent, self.unroll) as lane:
            place[last] = start + lane
            registers = [start_fold(k, node) for node in self.folds]
            with k.nest([extents[i] for i in folded]) as counters:
                self._visit({**place, **dict(zip(folded, counters, strict=True))}, registers)
            self._keep(place, registers)

    def _along(self, place: Place, extents: Place) -> None:
        """One kept point, vectors along the innermost reduced loop."""
        k = self.k
        *serial, inner = [i for i, gone in enumerate(self.nest.reduced) if gone]
        registers = [start_fold(k, node) for node in self.folds]
        with (
            k.nest([extents[i] for i in serial]) as counters,
            k.vector(extents[inner], self.unroll) as v,
        ):
            self._visit({**place, **dict(zip(serial, counters, strict=True)), inner: v}, registers)
        self._keep(place, registers)

    def _flat_run(self, place: Place, extents: Place, count: Value, width: Value) -> None:
        """One kept point, and a range of all reduced loops taken as one."""
        k = self.k
        folded = [i for i, gone in enumerate(self.nest.reduced) if gone]
        registers = [start_fold(k, node) for node in self.folds]
        begin, self.begin = self.part * width, const(0)
        with k.vector(values.binary("min", count - begin, width), self.unroll) as v:
            rest, here = begin + v, dict(place)
            for i in reversed(folded[1:]):
                here[i] = values.binary("urem", rest, extents[i])
                rest = values.binary("udiv", rest, extents[i])
            here[folded[0]] = rest
            self._visit(here, registers)
        self._keep(place, registers)

    def _visit(self, place: Place, registers: Registers) -> None:
        """One point of all loops."""
        index = tuple(
            place[i] + self.begin if i == self.axis else place[i] for i in range(len(place))
        )
        scalars = Scalars(self.space, self.numbers, lambda a: self.bound[a][index], {})
        for node, (total, register) in zip(self.folds, registers, strict=True):
            fold(self.k, scalars, node, total, register)
        writes = [(self.bound[s], index, scalars.of(s.symbol)) for s in self.full_stores]
        if writes:
            self.k.store_all(writes)

    def _keep(self, place: Place, registers: Registers) -> None:
        """The totals of a part at one kept point."""
        index = (self.part, *(place.get(i, const(0)) for i in range(len(self.nest.sizes))))
        self.k.store_all(
            [(t, index, values.read(r)) for t, (_, r) in zip(self.partial, registers, strict=True)]
        )

    def _second(self) -> BoundKernel:
        """The totals of all parts, and what is computed of them."""
        kept = self.space.kept
        sizes = tuple(atom.size for atom in kept)
        self.k = k = KernelBuilder(f"{kernel_name(self.space)}_total")
        accesses = [*self.late_reads, *self.kept_stores]
        nest = coalesce(sizes, [*(a.strides(kept) for a in accesses), contiguous_strides(sizes)])
        self.bound = bind(k, self.space, accesses, nest)
        strides = self._partial_strides(nest.strides[-1])
        self.partial = [
            k.tensor("temporary", i, tensor_type(t, (self.parts, *nest.sizes), strides))
            for i, t in enumerate(self.totals)
        ]
        self.numbers = numbers_of(k, self.space)
        count = k.size(math.prod(a.size for a in self.space.reduced))
        parts = k.size(self.parts)
        if not nest.sizes or self.gpu:
            with k.parallel(*nest.sizes, work=self.parts) as counters:
                index = counters if nest.sizes else ()
                registers = [start_fold(k, node) for node in self.folds]
                with k.vector(parts, 4) as part:
                    self._add((part, *index), registers)
                self._finish(index, registers, count)
            return k.bind()
        *outer_sizes, inner = nest.sizes
        blocks = -(-inner // COLUMNS)
        with k.parallel(*outer_sizes, blocks, work=self.parts * COLUMNS) as (*outer, block):
            start = block * COLUMNS
            extent = values.binary("min", k.size(inner) - start, const(COLUMNS))
            with k.vector(extent, unroll_for(inner)) as lane:
                index = (*outer, start + lane)
                registers = [start_fold(k, node) for node in self.folds]
                with k.loop(parts) as part:
                    self._add((part, *index), registers)
                self._finish(index, registers, count)
        return k.bind()

    def _add(self, index: tuple[Value, ...], registers: Registers) -> None:
        """One part to the totals."""
        for node, partial, (_, register) in zip(self.folds, self.partial, registers, strict=True):
            assert isinstance(node.op, Reduction)
            self.k.accumulate(register, node.op.combine, partial[index])

    def _finish(self, index: tuple[Value, ...], registers: Registers, count: Value) -> None:
        """The results at one kept point."""
        known: dict[Symbol, Value] = {
            node.outputs[0]: finish_fold(node, values.read(register), count)
            for node, (_, register) in zip(self.folds, registers, strict=True)
        }
        scalars = Scalars(self.space, self.numbers, lambda a: self.bound[a][index], known)
        self.k.store_all([(self.bound[s], index, scalars.of(s.symbol)) for s in self.kept_stores])


def _row_major(loops: Sequence[Atom], reduced: frozenset[Atom]) -> Shape:
    """Steps of a tensor over the kept loops, in their order."""
    found: list[int] = []
    step = 1
    for atom in reversed(loops):
        found.insert(0, 0 if atom in reduced else step)
        step *= 1 if atom in reduced else atom.size
    return tuple(found)
