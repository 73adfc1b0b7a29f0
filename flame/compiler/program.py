"""Program: a schedule made ready to run as one native call.

    program = Program.build(schedule, state)
    program.run(*arguments, *results)

``state`` gives the addresses of the graph inputs that stay where they are (captured tensors); all
other inputs are given at each call, in the graph's order: pointers of tensors, and numbers. After
them comes a pointer for each entry of `Program.result_types`, memory that the caller allocates.
`Program.output_places` then says where each output of the graph lies: ``Place("result", k, n)``,
n bytes into that memory (several outputs may share one, as views), or ``Place("input", i, 0)``,
where it is exactly an input that is not updated.

Invariants: results never share memory with arguments or state; an input is changed only by the
graph's updates; a run that fails has done no step that stands after the one that failed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flame.compiler import program_store
from flame.compiler.blueprint import Blueprint, Host, KernelText, make_blueprint
from flame.compiler.executor import Executor
from flame.compiler.profile import Profile, profile, write_trace
from flame.compiler.program_store import KeptProgram, keepable
from flame.compiler.regions import Layout
from flame.compiler.report import head_of, report
from flame.compiler.schedule.groups import best_plan
from flame.compiler.schedule.memory import Place
from flame.compiler.schedule.memory_check import check_memory
from flame.compiler.schedule.reorder import replacing_last
from flame.compiler.schedule.task import Schedule
from flame.core.errors import CompileError, DTypeError, FlameError, StateError
from flame.core.log import log
from flame.graph import Graph, Symbol

Failures = Mapping[int, Callable[[int], FlameError]]


class Program:
    """See the head of this file. Several threads may call `run`; the runs follow one another.

    stages: seconds of what making it took; whoever did something before may add its own.
    """

    inputs: tuple[Symbol, ...]
    outputs: tuple[Symbol, ...]
    # The memory that the caller allocates for each run: (symbol, bytes).
    result_types: tuple[tuple[Symbol, int], ...]
    output_places: tuple[Place, ...]
    peak: int  # planned bytes: arena and results
    stages: dict[str, float]
    device = "cpu"

    def __init__(
        self,
        graph: Graph,
        blueprint: Blueprint,
        results: tuple[tuple[Symbol, int], ...],
        state: Mapping[Symbol, int],
        hosts: Mapping[int, Host],
        failures: Failures,
        stages: dict[str, float],
    ) -> None:
        from flame.runtime.cpu import jit

        self.inputs, self.outputs = graph.inputs, graph.outputs
        self.result_types, self.output_places = results, blueprint.outputs
        self.peak = blueprint.arena + sum(blueprint.results)
        self.blueprint, self.stages = blueprint, stages
        self._failures = failures
        self._kept: KeptProgram | None = None
        self._profile: Profile | None = None
        with _stage(stages, "machine code"):
            addresses = jit.load_many([(k.text, k.symbol) for k in blueprint.kernels])
        self._numbers = {s: i for i, s in enumerate(graph.inputs)}
        with _stage(stages, "tables"):
            self.executor = Executor(
                blueprint, addresses, self._numbered(state), hosts, self._failure
            )
        self._run, self._address = self.executor.native.run, self.executor.address

    @classmethod
    def build(cls, schedule: Schedule, state: Mapping[Symbol, int]) -> Program:
        """Plan the memory of a schedule, and render and load its kernels. Raises CompileError."""
        stages: dict[str, float] = {}
        schedule = replacing_last(schedule)
        log("schedule", lambda: f"{len(schedule.tasks)} tasks\n{schedule}")
        with _stage(stages, "memory plan"):
            plan = best_plan(schedule)
        if os.environ.get("FLAME_VERIFY") == "1":
            check_memory(schedule, plan)
        with _stage(stages, "rendering"):
            blueprint = make_blueprint(schedule, plan)
        hosts = {
            call.step: host
            for call in blueprint.host_calls
            if (host := schedule.tasks[call.task].lowering.host) is not None
        }
        failures = {
            t: task.failure for t, task in enumerate(schedule.tasks) if task.failure is not None
        }
        made = cls(schedule.graph, blueprint, plan.results, state, hosts, failures, stages)
        made._kept = keepable(schedule, blueprint, plan.results)
        log("memory", lambda: str(plan))
        log("compile", lambda: head_of(made))
        return made

    @classmethod
    def restore(cls, key: str | None, graph: Graph, state: Mapping[Symbol, int]) -> Program | None:
        """The program that `save` kept under a key; None where there is none.

        graph: what the key was made of by `program_key`. Its inputs and outputs must be those of
        the schedule that was built, one by one; its nodes may have been changed by passes since.
        """
        stages: dict[str, float] = {}
        with _stage(stages, "found on disk"):
            kept = None if key is None else program_store.read(key)
        if not isinstance(kept, KeptProgram) or kept.blueprint.input_types != tuple(
            s.type for s in graph.inputs
        ):
            return None
        if kept.output_types != tuple(s.type for s in graph.outputs):
            return None
        try:
            hosts = kept.host_functions()
        except KeyError as reason:  # an op that this process has not declared
            log("cache", f"the program needs an op that is not there: {reason}")
            return None
        made = cls(
            graph, kept.blueprint, kept.result_types(), state, hosts, kept.failures(), stages
        )
        made._kept = kept
        return made

    def save(self, key: str | None) -> bool:
        """Keep the program on disk; whether it could be kept."""
        if key is None or self._kept is None:
            return False
        return program_store.write(key, self._kept)

    # --- running ----------------------------------------------------------------------------------

    def run(self, *words: float) -> None:
        """Run once; see the head of this file. Raises the error of a task that refuses its data."""
        try:
            status = self._run(self._address, *words)
        except OverflowError as error:
            raise DTypeError(
                f"a number among the arguments of a compiled step does not fit int64: {error}"
            ) from error
        if status:
            self.executor.go_on(status, words)

    def rebind(self, state: Mapping[Symbol, int]) -> None:
        """Use other addresses for (some of) the state."""
        numbered = self._numbered(state)
        for number in numbered:
            if number not in self.executor.state:
                raise CompileError(f"{self.inputs[number]} is an argument of this program")
        self.executor.rebind(numbered)

    def _numbered(self, state: Mapping[Symbol, int]) -> dict[int, int]:
        for symbol in state:
            if symbol not in self._numbers:
                raise CompileError(f"{symbol} is no input of the graph")
        return {self._numbers[s]: pointer for s, pointer in state.items()}

    def _failure(self, task: int, code: int) -> FlameError:
        make = self._failures.get(task)
        if make is None:
            name = self.blueprint.tasks[task].name
            return CompileError(f"task {name} refused its data, and has no words for it ({code})")
        return make(code)

    # --- looking ----------------------------------------------------------------------------------

    @property
    def kernels(self) -> tuple[KernelText, ...]:
        """Name, symbol and text of every kernel, in the order of first use."""
        return self.blueprint.kernels

    def source(self, i: int) -> str:
        """LLVM IR of a kernel, as `report` numbers them."""
        return self.blueprint.kernels[i].text

    @property
    def layout(self) -> Layout:
        """The native steps, for the present number of threads."""
        return self.executor.layout

    @property
    def threads(self) -> int:
        """How many threads the native steps are made for."""
        return self.executor.threads

    @property
    def constant_bytes(self) -> int:
        """Bytes of the tables that kernels read."""
        return sum(int(array.nbytes) for array in self.blueprint.constants)

    def report(self) -> str:
        """Tasks with what they cover, compute and move; kernels; memory; seconds of compiling."""
        return report(self)

    def __repr__(self) -> str:
        return f"<program of {len(self.blueprint.tasks)} tasks, {len(self.kernels)} kernels>"

    def profile(self, *words: float, runs: int = 10) -> Profile:
        """Run several times, updates of state included; `str` of the result is a table."""
        self._profile = profile(self, words, runs)
        return self._profile

    def trace(self, path: str | Path) -> None:
        """Write the last run of `profile` for chrome://tracing or ui.perfetto.dev."""
        if self._profile is None:
            raise StateError("trace writes what profile measured: call profile(...) first")
        write_trace(self, self._profile, path)


@contextmanager
def _stage(stages: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    stages[name] = stages.get(name, 0.0) + time.perf_counter() - started
