"""Dropout in training, and activations that write into their input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
from flame import nn
from flame.core.errors import ShapeError
from flame.nn import functional as F


@pytest.fixture(autouse=True)
def _seed() -> None:
    flame.manual_seed(3)


def test_dropout_zeroes_and_scales() -> None:
    x = flame.ones(100, 100, requires_grad=True)
    y = nn.Dropout(0.25)(x)
    kept = y.detach().numpy()
    np.testing.assert_allclose(kept[kept != 0], 1 / 0.75, rtol=1e-6)
    assert (kept == 0).mean() == pytest.approx(0.25, abs=0.02)
    y.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), kept)  # the same mask in backward
    assert not np.array_equal(nn.Dropout(0.25)(x).detach().numpy(), kept)


@pytest.mark.parametrize("layer", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d])
def test_dropout_at_its_ends(layer: Any) -> None:
    shape = {nn.Dropout1d: (2, 3, 4), nn.Dropout3d: (2, 3, 4, 2, 2)}.get(layer, (2, 3, 4, 5))
    x = flame.randn(*shape)
    np.testing.assert_array_equal(layer(0.0)(x).numpy(), x.numpy())
    np.testing.assert_array_equal(layer(0.5).eval()(x).numpy(), x.numpy())
    assert (layer(1.0)(x).numpy() == 0).all()


@pytest.mark.parametrize(
    ("layer", "shape", "leading"),
    [
        (nn.Dropout1d, (20, 30, 4), 2),
        (nn.Dropout1d, (300, 4), 1),
        (nn.Dropout2d, (20, 30, 2, 3), 2),
        (nn.Dropout3d, (20, 30, 2, 2, 2), 2),
        (nn.Dropout3d, (300, 2, 2, 2), 1),
    ],
)
def test_channel_dropout(layer: Any, shape: tuple[int, ...], leading: int) -> None:
    y = layer(0.5)(flame.ones(*shape)).numpy()
    rows = y.reshape(*shape[:leading], -1)
    assert (rows == rows[..., :1]).all()  # whole channels
    assert set(np.unique(rows)) == {0.0, 2.0}
    assert (rows == 0).mean() == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ShapeError, match="needs"):
        layer(0.5)(flame.ones(3))


IN_PLACE = [
    nn.ReLU(inplace=True),
    nn.ReLU6(inplace=True),
    nn.SiLU(inplace=True),
    nn.Mish(inplace=True),
    nn.ELU(inplace=True),
    nn.LeakyReLU(inplace=True),
    nn.Hardtanh(inplace=True),
    nn.Dropout(1.0, inplace=True),
    nn.Dropout2d(1.0, inplace=True),
]


@pytest.mark.parametrize("layer", IN_PLACE, ids=lambda layer: type(layer).__name__)
def test_in_place(layer: Any) -> None:
    leaf = flame.linspace(-3.0, 3.0, 24).reshape(2, 3, 4).requires_grad_()
    x = leaf * 1.0
    y = layer(x)
    assert y is x
    y.sum().backward()
    twin = flame.linspace(-3.0, 3.0, 24).reshape(2, 3, 4).requires_grad_()
    layer.inplace = False
    expected = layer(twin * 1.0)
    layer.inplace = True
    expected.sum().backward()
    np.testing.assert_allclose(y.detach().numpy(), expected.detach().numpy(), 1e-6)
    np.testing.assert_allclose(leaf.grad.numpy(), twin.grad.numpy(), 1e-6)
    assert "inplace=True" in repr(layer)


def test_composites_refuse() -> None:
    x = flame.ones(2, 3, 5)
    for call, part in (
        (lambda: F.glu(x), "even"),
        (lambda: F.prelu(x, flame.ones(2)), "3 channels"),
        (lambda: F.pixel_unshuffle(x, 2), "divisible by 2"),
        (lambda: F.pad(x, (6, 0), mode="circular"), "6"),
        (lambda: F.bilinear(x, x, flame.ones(2, 3, 4)), r"\(\.\.\., 3\)"),
    ):
        with pytest.raises(ShapeError, match=part):
            call()


def test_circular_padding_can_crop() -> None:
    x = flame.arange(5, dtype=flame.float32).reshape(1, 1, 5)
    assert F.pad(x, (2, -1), mode="circular").flatten().tolist() == [2, 3, 0, 1, 2, 3]
