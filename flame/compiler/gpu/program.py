"""A schedule on a GPU: planned memory, kernels and library calls, captured as one CUDA graph.

    program = GpuProgram.build(schedule, state)
    program.run(*arguments, *results)

as `flame.compiler.program.Program`, whose head says what arguments, state and results are.

Invariants: all that the graph touches lies at addresses that do not change from run to run: arena,
constants, scratch, state, and the words of numbers, which are copied in before each launch. Of
arguments and results see `Port`; the graph is captured again where they have moved. Nothing waits
for the device; data that a task refuses is told at the next synchronisation.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from flame.compiler.gpu.call import bits_of, on_device
from flame.compiler.gpu.profile import GpuProfile, profile
from flame.compiler.gpu.report import report
from flame.compiler.gpu.steps import GpuStep, steps_of
from flame.compiler.report import TaskInfo, task_info
from flame.compiler.schedule.memory import Copy, MemoryPlan, Place, nbytes_of, plan_memory
from flame.compiler.schedule.reorder import replacing_last
from flame.compiler.schedule.task import Schedule, Task
from flame.core.device import device_index
from flame.core.errors import CompileError, TraceError, UnsupportedError
from flame.core.log import log
from flame.core.types import TensorType
from flame.graph import Operand, Symbol
from flame.kernel.builder import Bound, Ref
from flame.ops.conversion import copy as copy_op
from flame.runtime.cuda import errors, streams
from flame.runtime.cuda.driver import driver
from flame.runtime.cuda.graphs import Graph as CudaGraph
from flame.runtime.cuda.graphs import capture
from flame.runtime.storage import Storage

LARGE: Final = 1 << 20  # bytes from which copying is worth some captures to avoid
MOVES: Final = (1, 6)  # how often memory may move from run to run before it is copied: small, large
ALIGNED: Final = 16  # bytes: what libraries ask of operands


class Port:
    """An argument or result: at first the graph works where the caller has it; if that moves from
    run to run, in a slot of its own, and it is copied. ``on_host``: it comes from the CPU."""

    def __init__(self, nbytes: int, device: str, *, on_host: bool = False) -> None:
        self.nbytes, self.device, self.on_host = nbytes, device, on_host
        self.pointer = 0
        self.slot: Storage | None = None
        self.left = MOVES[nbytes >= LARGE]
        if on_host:
            self._settle()

    def move(self, pointer: int) -> None:
        """The caller has it at another address now."""
        first, self.left = self.pointer == 0, self.left - (self.pointer != 0)
        if pointer % ALIGNED or (not first and self.left < 0):
            self._settle()
        else:
            self.pointer = pointer

    def _settle(self) -> None:
        self.slot = Storage.allocate(self.nbytes, self.device)
        self.pointer = self.slot.pointer


class Launch:
    """A step at its addresses; ``task`` is -1 for copies around the tasks."""

    def __init__(self, task: int, step: GpuStep, words: list[int]) -> None:
        self.task, self.step, self.words = task, step, words


class GpuProgram:
    """See the head of this file."""

    def __init__(
        self, schedule: Schedule, plan: MemoryPlan, state: Mapping[Symbol, int], device: str
    ) -> None:
        graph = schedule.graph
        self.schedule, self.plan, self.device = schedule, plan, device
        self.index = device_index(device)
        self.inputs, self.outputs = graph.inputs, graph.outputs
        self.result_types, self.output_places = plan.results, plan.outputs
        self.tasks: tuple[TaskInfo, ...] = tuple(task_info(t) for t in schedule.tasks)
        self.stages: dict[str, float] = {}
        self.lock = threading.RLock()
        self.graph: CudaGraph | None = None
        self.moves = 0
        self.stream = -1
        driver().use(self.index)
        self.state = {graph.inputs.index(s): pointer for s, pointer in state.items()}
        self.given = [i for i in range(len(graph.inputs)) if i not in self.state]
        with self._stage("kernels"):
            self._steps()
        self._memory()
        self.peak = plan.peak + self.scratch.nbytes
        self._bind()

    @classmethod
    def build(cls, schedule: Schedule, state: Mapping[Symbol, int], device: str) -> GpuProgram:
        """Plan the memory of a schedule, and compile its kernels. Raises CompileError."""
        _check_places(schedule, device)
        schedule = replacing_last(schedule)
        log("schedule", lambda: f"{len(schedule.tasks)} tasks\n{schedule}")
        started = time.perf_counter()
        plan = plan_memory(schedule)
        planned = time.perf_counter() - started
        made = cls(schedule, plan, state, device)
        made.stages = {"memory plan": planned, **made.stages}
        log("memory", lambda: str(plan))
        log("compile", lambda: made.report().partition("\n")[0])
        return made

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - started

    # --- kernels ----------------------------------------------------------------------------------

    def _steps(self) -> None:
        """Everything that is to be launched, in order, with the task it belongs to."""
        bounds: list[Bound] = []
        owners: list[tuple[int, Copy | None]] = []
        for copy in self.plan.before:
            self._add_copy(copy, bounds, owners)
        for t, task in enumerate(self.schedule.tasks):
            if task.lowering.host is not None:
                raise UnsupportedError(
                    f"{task.name} has no kernel for a GPU; compute it outside of the step, on the "
                    "CPU"
                )
            mine = task.lowering.steps[1 if t in self.plan.dropped else 0 :]
            for bound in mine:
                if bound.extent:
                    bounds.append(bound)
                    owners.append((t, None))
        for copy in self.plan.after:
            self._add_copy(copy, bounds, owners)
        self.owners = owners
        self.steps = steps_of(bounds, self.index, by_pointer=True)

    def _add_copy(
        self, copy: Copy, bounds: list[Bound], owners: list[tuple[int, Copy | None]]
    ) -> None:
        if nbytes_of(copy.type):
            (bound,) = copy_op.lower((copy.type,), (copy.type,)).kernels
            bounds.append(bound)
            owners.append((-1, copy))

    # --- memory -----------------------------------------------------------------------------------

    def _memory(self) -> None:
        plan, graph = self.plan, self.schedule.graph
        self.arena = Storage.allocate(plan.arena, self.device)
        self.scratch = Storage.allocate(max([0, *(s.scratch for s in self.steps)]), self.device)
        self.constants = [
            on_device(np.ascontiguousarray(a), self.device) for a in graph.constants.values()
        ]
        self.task_constants = [
            [on_device(np.ascontiguousarray(a), self.device) for a in task.lowering.constants]
            for task in self.schedule.tasks
        ]
        self.arguments: dict[int, Port] = {}
        self.uploads: dict[int, Storage] = {}  # state on the CPU, by input
        for i, symbol in enumerate(graph.inputs):
            type_ = symbol.type
            if not isinstance(type_, TensorType):
                continue
            if i not in self.state:
                port = Port(nbytes_of(type_), self.device, on_host=type_.device == "cpu")
                self.arguments[i] = port
            elif type_.device == "cpu":
                self.uploads[i] = Storage.allocate(nbytes_of(type_), self.device)
        self.numbers = {
            i: n
            for n, i in enumerate(
                i for i, s in enumerate(graph.inputs) if not isinstance(s.type, TensorType)
            )
        }
        self.literals: dict[tuple[type, Any], int] = {}
        for task in self.schedule.tasks:
            for x in task.inputs:
                if x is not None and not isinstance(x, Symbol):
                    key = (type(x), bits_of(x))
                    self.literals.setdefault(key, len(self.numbers) + len(self.literals))
        count = max(len(self.numbers) + len(self.literals), 1)
        self.words = np.zeros(count, np.int64)
        for (_, bits), place in self.literals.items():
            self.words[place] = bits
        self.word_memory = on_device(self.words, self.device)
        self.results = [Port(nbytes, self.device) for _, nbytes in plan.results]
        self.error_slots = {
            t: errors.error_slot(self.index, task.failure)
            for t, task in enumerate(self.schedule.tasks)
            if task.failure is not None
        }

    def _address(self, place: Place) -> int:
        if place.space == "arena":
            base = self.arena.pointer
        elif place.space == "constant":
            base = self.constants[place.index].pointer
        elif place.space == "result":
            base = self.results[place.index].pointer
        elif place.index in self.arguments:
            base = self.arguments[place.index].pointer
        elif place.index in self.uploads:
            base = self.uploads[place.index].pointer
        else:
            base = self.state[place.index]
        return base + place.offset

    def _bind(self) -> None:
        """Resolve the operands of all steps to addresses."""
        self.launches = [
            Launch(t, step, [self._word(t, copy, ref) for ref in step.operands])
            for step, (t, copy) in zip(self.steps, self.owners, strict=True)
        ]
        self.graph = None

    def _word(self, t: int, copy: Copy | None, ref: Ref | None) -> int:
        if ref is None:
            return 0
        if copy is not None:
            return self._address(copy.source if ref.role == "input" else copy.target)
        task = self.schedule.tasks[t]
        if ref.role == "input":
            return self._operand(task.inputs[ref.position])
        if ref.role == "output":
            return self._operand(task.outputs[ref.position])
        if ref.role == "temporary":
            return int(self.arena.pointer) + self.plan.temporaries[t][ref.position]
        if ref.role == "constant":
            return int(self.task_constants[t][ref.position].pointer)
        return self.error_slots[t].pointer

    def _operand(self, operand: Operand) -> int:
        if operand is None:
            return 0
        if isinstance(operand, Symbol):
            if isinstance(operand.type, TensorType):
                return self._address(self.plan.place(self.schedule, operand))
            place = self.numbers[self.inputs.index(operand)]
        else:
            place = self.literals[type(operand), bits_of(operand)]
        return int(self.word_memory.pointer) + 8 * place

    # --- running ----------------------------------------------------------------------------------

    def run(self, *words: Any) -> None:
        """Queue one run on the current stream; see `Program.run`."""
        made = driver()
        with self.lock:
            made.use(self.index)
            stream = streams.current_handle(self.index)
            if stream != self.stream:
                if self.stream >= 0:
                    streams.wait(stream, self.stream, self.index)
                self.stream = stream
            results = words[len(self.given) :]
            self._place(words, results)
            self._take(words, stream)
            if self.graph is None:
                with self._stage("capture"):
                    self.graph = capture(self.index, self.enqueue)
            self.graph.launch(stream)
            for port, word in zip(self.results, results, strict=True):
                if port.slot is not None:
                    made.copy_on_device(word, port.pointer, port.nbytes, stream)

    def _place(self, words: Sequence[int], results: Sequence[int]) -> None:
        """See to it that the graph reads arguments and writes results where they are."""
        moved = False
        for i, word in zip(self.given, words, strict=False):
            port = self.arguments.get(i)
            if port is not None and port.slot is None and port.pointer != word:
                port.move(word)
                moved = True
        for port, word in zip(self.results, results, strict=True):
            if port.slot is None and port.pointer != word:
                port.move(word)
                moved = True
        if moved:
            self._bind()

    def _take(self, words: Sequence[Any], stream: int) -> None:
        """Arguments, numbers and state of the CPU into their places."""
        made = driver()
        changed = False
        for i, word in zip(self.given, words, strict=False):
            port = self.arguments.get(i)
            if port is None:
                bits, place = bits_of(word), self.numbers[i]
                if self.words[place] != bits:
                    self.words[place] = bits
                    changed = True
            elif port.slot is not None and port.nbytes:
                move = made.copy_to_device if port.on_host else made.copy_on_device
                move(port.pointer, word, port.nbytes, stream)
        for i, storage in self.uploads.items():
            made.copy_to_device(storage.pointer, self.state[i], storage.nbytes, stream)
        if changed:
            address, size = self.words.ctypes.data, 8 * len(self.numbers)
            made.copy_to_device(self.word_memory.pointer, address, size, stream)

    def enqueue(self, stream: int) -> None:
        """Queue every step on a stream."""
        scratch = self.scratch.pointer
        for launch in self.launches:
            launch.step.enqueue(launch.words, scratch, stream)

    def rebind(self, state: Mapping[Symbol, int]) -> None:
        """Use other addresses for (some of) the state."""
        with self.lock:
            for symbol, pointer in state.items():
                number = self.inputs.index(symbol)
                if number not in self.state:
                    raise CompileError(f"{symbol} is an argument of this program")
                self.state[number] = pointer
            self._bind()

    # --- looking ----------------------------------------------------------------------------------

    @property
    def kernels(self) -> tuple[GpuStep, ...]:
        """Every kernel with a text of its own, in the order of first use."""
        return tuple({s.text: s for s in self.steps if s.text}.values())

    def source(self, i: int) -> str:
        """CUDA C++ of a kernel, as `report` numbers them."""
        return self.kernels[i].text

    @property
    def constant_bytes(self) -> int:
        """Bytes of the tables that kernels read."""
        every = [*self.constants, *(s for each in self.task_constants for s in each)]
        return sum(s.nbytes for s in every)

    def report(self) -> str:
        """Tasks with what they cover, compute and move, what runs them; memory; compile times."""
        return report(self)

    def profile(self, *words: Any, runs: int = 10) -> GpuProfile:
        """Run several times, updates of state included, each task timed on the device."""
        return profile(self, words, runs)

    def __repr__(self) -> str:
        return f"<program of {len(self.tasks)} tasks on {self.device}, {len(self.steps)} launches>"


def _check_places(schedule: Schedule, device: str) -> None:
    """Raise where something other than the inputs is on the CPU."""
    for task in schedule.tasks:
        for symbol in task.outputs:
            if isinstance(symbol.type, TensorType) and symbol.type.device != device:
                raise _on_cpu(task)
    for old, _ in schedule.graph.updates:
        if isinstance(old.type, TensorType) and old.type.device != device:
            raise UnsupportedError(
                f"a compiled step on {device} writes into a tensor on the CPU ({old}); keep it on "
                f"{device}"
            )


def _on_cpu(task: Task) -> TraceError:
    line = next((n.line for n in task.nodes if n.line is not None), None)
    where = "" if line is None else f"{line}: "
    return TraceError(
        f"{where}a compiled step on a GPU computes {task.name} on the CPU; move its operands to "
        "the GPU, or return the tensor and compute on the CPU after the call"
    )
