"""Random graphs, and programs with memory for their inputs, for tests of the compiler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flame.compiler.program import Program
from flame.compiler.schedule import Schedule, one_task_a_node
from flame.core import dtypes
from flame.core.types import TensorType, tensor_type
from flame.graph import Graph, Node, Symbol, infer
from flame.graph.graph import type_of
from flame.ops.op import OPS
from flame.ops.overwriting import overwrite
from flame.runtime.storage import Storage


class GraphWriter:
    """``w = GraphWriter(); x = w.input(2, 3); w.graph(w("add", x, 1.0))``."""

    def __init__(self) -> None:
        self.inputs: list[Symbol] = []
        self.nodes: list[Node] = []
        self.updates: list[tuple[Symbol, Symbol]] = []
        self.constants: dict[Symbol, Any] = {}

    def input(self, *shape: int, dtype: Any = dtypes.float32, strides: Any = None) -> Symbol:
        """A tensor."""
        made = Symbol(f"x{len(self.inputs)}", tensor_type(dtype, shape, strides))
        self.inputs.append(made)
        return made

    def number(self, kind: type) -> Symbol:
        """A number that is known at the call."""
        self.inputs.append(Symbol(f"x{len(self.inputs)}", kind))
        return self.inputs[-1]

    def constant(self, array: Any) -> Symbol:
        kind = dtypes.from_numpy(array.dtype)
        made = Symbol(f"c{len(self.constants)}", tensor_type(kind, array.shape))
        self.constants[made] = array
        return made

    def __call__(self, name: str, *operands: Any, **attributes: Any) -> Any:
        """A node; its result, or a tuple of its results."""
        op = OPS[name]
        types = infer(op, tuple(type_of(x) for x in operands), attributes)
        count = len(self.nodes)
        made = tuple(Symbol(f"v{count}_{i}", t) for i, t in enumerate(types))
        self.nodes.append(Node(op, operands, made, attributes, line=f"line {count}"))
        return made[0] if len(made) == 1 else made

    def graph(self, *outputs: Symbol) -> Graph:
        made = Graph(
            tuple(self.inputs), tuple(self.nodes), outputs, tuple(self.updates), self.constants
        )
        made.verify()
        return made


def random_graph(seed: int, nodes: int = 20) -> Graph:
    """Elementwise ops, sums, views, products, indices and updates of square matrices."""
    rng = np.random.default_rng(seed)
    w = GraphWriter()
    size = int(rng.integers(2, 40))
    states = [w.input(size, size) for _ in range(int(rng.integers(0, 4)))]
    if rng.random() < 0.3:
        states.append(w.input(size, size, strides=(size + 3, 1)))
    known = [*states, w.input(size, size), w.input(size, size)]
    scale = w.number(float)
    if rng.random() < 0.5:
        known.append(w.constant(rng.standard_normal((size, size)).astype(np.float32)))
    for _ in range(nodes):
        known.append(_random_node(w, rng, known, scale, size))
    made = [s for s in known if s not in w.inputs and s not in w.constants]
    for state in states:
        if rng.random() < 0.8:
            choices = [s for s in (*made, *states) if s.type is state.type]
            if choices:
                w.updates.append((state, choices[int(rng.integers(len(choices)))]))
    count = int(rng.integers(1, 5))
    outputs = [known[int(i)] for i in rng.integers(0, len(known), count)]
    return w.graph(*outputs)


def _random_node(
    w: GraphWriter, rng: Any, known: Sequence[Symbol], scale: Symbol, size: int
) -> Symbol:
    def pick() -> Symbol:
        recent = known[-6:] if rng.random() < 0.7 else known
        return recent[int(rng.integers(len(recent)))]

    kind = rng.integers(0, 10)
    x, y = pick(), pick()
    made: Symbol
    if kind <= 2:
        made = w(("add", "mul", "sub")[kind], x, y)
    elif kind == 3:
        made = w("tanh", x)
    elif kind == 4:
        made = w("mul", w("tanh", x), scale)
    elif kind == 5:
        made = w("permute", x, dims=(1, 0))
    elif kind == 6:
        made = w("add", y, w("sum", x, dims=(int(rng.integers(2)),), keepdim=False))
    elif kind == 7:
        half = w("slice", w("tanh", x), dim=0, start=size // 2, stop=size, step=1)
        made = w("sub", y, w("amax", half, dims=(0,), keepdim=True))
    elif kind == 8:
        part = w("slice", x, dim=1, start=0, stop=size // 2, step=1)
        whole = w("copy", y, contiguous=True) if rng.random() < 0.5 else y
        if not isinstance(whole.type, TensorType) or not whole.type.contiguous:
            whole = w("copy", whole, contiguous=True)
        made = w(overwrite.name, whole, part, strides=(size, 1), offset=1)
    else:
        made = w("mul", w("matmul", w("copy", x, contiguous=True), w("tanh", y)), 1 / size)
    return made


def random_values(graph: Graph, seed: int) -> list[Any]:
    """Numbers for the inputs of a graph."""
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal(s.type.shape).astype(s.type.dtype.numpy)
        if isinstance(s.type, TensorType)
        else s.type(rng.uniform(0.5, 1.5))
        for s in graph.inputs
    ]


def memory_of(array: Any, type_: TensorType) -> Storage:
    """Memory that holds an array as a tensor of a type."""
    made = Storage.allocate(type_.span * type_.dtype.itemsize)
    if type_.numel:
        view(made, type_)[...] = array
    return made


def view(storage: Storage, type_: TensorType, nbytes: int = 0) -> Any:
    """A tensor that begins ``nbytes`` into a storage, as a NumPy array over it."""
    offset = nbytes // type_.dtype.itemsize
    return storage.as_numpy(type_.dtype.numpy, type_.shape, type_.strides, offset)


class ProgramRunner:
    """A program with memory for its inputs. ``state``: those whose addresses are given once."""

    def __init__(
        self,
        graph: Graph | Schedule,
        values: Sequence[Any],
        state: Sequence[Symbol] = (),
        program: Program | None = None,
    ) -> None:
        schedule = graph if isinstance(graph, Schedule) else one_task_a_node(graph)
        self.graph, self.state = schedule.graph, list(state)
        self.memory = {
            s: memory_of(v, s.type) if isinstance(s.type, TensorType) else v
            for s, v in zip(self.graph.inputs, values, strict=True)
        }
        pointers = {s: self.memory[s].pointer for s in self.state}
        self.program = program or Program.build(schedule, pointers)

    def __call__(self) -> list[Any]:
        """The outputs of one run, as arrays."""
        results = [Storage.allocate(n) for _, n in self.program.result_types]
        self.program.run(*self.words(results))
        found = []
        for symbol, place in zip(self.graph.outputs, self.program.output_places, strict=True):
            if place.space == "input":
                found.append(self.read(self.graph.inputs[place.index]))
            else:
                assert isinstance(symbol.type, TensorType)
                found.append(view(results[place.index], symbol.type, place.offset).copy())
        return found

    def words(self, results: Sequence[Storage]) -> list[Any]:
        given = [m for s, m in self.memory.items() if s not in self.state]
        pointers = [m.pointer if isinstance(m, Storage) else m for m in given]
        return pointers + [r.pointer for r in results]

    def read(self, symbol: Symbol) -> Any:
        """What an input holds."""
        memory = self.memory[symbol]
        if not isinstance(memory, Storage):
            return memory
        assert isinstance(symbol.type, TensorType)
        return view(memory, symbol.type).copy()

    def updated(self) -> list[Any]:
        return [self.read(old) for old, _ in self.graph.updates]
