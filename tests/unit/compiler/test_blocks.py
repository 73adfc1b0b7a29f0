"""Products that a loss reads, in blocks of rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import flame
from flame import nn
from flame.compiler.passes import optimize
from flame.compiler.passes.blocks import blocks
from flame.compiler.schedule.fusion import fuse
from flame.compiler.schedule.memory import plan_memory
from flame.graph import Graph, interpret
from flame.nn import functional as F
from flame.recording.step import record

pytestmark = pytest.mark.unit

Loss = Callable[[Any, Any, Any, Any], Any]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[blocks.__module__]
    for name, value in (("LEAST", 1), ("SHARE", 0.0), ("ROWS", 4)):
        monkeypatch.setattr(module, name, value)


def operands(*lead: int) -> tuple[Any, Any, Any, Any]:
    flame.manual_seed(0)
    x, w, b = flame.randn(*lead, 8), flame.randn(24, 8), flame.randn(24)
    y = flame.randint(0, 24, lead)
    y[(0,) * len(lead)] = -100  # counts for nothing
    return x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), y


def recorded(loss: Loss, given: tuple[Any, ...]) -> Graph:
    def step(*given: Any) -> Any:
        x, w, b, _ = given
        made = loss(*given)
        made[0].backward() if isinstance(made, tuple) else made.backward()
        found = [t.grad for t in (x, w, b) if t.grad is not None]
        return made, found

    graph: Graph = record(step, given, {}, list(given)).graph
    return graph


def scores_in_blocks(graph: Graph) -> int:
    return sum(node.op.name == "cross_entropy" for node in graph.nodes)


LOSSES: dict[str, Loss] = {
    "linear": lambda x, w, b, y: F.cross_entropy(F.linear(x, w, b).flatten(0, -2), y.flatten()),
    "tied": lambda x, w, b, y: F.cross_entropy((x @ w.T).flatten(0, -2), y.flatten()),
    "sum": lambda x, w, b, y: F.cross_entropy(
        F.linear(x, w, b).flatten(0, -2), y.flatten(), reduction="sum"
    ),
    "smoothed": lambda x, w, b, y: F.cross_entropy(
        F.linear(x, w).flatten(0, -2), y.flatten(), label_smoothing=0.1
    ),
    "ignoring": lambda x, w, b, y: F.cross_entropy(
        F.linear(x, w).flatten(0, -2), y.clamp(min=0).flatten(), ignore_index=3
    ),
    "scaled": lambda x, w, b, y: 0.25 * F.cross_entropy(
        F.linear(x, w).flatten(0, -2), y.clamp(min=0).flatten()
    ),
    "turned": lambda x, w, b, y: F.cross_entropy(
        (x @ w.T.contiguous()).flatten(0, -2), y.flatten()
    ),
}  # fmt: skip
OTHERS: dict[str, Loss] = {
    "another reader": lambda x, w, b, y: (
        F.cross_entropy(s := F.linear(x, w, b).flatten(0, -2), y.flatten()), s.argmax(-1),
    ),
    "weights": lambda x, w, b, y: F.cross_entropy(
        F.linear(x, w).flatten(0, -2), y.flatten(), b.detach().abs()
    ),
    "each row": lambda x, w, b, y: F.cross_entropy(
        F.linear(x, w).flatten(0, -2), y.flatten(), reduction="none"
    ).sum(),
    "a slope of the loss": lambda x, w, b, y: F.cross_entropy(
        F.linear(x, w).flatten(0, -2), y.flatten()
    ).square(),
    "no product": lambda x, w, b, y: F.cross_entropy((x * 2).flatten(0, -2), y.flatten() % 8),
}  # fmt: skip


@pytest.mark.parametrize("lead", [(24,), (3, 7), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_blocks_give_what_the_whole_gives(name: str, lead: tuple[int, ...]) -> None:
    given = operands(*lead)
    graph = recorded(LOSSES[name], given)
    made = optimize(graph)
    made.verify()
    assert scores_in_blocks(made) in (3, 4), made
    values = [t.detach().numpy() for t in given]
    for found, wanted in zip(interpret(made, values), interpret(graph, values), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_in_blocks_stays_whole(name: str) -> None:
    made = optimize(recorded(OTHERS[name], operands(24)))
    assert scores_in_blocks(made) <= 1


@pytest.mark.parametrize("dtype", [flame.uint8, flame.int8, flame.int32], ids=str)
def test_a_number_to_ignore_that_targets_cannot_hold(dtype: flame.DType) -> None:
    x, w, _, y = operands(24)
    y = (y.clamp(min=0) + (156 if dtype is flame.uint8 else 0)).to(dtype)  # 156 is -100 in a byte
    w = flame.randn(200, 8).requires_grad_()

    def step(x: Any, w: Any, y: Any) -> Any:
        loss = F.cross_entropy(F.linear(x, w), y)
        loss.backward()
        return loss.detach(), w.grad

    found = flame.compile(step)(x, w, y)
    w.grad = None
    for a, b in zip(found, step(x, w, y), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=1e-6)


def natural(x: Any, w: Any, y: Any, *, first: str) -> Any:
    """A gradient of the input from a gradient of the weight, or the other way round."""
    scores = F.linear(x, w)
    loss = F.cross_entropy(scores, y)
    (g,) = flame.autograd.grad(loss, scores)
    if first == "weight":
        made = g.T @ x.detach()
        return loss.detach(), made, g @ made
    made = g @ w.detach()
    return loss.detach(), g.T @ made, made


@pytest.mark.parametrize("first", ["weight", "input"])
def test_blocks_that_would_need_the_whole_of_others_stay_whole(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAME_VERIFY", "1")
    x, w, _, y = operands(24)
    compiled = flame.compile(lambda x, w, y: natural(x, w, y, first=first))
    for a, b in zip(compiled(x, w, y), natural(x, w, y, first=first), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_block_is_gone_before_the_next(
    bias: bool, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planned memory, not that of the graph alone: what is fused may keep operands."""
    head, embedding = nn.Linear(8, 512, bias=bias), nn.Embedding(512, 8)
    x, y = (flame.zeros(256, dtype=flame.int64) for _ in range(2))
    optimizer = flame.optim.SGD([*head.parameters(), *embedding.parameters()], lr=0.1)

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        with flame.autocast("cpu", dtype=flame.bfloat16, enabled=half):
            loss = F.cross_entropy(head(embedding(x)), y)
        loss.backward()
        optimizer.step()
        return loss

    arenas = []
    for least in (1 << 40, 1):
        monkeypatch.setattr(sys.modules[blocks.__module__], "LEAST", least)
        graph = optimize(record(step, (x, y), {}, [x, y]).graph)
        arenas.append(plan_memory(fuse(graph)).arena)
    assert arenas[1] < 0.45 * arenas[0]


