"""Golden texts of graphs: a recorded step, and what the passes make of it.

``pytest tests/text --update`` rewrites them; the difference is then reviewed like code.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flame
from flame.compiler.passes import ALL, optimize
from flame.recording.step import record

GOLDEN = Path(__file__).parent / "golden" / "graphs"
F = flame.nn.functional


def trained_by_hand() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The example of docs/graph.md."""
    weight = flame.ones(3, 4, requires_grad=True)

    def step(x: Any) -> Any:
        q, k = (x @ weight.T).chunk(2, dim=0)
        loss = (q * k).mean()
        loss.backward()
        with flame.no_grad():
            weight.sub_(0.1 * weight.grad)
        weight.grad = None
        return loss.detach()

    return step, (flame.ones(2, 4),)


def attention() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """q, k and v cut from one projection: their gradients are put together again."""
    project = flame.nn.Linear(8, 24)

    def step(x: Any) -> Any:
        qkv = project(x).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = F.softmax(q @ k.transpose(-1, -2) / 2, dim=-1)
        (weights @ v).sum().backward()

    return step, (flame.ones(2, 5, 8),)


def optimizer() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Updates stand behind their gradients; nothing is copied."""
    model = flame.nn.Sequential(flame.nn.Linear(4, 3), flame.nn.ReLU(), flame.nn.Linear(3, 2))
    sgd = flame.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x: Any, y: Any) -> Any:
        loss = F.cross_entropy(model(x), y)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        sgd.zero_grad()
        return loss.detach()

    return step, (flame.ones(5, 4), flame.tensor([0, 1, 1, 0, 1]))


CASES = {"trained_by_hand": trained_by_hand, "attention": attention, "optimizer": optimizer}


@pytest.mark.text
@pytest.mark.parametrize("name", CASES)
def test_graphs(name: str, request: pytest.FixtureRequest) -> None:
    step, tensors = CASES[name]()
    graph = record(step, tensors, {}, list(tensors)).graph
    graph.verify()
    after = optimize(graph)
    after.verify()
    made = f"recorded:\n{graph}\n\noptimized:\n{after}\n"
    path = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update"):
        path.write_text(made)
    assert path.exists(), f"{path} is missing; run pytest tests/text --update and review it"
    assert made == path.read_text(), f"{name} changed; run pytest tests/text --update and review it"


def test_the_document_of_the_graph_is_real() -> None:
    """What docs/graph.md prints is what its script prints."""
    text = (Path(__file__).parents[2] / "docs" / "graph.md").read_text("utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^```text\n(graph\(%.*?)^```$", text, re.MULTILINE | re.DOTALL)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(script, {"__name__": "document"})
    assert out.getvalue() == "".join(blocks)


def test_every_pass_is_in_the_document() -> None:
    text = (Path(__file__).parents[2] / "docs" / "graph.md").read_text("utf-8")
    assert [p.__name__ for p in ALL if f"| `{p.__name__}` |" not in text] == []
