"""Library calls whose operands lie at addresses that the library does not take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
from flame.nn import functional as F

pytestmark = pytest.mark.cuda


def _shifted(shape: tuple[int, ...]) -> Any:
    """A contiguous tensor that starts one element after an aligned address."""
    count = int(np.prod(shape))
    return flame.randn(count + 1, device="cuda")[1:].reshape(shape)


def _convolved(x: Any, weight: Any, bias: Any) -> Any:
    y = F.conv2d(x, weight, bias, padding=1)
    return y, flame.autograd.grad(y.square().sum(), [x, weight, bias])


@pytest.mark.usefixtures("eager_cuda")
@pytest.mark.parametrize("compiled", [False, True])
def test_operands_are_moved(compiled: bool) -> None:
    flame.manual_seed(0)
    given = [_shifted(shape) for shape in ((2, 3, 5, 5), (4, 3, 3, 3), (4,))]
    assert all(t.data_ptr() % 16 for t in given)
    function = flame.compile(_convolved) if compiled else _convolved
    y, gradients = function(*[t.requires_grad_() for t in given])
    there = [t.detach().cpu().requires_grad_() for t in given]
    expected, wanted = _convolved(*there)
    for a, b in zip((y, *gradients), (expected, *wanted), strict=True):
        np.testing.assert_allclose(
            a.detach().cpu().numpy(), b.detach().numpy(), rtol=1e-4, atol=1e-4
        )
