"""Half-width operands of ops that widen are read as they are."""

import numpy as np
import pytest

import flame
from flame import nn
from flame.compiler.passes import optimize
from flame.nn import functional as F

pytestmark = pytest.mark.unit


def _cross_entropy(x: flame.Tensor) -> flame.Tensor:
    return F.cross_entropy(x, flame.tensor([1, 0, 3, 2]))


@pytest.mark.parametrize(
    "function",
    [
        _cross_entropy,
        lambda x: F.layer_norm(x, (6,)).square().sum(),
        lambda x: F.group_norm(x.reshape(4, 3, 2), 3).square().sum(),
        lambda x: F.softmax(x, -1)[:, 2].sum(),
        lambda x: F.log_softmax(x, -1)[:, 2].sum(),
    ],
)
def test_no_copy_is_made(function) -> None:
    weight = nn.Parameter(flame.randn(5, 6))
    data = flame.randn(4, 5)

    def step(x):
        with flame.autocast("cpu", dtype=flame.bfloat16):
            loss = function(x @ weight)
        loss.backward()
        gradient, weight.grad = weight.grad, None
        return loss.detach(), gradient

    expected = [t.numpy() for t in step(data)]
    compiled = flame.compile(step)
    for made, wanted in zip(compiled(data), expected, strict=True):
        np.testing.assert_allclose(made.numpy(), wanted, rtol=2e-2, atol=2e-2)
    nodes = optimize(compiled.graph).nodes
    readers = [n for n in nodes if n.op.widens]
    assert readers
    halves = [t for n in readers for t in n.types if getattr(t, "dtype", None) is flame.bfloat16]
    assert halves
    widening = [
        n
        for n in nodes
        if n.op.name == "copy"
        and n.outputs[0].type.shape[-1:] == (6,)
        and n.outputs[0].type.dtype is flame.float32
        and any(n.outputs[0] in r.inputs for r in readers)
    ]
    assert not widening
