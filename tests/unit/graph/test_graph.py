"""Graphs: printing, verification, and the NumPy interpreter."""

from __future__ import annotations

import numpy as np
import pytest

import flame  # noqa: F401 - gives the ops their interpreter
from flame.core import dtypes
from flame.core.errors import CompileError, ShapeError
from flame.core.types import tensor_type
from flame.graph import Graph, Node, Symbol, interpret, one_op
from flame.ops.arithmetic import _add, _mul
from flame.ops.reductions import _sum

X = tensor_type(dtypes.float32, (2, 3))
ROW = tensor_type(dtypes.float32, (3,))


def example() -> Graph:
    """sum(x * y + 1.0, dim 1)"""
    x, y, one = Symbol("x", X), Symbol("y", ROW), Symbol("one", float)
    product, shifted = Symbol("p", X), Symbol("s", X)
    total = Symbol("t", tensor_type(dtypes.float32, (2,)))
    nodes = (
        Node(_mul, (x, y), (product,), {}),
        Node(_add, (product, one), (shifted,), {}),
        Node(_sum, (shifted,), (total,), {"dims": (1,), "keepdim": False}),
    )
    return Graph((x, y, one), nodes, (total,))


def test_prints_every_node() -> None:
    assert str(example()).splitlines() == [
        "graph(%x: float32[2, 3], %y: float32[3], %one: float)",
        "  %p: float32[2, 3] = mul(%x, %y)",
        "  %s: float32[2, 3] = add(%p, %one)",
        "  %t: float32[2] = sum(%s) {dims=(1,), keepdim=False}",
        "  return %t",
    ]


def test_interprets_by_references() -> None:
    graph = example()
    graph.verify()
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    y = np.array([1, 2, 3], np.float32)
    (total,) = interpret(graph, [x, y, 1.0])
    np.testing.assert_array_equal(total, (x * y + 1).sum(1))
    with pytest.raises(ShapeError, match="shape"):
        interpret(graph, [y, y, 1.0])


def test_verify_finds_a_use_before_its_definition() -> None:
    graph = example()
    broken = Graph(graph.inputs, graph.nodes[1:], graph.outputs)
    with pytest.raises(CompileError, match="%p is used before"):
        broken.verify()


def test_verify_finds_a_wrong_type() -> None:
    node = one_op(_add, (X, X), {}).nodes[0]
    wrong = Node(node.op, node.inputs, (Symbol("y0", ROW),), {})
    inputs = tuple(s for s in node.inputs if s is not None)
    with pytest.raises(CompileError, match=r"add gives float32\[2, 3\]"):
        Graph(inputs, (wrong,), wrong.outputs).verify()


def test_verify_finds_a_missing_result() -> None:
    graph = example()
    with pytest.raises(CompileError, match="nothing defines"):
        Graph(graph.inputs, graph.nodes[:2], graph.outputs).verify()