def losses_in(step: Any) -> int:
    """The gradients of losses that the latest program computes."""
    tasks = [words for line in step.report().splitlines() if "->" not in (words := line.split())]
    return sum("cross_entropy_backward" in words for words in tasks)


def test_rows_that_all_count_for_nothing() -> None:
    x, w, b, y = operands(24)

    @flame.compile
    def step(x: Any, w: Any, b: Any, y: Any) -> Any:
        loss = LOSSES["linear"](x, w, b, y)
        loss.backward()
        return loss.detach(), w.grad, b.grad

    y.fill_(-100)
    loss, *gradients = step(x, w, b, y)
    assert losses_in(step) == 3
    assert np.isnan(loss.item())
    assert not any(gradient.numpy().any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [flame.float32, flame.bfloat16], ids=str)
def test_a_model_trains_in_blocks(dtype: flame.DType) -> None:
    """Compiled with blocks as uncompiled, with half-width scores, too."""

    def train(compiling: bool) -> tuple[list[float], Any]:
        flame.manual_seed(1)
        model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 16), nn.GELU())
        head = nn.Linear(16, 40, bias=False)
        head.weight = model[0].weight  # tied
        optimizer = flame.optim.SGD(model.parameters(), lr=0.5)

        def step(x: Any, y: Any) -> Any:
            with flame.autocast("cpu", dtype=flame.bfloat16, enabled=dtype is flame.bfloat16):
                scores = head(model(x))
                loss = F.cross_entropy(scores.view(-1, 40), y.view(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        run = flame.compile(step) if compiling else step
        x, y = flame.randint(0, 40, (4, 16)), flame.randint(0, 40, (4, 16))
        losses = [run(x, y).item() for _ in range(4)]
        if compiling:
            assert losses_in(run) == 4
        return losses, model[0].weight.detach().numpy()

    (losses, weight), (wanted, other) = train(True), train(False)
    tolerance = 1e-5 if dtype is flame.float32 else 1e-2
    np.testing.assert_allclose(losses, wanted, rtol=tolerance)
    np.testing.assert_allclose(weight, other, rtol=tolerance, atol=tolerance)
