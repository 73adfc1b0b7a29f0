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

from collections.abc import Callable, Mapping
from typing import Any

from flame.compiler.blueprint import Blueprint, Host, make_blueprint
from flame.compiler.executor import Executor
from flame.compiler.regions import Layout
from flame.compiler.schedule.groups import best_plan
from flame.compiler.schedule.memory import MemoryPlan, Place
from flame.compiler.schedule.task import Schedule
from flame.core.errors import CompileError, FlameError
from flame.graph import Graph, Symbol

Failures = Mapping[int, Callable[[int], FlameError]]


class Program:
    """See the head of this file. Several threads may call `run`; the runs follow one another."""

    inputs: tuple[Symbol, ...]
    outputs: tuple[Symbol, ...]
    # The memory that the caller allocates for each run: (symbol, bytes).
    result_types: tuple[tuple[Symbol, int], ...]
    output_places: tuple[Place, ...]
    peak: int

    def __init__(
        self,
        graph: Graph,
        blueprint: Blueprint,
        results: tuple[tuple[Symbol, int], ...],
        state: Mapping[Symbol, int],
        hosts: Mapping[int, Host],
        failures: Failures,
    ) -> None:
        from flame.runtime.cpu import jit

        self.inputs, self.outputs = graph.inputs, graph.outputs
        self.result_types, self.output_places = results, blueprint.outputs
        self.peak = blueprint.arena + sum(blueprint.results)
        self.blueprint = blueprint
        self._failures = failures
        addresses = jit.load_many([(k.text, k.symbol) for k in blueprint.kernels])
        self._numbers = {s: i for i, s in enumerate(graph.inputs)}
        self._executor = Executor(blueprint, addresses, self._numbered(state), hosts, self._failure)
        self._run, self._address = self._executor.native.run, self._executor.address

    @classmethod
    def build(cls, schedule: Schedule, state: Mapping[Symbol, int]) -> Program:
        """Plan the memory of a schedule, and render and load its kernels. Raises CompileError."""
        plan: MemoryPlan = best_plan(schedule)
        blueprint = make_blueprint(schedule, plan)
        hosts = {
            call.step: host
            for call in blueprint.host_calls
            if (host := schedule.tasks[call.task].lowering.host) is not None
        }
        failures = {
            t: task.failure for t, task in enumerate(schedule.tasks) if task.failure is not None
        }
        return cls(schedule.graph, blueprint, plan.results, state, hosts, failures)

    def run(self, *words: float) -> None:
        """Run once; see the head of this file. Raises the error of a task that refuses its data."""
        status = self._run(self._address, *words)
        if status:
            self._executor.go_on(status, words)

    def rebind(self, state: Mapping[Symbol, int]) -> None:
        """Use other addresses for (some of) the state."""
        numbered = self._numbered(state)
        for number in numbered:
            if number not in self._executor.state:
                raise CompileError(f"{self.inputs[number]} is an argument of this program")
        self._executor.rebind(numbered)

    def _numbered(self, state: Mapping[Symbol, int]) -> dict[int, int]:
        for symbol in state:
            if symbol not in self._numbers:
                raise CompileError(f"{symbol} is no input of the graph")
        return {self._numbers[s]: pointer for s, pointer in state.items()}

    def _failure(self, task: int, code: int) -> FlameError:
        make = self._failures.get(task)
        if make is None:
            return CompileError(f"task {task} refused its data, and has no words for it ({code})")
        return make(code)

    def source(self, i: int) -> str:
        """LLVM IR of a kernel."""
        return self.blueprint.kernels[i].text

    @property
    def layout(self) -> Layout:
        """The native steps, for the present number of threads."""
        return self._executor.layout

    @property
    def arena_bytes(self) -> int:
        """What the program holds between calls, without its constants and scratch memory."""
        return self.blueprint.arena

    @property
    def kernels(self) -> Any:
        """Name, symbol and text of every kernel, in the order of first use."""
        return self.blueprint.kernels
