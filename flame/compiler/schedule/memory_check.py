"""Proves a memory plan by running it on tags instead of numbers.

Invariant checked: whatever a task reads was written last by the task that makes it, and tasks of
one group neither write what another one reads, nor what another one writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from flame.compiler.schedule.memory import Copy, MemoryPlan, Place, itemsize, nbytes_of, tensor_of
from flame.compiler.schedule.task import Schedule, Task
from flame.core.errors import CompileError
from flame.core.types import TensorType
from flame.graph import Symbol

Space = tuple[str, int]


@dataclass(frozen=True)
class _Range:
    """Bytes of one space: from ``begin`` up to below ``end``."""

    space: Space
    begin: int
    end: int

    def meets(self, other: _Range) -> bool:
        return self.space == other.space and self.begin < other.end and other.begin < self.end


class _Memory:
    """What stands where: ranges with the owner whose numbers they hold."""

    def __init__(self) -> None:
        self.tags: dict[Space, list[tuple[_Range, Symbol | str]]] = {}

    def write(self, where: _Range, tag: Symbol | str) -> None:
        kept = [(r, t) for r, t in self.tags.get(where.space, []) if not r.meets(where)]
        self.tags[where.space] = [*kept, (where, tag)] if where.end > where.begin else kept

    def holds(self, where: _Range, tag: Symbol) -> bool:
        if where.end == where.begin:
            return True
        return any(
            t is tag and r.begin <= where.begin and where.end <= r.end
            for r, t in self.tags.get(where.space, [])
        )


def _range(place: Place, nbytes: int) -> _Range:
    return _Range((place.space, place.index), place.offset, place.offset + nbytes)


class _Check:
    def __init__(self, schedule: Schedule, plan: MemoryPlan) -> None:
        self.schedule, self.plan, self.memory = schedule, plan, _Memory()
        self.sizes = [nbytes for _, nbytes in plan.results]
        self.extents: dict[Symbol, int] = {}
        for symbol in (*plan.places, *schedule.owners):
            if isinstance(symbol.type, TensorType):
                owner, offset = schedule.owner(symbol)
                reach = offset * itemsize(symbol) + nbytes_of(symbol.type)
                self.extents[owner] = max(self.extents.get(owner, 0), reach)

    def fail(self, message: str) -> None:
        raise CompileError(f"the memory plan is wrong: {message}\n{self.schedule.graph}")

    def whole(self, owner: Symbol) -> _Range:
        where = _range(self.plan.places[owner], self.extents[owner])
        limit = {"arena": self.plan.arena}.get(where.space[0])
        if where.space[0] == "result":
            limit = self.sizes[where.space[1]]
        if limit is not None and where.end > limit:
            self.fail(f"{owner} reaches byte {where.end} of {where.space}, which has {limit}")
        return where

    def part(self, symbol: Symbol) -> _Range:
        return _range(self.plan.place(self.schedule, symbol), nbytes_of(tensor_of(symbol)))

    def expect(self, symbol: Symbol, reader: str) -> None:
        if not self.memory.holds(self.part(symbol), self.schedule.owner(symbol)[0]):
            self.fail(f"{reader} reads {symbol}, whose memory holds something else")

    def run(self) -> None:
        graph, plan = self.schedule.graph, self.plan
        for symbol in (*graph.inputs, *graph.constants):
            if isinstance(symbol.type, TensorType):
                self.memory.write(self.whole(symbol), symbol)
        for copy in plan.before:
            self.expect(copy.symbol, "a copy at the start")
            self.copy(copy)
        for group in plan.groups:
            self.group(*group)
        self.finish()

    def copy(self, copy: Copy) -> None:
        owner = self.schedule.owner(copy.symbol)[0]
        nbytes = nbytes_of(copy.type)
        if not self.memory.holds(_range(copy.source, nbytes), owner):
            self.fail(f"{copy} copies something else")
        self.memory.write(_range(copy.target, nbytes), owner)

    def group(self, begin: int, end: int) -> None:
        """Tasks that may run at once."""
        writes: list[list[_Range]] = []
        reads: list[list[_Range]] = []
        for t in range(begin, end):
            task = self.schedule.tasks[t]
            tensors = [x for x in task.inputs if isinstance(x, Symbol) and x in self.plan.places]
            tensors += [x for x in task.inputs if isinstance(x, Symbol) and x not in tensors]
            tensors = [x for x in tensors if isinstance(x.type, TensorType)]
            for x in tensors:
                self.expect(x, task.name)
            made = [self.made(s) for s in task.outputs]
            spare = [
                _Range(("arena", 0), at, at + n)
                for at, n in zip(self.plan.temporaries[t], task.lowering.temporaries, strict=True)
            ]
            if any(r.end > self.plan.arena for r in spare):
                self.fail(f"a temporary of {task.name} leaves the arena")
            self.within(t, made, spare)
            reads.append([self.part(x) for x in tensors])
            writes.append(made + spare)
        for i, mine in enumerate(writes):
            for j in range(len(writes)):
                theirs = reads[j] + writes[j] if i != j else []
                if any(a.meets(b) for a in mine for b in theirs):
                    names = [self.schedule.tasks[begin + n].name for n in (i, j)]
                    self.fail(f"{names[0]} writes what {names[1]} uses at the same time")
        for t in range(begin, end):
            for where in writes[t - begin]:
                self.memory.write(where, "temporary")
            for symbol in self.schedule.tasks[t].outputs:
                owner = self.schedule.owner(symbol)[0]
                self.memory.write(self.whole(owner), owner)

    def made(self, symbol: Symbol) -> _Range:
        """What a task writes; a part of a result that others join counts as the whole."""
        return self.whole(self.schedule.owner(symbol)[0])

    def parts(self, task: Task) -> bool:
        """Whether a task only stands for operands that already lie where it joins them."""
        whole = {self.schedule.owner(x)[0] for x in task.inputs if isinstance(x, Symbol)}
        return not task.lowering.steps and whole == set(task.outputs)

    def within(self, t: int, made: list[_Range], spare: list[_Range]) -> None:
        """One task's results lie apart, and over operands only where it may be so."""
        task = self.schedule.tasks[t]
        if self.parts(task):
            return
        owners = dict.fromkeys(self.schedule.owner(s)[0] for s in task.outputs)
        distinct = [self.whole(owner) for owner in owners] + spare
        apart = made + spare
        for i, a in enumerate(distinct):
            if any(a.meets(b) for b in distinct[i + 1 :]):
                self.fail(f"two results or temporaries of {task.name} overlap")
        for i, x in enumerate(task.inputs):
            if not isinstance(x, Symbol) or not isinstance(x.type, TensorType):
                continue
            read = self.part(x)
            for position, a in enumerate(apart):
                if a.meets(read) and ((position, i) not in task.in_place or a != read):
                    self.fail(f"{task.name} writes over its operand {x}")

    def finish(self) -> None:
        graph, plan = self.schedule.graph, self.plan
        for copy in plan.after:
            self.copy(copy)
        for old, new in graph.updates:
            where = _range(plan.places[old], nbytes_of(tensor_of(old)))
            if not self.memory.holds(where, self.schedule.owner(new)[0]):
                self.fail(f"{old} does not hold {new} at the end")
        for symbol, place in zip(graph.outputs, plan.outputs, strict=True):
            if not isinstance(symbol.type, TensorType):
                continue
            where = _range(place, nbytes_of(symbol.type))
            if not self.memory.holds(where, self.schedule.owner(symbol)[0]):
                self.fail(f"the output {symbol} is not where it is said to be")
            exact = symbol in graph.inputs and place.space == "input"
            if place.space != "result" and not exact:
                self.fail(f"the output {symbol} lies in memory that is not its own")


def check_memory(schedule: Schedule, plan: MemoryPlan) -> None:
    """Raise CompileError where the plan would let a task read or write the wrong memory."""
    _Check(schedule, plan).run()
