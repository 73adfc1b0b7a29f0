"""What a `cat` joins is computed where it is joined: no copies, the same numbers."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import flame
from flame.core import dtypes
from flame.nn import functional as F

from .emulation import EmulatedDriver


@pytest.fixture(autouse=True)
def small_ones_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("flame.compiler.passes.pieces"), "LEAST", 64)
    monkeypatch.setenv("FLAME_VERIFY", "1")


def attention(x: Any, weight: Any) -> Any:
    """Queries, keys and values by one product, as in most transformers."""
    batch, length, width = x.shape
    joint = F.linear(x, weight).view(batch, length, 3, 2, width // 2)
    q, k, v = joint.permute(2, 0, 3, 1, 4).unbind(0)
    made = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return made.transpose(1, 2).reshape(batch, length, width)


def gated(x: Any, weight: Any) -> Any:
    value, gate = F.linear(x, weight).chunk(2, dim=-1)
    return value * F.gelu(gate)


def three(x: Any, weight: Any) -> Any:
    first, second, third = F.linear(x, weight).split(32, dim=-1)
    return first * second.sigmoid() + third.tanh() * second


def gradients(body: Any, dtype: Any) -> Any:
    def step(x: Any, weight: Any) -> Any:
        made = body(x.to(dtype), weight.to(dtype)).float()
        (made * made).sum().backward()
        found = x.grad, weight.grad
        x.grad = weight.grad = None
        return found

    return step


def compare(body: Any, shape: tuple[int, ...], rows: int, dtype: Any = dtypes.float32) -> str:
    """The compiled step's gradients against those of the CPU; gives its report."""
    rng = np.random.default_rng(0)
    x, weight = (
        flame.from_numpy(rng.standard_normal(s).astype(np.float32) * 0.3)
        for s in (shape, (rows, shape[-1]))
    )
    step = gradients(body, dtype)
    wanted = step(x.requires_grad_(), weight.requires_grad_())
    compiled = flame.compile(step)
    there = [t.detach().to("cuda").requires_grad_() for t in (x, weight)]
    for _ in range(2):
        got = compiled(*there)
    tolerance = 1e-4 if dtype is dtypes.float32 else 3e-2
    for a, b in zip(got, wanted, strict=True):
        scale = float(b.abs().max().item())
        np.testing.assert_allclose(a.cpu().numpy() / scale, b.numpy() / scale, atol=tolerance)
    return str(compiled.report())


def cats(report: str) -> list[list[str]]:
    """The rows of `cat` tasks, as words."""
    return [line.split() for line in report.splitlines() if line.split()[-2:] == ["cat", "cat"]]


@pytest.mark.parametrize("dtype", [dtypes.float32, dtypes.bfloat16], ids=str)
def test_gradients_of_queries_keys_and_values(emulated_cuda: EmulatedDriver, dtype: Any) -> None:
    (row,) = cats(compare(attention, (2, 24, 32), 96, dtype))
    assert "none" in row


def test_gradients_of_both_halves_of_a_gated_unit(emulated_cuda: EmulatedDriver) -> None:
    (row,) = cats(compare(gated, (3, 20, 32), 128))
    assert "none" in row


def test_gradients_of_three_parts_that_meet_again(emulated_cuda: EmulatedDriver) -> None:
    (row,) = cats(compare(three, (40, 32), 96))
    assert "none" in row


def test_unaligned_parts_are_copied(emulated_cuda: EmulatedDriver) -> None:
    (row,) = cats(compare(gated, (30, 8), 2 * 7))
    assert "none" not in row
