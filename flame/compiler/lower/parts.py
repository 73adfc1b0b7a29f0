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
from flame.ops.loops import Nest, coalesce
from flame.ops.reductions import CHUNK, COLUMNS, Reduction
from flame.ops.rows import unroll_for

Registers = Sequence[tuple[DType, Register]]


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
        self.step = max(1, CHUNK * size // max(count * columns, 1))
        self.parts = -(-size // self.step)
        first = self._first(accesses)
        second = self._second()
        nbytes = [self.parts * self.kept_count * total.itemsize for total in self.totals]
        return Lowering((first, second), tuple(nbytes))

    def _first(self, accesses: Sequence[Access]) -> BoundKernel:
        space, nest = self.space, self.nest
        k = KernelBuilder(f"{kernel_name(space)}_parts")
        bound = bind(k, space, accesses, Nest(nest.sizes, nest.strides))
        strides = (self.kept_count, *nest.strides[-1])
        shape = (self.parts, *nest.sizes)
        partial = [
            k.tensor("temporary", i, tensor_type(total, shape, strides))
            for i, total in enumerate(self.totals)
        ]
        numbers = numbers_of(k, space)
        nodes = [n for n in space.full if not isinstance(n.op, Reduction)]
        unroll = unroll_of(sum(map(weight_of, nodes)))
        last = len(nest.sizes) - 1
        columns = not nest.reduced[last]
        outer_kept = [i for i, gone in enumerate(nest.reduced) if not gone and i != last]
        folded = [i for i, gone in enumerate(nest.reduced) if gone]
        extents = {i: k.size(n) for i, n in enumerate(nest.sizes)}
        width = k.size(self.step)
        blocks = [-(-nest.sizes[last] // COLUMNS)] if columns else []
        sizes = [nest.sizes[i] for i in outer_kept]
        with k.parallel(self.parts, *sizes, *blocks, work=CHUNK) as (part, *outer):
            begin = part * width
            place = dict(zip(outer_kept, outer, strict=False))
            whole = {**extents, self.axis: values.binary("min", extents[self.axis] - begin, width)}

            def visit(at: dict[int, Value], registers: Registers) -> None:
                index = tuple(at[i] + begin if i == self.axis else at[i] for i in range(last + 1))
                scalars = Scalars(space, numbers, lambda a: bound[a][index], {})
                for node, (total, register) in zip(self.folds, registers, strict=True):
                    fold(k, scalars, node, total, register)
                writes = [(bound[s], index, scalars.of(s.symbol)) for s in self.full_stores]
                if writes:
                    k.store_all(writes)

            def finish(at: dict[int, Value], registers: Registers) -> None:
                index = (part, *(at.get(i, const(0)) for i in range(last + 1)))
                k.store_all(
                    [
                        (t, index, values.read(r))
                        for t, (_, r) in zip(partial, registers, strict=True)
                    ]
                )

            if columns:
                start = outer[-1] * COLUMNS
                extent = values.binary("min", extents[last] - start, const(COLUMNS))
                with k.vector(extent, min(unroll, unroll_for(nest.sizes[last]))) as lane:
                    place[last] = start + lane
                    registers = [start_fold(k, node) for node in self.folds]
                    with k.nest([whole[i] for i in folded]) as counters:
                        visit({**place, **dict(zip(folded, counters, strict=True))}, registers)
                    finish(place, registers)
            else:
                registers = [start_fold(k, node) for node in self.folds]
                *serial, vector = folded
                with (
                    k.nest([whole[i] for i in serial]) as counters,
                    k.vector(whole[vector], min(unroll, unroll_for(nest.sizes[vector]))) as v,
                ):
                    at = {**place, **dict(zip(serial, counters, strict=True)), vector: v}
                    visit(at, registers)
                finish(place, registers)
        return k.bind()

    def _second(self) -> BoundKernel:
        """The totals of all parts, and what is computed of them."""
        space, kept = self.space, self.space.kept
        k = KernelBuilder(f"{kernel_name(space)}_total")
        accesses = [*self.late_reads, *self.kept_stores]
        own = [tuple(a.steps.get(atom, 0) for atom in kept) for a in accesses]
        row_major = contiguous_strides(tuple(a.size for a in kept))
        nest = coalesce(tuple(a.size for a in kept), [*own, row_major])
        bound = bind(k, space, accesses, nest)
        strides = (self.kept_count, *nest.strides[-1])
        temporaries = [
            k.tensor("temporary", i, tensor_type(t, (self.parts, *nest.sizes), strides))
            for i, t in enumerate(self.totals)
        ]
        numbers = numbers_of(k, space)
        count = k.size(math.prod(a.size for a in space.reduced))
        parts = k.size(self.parts)

        def finish(index: tuple[Value, ...], registers: Registers) -> None:
            known: dict[Symbol, Value] = {
                node.outputs[0]: finish_fold(node, values.read(register), count)
                for node, (_, register) in zip(self.folds, registers, strict=True)
            }
            scalars = Scalars(space, numbers, lambda a: bound[a][index], known)
            k.store_all([(bound[s], index, scalars.of(s.symbol)) for s in self.kept_stores])

        def folds(index: tuple[Value, ...], part: Value, registers: Registers) -> None:
            for node, temporary, (_, register) in zip(
                self.folds, temporaries, registers, strict=True
            ):
                assert isinstance(node.op, Reduction)
                k.accumulate(register, node.op.combine, temporary[(part, *index)])

        if not nest.sizes:
            with k.parallel(work=self.parts) as _:
                registers = [start_fold(k, node) for node in self.folds]
                with k.vector(parts, 4) as part:
                    folds((), part, registers)
                finish((), registers)
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
                    folds(index, part, registers)
                finish(index, registers)
        return k.bind()


def _row_major(loops: Sequence[Atom], reduced: frozenset[Atom]) -> Shape:
    """Steps of a tensor over the kept loops, in their order."""
    found: list[int] = []
    step = 1
    for atom in reversed(loops):
        found.insert(0, 0 if atom in reduced else step)
        step *= 1 if atom in reduced else atom.size
    return tuple(found)
