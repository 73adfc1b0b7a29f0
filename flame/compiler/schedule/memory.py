"""Where every symbol of a schedule lies while it runs.

A symbol lies in the arena, in a graph input (a state that is updated in place), in a result that
the caller allocates, or in a constant. Invariants: a result lies in memory of its own, unless the
output is exactly an input that is not updated; inputs are written only where an update says so, and
only after the last read of what they held; the plan depends on the schedule alone.
A result that several tasks make in parts (`schedule.pieces`) lives from the first of them on.

Time counts groups of tasks that may run at once: 0 is before them, 1 the first, the last after all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final, Literal

from flame.compiler.schedule.arena import Interval, place
from flame.compiler.schedule.task import Schedule, Task
from flame.core.types import TensorType
from flame.graph import Symbol

Space = Literal["arena", "input", "result", "constant"]
SLACK: Final = 4  # see `plan_memory`
Group = tuple[int, int]  # the tasks from the first number up to below the second


@dataclass(frozen=True)
class Place:
    """``offset`` bytes into the arena, or into the input, result or constant of that ``index``."""

    space: Space
    index: int
    offset: int

    def __str__(self) -> str:
        number = "" if self.space == "arena" else f" {self.index}"
        return f"{self.space}{number} + {self.offset}"

    def shifted(self, nbytes: int) -> Place:
        return replace(self, offset=self.offset + nbytes)


@dataclass(frozen=True)
class Copy:
    """What ``symbol`` holds, from ``source`` to ``target``."""

    target: Place
    source: Place
    symbol: Symbol

    def __str__(self) -> str:
        return f"{self.target} <- {self.source} (%{self.symbol.name})"

    @property
    def type(self) -> TensorType:
        return tensor_of(self.symbol)


@dataclass(frozen=True)
class Held:
    """Memory of the arena in use where it is fullest: of what type, and the names of the tasks that
    make it and that read it last. None: what a task needs while it runs."""

    nbytes: int
    type: TensorType | None
    maker: str
    reader: str


@dataclass(frozen=True, eq=False)
class MemoryPlan:
    """See the head of this file.

    results: the symbols that need memory of the caller, and how many bytes. outputs: for each
    output of the graph its place, in a result or, where it is exactly an input, in that input.
    temporaries: offsets in the arena for each task. dropped: tasks whose first kernel is left out,
    as it would copy memory onto itself. before, after: what is copied around the tasks. held: what
    is in the arena while the task of the name ``fullest`` runs.
    """

    groups: tuple[Group, ...]
    places: dict[Symbol, Place]
    arena: int
    results: tuple[tuple[Symbol, int], ...]
    outputs: tuple[Place, ...]
    temporaries: tuple[tuple[int, ...], ...]
    dropped: frozenset[int]
    before: tuple[Copy, ...]
    after: tuple[Copy, ...]
    fullest: str
    held: tuple[Held, ...]

    @property
    def peak(self) -> int:
        """Bytes of the arena and of the results."""
        return self.arena + sum(nbytes for _, nbytes in self.results)

    def __str__(self) -> str:
        """Where each symbol lies that owns memory, the copies, and the groups of several tasks."""
        lines = [f"at most {self.peak} bytes, {self.arena} of them in the arena"]
        lines += [f"  %{s.name}: {place}" for s, place in self.places.items()]
        lines += [f"  before: {copy}" for copy in self.before]
        lines += [f"  after: {copy}" for copy in self.after]
        lines += [
            f"  tasks {begin} to {end - 1} may run at once"
            for begin, end in self.groups
            if end - begin > 1
        ]
        return "\n".join(lines)

    def place(self, schedule: Schedule, symbol: Symbol) -> Place:
        """Where a tensor begins."""
        owner, offset = schedule.owner(symbol)
        return self.places[owner].shifted(offset * itemsize(symbol))


def tensor_of(symbol: Symbol) -> TensorType:
    assert isinstance(symbol.type, TensorType), f"{symbol} is a number"
    return symbol.type


def itemsize(symbol: Symbol) -> int:
    return tensor_of(symbol).dtype.itemsize


def nbytes_of(type_: TensorType) -> int:
    """Bytes from the first to the last element."""
    return type_.span * type_.dtype.itemsize


def plan_memory(
    schedule: Schedule,
    groups: Sequence[Group] | None = None,
    late: Collection[int] = (),
) -> MemoryPlan:
    """The memory plan where the tasks of one group may run at once; default: none do.

    late: tasks that may run some time after their place in the order. That their memory is not
    used again before is their caller's care; `SLACK` tasks after them do not ask for it.
    """
    if groups is None:
        groups = [(i, i + 1) for i in range(len(schedule.tasks))]
    return _Planner(schedule, tuple(groups), late).plan()


@dataclass(eq=False)
class _Buffer:
    """Symbols of one size that use the same memory one after the other."""

    members: list[Symbol]


class _Planner:
    def __init__(
        self, schedule: Schedule, groups: tuple[Group, ...], late: Collection[int]
    ) -> None:
        self.schedule, self.graph, self.groups = schedule, schedule.graph, groups
        self.late = late
        self.tasks = schedule.tasks
        self.end = len(groups) + 1
        self.time = [0] * len(self.tasks)
        for number, (begin, end) in enumerate(groups, 1):
            self.time[begin:end] = [number] * (end - begin)
        self.inputs = {s: i for i, s in enumerate(self.graph.inputs)}
        self.updated = {old for old, new in self.graph.updates if old is not new}
        self.made = {s: t for t, task in enumerate(self.tasks) for s in task.outputs}
        self.begun: dict[Symbol, int] = {}  # made in parts by several tasks: the first of them
        for s, t in self.made.items():
            whole = schedule.owner(s)[0]
            if whole is not s:
                self.begun[whole] = min(t, self.begun.get(whole, t))
        self.nbytes: dict[Symbol, int] = {}
        self.reads: dict[Symbol, list[tuple[int, int]]] = {}  # (time, task), -1: a copy
        self.places: dict[Symbol, Place] = {}
        self.results: dict[Symbol, tuple[int, int]] = {}  # -> number, bytes
        self.before: list[Copy] = []
        self.after: list[Copy] = []
        self.stages: list[tuple[Symbol, Symbol]] = []  # (old, new), copied twice
        self.buffers: dict[Symbol, _Buffer] = {}
        self.fullest: tuple[str, tuple[Held, ...]] = ("", ())

    def plan(self) -> MemoryPlan:
        for symbol, index in self.inputs.items():
            self.places[symbol] = Place("input", index, 0)
        for index, symbol in enumerate(self.graph.constants):
            self.places[symbol] = Place("constant", index, 0)
        self._measure()
        outputs = self._results()
        late = self._read_updates()
        self._chain()
        copied = [pair for pair in late if not self._update_directly(*pair)]
        arena, temporaries = self._arrange()
        for old, new in copied:
            self.after.append(Copy(self.places[old], self._place(new), new))
        dropped = {
            t
            for t, task in enumerate(self.tasks)
            if task.updating
            and isinstance(task.inputs[0], Symbol)
            and self._place(task.inputs[0]) == self._place(task.outputs[0])
        }
        return MemoryPlan(
            self.groups,
            self.places,
            arena,
            tuple((symbol, nbytes) for symbol, (_, nbytes) in self.results.items()),
            outputs,
            temporaries,
            frozenset(dropped),
            tuple(self.before),
            tuple(self.after),
            *self.fullest,
        )

    def _place(self, symbol: Symbol) -> Place:
        owner, offset = self.schedule.owner(symbol)
        return self.places[owner].shifted(offset * itemsize(symbol))

    # --- what is read when ------------------------------------------------------------------------

    def _measure(self) -> None:
        for symbol in (*self.inputs, *self.made, *self.graph.constants, *self.schedule.owners):
            if isinstance(symbol.type, TensorType):
                owner, offset = self.schedule.owner(symbol)
                reach = offset * itemsize(symbol) + nbytes_of(symbol.type)
                self.nbytes[owner] = max(self.nbytes.get(owner, 0), reach)
        for t, task in enumerate(self.tasks):
            for x in task.inputs:
                if isinstance(x, Symbol):
                    self._read(x, self.time[t], t)

    def _read(self, symbol: Symbol, time: int, task: int) -> None:
        self.reads.setdefault(self.schedule.owner(symbol)[0], []).append((time, task))

    def _last_read(self, owner: Symbol) -> int:
        return max((time for time, _ in self.reads.get(owner, ())), default=-1)

    def _results(self) -> tuple[Place, ...]:
        """Give the outputs their memory. What is no task's result is copied there at the start."""
        outputs = []
        for symbol in self.graph.outputs:
            owner, offset = self.schedule.owner(symbol)
            if owner in self.made:
                number, _ = self.results.setdefault(owner, (len(self.results), self.nbytes[owner]))
                self.places[owner] = Place("result", number, 0)
                self._read(owner, self.end, -1)
                outputs.append(self.places[owner].shifted(offset * itemsize(symbol)))
            elif symbol in self.inputs and symbol not in self.updated:
                outputs.append(self.places[symbol])
            else:
                type_ = tensor_of(symbol)
                known = symbol in self.results
                number, _ = self.results.setdefault(symbol, (len(self.results), nbytes_of(type_)))
                outputs.append(Place("result", number, 0))
                if not known:
                    self._read(symbol, 0, -1)
                    self.before.append(Copy(outputs[-1], self._place(symbol), symbol))
        return tuple(outputs)

    def _read_updates(self) -> list[tuple[Symbol, Symbol]]:
        """Note what the updates read; those whose copy comes after the tasks are returned.

        A new value in the memory of another state that is updated is put aside at the start.
        """
        late = []
        for old, new in self.graph.updates:
            owner = self.schedule.owner(new)[0]
            if old is new:
                continue
            if owner in self.updated:
                self._read(new, 0, -1)
                self.stages.append((old, new))
            else:
                self._read(new, self.end, -1)
                late.append((old, new))
        return late

    # --- who takes whose memory -------------------------------------------------------------------

    def _chain(self) -> None:
        """Join every task's result with the operand that dies there, where it may be so."""
        for t, task in enumerate(self.tasks):
            for position, symbol in enumerate(task.outputs):
                if self.schedule.owner(symbol)[0] is not symbol:  # a part of another result
                    continue
                buffer = self._taken(t, task, position)
                if buffer is None:
                    buffer = _Buffer([])
                buffer.members.append(symbol)
                self.buffers[symbol] = buffer

    def _taken(self, t: int, task: Task, position: int) -> _Buffer | None:
        for output, i in sorted(task.in_place):
            x = task.inputs[i]
            if output != position or not isinstance(x, Symbol):
                continue
            owner = self.schedule.owner(x)[0]
            same = self.nbytes.get(owner) == self.nbytes[task.outputs[position]]
            if owner not in self.made or not same or not self._over(task, position, owner):
                continue
            latest = self._last_read(owner)
            others = any(time == latest and other != t for time, other in self.reads[owner])
            free = self.buffers[owner].members[-1] is owner
            if latest == self.time[t] and not others and free:
                return self.buffers[owner]
        return None

    def _over(self, task: Task, position: int, owner: Symbol) -> bool:
        """Whether an output may lie over all that the task reads of ``owner``'s memory."""
        wanted = nbytes_of(tensor_of(task.outputs[position]))
        for i, x in enumerate(task.inputs):
            if not isinstance(x, Symbol):
                continue
            found, offset = self.schedule.owner(x)
            if found is not owner:
                continue
            allowed = (position, i) in task.in_place
            if task.updating and position == 0:
                allowed = allowed and i == 0  # others would be overwritten by the first copy
            if not allowed or offset or nbytes_of(tensor_of(x)) != wanted:
                return False
        return True

    def _update_directly(self, old: Symbol, new: Symbol) -> bool:
        """Let the task that computes ``new`` write into ``old``, with what leads to it if it may.

        Every other reader of what ``old`` held must have run before the first such task.
        """
        owner, offset = self.schedule.owner(new)
        if owner not in self.made or owner in self.places or offset:
            return False
        type_ = tensor_of(old)
        members = self.buffers[owner].members
        if not self.begun.keys().isdisjoint(members):
            return False
        for first in range(len(members)):
            chosen = members[first:]
            if self._fits(chosen, new, type_) and self._last_reader(members[first], old):
                for symbol in chosen:
                    self.places[symbol] = self.places[old]
                del members[first:]
                return True
        return False

    def _fits(self, chosen: Sequence[Symbol], new: Symbol, type_: TensorType) -> bool:
        """Whether these symbols touch the elements of a tensor of ``type_`` and nothing beside."""
        return all(
            s.type is type_
            or (
                type_.dense
                and tensor_of(s).dense
                and self.nbytes[s] <= nbytes_of(type_)
                and (s is not self.schedule.owner(new)[0] or self.nbytes[s] == nbytes_of(type_))
            )
            for s in chosen
        )

    def _last_reader(self, symbol: Symbol, old: Symbol) -> bool:
        t = self.made[symbol]
        task = self.tasks[t]
        position = task.outputs.index(symbol)
        reads = self.reads.get(old, ())
        before = all(time < self.time[t] or other == t for time, other in reads)
        return before and self._over(task, position, old)

    # --- the arena --------------------------------------------------------------------------------

    def _arrange(self) -> tuple[int, tuple[tuple[int, ...], ...]]:
        """Offsets for the buffers, the temporaries of tasks, and what is put aside."""
        buffers = [
            b for b in dict.fromkeys(self.buffers.values()) if b.members and self._homeless(b)
        ]
        intervals = [self._interval(b) for b in buffers]
        self.fullest = self._held(buffers, intervals)
        for t, task in enumerate(self.tasks):
            until = self._until(self.time[t], t)
            intervals += [Interval(n, self.time[t], until) for n in task.lowering.temporaries]
        intervals += [Interval(nbytes_of(tensor_of(new)), 0, self.end) for _, new in self.stages]
        offsets, total = place(intervals) if intervals else ([], 0)
        found = iter(offsets)
        for buffer in buffers:
            at = Place("arena", 0, next(found))
            self.places.update(dict.fromkeys(buffer.members, at))
        temporaries = tuple(
            tuple(next(found) for _ in task.lowering.temporaries) for task in self.tasks
        )
        for old, new in self.stages:
            aside = Place("arena", 0, next(found))
            self.before.append(Copy(aside, self._place(new), new))
            self.after.append(Copy(self.places[old], aside, new))
        return total, temporaries

    def _held(
        self, buffers: Sequence[_Buffer], intervals: Sequence[Interval]
    ) -> tuple[str, tuple[Held, ...]]:
        """The task that runs while most of the arena is in use, and what it is in use for."""
        if not self.tasks:
            return "", ()
        change = [0] * (self.end + 2)
        for interval in intervals:
            change[interval.begin] += interval.size
            change[interval.end + 1] -= interval.size
        for t, task in enumerate(self.tasks):
            change[self.time[t]] += sum(task.lowering.temporaries)
            change[self.time[t] + 1] -= sum(task.lowering.temporaries)
        in_use = list(accumulate(change))[1 : self.end]
        peak = 1 + in_use.index(max(in_use))
        found = [
            Held(interval.size, tensor_of(b.members[-1]), *self._ends(b))
            for b, interval in zip(buffers, intervals, strict=True)
            if interval.begin <= peak <= interval.end
        ]
        running = self.tasks[slice(*self.groups[peak - 1])]
        found += [
            Held(sum(task.lowering.temporaries), None, task.name, task.name)
            for task in running
            if task.lowering.temporaries
        ]
        return running[0].name, tuple(found)

    def _ends(self, buffer: _Buffer) -> tuple[str, str]:
        """The names of the tasks that make a buffer, and that read it last."""
        maker = self.made[buffer.members[0]]
        reads = self.reads.get(buffer.members[-1], ())
        _, reader = max(reads, default=(0, -1))
        return self.tasks[maker].name, "the end" if reader < 0 else self.tasks[reader].name

    def _homeless(self, buffer: _Buffer) -> bool:
        """Whether a buffer belongs in the arena; a result takes what leads to it along."""
        home = self.places.get(buffer.members[-1])
        if home is not None:
            self.places.update(dict.fromkeys(buffer.members, home))
        return home is None

    def _interval(self, buffer: _Buffer) -> Interval:
        first = buffer.members[0]
        begin = self.time[self.begun.get(first, self.made[first])]
        last = buffer.members[-1]
        uses = [*self.reads.get(last, ())]
        uses += [(self.time[t], t) for t in (self.made[s] for s in buffer.members)]
        return Interval(self.nbytes[last], begin, max(self._until(time, t) for time, t in uses))

    def _until(self, time: int, task: int) -> int:
        """When memory that a task uses is free again."""
        return min(time + SLACK, self.end) if task in self.late else time
