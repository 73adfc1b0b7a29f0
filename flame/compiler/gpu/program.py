"""A schedule on a GPU: planned memory, kernels and library calls, captured as one CUDA graph.

    program = GpuProgram.build(schedule, state)
    program.run(*arguments, *results)

as `flame.compiler.program.Program`, whose head says what arguments, state and results are.

Invariants: all that the graph touches lies at addresses that do not change from run to run: arena,
constants, scratch, state, and the words of numbers, which are copied in before each launch. Of
arguments and results see `Port`; the graph is captured again where they have moved. It has two
lanes, see `gpu.lanes`. Nothing waits for the device; data that a task refuses is told at the next
synchronisation.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from flame.compiler import program_store
from flame.compiler.gpu.blueprint import GpuBlueprint, Word, bits_of, make_blueprint
from flame.compiler.gpu.call import on_device
from flame.compiler.gpu.lanes import beside
from flame.compiler.gpu.profile import GpuProfile, profile
from flame.compiler.gpu.report import report
from flame.compiler.gpu.steps import GpuStep, load, placed
from flame.compiler.program_store import OpCall, failing_calls
from flame.compiler.schedule.memory import nbytes_of, plan_memory
from flame.compiler.schedule.memory_check import check_memory
from flame.compiler.schedule.pieces import in_pieces
from flame.compiler.schedule.reorder import replacing_last
from flame.compiler.schedule.task import Schedule, Task
from flame.core.determinism import are_deterministic_algorithms_enabled
from flame.core.device import device_index
from flame.core.errors import CompileError, FlameError, TraceError, UnsupportedError
from flame.core.log import log
from flame.core.types import TensorType
from flame.graph import Graph, Symbol
from flame.runtime.cuda import errors, streams
from flame.runtime.cuda.driver import driver
from flame.runtime.cuda.graphs import Graph as CudaGraph
from flame.runtime.cuda.graphs import Lanes, capture
from flame.runtime.cuda.memory import leave_room
from flame.runtime.cuda.transfer import from_host
from flame.runtime.storage import Storage

Failures = Mapping[int, Callable[[int], FlameError]]

LARGE: Final = 1 << 20  # bytes from which copying is worth some captures to avoid
MOVES: Final = (1, 6)  # how often memory may move from run to run before it is copied: small, large
WHOLE: Final = 256  # bytes: where the scratch of the second lane may begin
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


@dataclass(frozen=True)
class KeptProgram:
    """What the disk keeps. ``failing``: by task, calls from which errors are made."""

    blueprint: GpuBlueprint
    failing: dict[int, OpCall]

    def failures(self) -> Failures:
        return {t: partial(OpCall.failure, call) for t, call in self.failing.items()}


class GpuProgram:
    """See the head of this file. ``failures``: the error for a code, of each task that may fail."""

    def __init__(
        self,
        graph: Graph,
        blueprint: GpuBlueprint,
        state: Mapping[Symbol, int],
        failures: Failures,
        stages: dict[str, float],
    ) -> None:
        self.blueprint, self.device, self.stages = blueprint, blueprint.device, stages
        self.index = device_index(self.device)
        self.inputs, self.outputs = graph.inputs, graph.outputs
        self.result_types = tuple((Symbol(n, t), nbytes) for n, t, nbytes in blueprint.results)
        self.output_places = blueprint.outputs
        self.lock = threading.RLock()
        self.graph: CudaGraph | None = None
        self.captured = False  # at least once
        self.stream = -1
        driver().use(self.index)
        self._numbers = {s: i for i, s in enumerate(graph.inputs)}
        self.state = {self._numbers[s]: pointer for s, pointer in state.items()}
        self.given = [i for i in range(len(graph.inputs)) if i not in self.state]
        with stage(stages, "kernels"):
            self.steps = load([launch.spec for launch in blueprint.launches], self.index)
        self._memory(failures)
        results = sum(nbytes for _, _, nbytes in blueprint.results)
        self.peak = blueprint.arena + results + self.scratch.nbytes
        self._bind()
        self._kept: KeptProgram | None = None

    @classmethod
    def build(cls, schedule: Schedule, state: Mapping[Symbol, int], device: str) -> GpuProgram:
        """Plan the memory of a schedule, and compile its kernels. Raises CompileError."""
        stages: dict[str, float] = {}
        check_places(schedule, device)
        schedule = in_pieces(replacing_last(schedule))
        log("schedule", lambda: f"{len(schedule.tasks)} tasks\n{schedule}")
        with stage(stages, "memory plan"):
            aside = beside(schedule)
            plan = plan_memory(schedule, late=aside)
        if os.environ.get("FLAME_VERIFY") == "1":
            check_memory(schedule, plan)
        with stage(stages, "rendering"):
            blueprint = make_blueprint(schedule, plan, device, aside)
        failures = {
            t: task.failure for t, task in enumerate(schedule.tasks) if task.failure is not None
        }
        made = cls(schedule.graph, blueprint, state, failures, stages)
        failing = failing_calls(schedule)
        made._kept = None if failing is None else KeptProgram(blueprint, failing)
        log("memory", lambda: str(plan))
        log("compile", lambda: made.report().partition("\n")[0])
        return made

    @classmethod
    def restore(
        cls, key: str | None, graph: Graph, state: Mapping[Symbol, int]
    ) -> GpuProgram | None:
        """The program that `save` kept under a key; None where there is none."""
        stages: dict[str, float] = {}
        with stage(stages, "found on disk"):
            kept = None if key is None else program_store.read(key)
        if not isinstance(kept, KeptProgram):
            return None
        blueprint = kept.blueprint
        if blueprint.input_types != tuple(s.type for s in graph.inputs):
            return None
        if blueprint.output_types != tuple(s.type for s in graph.outputs):
            return None
        made = cls(graph, blueprint, state, kept.failures(), stages)
        made._kept = kept
        return made

    def save(self, key: str | None) -> bool:
        """Keep the program on disk; whether it could be kept."""
        if key is None or self._kept is None:
            return False
        return program_store.write(key, self._kept)

    # --- memory -----------------------------------------------------------------------------------

    def _memory(self, failures: Failures) -> None:
        blueprint, device = self.blueprint, self.device
        self.arena = Storage.allocate(blueprint.arena, device)
        needs = [0, 0]  # of each lane
        for launch, step in zip(blueprint.launches, self.steps, strict=True):
            needs[launch.beside] = max(needs[launch.beside], step.scratch)
        first = -(-needs[0] // WHOLE) * WHOLE
        self.scratch = Storage.allocate(first + needs[1], device)
        self.scratches = (self.scratch.pointer, self.scratch.pointer + first)
        several = any(launch.beside for launch in blueprint.launches)
        self.aside = streams.Stream(self.index) if several else None
        self.constants = [on_device(array, device) for array in blueprint.constants]
        self.arguments: dict[int, Port] = {}
        self.uploads: dict[int, Storage] = {}  # state on the CPU, by input
        numbers: list[int] = []
        for i, type_ in enumerate(blueprint.input_types):
            if not isinstance(type_, TensorType):
                numbers.append(i)
            elif i not in self.state:
                self.arguments[i] = Port(nbytes_of(type_), device, on_host=type_.device == "cpu")
            elif type_.device == "cpu":
                self.uploads[i] = Storage.allocate(nbytes_of(type_), device)
        self.results = [Port(nbytes, device) for _, _, nbytes in blueprint.results]
        # the words of all numbers: those of the call, then those that stand in the graph
        self.number_places = {i: n for n, i in enumerate(numbers)}
        self.words = np.zeros(max(len(numbers) + len(blueprint.literals), 1), np.int64)
        self.words[len(numbers) : len(numbers) + len(blueprint.literals)] = blueprint.literals
        self.word_memory = on_device(self.words, device)
        self.error_slots = {t: errors.error_slot(self.index, f) for t, f in failures.items()}

    def _address(self, word: Word) -> int:
        space, index, offset = word
        if space == "none":
            return 0
        if space == "number":
            return int(self.word_memory.pointer) + 8 * self.number_places[index]
        if space == "literal":
            return int(self.word_memory.pointer) + 8 * (len(self.number_places) + index)
        return self._base(space, index) + offset

    def _base(self, space: str, index: int) -> int:
        if space == "arena":
            return int(self.arena.pointer)
        if space == "constant":
            return int(self.constants[index].pointer)
        if space == "result":
            return self.results[index].pointer
        if space == "error":
            return self.error_slots[index].pointer
        if index in self.arguments:
            return self.arguments[index].pointer
        return int(self.uploads[index].pointer) if index in self.uploads else self.state[index]

    def _bind(self) -> None:
        """Resolve the operands of all steps to addresses."""
        self.addresses = [
            [self._address(word) for word in launch.words] for launch in self.blueprint.launches
        ]
        self.placed = [
            placed(step, words, self.device)
            for step, words in zip(self.steps, self.addresses, strict=True)
        ]
        self.graph = None

    # --- running ----------------------------------------------------------------------------------

    def run(self, *words: Any) -> None:
        """Queue one run on the current stream; see `Program.run`."""
        made = driver()
        with self.lock:
            made.use(self.index)
            stream = streams.current_handle(self.index)
            if stream != self.stream:
                self._go_to(stream)
            results = words[len(self.given) :]
            self._place(words, results)
            self._take(words, stream)
            if self.graph is None:
                with stage(self.stages, "capture"):
                    self.graph = self._capture()
            self.graph.launch(stream)
            for port, word in zip(self.results, results, strict=True):
                if port.slot is not None:
                    made.copy_on_device(word, port.pointer, port.nbytes, stream)

    def _go_to(self, stream: int) -> None:
        """Run on another stream than before."""
        if self.stream >= 0:
            streams.wait(stream, self.stream, self.index)
        self.stream = stream
        ports = (*self.arguments.values(), *self.results)
        slots = [port.slot for port in ports if port.slot is not None]
        own = (self.arena, self.scratch, self.word_memory, *self.constants, *slots)
        for storage in (*own, *self.uploads.values()):
            storage.record_stream(stream)

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
                bits, place = bits_of(word), self.number_places[i]
                if self.words[place] != bits:
                    self.words[place] = bits
                    changed = True
            elif port.slot is not None and port.nbytes:
                if port.on_host:
                    from_host(self.index, port.pointer, word, port.nbytes, stream)
                else:
                    made.copy_on_device(port.pointer, word, port.nbytes, stream)
        for i, storage in self.uploads.items():
            from_host(self.index, storage.pointer, self.state[i], storage.nbytes, stream)
        if changed:
            address, size = self.words.ctypes.data, 8 * len(self.number_places)
            made.copy_to_device(self.word_memory.pointer, address, size, stream)

    def _capture(self) -> CudaGraph:
        """All steps as a graph."""
        if not self.captured:
            leave_room(self.index)  # the first time loads kernels of libraries
            self.captured = True
        aside = None
        if self.aside is not None and not self._inputs_overlap():
            aside = self.aside.cuda_stream
        lanes = Lanes(self.index, self.stream, aside)
        try:
            return capture(self.index, lambda _: self._queue(lanes))
        finally:
            lanes.close()

    def _queue(self, lanes: Lanes) -> None:
        launches = self.blueprint.launches
        awaited = {launch.after for launch in launches}
        lanes.begin()
        steps = zip(launches, self.placed, self.addresses, strict=True)
        for number, (launch, step, addresses) in enumerate(steps):
            if launch.after >= 0:
                lanes.wait(launch.after, beside=launch.beside)
            stream = lanes.stream(beside=launch.beside)
            step.enqueue(addresses, self.scratches[launch.beside], stream)
            if number in awaited:
                lanes.mark(number, beside=launch.beside)
        lanes.end()

    def _inputs_overlap(self) -> bool:
        """Whether one input lies over another one that is written: tensors that share memory."""
        ranges = []
        for i, type_ in enumerate(self.blueprint.input_types):
            if isinstance(type_, TensorType) and i not in self.uploads:
                begin = self._base("input", i)
                ranges.append((begin, begin + nbytes_of(type_), i in self.blueprint.written))
        ranges.sort()
        reach = written = 0  # where what came so far ends, and what of it is written
        for begin, end, is_written in ranges:
            if begin < written or (is_written and begin < reach):
                return True
            reach, written = max(reach, end), max(written, end if is_written else 0)
        return False

    def rebind(self, state: Mapping[Symbol, int]) -> None:
        """Use other addresses for (some of) the state."""
        with self.lock:
            for symbol, pointer in state.items():
                number = self._numbers[symbol]
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
        return sum(storage.nbytes for storage in self.constants)

    def report(self) -> str:
        """Tasks with what they cover, compute and move, what runs them; memory; compile times."""
        return report(self)

    def profile(self, *words: Any, runs: int = 10) -> GpuProfile:
        """Run several times, updates of state included, each task timed on the device."""
        return profile(self, words, runs)

    def __repr__(self) -> str:
        tasks, launches = len(self.blueprint.tasks), len(self.steps)
        return f"<program of {tasks} tasks on {self.device}, {launches} launches>"


def identity(device: str) -> tuple[object, ...]:
    """What of a device and of this machine's libraries decides a program."""
    made = driver()
    properties = made.properties(device_index(device))
    versions = sorted((name, str(version)) for name, version in made.versions().items())
    return (
        device, properties.name, properties.capability, properties.multiprocessor_count,
        made.compiler_identity(), tuple(versions), are_deterministic_algorithms_enabled(),
    )  # fmt: skip


@contextmanager
def stage(stages: dict[str, float], name: str) -> Iterator[None]:
    """Count the seconds of what is done inside."""
    started = time.perf_counter()
    yield
    stages[name] = stages.get(name, 0.0) + time.perf_counter() - started


def check_places(schedule: Schedule, device: str) -> None:
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
