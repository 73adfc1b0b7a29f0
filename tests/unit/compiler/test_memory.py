"""Memory plans: nothing that lives is overwritten, and the arena is small."""

from __future__ import annotations

import numpy as np
import pytest

import flame  # noqa: F401 - gives the ops their interpreter
from flame.compiler.schedule import one_task_a_node
from flame.compiler.schedule.arena import Interval, aligned, needed, place
from flame.compiler.schedule.groups import best_plan, groups_of
from flame.compiler.schedule.memory import MemoryPlan, plan_memory
from flame.compiler.schedule.memory_check import check_memory
from flame.compiler.schedule.reorder import replacing_last
from flame.core.errors import CompileError
from flame.graph import Graph
from flame.testing.programs import GraphWriter, random_graph


def random_intervals(seed: int, count: int) -> list[Interval]:
    rng = np.random.default_rng(seed)
    begins = rng.integers(0, count, count)
    lengths = rng.geometric(0.1, count)
    sizes = rng.integers(0, 5000, count)
    rows = zip(sizes, begins, lengths, strict=True)
    return [Interval(int(s), int(b), int(b + n)) for s, b, n in rows]


@pytest.mark.parametrize("seed", range(20))
def test_buffers_that_live_at_once_lie_apart(seed: int) -> None:
    buffers = random_intervals(seed, 80)
    offsets, total = place(buffers)
    for i, (a, x) in enumerate(zip(buffers, offsets, strict=True)):
        assert x % 64 == 0
        assert x + a.size <= total
        for b, y in zip(buffers[:i], offsets[:i], strict=True):
            apart = x + a.size <= y or y + b.size <= x
            assert apart or a.end < b.begin or b.end < a.begin or not a.size or not b.size
    assert needed(buffers) <= total <= 1.25 * needed(buffers)


def test_a_stack_needs_no_more_than_what_lives() -> None:
    """Activations of a forward pass, which die in the opposite order."""
    n = 40
    buffers = [Interval(1000 + 64 * i, i, 2 * n - i) for i in range(n)]
    assert place(buffers)[1] == sum(aligned(b.size) for b in buffers) == needed(buffers)


def plans(graph: Graph) -> list[MemoryPlan]:
    schedule = replacing_last(one_task_a_node(graph))
    made = [
        plan_memory(schedule),
        plan_memory(schedule, groups_of(schedule, lambda task: True)),
        best_plan(schedule),
    ]
    for plan in made:
        check_memory(schedule, plan)
    return made


@pytest.mark.parametrize("seed", range(150))
def test_plans_of_random_schedules_hold(seed: int) -> None:
    plans(random_graph(seed, 30))


def test_the_check_finds_a_wrong_plan() -> None:
    w = GraphWriter()
    x = w.input(8)
    a, b = w("tanh", x), w("exp", x)
    schedule = one_task_a_node(w.graph(w("add", w("add", a, b), a)))
    plan = plan_memory(schedule)
    plan.places[a] = plan.places[b]
    with pytest.raises(CompileError, match="holds something else"):
        check_memory(schedule, plan)


def test_a_chain_of_elementwise_results_needs_one_buffer() -> None:
    w = GraphWriter()
    x = y = w.input(1000)
    for _ in range(10):
        y = w("tanh", y)
    (plan, *_) = plans(w.graph(w("add", y, x)))
    assert plan.arena == 0  # the chain lies in the result's memory
    assert plan.peak == 4000


def test_updates_reach_back_through_what_is_written_in_place() -> None:
    w = GraphWriter()
    p, g = w.input(1000), w.input(1000)
    w.updates.append((p, w("sub", w("mul", p, 0.9), g)))
    (plan, *_) = plans(w.graph())
    assert plan.peak == 0
    assert not plan.after


def test_a_state_that_must_be_read_later_is_copied_at_the_end() -> None:
    w = GraphWriter()
    p = w.input(1000)
    new = w("tanh", p)
    w.updates.append((p, new))
    (plan, *_) = plans(w.graph(w("sum", w("sub", p, new), dims=(0,), keepdim=False)))
    assert len(plan.after) == 1


def test_a_task_that_replaces_a_state_waits_for_its_readers() -> None:
    w = GraphWriter()
    p, q = w.input(1000), w.input(1000)
    w.updates += [(p, w("tanh", p)), (q, w("mul", p, 2.0))]
    graph = w.graph(w("sum", p, dims=(0,), keepdim=False), w("add", p, q))
    assert [t.name for t in replacing_last(one_task_a_node(graph)).tasks] == [
        "sum",
        "add",
        "mul",
        "tanh",
    ]
    for plan in plans(graph):
        assert not plan.after


def test_an_updating_op_drops_its_copy_where_it_writes_into_its_operand() -> None:
    w = GraphWriter()
    p, rows = w.input(10, 4), w.input(3, 4)
    made = w("overwrite", p, rows, strides=(4, 1), offset=8)
    w.updates.append((p, made))
    (plan, *_) = plans(w.graph())
    assert plan.dropped == {0}
    assert plan.peak == 0


def test_updates_of_many_parameters_are_one_group() -> None:
    w = GraphWriter()
    for _ in range(50):
        p, g = w.input(30), w.input(30)
        w.updates.append((p, w("sub", p, g)))
    plan = plans(w.graph())[-1]
    assert plan.groups == ((0, 50),)
    assert not plan.after
