"""Runs a schedule task by task and compares every result with its op's definition.

Each task gets what the compiled tasks before it gave, so a difference is found where it arises, and
one that grows over many tasks is not blamed on the last of them. All values are kept on the host; a
task of a GPU gets copies of its operands there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flame.compiler.compilation import gpu_of
from flame.compiler.executor import array_at
from flame.compiler.program import Program
from flame.compiler.schedule import one_task_a_node
from flame.compiler.schedule.task import Schedule, Task
from flame.core.errors import ShapeError
from flame.core.types import TensorType
from flame.graph import Graph, Node, Symbol
from flame.runtime.storage import Storage
from flame.runtime.transfer import on_host, restore

if TYPE_CHECKING:
    from flame.compiler.gpu.program import GpuProgram

# Differences, relative to the largest number of a result, that reordered sums may make.
TOLERANCE: Final = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Finding:
    """What is wrong with a node's result, and where the user's code called it."""

    node: Node
    task: Task
    what: str

    def __str__(self) -> str:
        where = "" if self.node.line is None else f"\n  called at {self.node.line}"
        return f"{self.node.op.name} {self.what}\n  {self.node}{where}\n  in task {self.task.name}"


@dataclass(frozen=True)
class Replay:
    """The first node of each kind; None where there is none. ``results``: all of the graph's."""

    difference: Finding | None
    nan: Finding | None
    infinity: Finding | None
    results: tuple[Any, ...]

    def __str__(self) -> str:
        found = [f for f in (self.nan, self.infinity, self.difference) if f is not None]
        return "\n".join(map(str, found)) or "every task gives what its ops mean"


def replay(program: Schedule | Graph, arrays: Sequence[Any], *, tolerance: float = 1.0) -> Replay:
    """Run every task by itself on these inputs (arrays and numbers), updates left undone.

    A graph is run node by node. tolerance: how many times the usual difference is allowed.
    """
    schedule = program if isinstance(program, Schedule) else one_task_a_node(program)
    return _Replay(schedule, arrays, tolerance).run()


