"""The order of tasks: a task that replaces a state comes after all that still read the state.

So the new value can be written over the old one, instead of being copied there at the end. Apart
from that the order stays. Invariant: every operand is computed before it is read.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import replace

from flame.compiler.schedule.task import Schedule
from flame.graph import Symbol


def replacing_last(schedule: Schedule) -> Schedule:
    """The schedule with tasks that replace states put off, where nothing speaks against it."""
    order = _Order(schedule)
    wanted = order.put_off()
    if not wanted:
        return schedule
    return replace(schedule, tasks=tuple(schedule.tasks[t] for t in order.sorted(wanted)))


class _Order:
    """Tasks by their numbers; sets of tasks are the bits of an int."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        tasks = schedule.tasks
        self.made = {s: t for t, task in enumerate(tasks) for s in task.outputs}
        self.readers: dict[Symbol, list[int]] = {}
        self.operands: list[set[int]] = []
        for t, task in enumerate(tasks):
            owners = {schedule.owner(x)[0] for x in task.inputs if isinstance(x, Symbol)}
            for owner in owners:
                self.readers.setdefault(owner, []).append(t)
            self.operands.append({self.made[s] for s in owners if s in self.made})
        self.after = [0] * len(tasks)  # all that must come later, however indirectly
        for t in reversed(range(len(tasks))):
            for operand in self.operands[t]:
                self.after[operand] |= self.after[t] | 1 << t

    def put_off(self) -> list[tuple[int, int]]:
        """Pairs (earlier, later) of tasks beyond those that operands demand."""
        found: list[tuple[int, int]] = []
        late = False
        for old, new in self.schedule.graph.updates:
            t = self.made.get(self.schedule.owner(new)[0])
            readers = [r for r in self.readers.get(old, ()) if r != t]
            if t is None or any(self.after[t] >> r & 1 for r in readers):
                continue
            late = late or any(r > t for r in readers)
            for r in readers:
                found.append((r, t))
                self._forbid(r, t)
        return found if late else []

    def _forbid(self, first: int, second: int) -> None:
        """Remember that ``second`` comes after ``first``."""
        gained = self.after[second] | 1 << second
        if self.after[first] | gained == self.after[first]:
            return
        self.after[first] |= gained
        for t, later in enumerate(self.after):
            if later >> first & 1:
                self.after[t] = later | gained

    def sorted(self, pairs: Iterable[tuple[int, int]]) -> list[int]:
        """The first task that may come, again and again."""
        before = [set(found) for found in self.operands]
        for first, second in pairs:
            before[second].add(first)
        following: list[list[int]] = [[] for _ in before]
        for t, found in enumerate(before):
            for first in found:
                following[first].append(t)
        waits = [len(found) for found in before]
        ready = [t for t, count in enumerate(waits) if not count]
        order: list[int] = []
        while ready:
            t = heapq.heappop(ready)
            order.append(t)
            for later in following[t]:
                waits[later] -= 1
                if not waits[later]:
                    heapq.heappush(ready, later)
        return order
