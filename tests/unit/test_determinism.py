"""The same seed and thread count give the same bits, whichever thread takes which chunk."""

from __future__ import annotations

import numpy as np

import flame
from flame.nn import functional


def step() -> list[bytes]:
    """Loss and gradients of a small net that scatters, reduces and draws random numbers."""
    flame.manual_seed(7)
    images = flame.randn(8, 3, 32, 32)
    table = flame.randn(50, 64).requires_grad_()
    weight = flame.randn(64, 3, 3, 3).requires_grad_()
    labels = flame.randint(0, 50, (4096,))
    features = functional.conv2d(images, weight, padding=1).relu()
    features = functional.dropout(features, 0.5)
    rows = functional.embedding(labels, table)
    loss = features.var() + (rows * features.mean((0, 2, 3))).sum()
    loss.backward()
    assert table.grad is not None
    assert weight.grad is not None
    return [t.detach().numpy().tobytes() for t in (loss, table.grad, weight.grad)]


def test_runs_repeat_bit_for_bit() -> None:
    flame.use_deterministic_algorithms(True)
    try:
        assert flame.are_deterministic_algorithms_enabled()
        first = step()
        assert np.frombuffer(first[1], np.float32).any()
        for _ in range(5):
            assert step() == first
    finally:
        flame.use_deterministic_algorithms(False)
