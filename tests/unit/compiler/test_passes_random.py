"""Random graphs give the same results before and after the passes."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flame  # noqa: F401 - declares every op
from flame.compiler.passes import ALL, optimize
from flame.compiler.passes.dead import dead
from flame.compiler.passes.order import order
from flame.compiler.passes.recompute import recompute
from flame.core import dtypes
from flame.core.types import TensorType, contiguous_strides, tensor_type
from flame.graph import Graph, Node, Symbol, interpret
from flame.ops.elementwise import Elementwise
from flame.ops.op import OPS
from flame.ops.overwriting import overwrite
from flame.testing.schedules import GraphBuilder

pytestmark = pytest.mark.unit

UNARY = ("neg", "tanh", "relu", "square")
BINARY = ("add", "sub", "mul", "maximum", "where", "div")
SIZES = st.sampled_from([1, 1, 2, 3, 4])
NUMBERS = st.sampled_from([0, 1, -1, 2, 0.5, 0.0, 1.0, -0.0, 3.0, 0.25])


def shape_of(symbol: Symbol) -> tuple[int, ...]:
    assert isinstance(symbol.type, TensorType)
    return symbol.type.shape


def type_of(symbol: Symbol) -> TensorType:
    assert isinstance(symbol.type, TensorType)
    return symbol.type


class Drawn:
    """A graph that grows by one random piece after the other."""

    def __init__(self, draw: Any) -> None:
        self.draw, self.g = draw, GraphBuilder()
        shape = tuple(draw(st.lists(SIZES, min_size=1, max_size=3)))
        strides = tuple(reversed(contiguous_strides(shape[::-1]))) if draw(st.booleans()) else None
        self.values = [
            self.g.input(shape, dtypes.float64, strides), self.g.input(shape, dtypes.float64)
        ]  # fmt: skip
        self.number = self.g.number(float)
        for _ in range(draw(st.integers(3, 16))):
            made = getattr(self, draw(st.sampled_from(KINDS)))(self.pick())
            if made is not None:
                self.values.append(made)

    def pick(self) -> Symbol:
        found: Symbol = self.draw(st.sampled_from(self.values[-6:]))
        return found

    def unary(self, x: Symbol) -> Any:
        return self.g(self.draw(st.sampled_from(UNARY)), x)

    def binary(self, x: Symbol) -> Any:
        op = self.draw(st.sampled_from(BINARY))
        fitting = [y for y in self.values if _broadcast(shape_of(x), shape_of(y))]
        y = self.draw(st.sampled_from([*fitting, self.number, self.draw(NUMBERS)]))
        if op == "div":
            return self.g("div", x, self.draw(st.sampled_from([1, 2, 4.0, 3.0, -0.5, 1e20])))
        if op == "where":
            condition = self.g("full", self.draw(st.booleans()), shape=(), dtype=dtypes.bool_)
            return self.g("where", condition, x, y)
        return self.g(op, *((x, y) if self.draw(st.booleans()) else (y, x)))

    def gradient(self, x: Symbol) -> Any:
        """Derived ops of several results."""
        fitting = [y for y in self.values if shape_of(y) == shape_of(x)]
        y = self.draw(st.sampled_from(fitting))
        name = self.draw(st.sampled_from(["add", "mul"]))
        op = OPS[name].backward((True, True), (type_of(x), type_of(y)))  # type: ignore[attr-defined]
        operands = (x,) if name == "add" else (x, y, self.draw(st.sampled_from(fitting)))
        made = self.g(op, *operands)
        self.values.append(made[0])
        return made[1]

    def uniform(self, x: Symbol) -> Any:
        shape = self.draw(st.sampled_from([shape_of(x), (), (1,)]))
        return self.g("full", self.draw(NUMBERS), shape=shape, dtype=dtypes.float64)

    def counted(self, x: Symbol) -> Any:
        made = self.g("arange", 0, 1, count=shape_of(x)[-1] if shape_of(x) else 2,
                      dtype=self.draw(st.sampled_from([dtypes.int64, dtypes.float64])))  # fmt: skip
        return self.g("mul", made, 0.5)

    def fold(self, x: Symbol) -> Any:
        shape = shape_of(x)
        if not shape:
            return None
        dims = tuple(sorted(self.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))))
        return self.g("sum", x, dims=dims, keepdim=self.draw(st.booleans()))

    def view(self, x: Symbol) -> Any:
        shape = shape_of(x)
        which = self.draw(st.integers(0, 4))
        if which == 0:
            return self.g("permute", x, dims=tuple(self.draw(st.permutations(range(len(shape))))))
        if which == 1 and shape and shape[-1] > 1:
            start = self.draw(st.integers(0, 1))
            return self.g("slice", x, dim=len(shape) - 1, start=start, stop=shape[-1], step=1)
        if which == 2:
            return self.g("expand", x, shape=tuple(3 if n == 1 else n for n in shape))
        if not type_of(x).contiguous:
            return self.g("copy", x, contiguous=True)
        count = math.prod(shape)
        if which == 3:
            return self.g("as_strided", x, shape=(count,), strides=(1,), offset=0)
        split = next((n for n in (6, 2, 3, 4) if count % n == 0), 1)
        return self.g("view", x, shape=(split, count // split))

    def copy(self, x: Symbol) -> Any:
        wanted = self.draw(st.sampled_from([dtypes.float32, dtypes.float64]))
        if self.draw(st.booleans()):
            return self.g("copy", x, contiguous=self.draw(st.booleans()))
        wide = self.g("copy", self.g("copy", x, dtype=wanted), dtype=dtypes.float64)
        return self.g("copy", wide, dtype=dtypes.float64)

    def parts(self, x: Symbol) -> Any:
        """Cut along a dimension, changed, and put together as a gradient would."""
        shape = shape_of(x)
        if not shape or shape[0] < 2:
            return None
        whole = contiguous_strides(shape)
        pieces = []
        for at in range(self.draw(st.integers(1, shape[0]))):
            piece = self.g("slice", x, dim=0, start=at, stop=at + 1, step=1)
            pieces.append(self.g("place", piece, at * whole[0], shape=shape, strides=whole))
        total = pieces[0]
        for piece in pieces[1:]:
            total = self.g("add", total, piece)
        return total

    def overwritten(self, x: Symbol) -> Any:
        count = type_of(x).numel
        if not type_of(x).contiguous or count < 2:
            return None
        part = self.g("slice", self.g("view", x, shape=(count,)), dim=0, start=0, stop=1, step=1)
        return self.g(overwrite, x, part, strides=(1,), offset=count - 1)

    def product(self, x: Symbol) -> Any:
        if len(shape_of(x)) != 2:
            return None
        other = self.g("permute", self.pick_like(x), dims=(1, 0))
        made = self.g("matmul", x, other)
        return self.g("permute", made, dims=(1, 0)) if self.draw(st.booleans()) else made

    def pick_like(self, x: Symbol) -> Symbol:
        dtype = type_of(x).dtype
        fitting = [
            y for y in self.values if shape_of(y) == shape_of(x) and type_of(y).dtype is dtype
        ]
        found: Symbol = self.draw(st.sampled_from(fitting))
        return found

    def joined(self, x: Symbol) -> Any:
        if not shape_of(x):
            return None
        return self.g("cat", x, self.pick_like(x), dim=0)


KINDS = (
    "unary", "binary", "binary", "gradient", "uniform", "counted", "fold", "view", "view", "copy",
    "parts", "overwritten", "product", "joined",
)  # fmt: skip


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(x == y or 1 in (x, y) for x, y in zip(a[::-1], b[::-1], strict=False))


@st.composite
def graphs(draw: Any) -> Graph:
    made = Drawn(draw)
    outputs = draw(st.lists(st.sampled_from(made.values), min_size=1, max_size=3))
    updates = [
        (old, new)
        for old, new in zip(made.values[:2], draw(st.permutations(made.values)), strict=False)
        if old.type is new.type
    ]
    return made.g.graph(*outputs, updates=updates)


def drawn_values(graph: Graph, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [
        rng.uniform(-1, 1, s.type.shape) if isinstance(s.type, TensorType) else 0.75
        for s in graph.inputs
    ]


def check_equal(before: Graph, after: Graph, seed: int) -> None:
    after.verify()
    assert [s.type for s in after.results] == [s.type for s in before.results]
    assert after.inputs == before.inputs
    values = drawn_values(before, seed)
    with np.errstate(all="ignore"):
        wanted, found = interpret(before, values), interpret(after, values)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=f"{before}\n{after}")


@settings(max_examples=150, deadline=None)
@given(graphs(), st.integers(0, 1000))
def test_random_graphs(graph: Graph, seed: int) -> None:
    check_equal(graph, optimize(graph), seed)


@pytest.mark.parametrize("step", ALL, ids=lambda s: s.__name__)
def test_each_pass_on_random_graphs(step: Any) -> None:
    @settings(max_examples=50, deadline=None)
    @given(graphs(), st.integers(0, 1000))
    def check(graph: Graph, seed: int) -> None:
        check_equal(graph, step(graph), seed)

    check()


@settings(max_examples=100, deadline=None)
@given(graphs(), st.integers(0, 15), st.integers(0, 1000))
def test_whatever_is_elementwise_can_be_computed_again(graph: Graph, peak: int, seed: int) -> None:
    module = sys.modules[recompute.__module__]
    chosen = {
        node.outputs[0]: node
        for node in graph.nodes[:peak]
        if isinstance(node.op, Elementwise) and len(node.outputs) == 1
    }
    made = module._again(graph, chosen, peak)
    check_equal(graph, made, seed)
    check_equal(graph, order(dead(made)), seed)


@settings(max_examples=50, deadline=None)
@given(graphs())
def test_a_second_time_changes_nothing(graph: Graph) -> None:
    once = optimize(graph)
    assert len(optimize(once).nodes) == len(once.nodes), str(once)


def test_layouts_of_nodes_may_differ_from_the_inferred() -> None:
    """A node may store into another layout than its op infers, and no pass minds."""
    x = Symbol("x", tensor_type(dtypes.float64, (2, 3)))
    turned = Symbol("y", tensor_type(dtypes.float64, (2, 3), (1, 2)))
    out = Symbol("z", tensor_type(dtypes.float64, (2, 3), (1, 2)))
    nodes = (Node(OPS["tanh"], (x,), (turned,), {}), Node(OPS["neg"], (turned,), (out,), {}))
    graph = Graph((x,), nodes, (out,))
    graph.verify()
    check_equal(graph, optimize(graph), 0)
