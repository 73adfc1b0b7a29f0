"""Which loads and stores of a vector loop move 16 bytes at a time.

A *run* is a stretch of the loop's body, or of a serial loop's in it, that a thread does for all
elements of a pack at once: all of its loads before its store.

Invariant: iterations of a vector loop are independent, so that they may go side by side, run by
run; what decides which statements run at all is then the same for all of them, or the loop has no
packs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.kernel import values
from flame.kernel.program import Accumulate, Assign, Declare, If, Loop, Statement, Store, Target
from flame.kernel.values import Buffer, Value
from flame.render.cuda_index import carried, operands, walk

BYTES: Final = 16
MOST: Final = 8  # elements of a pack beside serial loops, whose registers are as many

Simple = Declare | Assign | Accumulate | Store


@dataclass(frozen=True)
class Place:
    """Where packs lie: at ``index`` plus the loop's counter, in ``buffer``.

    start: the index where all serial loops in between are at their first step; steps: by how much
    they move it.
    """

    buffer: Buffer
    index: Value
    start: Value
    steps: tuple[Value, ...]


@dataclass(frozen=True)
class Packs:
    """``width`` elements at a time: of these loads and targets."""

    width: int
    loads: dict[Value, Place] = field(default_factory=dict)
    stores: dict[Target, Place] = field(default_factory=dict)

    def places(self) -> Iterator[Place]:
        yield from dict.fromkeys((*self.loads.values(), *self.stores.values()))


def item_bytes(dtype: DType) -> int:
    return 1 if dtype is dtypes.bool_ else dtype.itemsize


def runs_of(body: Iterable[Statement]) -> Iterator[list[Simple] | Loop | If]:
    """The body as runs, and what stands between them. What reads or stores where a run has stored
    begins another one."""
    run: list[Simple] = []
    stored: set[Buffer] = set()
    for statement in body:
        if isinstance(statement, (Declare, Assign, Accumulate, Store)):
            targets = (
                {t.buffer for t in statement.targets} if isinstance(statement, Store) else set()
            )
            if not stored.isdisjoint(targets | {v.attr for v in loads_of(statement)}):
                yield run
                run, stored = [], set()
            run.append(statement)
            stored |= targets
        elif isinstance(statement, (Loop, If)):
            if run:
                yield run
                run, stored = [], set()
            yield statement
    if run:
        yield run


def packs_of(loop: Loop, width: int = 0) -> Packs | None:
    """The packs of a vector loop, of ``width`` elements if given; None where it has none."""
    return _Finder(loop).packs(width)


class _Finder:
    def __init__(self, loop: Loop) -> None:
        self.var = loop.var
        self.loop = loop
        inner = list(walk(loop.body))
        self.own = {s.register for s in inner if isinstance(s, Declare)} | {*carried(loop.body)}
        self.stored = {t.buffer for s in inner if isinstance(s, Store) for t in s.targets}
        self.uniform = all(
            self._same(s.extent if isinstance(s, Loop) else s.condition)
            for s in inner
            if isinstance(s, (Loop, If))
        ) and all(isinstance(s, (Declare, Assign, Accumulate, Store, Loop, If)) for s in inner)
        self.loads: dict[Value, Place] = {}
        self.stores: dict[Target, Place] = {}
        self.sizes: dict[bool, list[int]] = {True: [], False: []}  # inside of serial loops, or not

    def packs(self, width: int) -> Packs | None:
        if not self.uniform or self._shifts():
            return None
        self._visit(self.loop.body, ())
        if width:
            return Packs(width, self.loads, self.stores)
        if self.sizes[True]:
            width = min(MOST, BYTES // max(self.sizes[True]))
        elif self.sizes[False]:
            width = BYTES // max(self.sizes[False])
        else:
            return None
        return Packs(width, self.loads, self.stores) if width > 1 else None

    def _shifts(self) -> bool:
        """Whether an element is read at another place than where its buffer is stored, in a loop
        where that can be a neighbour's."""
        if any(isinstance(s, Loop) for s in self.loop.body):
            return False
        flat = [
            s for s in walk(self.loop.body) if isinstance(s, (Declare, Assign, Accumulate, Store))
        ]
        places = {(t.buffer, t.index) for s in flat if isinstance(s, Store) for t in s.targets}
        buffers = {buffer for buffer, _ in places}
        read = {(v.attr, v.args[0]) for s in flat for v in loads_of(s) if v.attr in buffers}
        return not read <= places

    def _visit(self, body: Sequence[Statement], around: tuple[Loop, ...]) -> None:
        for part in runs_of(body):
            if isinstance(part, Loop):
                self._visit(part.body, (*around, part))
            elif isinstance(part, If):
                self._visit(part.body, around)
            else:
                self._run(part, around)

    def _run(self, run: Sequence[Simple], around: tuple[Loop, ...]) -> None:
        for statement in run:
            for value in loads_of(statement):
                where = value.args[1] if len(value.args) > 1 else None
                place = self._place(value.attr, value.args[0], around)
                if place is not None and (where is None or self._same(where)):
                    self.loads[value] = place
                    self.sizes[bool(around)].append(item_bytes(value.dtype))
        targets = [t for s in run if isinstance(s, Store) for t in s.targets]
        for target in targets:
            alone = sum(t.buffer is target.buffer for t in targets) == 1
            place = self._place(target.buffer, target.index, around)
            if alone and target.where is None and place is not None:
                self.stores[target] = place
                self.sizes[bool(around)].append(item_bytes(target.buffer.dtype))

    def _place(self, buffer: Buffer, index: Value, around: tuple[Loop, ...]) -> Place | None:
        """The place of an index that counts up with the loop."""
        line = values.linear(index, self.var)
        if line is None or not values.is_const(line[0], 1) or not self._same(line[1]):
            return None
        start, steps = line[1], []
        for loop in around:
            found = values.linear(start, loop.var)
            if found is None:
                return None
            if not values.is_const(found[0], 0):
                steps.append(found[0])
            start = found[1]
        inner = {loop.var for loop in around}
        if any(values.depends(v, name) for v in (start, *steps) for name in inner):
            return None
        return Place(buffer, line[1], start, tuple(dict.fromkeys(steps)))

    def _same(self, value: Value) -> bool:
        """Whether a value is the same for all iterations, and does not change between them."""
        waiting, seen = [value], set()
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            if value.op == "var" and value.attr == self.var:
                return False
            if (value.op == "read" and value.attr in self.own) or (
                value.op == "load" and value.attr in self.stored
            ):
                return False
            waiting += value.args
        return True


def loads_of(statement: Simple) -> Iterator[Value]:
    """What a statement reads from memory."""
    seen: set[Value] = set()
    waiting = operands(statement)
    while waiting:
        value = waiting.pop()
        if value not in seen:
            seen.add(value)
            waiting += value.args
            if value.op == "load":
                yield value
