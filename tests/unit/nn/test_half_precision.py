"""Layers in float16 and bfloat16: they run, keep the dtype, and stay near float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
from flame import nn

LAYERS = [
    (lambda: nn.Linear(8, 6), (4, 8)),
    (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 6)),
    (lambda: nn.BatchNorm2d(3), (4, 3, 5, 5)),
    (lambda: nn.LayerNorm(8), (4, 8)),
    (lambda: nn.GroupNorm(2, 4), (2, 4, 5)),
    (lambda: nn.RMSNorm(8), (4, 8)),
    (lambda: nn.GELU(), (4, 8)),
    (lambda: nn.LSTM(4, 5), (3, 2, 4)),
    (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), (3, 2, 8)),
]


@pytest.mark.parametrize("dtype", [flame.float16, flame.bfloat16], ids=lambda d: d.name)
@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_half(build: Any, shape: tuple[int, ...], dtype: Any) -> None:
    flame.manual_seed(0)
    layer = build()
    x = flame.randn(*shape)
    results = []
    for kind in (flame.float32, dtype):
        layer.to(kind)
        layer.zero_grad()
        given = x.to(kind).detach().requires_grad_()
        output = layer(given)
        output = output[0] if isinstance(output, tuple) else output
        assert output.dtype is kind
        weights = flame.arange(output.numel(), dtype=flame.float32).cos().reshape(output.shape)
        (output * weights.to(kind)).sum().backward()
        assert given.grad.dtype is kind
        assert all(p.grad.dtype is kind for p in layer.parameters())
        results.append((output.detach().to(flame.float32).numpy(), given.grad.float().numpy()))
    for full, half in zip(*results, strict=True):
        np.testing.assert_allclose(half, full, rtol=0.1, atol=0.1 * np.abs(full).max())
