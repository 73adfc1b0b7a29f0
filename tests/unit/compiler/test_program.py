"""Programs: what a schedule computes as one native call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import flame  # noqa: F401 - gives the ops their interpreter
from flame.compiler.program import Program
from flame.compiler.schedule import one_task_a_node
from flame.core import dtypes
from flame.core.errors import IndexRangeError
from flame.core.types import TensorType, tensor_type
from flame.graph import Graph, Node, Symbol, interpret
from flame.graph.graph import infer
from flame.ops.op import OPS
from flame.runtime.storage import Storage


class Recorder:
    """Builds a graph call by call."""

    def __init__(self) -> None:
        self.inputs: list[Symbol] = []
        self.nodes: list[Node] = []
        self.updates: list[tuple[Symbol, Symbol]] = []
        self.constants: dict[Symbol, Any] = {}

    def input(self, *shape: int, dtype: Any = dtypes.float32) -> Symbol:
        made = Symbol(f"x{len(self.inputs)}", tensor_type(dtype, shape))
        self.inputs.append(made)
        return made

    def number(self, kind: type) -> Symbol:
        made = Symbol(f"x{len(self.inputs)}", kind)
        self.inputs.append(made)
        return made

    def constant(self, array: Any) -> Symbol:
        made = Symbol(
            f"c{len(self.constants)}", tensor_type(dtypes.from_numpy(array.dtype), array.shape)
        )
        self.constants[made] = array
        return made

    def __call__(self, name: str, *operands: Any, **attributes: Any) -> Any:
        op = OPS[name]
        types = tuple(
            None if x is None else x.type if isinstance(x, Symbol) else type(x) for x in operands
        )
        made = tuple(
            Symbol(f"v{len(self.nodes)}_{i}", t) for i, t in enumerate(infer(op, types, attributes))
        )
        self.nodes.append(Node(op, operands, made, attributes, line=f"line {len(self.nodes)}"))
        return made[0] if len(made) == 1 else made

    def graph(self, *outputs: Symbol) -> Graph:
        made = Graph(
            tuple(self.inputs),
            tuple(self.nodes),
            outputs,
            tuple(self.updates),
            self.constants,
        )
        made.verify()
        return made


def held(array: Any) -> Storage:
    """A storage with the numbers of an array."""
    made = Storage.allocate(array.nbytes)
    made.as_numpy(array.dtype, array.shape, [s // array.itemsize for s in array.strides])[...] = (
        array
    )
    return made


def type_of(symbol: Symbol) -> TensorType:
    assert isinstance(symbol.type, TensorType)
    return symbol.type


def view(storage: Storage, type_: TensorType, offset: int = 0) -> Any:
    return storage.as_numpy(
        type_.dtype.numpy, type_.shape, type_.strides, offset // type_.dtype.itemsize
    )


class Runner:
    """A program with memory for its inputs."""

    def __init__(self, graph: Graph, values: Sequence[Any], state: Sequence[Symbol] = ()) -> None:
        self.graph, self.state = graph, list(state)
        self.memory = {
            s: held(np.ascontiguousarray(v)) if isinstance(s.type, TensorType) else v
            for s, v in zip(graph.inputs, values, strict=True)
        }
        self.program = Program.build(
            one_task_a_node(graph), {s: self.memory[s].pointer for s in self.state}
        )

    def __call__(self, **changed: Any) -> list[Any]:
        given = [
            m.pointer if isinstance(m, Storage) else m
            for s, m in self.memory.items()
            if s not in self.state
        ]
        results = [Storage.allocate(n) for _, n in self.program.result_types]
        self.program.run(*given, *[r.pointer for r in results])
        found = []
        for symbol, place in zip(self.graph.outputs, self.program.output_places, strict=True):
            if place.space == "input":
                found.append(self.read(self.graph.inputs[place.index]))
            else:
                found.append(view(results[place.index], type_of(symbol), place.offset).copy())
        return found

    def read(self, symbol: Symbol) -> Any:
        memory = self.memory[symbol]
        return view(memory, type_of(symbol)).copy() if isinstance(memory, Storage) else memory

    def updated(self) -> list[Any]:
        return [self.read(old) for old, _ in self.graph.updates]


def check(graph: Graph, values: Sequence[Any], state: Sequence[Symbol] = ()) -> Runner:
    """Outputs and updates of two runs are those of the interpreter."""
    runner = Runner(graph, values, state)
    current = list(values)
    for _ in range(2):
        wanted = interpret(graph, current)
        found = [*runner(), *runner.updated()]
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        current = [runner.read(s) for s in graph.inputs]
    return runner


def numbers(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_a_chain_with_a_number_and_a_view() -> None:
    g = Recorder()
    x, scale = g.input(4, 6), g.number(float)
    y = g("mul", x, scale)
    z = g("permute", y, dims=(1, 0))
    graph = g.graph(g("add", z, 1.0), g("sum", z, dims=(1,), keepdim=False))
    check(graph, [numbers(4, 6), 2.5])


def test_an_update_in_place_needs_no_copy() -> None:
    g = Recorder()
    p, grad, rate = g.input(300), g.input(300), g.number(float)
    new = g("sub", p, g("mul", grad, rate))
    g.updates.append((p, new))
    runner = check(g.graph(), [numbers(300), numbers(300), 0.1], [p])
    assert [s.kernel for s in runner.program.blueprint.steps] == [0, 1]  # no copy


def test_outputs_of_every_kind() -> None:
    g = Recorder()
    p, x = g.input(3, 4), g.input(3, 4)
    c = g.constant(numbers(2, 2))
    y = g("mul", p, x)
    g.updates.append((p, y))
    turned = g("permute", y, dims=(1, 0))
    old = g("permute", p, dims=(1, 0))
    graph = g.graph(y, turned, y, p, old, x, c, g("permute", x, dims=(1, 0)))
    runner = check(graph, [numbers(3, 4), numbers(3, 4)], [p])
    places = runner.program.output_places
    assert places[0] == places[1] == places[2]
    assert places[5].space == "input"
    assert all(p.space == "result" for p in (*places[:5], *places[6:]))


def test_states_that_change_places() -> None:
    g = Recorder()
    a, b = g.input(5), g.input(5)
    g.updates += [(a, b), (b, a)]
    check(g.graph(), [numbers(5), numbers(5) + 1], [a, b])


def test_a_refused_index_names_its_op_and_stops() -> None:
    g = Recorder()
    table, index, p = g.input(5, 3), g.input(4, 1, dtype=dtypes.int64), g.input(4, 3)
    wide = g("expand", index, shape=(4, 3))
    rows = g("embedding", table, wide, padding=None, by_frequency=False)
    g.updates.append((p, g("add", p, rows)))
    graph = g.graph()
    runner = Runner(graph, [numbers(5, 3), np.array([[0], [1], [7], [2]]), numbers(4, 3)], [p])
    with pytest.raises(IndexRangeError, match="7"):
        runner()
    np.testing.assert_array_equal(runner.updated()[0], numbers(4, 3))
    view(runner.memory[index], type_of(index))[2, 0] = 3
    runner()
    expected = numbers(4, 3) + numbers(5, 3)[[0, 1, 3, 2]]
    np.testing.assert_array_equal(runner.updated()[0], expected)


def test_host_calls_stand_between_kernels() -> None:
    g = Recorder()
    x = g.input(20)
    order = g("argsort", g("neg", x), dim=0, descending=False, stable=True)
    check(g.graph(g("add", order, 1)), [numbers(20)])


def test_words_are_checked() -> None:
    g = Recorder()
    x, n = g.input(3), g.number(int)
    runner = Runner(g.graph(g("mul", x, n)), [numbers(3), 2])
    with pytest.raises(TypeError, match="takes 3 words"):
        runner.program.run(1)
    with pytest.raises(TypeError):
        runner.program.run(0, 2.5, 0)
    runner()


def test_state_can_move() -> None:
    g = Recorder()
    p = g.input(7)
    g.updates.append((p, g("mul", p, 2.0)))
    runner = Runner(g.graph(), [numbers(7)], [p])
    moved = held(numbers(7))
    runner.program.rebind({p: moved.pointer})
    runner.program.run()
    np.testing.assert_array_equal(view(moved, type_of(p)), numbers(7) * 2)
    np.testing.assert_array_equal(runner.updated()[0], numbers(7))
