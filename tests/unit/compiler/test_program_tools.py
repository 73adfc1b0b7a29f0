"""What a program tells of itself: report, source, profile, trace, replay, log."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flame.compiler.replay import replay
from flame.compiler.schedule import one_task_a_node
from flame.core import log as logs
from flame.core.errors import ArgumentError, StateError
from flame.graph import Graph, interpret
from flame.runtime.storage import Storage
from flame.testing.programs import GraphWriter, ProgramRunner, random_graph, random_values


def layer() -> Graph:
    w = GraphWriter()
    x, weight = w.input(32, 64), w.input(64, 16)
    y = w("tanh", w("matmul", x, weight))
    return w.graph(w("argsort", y, dim=1, descending=False, stable=True), y)


def test_the_report_names_tasks_work_and_memory() -> None:
    graph = layer()
    text = ProgramRunner(graph, random_values(graph, 0)).program.report()
    assert "3 tasks" in text
    assert "1 host calls" in text
    assert "planned peak 6 KiB" in text
    assert "65.5 k" in text  # 2 * 32 * 64 * 16
    assert "machine code" in text
    assert [line for line in text.splitlines() if "matmul" in line]


def test_the_report_tells_what_fills_the_arena() -> None:
    w = GraphWriter()
    x, inner, outer = w.input(32, 64), w.input(64, 256), w.input(256, 16)
    graph = w.graph(w("matmul", w("matmul", x, inner), outer))
    program = ProgramRunner(graph, random_values(graph, 0)).program
    blueprint = program.blueprint
    assert sum(held.nbytes for held in blueprint.held) == blueprint.arena >= 32 * 256 * 4
    assert max(blueprint.held, key=lambda held: held.nbytes).maker == "matmul"
    assert "the arena is fullest in matmul:\n" in program.report()
    assert "32 KiB  1 x  float32[32, 256]  matmul -> matmul" in program.report()


def test_sources_are_llvm() -> None:
    graph = layer()
    program = ProgramRunner(graph, random_values(graph, 0)).program
    for i, kernel in enumerate(program.kernels):
        assert f"define void @{kernel.symbol}(" in program.source(i)


def test_profile_and_trace(tmp_path: Path) -> None:
    graph = layer()
    runner = ProgramRunner(graph, random_values(graph, 0))
    with pytest.raises(StateError, match="profile"):
        runner.program.trace(tmp_path / "trace.json")
    results = [Storage.allocate(n) for _, n in runner.program.result_types]
    found = runner.program.profile(*runner.words(results), runs=3)
    assert [row.covers for row in found.rows] == ["matmul", "tanh", "argsort"]
    assert all(row.seconds > 0 for row in found.rows)
    assert sum(row.seconds for row in found.rows) <= found.seconds * 3
    assert "GFLOP/s" in str(found)
    assert "host call" in str(found)
    runner.program.trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len(events) == len(runner.program.layout.steps)
    assert events[0]["ts"] == 0
    assert events[0]["args"]["lines"] == ["line 0"]


@pytest.mark.parametrize("seed", range(8))
def test_replay_of_what_is_right_finds_nothing(seed: int) -> None:
    graph = random_graph(seed)
    values = random_values(graph, seed)
    found = replay(graph, values)
    assert found.difference is None
    assert found.nan is None
    assert "every task" in str(found)
    for a, b in zip(found.results, interpret(graph, values), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(1.0, float(np.abs(b).max())))


def test_replay_names_the_node_that_makes_nan() -> None:
    w = GraphWriter()
    x = w.input(5)
    graph = w.graph(w("exp", w("log", w("neg", w("abs", x)))))
    found = replay(graph, [np.array([1, 2, 3, -4, 5], np.float32)])
    assert found.nan is not None
    assert found.nan.node is graph.nodes[2]
    assert "log makes NaN in 5 of 5 elements" in str(found)
    assert "line 2" in str(found)


def test_replay_names_the_node_that_makes_infinity() -> None:
    w = GraphWriter()
    x = w.input(3)
    graph = w.graph(w("add", w("exp", w("mul", x, 1e3)), 1.0))
    found = replay(graph, [np.ones(3, np.float32)])
    assert found.infinity is not None
    assert found.infinity.node.op.name == "exp"
    assert found.nan is None


def test_replay_finds_a_wrong_kernel() -> None:
    w = GraphWriter()
    x = w.input(5)
    a = w("exp", x)
    graph = w.graph(w("neg", w("tanh", a)))
    schedule = one_task_a_node(graph)
    first, second, third = schedule.tasks
    broken = replace(schedule, tasks=(first, replace(second, lowering=third.lowering), third))
    found = replay(broken, [np.ones(5, np.float32)])
    assert found.difference is not None
    assert found.difference.node.op.name == "tanh"
    assert "differs from its definition in 5 of 5" in str(found)


def test_channels_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    graph = layer()
    with logs.logging("memory"):
        ProgramRunner(graph, random_values(graph, 0))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[flame memory] at most 6144 bytes, 0 of them in the arena"
    assert "  %x0: input 0 + 0" in lines
    assert "  %v1_0: result 1 + 0" in lines
    with pytest.raises(ArgumentError, match="channel"):
        logs.log("nothing", "text")
