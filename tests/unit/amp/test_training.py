"""Small models trained under autocast: close to PyTorch's, and compiled as eager."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flame
from flame import nn

STEPS = 12


def batch() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    draw = np.random.default_rng(2)
    return draw.standard_normal((16, 3, 8, 8), dtype=np.float32), draw.integers(0, 5, 16)


def make(library: Any) -> Any:
    n = library.nn
    return n.Sequential(
        n.Conv2d(3, 8, 3, padding=1), n.BatchNorm2d(8), n.ReLU(), n.MaxPool2d(2), n.Flatten(),
        n.Linear(8 * 16, 32), n.LayerNorm(32), n.GELU(), n.Linear(32, 5),
    )  # fmt: skip


def same_parameters(models: list[tuple[Any, Any]]) -> None:
    """The parameters of all models become those of the first."""
    values = [p.detach().numpy().copy() for p in models[0][1].parameters()]
    for library, model in models[1:]:
        with library.no_grad():
            for p, value in zip(model.parameters(), values, strict=True):
                p.copy_(library.from_numpy(value))


def losses(library: Any, model: Any, dtype: str | None, *, compiled: bool = False) -> list[float]:
    optimizer = library.optim.AdamW(model.parameters(), lr=1e-2)
    functional = library.nn.functional
    x, y = (library.from_numpy(a) for a in batch())

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        if dtype is None:
            loss = functional.cross_entropy(model(x), y)
        else:
            with library.autocast("cpu", dtype=getattr(library, dtype)):
                loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    run = flame.compile(step) if compiled else step
    found = [float(run(x, y).item()) for _ in range(STEPS)]
    if compiled:
        assert run.recordings == 1
    return found


def test_losses_are_close_to_those_of_torch() -> None:
    models = [(torch, make(torch)), (flame, make(flame)), (flame, make(flame))]
    same_parameters(models)
    theirs = losses(torch, models[0][1], "bfloat16")
    ours = losses(flame, models[1][1], "bfloat16")
    exact = losses(flame, models[2][1], None)
    np.testing.assert_allclose(ours, theirs, rtol=0.05, atol=0.03)
    assert ours[-1] < 0.5 * ours[0]
    assert ours != exact


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compiled_training_is_eager_training(dtype: str) -> None:
    models = [(flame, make(flame)), (flame, make(flame))]
    same_parameters(models)
    eager = losses(flame, models[0][1], dtype)
    compiled = losses(flame, models[1][1], dtype, compiled=True)
    np.testing.assert_allclose(compiled, eager, rtol=0.03, atol=0.02)


def test_the_example_of_the_document_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[3] / "docs/mixed_precision.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(code, {"__name__": "document"})
    assert capsys.readouterr().out.startswith("tensor(2.")


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_recurrent_layers_run_in_lower_precision(kind: str) -> None:
    ours, theirs = getattr(nn, kind)(4, 6, 2), getattr(torch.nn, kind)(4, 6, 2)
    same_parameters([(torch, theirs), (flame, ours)])
    values = np.random.default_rng(0).standard_normal((7, 3, 4), dtype=np.float32)
    with flame.autocast("cpu", dtype=flame.bfloat16):
        output, last = ours(flame.from_numpy(values))
    wanted, _ = theirs(torch.from_numpy(values))
    assert output.dtype is flame.bfloat16
    assert all(t.dtype is flame.bfloat16 for t in (last if kind == "LSTM" else (last,)))
    np.testing.assert_allclose(
        output.float().detach().numpy(), wanted.detach().numpy(), rtol=0.05, atol=0.03
    )
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is flame.float32 for p in ours.parameters())


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_recurrent_cells_too(kind: str) -> None:
    cell = getattr(nn, kind)(4, 6)
    with flame.autocast("cpu"):
        made = cell(flame.zeros((2, 4)))
    assert all(t.dtype is flame.bfloat16 for t in (made if isinstance(made, tuple) else (made,)))


def test_attention_and_norms_inside_of_a_transformer_layer() -> None:
    ours, theirs = (lib.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0) for lib in (flame, torch))
    same_parameters([(torch, theirs), (flame, ours)])
    values = np.random.default_rng(0).standard_normal((5, 3, 8), dtype=np.float32)
    with flame.autocast("cpu"):
        made = ours(flame.from_numpy(values))
    assert made.dtype is flame.float32  # it ends in a norm
    wanted = theirs(torch.from_numpy(values))
    np.testing.assert_allclose(made.detach().numpy(), wanted.detach().numpy(), rtol=0.05, atol=0.05)


def test_a_compiled_module_under_autocast() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    compiled = flame.compile(model)
    x = flame.from_numpy(np.random.default_rng(0).standard_normal((6, 4), dtype=np.float32))
    found = []
    for each in (model, compiled):
        with flame.autocast("cpu"):
            made = each(x)
        assert made.dtype is flame.bfloat16
        made.float().square().sum().backward()
        found.append([p.grad.numpy().copy() for p in model.parameters()])
        for p in model.parameters():
            p.grad = None
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.03, atol=0.02)
