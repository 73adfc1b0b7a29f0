"""Programs on disk: found again, never stale, never an error."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flame
from flame.compiler import program_key as keys
from flame.compiler.program import Program
from flame.compiler.program_key import declared_here, program_key
from flame.core import dtypes
from flame.core.errors import IndexRangeError
from flame.graph import Graph, Node, Symbol, interpret
from flame.ops.op import OPS
from flame.ops.pointwise import pointwise
from flame.recording.step import record
from flame.runtime.cpu import jit
from flame.testing.programs import GraphWriter, ProgramRunner, random_graph, random_values


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(keys, "source_digest", lambda: "someone may be editing")
    return tmp_path


def restored(graph: Graph, values: Any) -> ProgramRunner:
    """A runner with the program from disk."""
    program = Program.restore(program_key(graph), graph, {})
    assert program is not None
    return ProgramRunner(graph, values, program=program)


@pytest.mark.parametrize("seed", range(12))
def test_a_program_is_found_again(seed: int) -> None:
    graph = random_graph(seed)
    values = random_values(graph, seed)
    first = ProgramRunner(graph, values)
    assert Program.restore(program_key(graph), graph, {}) is None
    assert first.program.save(program_key(graph))
    compiled = jit.statistics().compiled
    again = restored(random_graph(seed), values)
    assert jit.statistics().compiled == compiled
    for a, b in zip([*first(), *first.updated()], [*again(), *again.updated()], strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.program.report().split("\n")[0] == first.program.report().split("\n")[0]
    assert again.program.peak == first.program.peak
    sizes = [[n for _, n in r.program.result_types] for r in (again, first)]
    assert sizes[0] == sizes[1]


def test_errors_and_host_calls_work_after_a_restore() -> None:
    w = GraphWriter()
    table, index = w.input(5, 3), w.input(4, 1, dtype=dtypes.int64)
    rows = w("embedding", table, w("expand", index, shape=(4, 3)), padding=None, by_frequency=False)
    graph = w.graph(w("argsort", rows, dim=0, descending=False, stable=True))
    values = [random_values(graph, 0)[0], np.array([[0], [1], [7], [2]])]
    ProgramRunner(graph, values).program.save(program_key(graph))
    runner = restored(graph, values)
    with pytest.raises(IndexRangeError, match="7"):
        runner()
    values[1][2] = 4
    runner = restored(graph, values)
    np.testing.assert_array_equal(runner()[0], interpret(graph, values)[0])


def test_damaged_entries_are_missed(own_cache: Path) -> None:
    graph = random_graph(1)
    runner = ProgramRunner(graph, random_values(graph, 1))
    runner.program.save(program_key(graph))
    (entry,) = (own_cache / "programs").iterdir()
    data = entry.read_bytes()
    for damaged in (b"", data[:-9], data[:60] + b"xx" + data[62:]):
        entry.write_bytes(damaged)
        assert Program.restore(program_key(graph), graph, {}) is None
    assert runner.program.save(program_key(graph))
    assert Program.restore(program_key(graph), graph, {}) is not None


def test_the_key_tells_apart_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(scale: float, array: Any, size: int = 4) -> Graph:
        w = GraphWriter()
        x = w.input(size)
        return w.graph(w("mul", w("add", x, w.constant(array)), scale))

    ones, twos = np.ones(4, np.float32), np.full(4, 2, np.float32)
    graphs = [product(2.0, ones), product(2.5, ones), product(2.0, twos), product(2, ones)]
    found = [program_key(g) for g in graphs]
    assert len(set(found)) == 4
    assert None not in found
    assert found[0] == program_key(product(2.0, ones))
    assert found[0] != program_key(graphs[0], "another option")
    monkeypatch.setattr(keys, "source_digest", lambda: "another FLAME")
    assert found[0] != program_key(graphs[0])


def test_names_of_symbols_do_not_matter() -> None:
    graph = random_graph(3)
    named: dict[Any, Any] = {s: Symbol(f"other{i}", s.type) for i, s in enumerate(graph.inputs)}
    named |= {s: Symbol(f"const{i}", s.type) for i, s in enumerate(graph.constants)}
    nodes = []
    for node in graph.nodes:
        named |= {s: Symbol(f"made{len(named)}_{i}", s.type) for i, s in enumerate(node.outputs)}
        nodes.append(
            Node(
                node.op,
                tuple(named.get(x, x) if isinstance(x, Symbol) else x for x in node.inputs),
                tuple(named[s] for s in node.outputs),
                node.attributes,
            )
        )
    other = Graph(
        tuple(named[s] for s in graph.inputs),
        tuple(nodes),
        tuple(named[s] for s in graph.outputs),
        tuple((named[a], named[b]) for a, b in graph.updates),
        {named[s]: a for s, a in graph.constants.items()},
    )
    assert program_key(other) == program_key(graph)


def test_fused_functions_are_known_by_what_they_compute() -> None:
    def key(factor: float) -> str | None:
        w = GraphWriter()
        x = w.input(4)
        fused = pointwise(lambda a: flame.tanh(a) * factor).op
        made = Symbol("y", x.type)
        return program_key(Graph((x,), (Node(fused, (x,), (made,), {}),), (made,)))

    assert key(2.0) == key(2.0) != key(3.0)


def test_ops_from_elsewhere_are_not_known_by_their_names() -> None:
    assert all(declared_here(op) for op in OPS.values())
    w = GraphWriter()
    x = w.input(2, 3)
    made = w("sum", x, dims=(0,), keepdim=False)
    graph = w.graph(made)
    (node,) = graph.nodes
    own = copy.copy(node.op)
    own.lower = lambda *types, **attributes: node.op.lower(*types, **attributes)
    assert not declared_here(own)
    assert program_key(graph) is not None
    assert program_key(replace(graph, nodes=(replace(node, op=own),))) is None


def test_what_has_no_text_has_no_key() -> None:
    w = GraphWriter()
    x = w.input(4)
    y = w("tanh", x)
    graph = w.graph(y)
    (node,) = graph.nodes
    odd = replace(node, attributes={"function": object()})
    assert program_key(replace(graph, nodes=(odd,))) is None


def test_attributes_of_our_own_classes_are_told_apart() -> None:
    def key(mode: str, size: int) -> str | None:
        given = flame.zeros(1, 1, 4, 4)
        recording = record(
            lambda x: flame.nn.functional.interpolate(x, size=(size, size), mode=mode),
            (given,), {}, [given],
        )  # fmt: skip
        return program_key(recording.graph)

    found = [key("nearest", 8), key("bilinear", 8), key("nearest", 6)]
    assert None not in found
    assert len(set(found)) == 3
    assert key("nearest", 8) == found[0]


_SCRIPT = """
import sys
import flame
from flame.compiler import blueprint, program_key as keys
from flame.compiler.program import Program
from flame.compiler.program_key import program_key
keys.source_digest = lambda: "someone may be editing"
from flame.runtime.cpu import jit
from flame.testing.programs import ProgramRunner, random_graph, random_values
graph = random_graph(11, 30)
values = random_values(graph, 11)
program = Program.restore(program_key(graph), graph, {})
if program is not None:
    blueprint.make_blueprint = None
runner = ProgramRunner(graph, values, program=program)
runner.program.save(program_key(graph))
print(program is not None, jit.statistics().compiled, float(sum(a.sum() for a in runner())))
"""


def test_a_second_start_compiles_nothing(own_cache: Path) -> None:
    environment = {**os.environ, "FLAME_CACHE_DIR": str(own_cache)}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", _SCRIPT],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    )
    assert first[0] == "False"
    assert int(first[1]) > 5
    assert second[:2] == ["True", "0"]
    assert first[2] == second[2]
