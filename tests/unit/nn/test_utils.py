"""Clipping of gradients, and parameters as one vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
from flame import nn
from flame.core.errors import ArgumentError, GradientError, ShapeError
from flame.nn import utils

GRADIENTS = [np.array([[3.0, -4.0], [1.0, 0.5]]), np.array([2.0, -7.0, 0.0]), None]


def parameters(lib: Any, gradients: Any = GRADIENTS) -> list[Any]:
    made = []
    for gradient in gradients:
        data = lib.ones(2) if gradient is None else lib.from_numpy(gradient * 0)
        parameter = lib.nn.Parameter(data)
        parameter.grad = None if gradient is None else lib.from_numpy(gradient.copy())
        made.append(parameter)
    return made


@pytest.mark.parametrize("norm_type", [2.0, 1, 3.0, float("inf")])
@pytest.mark.parametrize("max_norm", [1.0, 100.0])
def test_clip_norm_as_pytorch(norm_type: float, max_norm: float) -> None:
    torch = pytest.importorskip("torch")
    ours, theirs = parameters(flame), parameters(torch)
    found = utils.clip_grad_norm_(ours, max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        np.testing.assert_allclose(one.grad.numpy(), other.grad.numpy(), rtol=1e-12)
    assert ours[2].grad is None


def test_clip_changes_gradients_in_place() -> None:
    given = parameters(flame)
    gradient = given[0].grad
    utils.clip_grad_norm_(given[0], 1.0)
    assert given[0].grad is gradient
    assert float(gradient.norm()) == pytest.approx(1.0, rel=1e-5)


def test_norms_that_are_not_finite() -> None:
    bad = [np.array([1.0, np.nan])]
    given = parameters(flame, bad)
    with pytest.raises(GradientError, match="nan"):
        utils.clip_grad_norm_(given, 1.0, error_if_nonfinite=True)
    assert given[0].grad.numpy()[0] == 1.0
    assert np.isnan(float(utils.clip_grad_norm_(given, 1.0)))
    assert np.isnan(given[0].grad.numpy()).all()
    assert float(utils.clip_grad_norm_([], 1.0)) == 0.0
    assert float(utils.get_total_norm([flame.tensor([3.0, 4.0])])) == 5.0


def test_clip_value() -> None:
    given = parameters(flame)
    utils.clip_grad_value_(given, 2.0)
    np.testing.assert_array_equal(given[0].grad.numpy(), [[2.0, -2.0], [1.0, 0.5]])
    np.testing.assert_array_equal(given[1].grad.numpy(), [2.0, -2.0, 0.0])


def test_vector_round_trip() -> None:
    net = nn.Linear(3, 2)
    vector = utils.parameters_to_vector(net.parameters())
    assert vector.shape == (8,)
    assert vector.requires_grad
    utils.vector_to_parameters(flame.arange(8, dtype=flame.float32), net.parameters())
    np.testing.assert_array_equal(net.weight.detach().numpy(), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(net.bias.detach().numpy(), [6, 7])
    with pytest.raises(ShapeError, match=r"\(8,\), got \(7,\)"):
        utils.vector_to_parameters(flame.zeros(7), net.parameters())
    with pytest.raises(ArgumentError, match="no parameters"):
        utils.parameters_to_vector([])
