"""Which neighbouring tasks may run at once, as one parallel region.

Invariant: no task of a group reads what another one makes, nor a state that another one may update;
tasks that can fail, and host calls, stand alone, as they decide whether what follows runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from flame.compiler.schedule.memory import Group, MemoryPlan, nbytes_of, plan_memory
from flame.compiler.schedule.task import Schedule, Task
from flame.core.types import TensorType
from flame.graph import Symbol

LARGEST: Final = 512  # tasks
SMALL: Final = 1 << 18  # bytes of a small task's operands and results
# What groups may add to the memory: tasks that run at once need theirs at once.
TOLERATED: Final = 1.02
TOLERATED_BYTES: Final = 1 << 16


def best_plan(schedule: Schedule) -> MemoryPlan:
    """The memory plan with the largest groups that cost next to no memory."""
    alone = plan_memory(schedule)
    limit = int(alone.peak * TOLERATED) + TOLERATED_BYTES
    for joins in (_any, _small):
        groups = groups_of(schedule, joins)
        if len(groups) < len(schedule.tasks):
            plan = plan_memory(schedule, groups)
            if plan.peak <= limit:
                return plan
    return alone


def _any(task: Task) -> bool:
    return True


def _small(task: Task) -> bool:
    symbols = [x for x in (*task.inputs, *task.outputs) if isinstance(x, Symbol)]
    held = sum(nbytes_of(s.type) for s in symbols if isinstance(s.type, TensorType))
    return held + sum(task.lowering.temporaries) <= SMALL


def groups_of(schedule: Schedule, joins: Callable[[Task], bool]) -> tuple[Group, ...]:
    """Runs of neighbours that do not depend on each other, of tasks that ``joins`` allows."""
    found: list[Group] = []
    grouping = _Grouping(schedule)
    begin = 0
    for t, task in enumerate(schedule.tasks):
        if t > begin and not (joins(task) and t - begin < LARGEST and grouping.independent(task)):
            found.append((begin, t))
            grouping.clear()
            begin = t
        grouping.add(task, closed=not joins(task))
    if schedule.tasks:
        found.append((begin, len(schedule.tasks)))
    return tuple(found)


class _Grouping:
    """What the tasks of the open group read and make."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        # The state that takes a value -> where that value is made.
        self.target = {
            schedule.owner(new)[0]: old for old, new in schedule.graph.updates if old is not new
        }
        self.clear()

    def clear(self) -> None:
        self.read: set[Symbol] = set()
        self.made: set[Symbol] = set()
        self.replaced: set[Symbol] = set()
        self.closed = False

    def owners(self, symbols: Sequence[object]) -> set[Symbol]:
        return {self.schedule.owner(x)[0] for x in symbols if isinstance(x, Symbol)}

    def independent(self, task: Task) -> bool:
        reads = self.owners(task.inputs)
        taken = self.owners([task.inputs[i] for _, i in task.in_place])
        replaced = {self.target[s] for s in task.outputs if s in self.target}
        return not (
            self.closed
            or _alone(task)
            or reads & (self.made | self.replaced)
            or replaced & self.read
            # A task keeps an operand's memory for its result only where nobody else reads it.
            or (taken & self.read) - set(self.schedule.graph.inputs)
        )

    def add(self, task: Task, *, closed: bool) -> None:
        self.read |= self.owners(task.inputs)
        self.made |= set(task.outputs)
        self.replaced |= {self.target[s] for s in task.outputs if s in self.target}
        self.closed = self.closed or closed or _alone(task)


def _alone(task: Task) -> bool:
    checked = any(r.role == "error" for k in task.lowering.kernels for r in k.operands)
    return checked or task.lowering.host is not None
