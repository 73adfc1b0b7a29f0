"""Programs: what a schedule computes as one native call."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import flame
from flame.core import dtypes
from flame.core.errors import DTypeError, IndexRangeError
from flame.core.types import TensorType
from flame.graph import Graph, Symbol, interpret
from flame.runtime import cpu
from flame.runtime.cpu.allocator import rounded
from flame.testing.programs import (
    GraphWriter,
    ProgramRunner,
    memory_of,
    random_graph,
    random_values,
    view,
)


def type_of(symbol: Symbol) -> TensorType:
    assert isinstance(symbol.type, TensorType)
    return symbol.type


def check(graph: Graph, values: Sequence[Any], state: Sequence[Symbol] = ()) -> ProgramRunner:
    """Outputs and updates of two runs are those of the interpreter."""
    runner = ProgramRunner(graph, values, state)
    current = list(values)
    for _ in range(2):
        wanted = interpret(graph, current)
        found = [*runner(), *runner.updated()]
        for a, b in zip(found, wanted, strict=True):
            scale = max(1.0, float(np.abs(b).max()))
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * scale)
        current = [runner.read(s) for s in graph.inputs]
    return runner


def numbers(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_a_chain_with_a_number_and_a_view() -> None:
    g = GraphWriter()
    x, scale = g.input(4, 6), g.number(float)
    y = g("mul", x, scale)
    z = g("permute", y, dims=(1, 0))
    graph = g.graph(g("add", z, 1.0), g("sum", z, dims=(1,), keepdim=False))
    check(graph, [numbers(4, 6), 2.5])


def test_an_update_in_place_needs_no_copy() -> None:
    g = GraphWriter()
    p, grad, rate = g.input(300), g.input(300), g.number(float)
    new = g("sub", p, g("mul", grad, rate))
    g.updates.append((p, new))
    runner = check(g.graph(), [numbers(300), numbers(300), 0.1], [p])
    assert [s.kernel for s in runner.program.blueprint.steps] == [0, 1]  # no copy


def test_outputs_of_every_kind() -> None:
    g = GraphWriter()
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
    g = GraphWriter()
    a, b = g.input(5), g.input(5)
    g.updates += [(a, b), (b, a)]
    check(g.graph(), [numbers(5), numbers(5) + 1], [a, b])


def test_a_refused_index_names_its_op_and_stops() -> None:
    g = GraphWriter()
    table, index, p = g.input(5, 3), g.input(4, 1, dtype=dtypes.int64), g.input(4, 3)
    wide = g("expand", index, shape=(4, 3))
    rows = g("embedding", table, wide, padding=None, by_frequency=False)
    g.updates.append((p, g("add", p, rows)))
    graph = g.graph()
    runner = ProgramRunner(
        graph, [numbers(5, 3), np.array([[0], [1], [7], [2]]), numbers(4, 3)], [p]
    )
    with pytest.raises(IndexRangeError, match="7"):
        runner()
    np.testing.assert_array_equal(runner.updated()[0], numbers(4, 3))
    view(runner.memory[index], type_of(index))[2, 0] = 3
    runner()
    expected = numbers(4, 3) + numbers(5, 3)[[0, 1, 3, 2]]
    np.testing.assert_array_equal(runner.updated()[0], expected)


def test_host_calls_stand_between_kernels() -> None:
    g = GraphWriter()
    x = g.input(20)
    order = g("argsort", g("neg", x), dim=0, descending=False, stable=True)
    check(g.graph(g("add", order, 1)), [numbers(20)])


def test_a_host_call_that_fails_leaves_the_program_usable() -> None:
    w = GraphWriter()
    x = w.input(20)
    runner = ProgramRunner(
        w.graph(w("argsort", x, dim=0, descending=False, stable=True)), [numbers(20)]
    )
    hosts = dict(runner.program.executor.hosts)
    runner.program.executor.hosts = dict.fromkeys(hosts, lambda inputs, outputs: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        runner()
    runner.program.executor.hosts = hosts
    np.testing.assert_array_equal(runner()[0], np.argsort(numbers(20)))


def test_words_are_checked() -> None:
    g = GraphWriter()
    x, n = g.input(3), g.number(int)
    runner = ProgramRunner(g.graph(g("mul", x, n)), [numbers(3), 2])
    with pytest.raises(TypeError, match="takes 3 words"):
        runner.program.run(1)
    with pytest.raises(TypeError):
        runner.program.run(0, 2.5, 0)
    with pytest.raises(DTypeError, match="int64"):
        runner.program.run(0, 1 << 63, 0)
    runner()


def test_state_can_move() -> None:
    g = GraphWriter()
    p = g.input(7)
    g.updates.append((p, g("mul", p, 2.0)))
    runner = ProgramRunner(g.graph(), [numbers(7)], [p])
    moved = memory_of(numbers(7), type_of(p))
    runner.program.rebind({p: moved.pointer})
    runner.program.run()
    np.testing.assert_array_equal(view(moved, type_of(p)), numbers(7) * 2)
    np.testing.assert_array_equal(runner.updated()[0], numbers(7))


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs_are_what_the_interpreter_says(seed: int) -> None:
    graph = random_graph(seed)
    state = [s for s in graph.inputs if seed % 2 and s in dict(graph.updates)]
    check(graph, random_values(graph, seed), state)


@pytest.fixture
def threads() -> Iterator[Any]:
    before = flame.get_num_threads()
    yield flame.set_num_threads
    flame.set_num_threads(before)


def many_updates(count: int, size: int) -> Graph:
    w = GraphWriter()
    for i in range(count):
        p, grad = w.input(size + i), w.input(size + i)
        w.updates.append((p, w("sub", p, grad)))
    return w.graph()


@pytest.mark.parametrize("size", [3, 20_000, 70_000])
def test_independent_steps_run_as_one_region(size: int, threads: Any) -> None:
    threads(3)
    graph = many_updates(30, size)
    runner = check(graph, random_values(graph, 0))
    steps = runner.program.layout.steps
    assert len(steps) == (30 if size == 3 else 1)


def test_a_program_follows_the_number_of_threads(threads: Any) -> None:
    threads(1)
    graph = many_updates(30, 20_000)
    runner = check(graph, random_values(graph, 0))
    assert len(runner.program.layout.steps) == 30
    for count in (4, 2):
        threads(count)
        before = runner.updated()
        runner()
        gradients = [runner.read(s) for s in graph.inputs[1::2]]
        for a, b, g in zip(runner.updated(), before, gradients, strict=True):
            np.testing.assert_array_equal(a, b - g)
        assert len(runner.program.layout.steps) == 1


def test_several_threads_may_run_one_program() -> None:
    graph = many_updates(5, 1000)
    values = random_values(graph, 0)
    runner = ProgramRunner(graph, values, graph.inputs)
    calls = [threading.Thread(target=lambda: [runner() for _ in range(50)]) for _ in range(4)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert len(calls) == 4
    for found, old, g in zip(runner.updated(), values[::2], values[1::2], strict=True):
        np.testing.assert_allclose(found, old - 200 * g, rtol=1e-3, atol=1e-3)


def test_programs_give_their_memory_back() -> None:
    graph = random_graph(5, 30)
    values = random_values(graph, 5)
    for _ in range(50):  # until caches of bounded size are full
        ProgramRunner(graph, values)()
    gc.collect()
    before = cpu.ALLOCATOR.statistics().allocated
    objects = len(gc.get_objects())
    for _ in range(100):
        ProgramRunner(graph, values)()
    gc.collect()
    assert cpu.ALLOCATOR.statistics().allocated == before
    assert len(gc.get_objects()) < objects + 100


@pytest.mark.parametrize("seed", range(10))
def test_no_run_takes_more_than_the_planned_peak(seed: int) -> None:
    graph = random_graph(seed, 40)
    runner = ProgramRunner(graph, random_values(graph, seed))
    runner()
    allocator = cpu.ALLOCATOR
    outside = allocator.statistics().allocated - rounded(runner.program.blueprint.arena)
    allocator.reset_peak()
    runner()
    results = [n for _, n in runner.program.result_types]
    measured = allocator.statistics().peak_allocated - outside
    classes = rounded(runner.program.blueprint.arena) + sum(map(rounded, results))
    assert measured <= classes <= 1.125 * runner.program.peak + 64 * (len(results) + 1)


def test_a_gradient_lies_over_the_scores_that_it_is_of() -> None:
    x, y = flame.randn(16, 40), flame.randint(0, 10, (16,))
    w = flame.randn(40, 10).requires_grad_()

    def step(x: flame.Tensor, y: flame.Tensor) -> tuple[flame.Tensor, ...]:
        scores = x @ w
        loss = flame.nn.functional.cross_entropy(scores, y, label_smoothing=0.1)
        (gradient,) = flame.autograd.grad(loss, w)
        return loss.detach(), gradient, scores.argmax(1)

    compiled = flame.compile(step)
    for ours, theirs in zip(compiled(x, y), step(x, y), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-6)
