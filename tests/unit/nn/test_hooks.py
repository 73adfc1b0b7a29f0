"""Forward and backward hooks of modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
from flame import nn
from flame.core.errors import ArgumentError, UnsupportedError


class Scale(nn.Module):
    def forward(self, x: Any, factor: float = 2.0) -> Any:
        return x * factor


def test_forward_hooks_see_and_replace() -> None:
    layer, seen = Scale(), []
    before = layer.register_forward_pre_hook(lambda module, args: (args[0] + 1.0,))
    after = layer.register_forward_hook(lambda module, args, output: seen.append(args) or -output)
    x = flame.ones(2)
    np.testing.assert_array_equal(layer(x).numpy(), [-4.0, -4.0])
    np.testing.assert_array_equal(seen[0][0].numpy(), [2.0, 2.0])
    before.remove()
    before.remove()
    np.testing.assert_array_equal(layer(x).numpy(), [-2.0, -2.0])
    after.remove()
    np.testing.assert_array_equal(layer(x).numpy(), [2.0, 2.0])


def test_hooks_with_kwargs() -> None:
    layer, seen = Scale(), []

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {"factor": kwargs["factor"] * 10.0}

    def after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(kwargs)

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after, with_kwargs=True)
    np.testing.assert_array_equal(layer(flame.ones(1), factor=3.0).numpy(), [30.0])
    assert seen == [{"factor": 30.0}]
    layer.register_forward_pre_hook(lambda module, args, kwargs: 3, with_kwargs=True)
    with pytest.raises(ArgumentError, match="with_kwargs=True"):
        layer(flame.ones(1), factor=3.0)


def test_hooks_in_order_and_for_a_while() -> None:
    layer, order = Scale(), []
    layer.register_forward_pre_hook(lambda *_: order.append("first"))
    layer.register_forward_pre_hook(lambda *_: order.append("second"))
    with layer.register_forward_pre_hook(lambda *_: order.append("early"), prepend=True):
        layer(flame.ones(1))
    layer(flame.ones(1))
    assert order == ["early", "first", "second", "first", "second"]


def test_backward_hook_sees_gradients() -> None:
    layer, seen = nn.Linear(3, 2), []
    layer.register_full_backward_hook(lambda module, gi, go: seen.append((module, gi, go)))
    x = flame.randn(4, 3, requires_grad=True)
    (layer(x) * 2.0).sum().backward()
    ((module, grad_input, grad_output),) = seen
    assert module is layer
    np.testing.assert_array_equal(grad_output[0].numpy(), np.full((4, 2), 2.0))
    np.testing.assert_allclose(grad_input[0].numpy(), x.grad.numpy())
    assert layer.weight.grad is not None


def test_backward_hooks_replace_gradients() -> None:
    layer = Scale()
    before = layer.register_full_backward_pre_hook(lambda module, go: (go[0] * 10.0,))
    layer.register_full_backward_hook(lambda module, gi, go: (gi[0] + 1.0,))
    x = flame.ones(2, requires_grad=True)
    layer(x).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), [21.0, 21.0])
    before.remove()
    x.grad = None
    layer(x).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), [3.0, 3.0])


def test_backward_hook_without_input_gradients() -> None:
    layer, seen = nn.Linear(3, 2), []
    layer.register_full_backward_hook(lambda module, gi, go: seen.append((gi, go)))
    layer(flame.ones(4, 3)).sum().backward()
    assert seen[0][0] == (None,)
    assert layer.weight.grad is not None
    layer.register_full_backward_hook(lambda module, gi, go: (go[0],))
    with pytest.raises(ArgumentError, match="no input requires a gradient"):
        layer(flame.ones(4, 3)).sum().backward()


def test_backward_hooks_with_several_inputs_and_outputs() -> None:
    class Swap(nn.Module):
        def forward(self, a: Any, note: str, b: Any) -> Any:
            return b * 3.0, note, a * 2.0

    layer, seen = Swap(), []
    layer.register_full_backward_hook(lambda module, gi, go: seen.append((gi, go)))
    a, b = flame.ones(1, requires_grad=True), flame.ones(2, requires_grad=True)
    first, note, second = layer(a, "note", b)
    assert note == "note"
    (first.sum() + second.sum()).backward()
    ((grad_input, grad_output),) = seen
    assert [None if g is None else g.shape for g in grad_input] == [(1,), None, (2,)]
    assert [None if g is None else g.shape for g in grad_output] == [(2,), None, (1,)]
    np.testing.assert_array_equal(a.grad.numpy(), [2.0])
    np.testing.assert_array_equal(b.grad.numpy(), [3.0, 3.0])


def test_backward_hooks_refuse_other_outputs() -> None:
    class Named(nn.Module):
        def forward(self, x: Any) -> Any:
            return {"x": x}

    layer = Named()
    layer.register_full_backward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match="dict"):
        layer(flame.ones(1))


def test_wrong_number_of_gradients() -> None:
    layer = Scale()
    layer.register_full_backward_hook(lambda module, gi, go: (gi[0], gi[0]))
    with pytest.raises(ArgumentError, match="2 gradients"):
        layer(flame.ones(1, requires_grad=True)).sum().backward()
