"""Which launches of a step run beside the others, and what they wait for.

The graph of a step has two lanes. An optimizer's updates, and what only they need - sums and small
products - run beside the rest, where they fill the gaps between kernels and their last, half empty
waves. Within a lane everything stays in order; between them a launch waits for the last one of the
other lane that made, or still uses, what it touches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from flame.compiler.report import flops_of
from flame.compiler.schedule.memory import MemoryPlan, Place, nbytes_of
from flame.compiler.schedule.task import Schedule, Task
from flame.core.types import TensorType
from flame.graph import Symbol
from flame.kernel.builder import BoundCall
from flame.kernel.library import MatmulProblem

SMALL: Final = 1 << 30  # operations of a product up to which it leaves room for others
LEAST: Final = 1 << 20  # bytes that move beside the rest: less is not worth a graph with branches


def beside(schedule: Schedule) -> frozenset[int]:
    """The tasks that run beside the others: those that nobody waits for, and those that only such
    ones wait for."""
    readers: dict[Symbol, set[int]] = {}
    for t, task in enumerate(schedule.tasks):
        for x in task.inputs:
            if isinstance(x, Symbol):
                readers.setdefault(schedule.owner(x)[0], set()).add(t)
    found: set[int] = set()
    last: set[int] = set()
    for t in reversed(range(len(schedule.tasks))):
        task = schedule.tasks[t]
        after = set().union(*(readers.get(schedule.owner(s)[0], ()) for s in task.outputs))
        if after <= last and task.lowering.steps and _leaves_room(task):
            found.add(t)
            if not after:
                last.add(t)
    moved = sum(
        nbytes_of(s.type)
        for t in found
        for s in (*schedule.tasks[t].inputs, *schedule.tasks[t].outputs)
        if isinstance(s, Symbol) and isinstance(s.type, TensorType)
    )
    return frozenset(found if moved >= LEAST else ())


def _leaves_room(task: Task) -> bool:
    """Whether a task can run beside others: kernels of our own, or a small product. cuDNN's handle
    knows one stream at a time, so its calls stay together."""
    calls = [step for step in task.lowering.steps if isinstance(step, BoundCall)]
    if not all(isinstance(call.problem, MatmulProblem) for call in calls):
        return False
    return not calls or sum(map(flops_of, task.nodes)) <= SMALL


@dataclass(frozen=True)
class Work:
    """Launches up to number ``last``, in one lane, with the places that they read and write and
    the bytes of those."""

    last: int
    beside: bool
    reads: tuple[tuple[Place, int], ...]
    writes: tuple[tuple[Place, int], ...]


def work_of(schedule: Schedule, plan: MemoryPlan, t: int, last: int, *, beside: bool) -> Work:
    """What task number ``t`` touches."""
    task = schedule.tasks[t]

    def places(symbols: Sequence[object]) -> tuple[tuple[Place, int], ...]:
        return tuple(
            (plan.place(schedule, s), nbytes_of(s.type))
            for s in symbols
            if isinstance(s, Symbol) and isinstance(s.type, TensorType)
        )

    spare = tuple(
        (Place("arena", 0, at), nbytes)
        for at, nbytes in zip(plan.temporaries[t], task.lowering.temporaries, strict=True)
    )
    return Work(last, beside, places(task.inputs), (*places(task.outputs), *spare))


def waits_of(works: Sequence[Work]) -> list[int]:
    """For each work the launch of the other lane that it waits for; -1: none, or none any more."""
    lanes = {lane: _Ranges(works, beside=lane) for lane in (False, True)}
    waited = {False: -1, True: -1}
    found = []
    for i, work in enumerate(works):
        other = lanes[not work.beside]
        after = max(
            [-1]
            + [other.last(i, place, nbytes, written=False) for place, nbytes in work.reads]
            + [other.last(i, place, nbytes, written=True) for place, nbytes in work.writes]
        )
        found.append(after if after > waited[work.beside] else -1)
        waited[work.beside] = max(after, waited[work.beside])
    return found


class _Ranges:
    """The memory that the works of one lane touch, as columns."""

    def __init__(self, works: Sequence[Work], *, beside: bool) -> None:
        self._spaces: dict[tuple[str, int], int] = {}
        rows: list[tuple[int, int, int, int, int, int]] = []
        for i, work in enumerate(works):
            if work.beside is beside:
                for written, places in enumerate((work.reads, work.writes)):
                    for place, nbytes in places:
                        space = self._spaces.setdefault(
                            (place.space, place.index), len(self._spaces)
                        )
                        end = place.offset + nbytes
                        rows.append((space, place.offset, end, i, work.last, written))
        table: npt.NDArray[np.int64] = np.array(rows, np.int64).reshape(-1, 6)
        self._columns = np.ascontiguousarray(table.T)
        self._starts = np.searchsorted(self._columns[3], np.arange(len(works) + 1))

    def last(self, number: int, place: Place, nbytes: int, *, written: bool) -> int:
        """The last launch of a work before ``number`` that writes here, or reads what is to be
        written here; -1: none."""
        space = self._spaces.get((place.space, place.index))
        if space is None:
            return -1
        spaces, begins, ends, _, launches, writes = self._columns[:, : self._starts[number]]
        met = (begins < place.offset + nbytes) & (ends > place.offset) & (spaces == space)
        if not written:
            met &= writes != 0
        return int(launches[met].max()) if met.any() else -1
