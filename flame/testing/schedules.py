"""Hand-built graphs, and schedules run kernel by kernel, for tests of the compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from flame.compiler.pipeline import load, source_of
from flame.compiler.program import Program
from flame.compiler.schedule.task import Schedule, Task
from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.types import Shape, TensorType, tensor_type
from flame.graph import Graph, Node, Operand, Symbol, infer
from flame.graph.graph import type_of
from flame.kernel.builder import Ref
from flame.ops.op import OPS, Op
from flame.runtime import cpu
from flame.runtime.cpu.pool import get_num_threads
from flame.runtime.storage import Storage


class GraphBuilder:
    """``g = GraphBuilder(); x = g.input((2, 3)); y = g("add", x, 1.0); g.graph(y)``."""

    def __init__(self) -> None:
        self.inputs: list[Symbol] = []
        self.nodes: list[Node] = []

    def input(
        self,
        shape: Shape,
        dtype: DType = dtypes.float32,
        strides: Shape | None = None,
        device: str = "cpu",
    ) -> Symbol:
        """A tensor input."""
        return self._input(tensor_type(dtype, shape, strides, device))

    def number(self, kind: type) -> Symbol:
        """A number that is known at the call."""
        return self._input(kind)

    def _input(self, type_: TensorType | type) -> Symbol:
        self.inputs.append(Symbol(f"x{len(self.inputs)}", type_))
        return self.inputs[-1]

    def __call__(self, op: str | Op, *operands: Operand, **attributes: Any) -> Any:
        """A node; its result, or a tuple of its results."""
        op = OPS[op] if isinstance(op, str) else op
        types = infer(op, tuple(type_of(x) for x in operands), attributes)
        first = sum(len(n.outputs) for n in self.nodes)
        made = tuple(Symbol(f"y{first + i}", t) for i, t in enumerate(types))
        self.nodes.append(Node(op, operands, made, attributes))
        return made[0] if len(made) == 1 else made

    def graph(self, *results: Symbol, updates: Sequence[tuple[Symbol, Symbol]] = ()) -> Graph:
        made = Graph(tuple(self.inputs), tuple(self.nodes), results, tuple(updates))
        made.verify()
        return made


def memory_of(array: Any, type_: TensorType) -> Storage:
    """The memory of a tensor of ``type_`` that holds an array."""
    storage = Storage.allocate(max(type_.span * type_.dtype.itemsize, 1))
    if array is not None and type_.numel:
        view(storage, type_)[...] = array
    return storage


def view(storage: Storage, type_: TensorType, offset: int = 0) -> Any:
    """A tensor's elements as a NumPy array over its memory."""
    return storage.as_numpy(type_.dtype.numpy, type_.shape, type_.strides, offset)


def run_schedule(schedule: Schedule, values: Sequence[Any]) -> tuple[Any, ...]:
    """The graph's results as arrays, every task by itself in memory of its own."""
    graph = schedule.graph
    memory: dict[Symbol, Any] = {}
    for symbol, value in [*zip(graph.inputs, values, strict=True), *graph.constants.items()]:
        tensor = isinstance(symbol.type, TensorType)
        memory[symbol] = memory_of(value, symbol.type) if tensor else value  # type: ignore[arg-type]
    for task in schedule.tasks:
        _run(schedule, task, memory)

    def result(symbol: Symbol) -> Any:
        owner, offset = schedule.owner(symbol)
        assert isinstance(symbol.type, TensorType)
        return np.array(view(memory[owner], symbol.type, offset))

    return tuple(result(s) for s in graph.results)


def _run(schedule: Schedule, task: Task, memory: dict[Symbol, Any]) -> None:
    for symbol in task.outputs:
        assert isinstance(symbol.type, TensorType)
        memory[symbol] = memory_of(None, symbol.type)
    temporaries = [Storage.allocate(max(n, 1)) for n in task.lowering.temporaries]
    slot = memory_of(np.zeros(2, np.int64), tensor_type(dtypes.int64, (2,)))

    def operand(x: Operand) -> Any:
        if not isinstance(x, Symbol) or isinstance(x.type, type):
            return memory[x] if isinstance(x, Symbol) else x
        owner, offset = schedule.owner(x)
        return memory[owner].pointer + offset * x.type.dtype.itemsize

    def pointer(ref: Ref) -> Any:
        if ref.role == "input":
            return operand(task.inputs[ref.position])
        if ref.role == "output":
            return memory[task.outputs[ref.position]].pointer
        if ref.role == "temporary":
            return temporaries[ref.position].pointer
        if ref.role == "constant":
            return task.lowering.constants[ref.position].ctypes.data
        return slot.pointer

    for bound in task.lowering.kernels:
        if not bound.extent:
            continue
        step = load(bound, source_of(bound.kernel))
        scratch = [Storage.allocate(n * get_num_threads()) for n in step.scratch]
        cpu.launch(
            step.address, step.extent, step.grain, *map(pointer, step.operands),
            *[s.pointer for s in scratch], *step.sizes,
        )  # fmt: skip
    flag, code = (ctypes.c_int64 * 2).from_address(slot.pointer)
    if flag:
        assert task.failure is not None
        raise task.failure(code)


def run_program(schedule: Schedule, values: Sequence[Any]) -> tuple[Any, ...]:
    """The graph's results as arrays, by the native program with its planned memory."""
    graph, program = schedule.graph, Program.build(schedule, {})
    memory = [
        memory_of(value, symbol.type) if isinstance(symbol.type, TensorType) else value
        for symbol, value in zip(graph.inputs, values, strict=True)
    ]
    made = [Storage.allocate(max(nbytes, 1)) for _, nbytes in program.result_types]
    program.run(*[m.pointer if isinstance(m, Storage) else m for m in (*memory, *made)])
    found = []
    for symbol, place in zip(graph.outputs, program.output_places, strict=True):
        assert isinstance(symbol.type, TensorType)
        storage = made[place.index] if place.space == "result" else memory[place.index]
        offset = place.offset // symbol.type.dtype.itemsize
        found.append(np.array(view(storage, symbol.type, offset)))
    for old, _ in graph.updates:
        assert isinstance(old.type, TensorType)
        found.append(np.array(view(memory[graph.inputs.index(old)], old.type)))
    return tuple(found)
