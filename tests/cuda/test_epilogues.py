"""Products with gelu as their epilogue give what the separate operations give."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import flame
from flame import nn

pytestmark = pytest.mark.cuda


@pytest.fixture
def _every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("flame.compiler.passes.epilogues")
    monkeypatch.setattr(module, "LEAST", 1)


@pytest.mark.usefixtures("eager_cuda", "_every_product")
def test_perceptron_of_a_transformer() -> None:
    flame.manual_seed(0)
    first, second = nn.Linear(16, 32).cuda(), nn.Linear(32, 16).cuda()
    x = flame.randn(2, 4, 16, device="cuda")

    def step(x: Any) -> Any:
        with flame.autocast("cuda", dtype=flame.bfloat16):
            y = second(nn.functional.gelu(first(x), approximate="tanh"))
        y.float().square().mean().backward()
        found = [p.grad for m in (first, second) for p in m.parameters()]
        for m in (first, second):
            m.zero_grad()
        return y.detach(), *found

    expected = [t.cpu().float().numpy() for t in step(x)]
    compiled = flame.compile(step)
    made = [t.cpu().float().numpy() for t in compiled(x)]
    report = compiled.report()
    assert "linear_gelu" in report
    assert "matmul_gelu_backward" in report
    for a, b in zip(made, expected, strict=True):
        assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(b)