class _Replay:
    def __init__(self, schedule: Schedule, arrays: Sequence[Any], tolerance: float) -> None:
        self.schedule, self.graph, self.tolerance = schedule, schedule.graph, tolerance
        if len(arrays) != len(self.graph.inputs):
            raise ShapeError(
                f"the graph has {len(self.graph.inputs)} inputs, {len(arrays)} were given"
            )
        self.memory: dict[Symbol, Storage] = {}
        self.numbers: dict[Symbol, Any] = {}
        self.maker = {s: node for node in self.graph.nodes for s in node.outputs}
        given = [*zip(self.graph.inputs, arrays, strict=True), *self.graph.constants.items()]
        for symbol, array in given:
            if isinstance(symbol.type, TensorType):
                self.memory[symbol] = self._storage(symbol)
                self.array(symbol)[...] = array
            else:
                self.numbers[symbol] = symbol.type(array)
        self.found: dict[str, Finding] = {}

    def run(self) -> Replay:
        for task in self.schedule.tasks:
            self._run(task)
            self._compare(task)
        results = tuple(
            self.array(s).copy() if isinstance(s.type, TensorType) else self.numbers[s]
            for s in self.graph.results
        )
        found = self.found
        return Replay(found.get("difference"), found.get("nan"), found.get("infinity"), results)

    def _storage(self, symbol: Symbol) -> Storage:
        assert isinstance(symbol.type, TensorType)
        return Storage.allocate(symbol.type.span * symbol.type.dtype.itemsize)

    def pointer(self, symbol: Symbol) -> int:
        owner, offset = self.schedule.owner(symbol)
        assert isinstance(symbol.type, TensorType)
        return self.memory[owner].pointer + offset * symbol.type.dtype.itemsize

    def array(self, symbol: Symbol) -> Any:
        assert isinstance(symbol.type, TensorType)
        return array_at(self.pointer(symbol), symbol.type)

    def _run(self, task: Task) -> None:
        """A program of one task, whose operands are its inputs."""
        operands = tuple(dict.fromkeys(x for x in task.inputs if isinstance(x, Symbol)))
        alone = replace(task, in_place=frozenset())
        program = _built(Schedule(Graph(operands, task.nodes, task.outputs), (alone,)))
        words: list[Any] = []
        copies = []
        for x in operands:
            if not isinstance(x.type, TensorType):
                words.append(self.numbers[x])
            elif x.type.device == "cpu":
                words.append(self.pointer(x))
            else:
                copies.append(self._uploaded(x, x.type))
                words.append(copies[-1].pointer)
        made = [Storage.allocate(nbytes, program.device) for _, nbytes in program.result_types]
        program.run(*words, *[storage.pointer for storage in made])
        named = {symbol.name: symbol for node in task.nodes for symbol in node.outputs}
        for (result, _), storage in zip(program.result_types, made, strict=True):
            self.memory[named[result.name]] = on_host(storage)

    def _uploaded(self, symbol: Symbol, type_: TensorType) -> Storage:
        """A copy on the symbol's device."""
        nbytes = type_.span * type_.dtype.itemsize
        made = Storage.allocate(nbytes, type_.device)
        restore(made, Storage.borrow(self.pointer(symbol), nbytes, self))
        return made

    def _compare(self, task: Task) -> None:
        """Compute the task's nodes by their definitions, from the operands that it had."""
        known: dict[Symbol, Any] = {}
        for x in task.inputs:
            if isinstance(x, Symbol):
                known[x] = self.array(x) if isinstance(x.type, TensorType) else self.numbers[x]
        for node in task.nodes:
            if not self._define(node, known, task):
                # No definition in NumPy: what the kernel itself gave is all there is to look at.
                for symbol in node.outputs:
                    if symbol in task.outputs:
                        known[symbol] = self.array(symbol)
                        self._look(node, task, known[symbol], known)
                return
            for symbol in node.outputs:
                wanted = known[symbol]
                self._look(node, task, wanted, known)
                if symbol in task.outputs:
                    self._differ(node, task, symbol, wanted)
                    self._look(node, task, self.array(symbol), known)

    def _define(self, node: Node, known: dict[Symbol, Any], task: Task) -> bool:
        operands = []
        for x in node.inputs:
            if isinstance(x, Symbol) and x not in known:
                maker = self.maker.get(x)
                if x in self.graph.inputs or x in self.graph.constants:
                    known[x] = self.array(x)
                elif maker is None or not self._define(maker, known, task):
                    return False
            operands.append(known[x] if isinstance(x, Symbol) else x)
        reference: Any = node.op.reference
        if reference is None:  # of functions that exist only compiled
            return False
        with np.errstate(all="ignore"):
            made = reference(*operands, **node.attributes)
            for symbol, result in zip(
                node.outputs, made if isinstance(made, tuple) else (made,), strict=True
            ):
                assert isinstance(symbol.type, TensorType)
                known[symbol] = np.asarray(result).astype(symbol.type.dtype.numpy)
        return True

    def _look(self, node: Node, task: Task, array: Any, known: dict[Symbol, Any]) -> None:
        """Note the first result that is not finite, made of operands that are."""
        if array.dtype.kind not in "fV":
            return
        wide = array.astype(np.float64)
        operands = [known[x] for x in node.symbols if x in known]
        for kind, test in (("nan", np.isnan), ("infinity", np.isinf)):
            if kind in self.found or not test(wide).any():
                continue
            if not any(_has(test, x) for x in operands):
                count = int(test(wide).sum())
                what = f"makes {'NaN' if kind == 'nan' else 'infinity'} in {count} of {wide.size}"
                self.found[kind] = Finding(node, task, f"{what} elements")

    def _differ(self, node: Node, task: Task, symbol: Symbol, wanted: Any) -> None:
        assert isinstance(symbol.type, TensorType)
        if "difference" in self.found or not wanted.size:
            return
        allowed = TOLERANCE.get(symbol.type.dtype.name, 0.0) * self.tolerance * node.op.tolerance
        made = self.array(symbol).astype(np.float64)
        wanted = wanted.astype(np.float64)
        finite = np.isfinite(wanted)
        scale = max(1.0, float(np.abs(wanted[finite]).max(initial=0.0)))
        with np.errstate(invalid="ignore"):
            same = (made == wanted) | (np.isnan(made) & np.isnan(wanted))
            wrong = ~same & ~(np.abs(made - wanted) <= allowed * scale)
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            what = (
                f"differs from its definition in {int(wrong.sum())} of {wrong.size} elements, "
                f"first at {at}: {made[at]!r} instead of {wanted[at]!r}"
            )
            self.found["difference"] = Finding(node, task, what)


def _built(schedule: Schedule) -> Program | GpuProgram:
    device = gpu_of(schedule.graph)
    if device is None:
        return Program.build(schedule, {})
    from flame.compiler.gpu.program import GpuProgram

    return GpuProgram.build(schedule, {}, device)


def _has(test: Any, value: Any) -> bool:
    array = np.asarray(value)
    return array.dtype.kind in "fV" and bool(test(array.astype(np.float64)).any())
