"""Blueprint: a program as plain data, without addresses: what the disk can keep.

Grammar:

    blueprint ::= step* word* kernel*
    step      ::= task group stage kernel words n grain [error slot] scratch*
    word      ::= code offset            its value is bases[code] + offset

Codes: LITERAL (a base of 0), ARENA, ERROR, SCRATCH, then one for each constant, each graph input,
and each result. Invariants: steps of one group and stage may run at once; a blueprint depends on
the schedule alone, not on addresses or on the number of threads.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from flame.compiler.pipeline import source_of
from flame.compiler.report import TaskInfo, task_info
from flame.compiler.schedule.memory import (
    Copy,
    Held,
    MemoryPlan,
    Place,
    nbytes_of,
)
from flame.compiler.schedule.task import Schedule, Task
from flame.core.errors import DTypeError
from flame.core.types import TensorType
from flame.graph import Operand, Symbol
from flame.kernel.builder import PARALLEL_WORK, BoundKernel, Ref
from flame.kernel.identity import kernel_identity
from flame.ops.conversion import copy as copy_op
from flame.ops.elementwise import Elementwise
from flame.ops.views import ViewOp
from flame.runtime.cpu.executor_text import COPY_BLOCK

LITERAL: Final = 0
ARENA: Final = 1
ERROR: Final = 2
SCRATCH: Final = 3
FIRST_CONSTANT: Final = 4
# Kernels that are no text of their own.
COPY: Final = -1
HOST: Final = -2
ERROR_SLOT_BYTES: Final = 64
COPY_GRAIN: Final = 4

Word = tuple[int, int]  # code, offset
Host = Callable[[Any, Any], None]


@dataclass(frozen=True)
class StepPlan:
    """One kernel launch, copy or host call. ``task`` is -1 for a copy.

    words: where its arguments stand among all words, from the first up to below the second.
    scratch: (the argument's number, bytes for each worker). error: the slot to look at afterwards.
    work: in chunks that are worth a thread.
    """

    task: int
    group: int
    stage: int
    kernel: int
    words: tuple[int, int]
    n: int
    grain: int
    error: int = -1
    scratch: tuple[tuple[int, int], ...] = ()
    work: float = 0.0


@dataclass(frozen=True)
class HostOperand:
    """An operand of a host call: a tensor, a number of a type, or nothing; ``word`` is its word."""

    type: TensorType | type | None
    word: int


@dataclass(frozen=True)
class HostCall:
    """What a library's function reads and fills."""

    step: int
    task: int
    inputs: tuple[HostOperand, ...]
    outputs: tuple[HostOperand, ...]


@dataclass(frozen=True)
class KernelText:
    """A kernel's name in reports, its symbol, and its LLVM IR."""

    name: str
    symbol: str
    text: str


@dataclass(frozen=True, eq=False)
class Blueprint:
    """See the head of this file. ``constants`` are contiguous arrays."""

    input_types: tuple[TensorType | type, ...]
    results: tuple[int, ...]  # bytes of each
    outputs: tuple[Place, ...]
    arena: int
    error_slots: int
    steps: tuple[StepPlan, ...]
    codes: Any  # int32, one for each word
    offsets: Any  # int64
    kernels: tuple[KernelText, ...]
    constants: tuple[Any, ...]
    host_calls: tuple[HostCall, ...]
    tasks: tuple[TaskInfo, ...]
    fullest: str
    held: tuple[Held, ...]

    @property
    def first_input(self) -> int:
        """The code of the first graph input."""
        return FIRST_CONSTANT + len(self.constants)

    @property
    def first_result(self) -> int:
        return self.first_input + len(self.input_types)


@dataclass
class _Draft:
    steps: list[StepPlan] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    kernels: dict[str, tuple[int, KernelText]] = field(default_factory=dict)
    known: dict[Any, int] = field(default_factory=dict)  # kernel's identity -> its number
    constants: list[Any] = field(default_factory=list)
    host_calls: list[HostCall] = field(default_factory=list)
    slots: int = 0


def make_blueprint(schedule: Schedule, plan: MemoryPlan) -> Blueprint:
    """Render the kernels of a schedule and write down its steps."""
    return _Writer(schedule, plan).write()


class _Writer:
    def __init__(self, schedule: Schedule, plan: MemoryPlan) -> None:
        self.schedule, self.plan, self.graph = schedule, plan, schedule.graph
        self.draft = _Draft()
        self.draft.constants += [np.ascontiguousarray(a) for a in self.graph.constants.values()]
        self.numbers = {s: i for i, s in enumerate(self.graph.inputs)}
        self.constants = len(self.draft.constants) + sum(
            len(task.lowering.constants) for task in schedule.tasks
        )

    def write(self) -> Blueprint:
        for copy in self.plan.before:
            self._copy(copy, 0)
        for number, (begin, end) in enumerate(self.plan.groups, 1):
            self._group(number, begin, end)
        for copy in self.plan.after:
            self._copy(copy, len(self.plan.groups) + 1)
        draft = self.draft
        return Blueprint(
            tuple(s.type for s in self.graph.inputs),
            tuple(nbytes for _, nbytes in self.plan.results),
            self.plan.outputs,
            self.plan.arena,
            draft.slots,
            tuple(draft.steps),
            np.array(draft.codes, np.int32),
            np.array(draft.offsets, np.int64),
            tuple(text for _, text in draft.kernels.values()),
            tuple(draft.constants),
            tuple(draft.host_calls),
            tuple(task_info(task) for task in self.schedule.tasks),
            self.plan.fullest,
            self.plan.held,
        )

    # --- words ------------------------------------------------------------------------------------

    def _code(self, place: Place) -> Word:
        first = {
            "arena": ARENA,
            "constant": FIRST_CONSTANT,
            "input": FIRST_CONSTANT + self.constants,
            "result": FIRST_CONSTANT + self.constants + len(self.graph.inputs),
        }[place.space]
        return first + place.index, place.offset

    def _operand(self, operand: Operand) -> Word:
        if isinstance(operand, Symbol):
            if isinstance(operand.type, TensorType):
                return self._code(self.plan.place(self.schedule, operand))
            return self._code(Place("input", self.numbers[operand], 0))
        return LITERAL, 0 if operand is None else bits_of(operand)

    def _words(self, words: list[Word]) -> tuple[int, int]:
        begin = len(self.draft.codes)
        self.draft.codes += [code for code, _ in words]
        self.draft.offsets += [offset for _, offset in words]
        return begin, begin + len(words)

    # --- steps ------------------------------------------------------------------------------------

    def _group(self, number: int, begin: int, end: int) -> None:
        """The first kernels of all tasks, then the second ones, and so on."""
        rows = [list(self._task(t, number)) for t in range(begin, end)]
        for stage in range(max(len(row) for row in rows)):
            self.draft.steps += [row[stage] for row in rows if stage < len(row)]

    def _task(self, t: int, group: int) -> Iterator[StepPlan]:
        task = self.schedule.tasks[t]
        first_constant = FIRST_CONSTANT + len(self.draft.constants)
        self.draft.constants += [np.ascontiguousarray(a) for a in task.lowering.constants]
        if task.lowering.host is not None:
            yield self._host(task, t, group)
            return
        kernels = task.lowering.kernels[1 if t in self.plan.dropped else 0 :]
        kernels = tuple(k for k in kernels if k.extent)
        checked = any(r.role == "error" for k in kernels for r in k.operands)
        slot = self.draft.slots if checked else -1
        self.draft.slots += checked

        def word(ref: Ref) -> Word:
            if ref.role == "input":
                return self._operand(task.inputs[ref.position])
            if ref.role == "output":
                return self._operand(task.outputs[ref.position])
            if ref.role == "temporary":
                return ARENA, self.plan.temporaries[t][ref.position]
            if ref.role == "constant":
                return first_constant + ref.position, 0
            return ERROR, slot * ERROR_SLOT_BYTES

        limit = _most_work(task)
        for stage, bound in enumerate(kernels):
            words = [word(ref) for ref in bound.operands]
            scratch = tuple(
                (len(words) + i, buffer.dtype.itemsize * count)
                for i, (buffer, count) in enumerate(bound.kernel.scratch)
            )
            words += [(SCRATCH, 0)] * len(scratch) + [(LITERAL, n) for n in bound.sizes]
            last = stage == len(kernels) - 1
            yield StepPlan(
                t,
                group,
                stage,
                self._kernel(bound),
                self._words(words),
                bound.extent,
                bound.grain,
                slot if last else -1,
                scratch,
                min(limit, bound.extent / bound.grain),
            )

    def _kernel(self, bound: BoundKernel) -> int:
        identity = kernel_identity(bound.kernel)
        known = self.draft.known.get(identity)
        if known is None:
            source = source_of(bound.kernel)
            made = KernelText(bound.kernel.name, source.symbol, source.text)
            entry = self.draft.kernels.setdefault(source.text, (len(self.draft.kernels), made))
            known = self.draft.known[identity] = entry[0]
        return known

    def _host(self, task: Task, t: int, group: int) -> StepPlan:
        operands = [*task.inputs, *task.outputs]
        begin, end = self._words([self._operand(x) for x in operands])
        described = [
            HostOperand(
                None if x is None else x.type if isinstance(x, Symbol) else type(x), begin + i
            )
            for i, x in enumerate(operands)
        ]
        split = len(task.inputs)
        self.draft.host_calls.append(
            HostCall(len(self.draft.steps), t, tuple(described[:split]), tuple(described[split:]))
        )
        return StepPlan(t, group, 0, HOST, (begin, end), 1, 1)

    def _copy(self, copy: Copy, group: int) -> None:
        target, source = self._code(copy.target), self._code(copy.source)
        nbytes = nbytes_of(copy.type)
        if nbytes == 0:
            return
        if copy.type.dense or copy.target.space != "input":
            words = self._words([target, source, (LITERAL, nbytes)])
            blocks = -(-nbytes // COPY_BLOCK)
            self.draft.steps.append(
                StepPlan(
                    -1, group, 0, COPY, words, blocks, COPY_GRAIN, work=nbytes / COPY_BLOCK / 4
                )
            )
            return
        # A state with gaps, in which others may have their numbers.
        (bound,) = copy_op.lower((copy.type,), (copy.type,)).kernels
        known = {"input": source, "output": target}
        words = self._words(
            [known[ref.role] for ref in bound.operands] + [(LITERAL, n) for n in bound.sizes]
        )
        step = StepPlan(-1, group, 0, self._kernel(bound), words, bound.extent, bound.grain)
        self.draft.steps.append(step)


def _most_work(task: Task) -> float:
    """A bound on a task's work where its elements give one: blocks may be much larger than it."""
    if not all(isinstance(node.op, Elementwise | ViewOp) for node in task.nodes):
        return float("inf")
    symbols = [x for x in (*task.inputs, *task.outputs) if isinstance(x, Symbol)]
    counts = [s.type.numel for s in symbols if isinstance(s.type, TensorType)]
    return max(counts, default=0) / PARALLEL_WORK


def bits_of(number: bool | int | float) -> int:
    """The 64-bit word of a number known at compile time."""
    if isinstance(number, float):
        return int.from_bytes(struct.pack("<d", number), "little", signed=True)
    if not -(1 << 63) <= number < 1 << 63:
        raise DTypeError(f"the number {number} does not fit int64")
    return int(number)
