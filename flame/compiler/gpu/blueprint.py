"""A GPU program as plain data, without addresses: what the disk can keep.

Grammar:

    blueprint ::= step*
    step      ::= task spec word*          task is -1 for copies around the tasks
    word      ::= space index offset       an address: base of the space's entry + offset bytes

Spaces: "none" (0), "arena", "constant" (of the graph, then of the tasks), "input", "result",
"number" (the word of an input that is a number), "literal" (of a number that stands in the graph),
"error" (the slot of a task). Invariant: a blueprint depends on the schedule alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flame.compiler.gpu.lanes import Work, waits_of, work_of
from flame.compiler.gpu.steps import Spec, specs_of
from flame.compiler.report import TaskInfo, task_info
from flame.compiler.schedule.memory import Copy, Held, MemoryPlan, Place, nbytes_of
from flame.compiler.schedule.task import Schedule, Task
from flame.core.errors import UnsupportedError
from flame.core.types import TensorType
from flame.graph import Operand, Symbol
from flame.kernel.builder import Ref
from flame.ops.conversion import copy as copy_op

Word = tuple[str, int, int]
NOTHING: Word = ("none", 0, 0)


@dataclass(frozen=True)
class Launch:
    """One step and the words of its operands.

    beside: whether it runs beside the others. after: the launch of the other lane that it waits
    for; -1: none. See `gpu.lanes`.
    """

    task: int
    spec: Spec
    words: tuple[Word, ...]
    beside: bool = False
    after: int = -1


@dataclass(frozen=True, eq=False)
class GpuBlueprint:
    """See the head of this file. results: (symbol's name, type, bytes). written: inputs that are
    replaced in their place."""

    device: str
    input_types: tuple[TensorType | type, ...]
    results: tuple[tuple[str, TensorType, int], ...]
    outputs: tuple[Place, ...]
    output_types: tuple[TensorType | type, ...]
    arena: int
    written: frozenset[int]
    launches: tuple[Launch, ...]
    constants: tuple[Any, ...]
    literals: tuple[int, ...]
    tasks: tuple[TaskInfo, ...]
    fullest: str
    held: tuple[Held, ...]


def make_blueprint(
    schedule: Schedule, plan: MemoryPlan, device: str, beside: Collection[int] = ()
) -> GpuBlueprint:
    """Render the kernels of a schedule and write down its steps. beside: the tasks of the second
    lane."""
    return _Writer(schedule, plan, device, beside).write()


@dataclass
class _Writer:
    schedule: Schedule
    plan: MemoryPlan
    device: str
    beside: Collection[int]
    launches: list[Launch] = field(default_factory=list)
    literals: dict[tuple[type, int], int] = field(default_factory=dict)
    works: list[tuple[int, Work]] = field(default_factory=list)  # with their first launch

    def write(self) -> GpuBlueprint:
        graph, plan, tasks = self.schedule.graph, self.plan, self.schedule.tasks
        self.numbers = {s: i for i, s in enumerate(graph.inputs)}
        constants = [np.ascontiguousarray(a) for a in graph.constants.values()]
        self.first_constant = []
        for task in tasks:
            self.first_constant.append(len(constants))
            constants += [np.ascontiguousarray(a) for a in task.lowering.constants]
        for copy in plan.before:
            self._copy(copy)
        for t, task in enumerate(tasks):
            self._task(t, task)
        for copy in plan.after:
            self._copy(copy)
        self._wait()
        results = []
        for symbol, nbytes in plan.results:
            assert isinstance(symbol.type, TensorType)
            results.append((symbol.name, symbol.type, nbytes))
        return GpuBlueprint(
            self.device,
            tuple(s.type for s in graph.inputs),
            tuple(results),
            plan.outputs,
            tuple(s.type for s in graph.outputs),
            plan.arena,
            frozenset(
                place.index
                for _, work in self.works
                for place, _ in work.writes
                if place.space == "input"
            ),
            tuple(self.launches),
            tuple(constants),
            tuple(bits for _, bits in self.literals),
            tuple(task_info(t) for t in tasks),
            plan.fullest,
            plan.held,
        )

    def _task(self, t: int, task: Task) -> None:
        if task.lowering.host is not None:
            raise UnsupportedError(
                f"{task.name} has no kernel for a GPU; compute it outside of the step, on the CPU"
            )
        steps = task.lowering.steps[1 if t in self.plan.dropped else 0 :]
        first, aside = len(self.launches), t in self.beside
        for spec in specs_of(steps, by_pointer=True):
            words = tuple(NOTHING if r is None else self._word(t, r) for r in spec.operands)
            self.launches.append(Launch(t, spec, words, aside))
        if len(self.launches) > first:
            last = len(self.launches) - 1
            work = work_of(self.schedule, self.plan, t, last, beside=aside)
            self.works.append((first, work))

    def _wait(self) -> None:
        """What launches wait for."""
        if not any(work.beside for _, work in self.works):
            return
        after = waits_of([work for _, work in self.works])
        for (first, _), launch in zip(self.works, after, strict=True):
            self.launches[first] = replace(self.launches[first], after=launch)

    def _copy(self, copy: Copy) -> None:
        nbytes = nbytes_of(copy.type)
        if not nbytes:
            return
        first = len(self.launches)
        places = {"input": self._place(copy.source), "output": self._place(copy.target)}
        lowering = copy_op.lower((copy.type,), (copy.type,))
        for spec in specs_of(lowering.kernels, by_pointer=True):
            words = tuple(places[r.role] for r in spec.operands if r is not None)
            self.launches.append(Launch(-1, spec, words))
        last = len(self.launches) - 1
        moved = Work(last, False, ((copy.source, nbytes),), ((copy.target, nbytes),))
        self.works.append((first, moved))

    def _word(self, t: int, ref: Ref) -> Word:
        task = self.schedule.tasks[t]
        if ref.role == "input":
            return self._operand(task.inputs[ref.position])
        if ref.role == "output":
            return self._operand(task.outputs[ref.position])
        if ref.role == "temporary":
            return "arena", 0, self.plan.temporaries[t][ref.position]
        if ref.role == "constant":
            return "constant", self.first_constant[t] + ref.position, 0
        return "error", t, 0

    def _operand(self, operand: Operand) -> Word:
        if operand is None:
            return NOTHING
        if not isinstance(operand, Symbol):
            key = (type(operand), bits_of(operand))
            return "literal", self.literals.setdefault(key, len(self.literals)), 0
        if isinstance(operand.type, TensorType):
            return self._place(self.plan.place(self.schedule, operand))
        return "number", self.numbers[operand], 0

    def _place(self, place: Place) -> Word:
        return place.space, place.index, place.offset


def bits_of(number: Any) -> int:
    """The 64-bit word of a number."""
    return _bits(float(number)) if isinstance(number, float) else int(number)


def _bits(number: float) -> int:
    return int(np.float64(number).view(np.int64))
