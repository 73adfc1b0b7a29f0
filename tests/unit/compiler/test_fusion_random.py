"""Random graphs: fused, one task a node, and the references agree."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flame  # noqa: F401 - declares every op
from flame.compiler.compilation import set_apart
from flame.compiler.lower import group, parts
from flame.compiler.schedule.fusion import fuse
from flame.compiler.schedule.task import owners_of
from flame.core import dtypes
from flame.core.types import TensorType
from flame.graph import Graph, Symbol, interpret
from flame.testing.schedules import GraphBuilder, run_program, run_schedule

pytestmark = pytest.mark.unit

UNARY = ("neg", "tanh", "abs", "sigmoid")
BINARY = ("add", "sub", "mul", "maximum")
FOLDS = ("sum", "mean", "amax")
SIZES = st.sampled_from([1, 1, 2, 3, 6, 17])


def permuted(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor whose dimensions lie in some order."""
    order = draw(st.permutations(range(len(shape))))
    strides = [0] * len(shape)
    step = 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


def shape_of(symbol: Symbol) -> tuple[int, ...]:
    assert isinstance(symbol.type, TensorType)
    return symbol.type.shape


class Drawn:
    """A graph that grows by one random node after the other."""

    def __init__(self, draw: Any) -> None:
        self.draw, self.g = draw, GraphBuilder()
        dtype = draw(st.sampled_from([dtypes.float64, dtypes.float64, dtypes.float32]))
        shape = tuple(draw(st.lists(SIZES, min_size=0, max_size=3)))
        if draw(st.integers(0, 30)) == 0:
            shape = (*shape, 0)
        strides = permuted(draw, shape) if draw(st.booleans()) else None
        self.values = [self.g.input(shape, dtype, strides), self.g.input(shape, dtype)]
        self.number = self.g.number(float)
        for _ in range(draw(st.integers(2, 14))):
            self.grow()

    def pick(self) -> Symbol:
        found: Symbol = self.draw(st.sampled_from(self.values[-6:]))
        return found

    def grow(self) -> None:
        kind = self.draw(
            st.sampled_from(["unary", "binary", "binary", "fold", "view", "other", "head"])
        )
        made = getattr(self, kind)(self.pick())
        if made is not None:
            self.values.append(made)

    def unary(self, x: Symbol) -> Any:
        return self.g(self.draw(st.sampled_from(UNARY)), x)

    def binary(self, x: Symbol) -> Any:
        op = self.draw(st.sampled_from(BINARY))
        fitting = [y for y in self.values if _broadcast(shape_of(x), shape_of(y))]
        y = self.draw(st.sampled_from([*fitting, self.number, 0.5, 2]))
        return self.g(op, x, y)

    def other(self, x: Symbol) -> Any:
        which = self.draw(st.integers(0, 2))
        if which == 0:
            return self.g("where", self.g("gt", x, 0.25), x, 0.5)
        if which == 1:
            return self.g("copy", x, contiguous=True)
        return self.g("add", self.g("copy", self.g("mul", x, 3.0), dtype=dtypes.int64), x)

    def head(self, x: Symbol) -> Any:
        """An op with a kernel of its own."""
        assert isinstance(x.type, TensorType)
        shape = x.type.shape
        if not shape or 0 in shape or x.type.dtype.kind != "f":
            return None
        if len(shape) > 1 and self.draw(st.booleans()):
            return self.g("matmul", x, self.g.input((shape[-1], 4), x.type.dtype))
        return self.g("softmax", x, dim=self.draw(st.integers(0, len(shape) - 1)))

    def fold(self, x: Symbol) -> Any:
        shape = shape_of(x)
        if not shape or 0 in shape:
            return None
        dims = tuple(sorted(self.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))))
        keep = self.draw(st.sampled_from([True, True, False]))
        made = self.g(self.draw(st.sampled_from(FOLDS)), x, dims=dims, keepdim=keep)
        return self.g("tanh", made) if self.draw(st.booleans()) else made

    def view(self, x: Symbol) -> Any:
        shape = shape_of(x)
        which = self.draw(st.integers(0, 3))
        if which == 0:
            return self.g("permute", x, dims=tuple(self.draw(st.permutations(range(len(shape))))))
        if which == 1 and shape and shape[-1] > 1:
            return self.g("slice", x, dim=len(shape) - 1, start=1, stop=shape[-1], step=1)
        if which == 2:
            wanted = tuple(3 if n == 1 else n for n in shape)
            return self.g("expand", x, shape=wanted)
        assert isinstance(x.type, TensorType)
        if not x.type.contiguous or 0 in shape:
            return None
        count = math.prod(shape)
        split = next((n for n in (6, 2, 3, 17) if count % n == 0), 1)
        return self.g("view", x, shape=(split, count // split))


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(x == y or 1 in (x, y) for x, y in zip(a[::-1], b[::-1], strict=False))


def owned(g: GraphBuilder, symbols: list[Symbol]) -> set[Symbol]:
    """Those that are views or inputs."""
    return set(owners_of(g.graph(symbols[-1]))) | set(g.inputs)


@st.composite
def graphs(draw: Any) -> Graph:
    made = Drawn(draw)
    computed = made.values[2:] or made.values
    extra = draw(st.lists(st.sampled_from(computed), max_size=2))
    x = made.values[0]
    new = [v for v in computed if v.type is x.type and v not in owned(made.g, computed)]
    updates = [(x, new[-1])] if new and draw(st.booleans()) else []
    return set_apart(made.g.graph(*dict.fromkeys([computed[-1], *extra]), updates=updates))


@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("limits", [{}, {"SMALL": 0, "ROWS": 1 << 30}, {"SMALL": 0, "ROW": 2}])
@pytest.mark.parametrize("planned", [False, True])
@given(graph=graphs(), seed=st.integers(0, 1000))
def test_random_graphs(graph: Graph, seed: int, planned: bool, limits: dict[str, int]) -> None:
    rng = np.random.default_rng(seed)
    values: list[Any] = []
    for symbol in graph.inputs:
        if isinstance(symbol.type, TensorType):
            drawn = rng.uniform(-1, 1, symbol.type.shape)
            values.append(np.asarray(drawn).astype(symbol.type.dtype.numpy))
        else:
            values.append(float(rng.uniform(0.5, 1.5)))
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in limits.items():  # small tensors take the ways of large ones
            patch.setattr(group, name, limit)
            patch.setattr(parts, "CHUNK", 8)
        schedule = fuse(graph)
    run = run_program if planned else run_schedule
    made = run(schedule, values)
    for symbol, mine, oracle in zip(graph.results, made, interpret(graph, values), strict=True):
        assert isinstance(symbol.type, TensorType)
        single = any(
            isinstance(s.type, TensorType) and s.type.dtype is dtypes.float32
            for n in graph.nodes
            for s in n.symbols
        )
        tolerance = 1e-3 if single else 1e-9
        np.testing.assert_allclose(
            mine.astype(np.float64), oracle.astype(np.float64), rtol=tolerance, atol=tolerance,
            err_msg=f"{graph}\n{schedule}",
        )  # fmt: skip
