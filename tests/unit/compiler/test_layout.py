"""layout: convolutional steps run channels-last, and give what they gave."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
import flame.nn as nn
from flame.compiler.passes import optimize
from flame.compiler.passes.layout import channels_last, layout
from flame.core.types import TensorType
from flame.graph import Graph, interpret
from flame.nn import functional
from flame.recording.step import record

IMAGES = ("convolution", "batch_norm", "group_norm", "relu", "max_pool", "cat")


class Net(nn.Module):
    """Whatever stands between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm, self.groups = nn.BatchNorm2d(16), nn.GroupNorm(4, 16)
        self.pool, self.down = nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, 2, 1)
        self.wide, self.head = nn.Conv2d(32, 16, 1), nn.Linear(16, 4)

    def forward(self, x: Any) -> Any:
        x = functional.relu(self.norm(self.stem(x)))
        y = functional.silu(self.groups(self.down(x)))
        z = functional.interpolate(y, scale_factor=2, mode="nearest")
        z = self.wide(flame.cat([self.pool(x), self.pool(z)], 1)) + y
        n, c, h, w = z.shape
        z = z.reshape(n, c, h * w).transpose(1, 2) * 2
        return self.head(z.mean(1))


def recorded() -> tuple[Graph, list[np.ndarray]]:
    """The graph of a step of training, and values for its inputs."""
    flame.manual_seed(0)
    model = Net()
    random = np.random.default_rng(0)
    x = flame.from_numpy(random.standard_normal((2, 3, 12, 12), dtype=np.float32))
    y = flame.from_numpy(random.integers(0, 4, 2))

    def step(x: Any, y: Any) -> Any:
        model.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    recording = record(step, (x, y), {}, [x, y])
    values = [x.numpy(), y.numpy()]
    for memory in recording.states:
        array = memory.storage.as_numpy(
            memory.type.dtype.numpy, memory.type.shape, memory.type.strides
        )
        values.append(array.copy())
    return recording.graph, values


def images(graph: Graph, names: tuple[str, ...] = IMAGES) -> list[tuple[str, TensorType]]:
    """The results of four dimensions of these ops."""
    return [
        (node.op.name, s.type)
        for node in graph.nodes
        for s in node.outputs[:1]
        if node.op.name in names and isinstance(s.type, TensorType) and s.type.ndim == 4
    ]


def test_images_lie_channels_last() -> None:
    graph, _ = recorded()
    assert all(t.contiguous for _, t in images(graph))
    found = images(optimize(graph))
    assert {name for name, _ in found} >= {"convolution", "batch_norm", "group_norm", "max_pool"}
    assert [name for name, t in found if t is not channels_last(t)] == []


def test_results_and_updates_keep_their_types() -> None:
    graph, _ = recorded()
    changed = layout(graph)
    changed.verify()
    assert [s.type for s in changed.results] == [s.type for s in graph.results]


def test_the_numbers_are_the_same() -> None:
    graph, values = recorded()
    expected = interpret(graph, values)
    for made in (layout(graph), optimize(graph)):
        for a, b in zip(interpret(made, values), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(b).max()))


def test_it_settles() -> None:
    graph, _ = recorded()
    once = optimize(layout(graph))
    again = layout(once)
    assert [n.op for n in again.nodes] == [n.op for n in once.nodes]


def test_graphs_without_images_are_left_alone() -> None:
    x = flame.ones(3, 4)
    graph = record(lambda x: flame.tanh(x) @ x.T, (x,), {}, [x]).graph
    assert layout(graph) is graph


@pytest.mark.parametrize("training", [True, False])
def test_compiled_and_uncompiled_agree(training: bool) -> None:
    flame.manual_seed(0)
    model = Net().train(training)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = flame.randn(2, 3, 12, 12)
    expected = model(x).numpy(force=True)
    model.load_state_dict(state)
    found = flame.compile(lambda x: model(x).detach())(x)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
