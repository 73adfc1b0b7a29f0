"""Checkpointing: the same gradients, from a second run in backward."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

import flame
from flame import nn
from flame.autograd import checkpoint, checkpoint_sequential, grad
from flame.core.errors import ArgumentError, GradientError


def leaf(values: Any) -> flame.Tensor:
    return flame.tensor(values, dtype=flame.float64, requires_grad=True)


def same(tensor: Any, values: Any) -> None:
    assert tensor is not None
    wanted = values.detach().numpy() if isinstance(values, flame.Tensor) else values
    np.testing.assert_allclose(tensor.detach().numpy(), wanted)


def test_the_function_runs_again_in_backward() -> None:
    calls = []

    def function(x: Any) -> Any:
        calls.append(flame.is_grad_enabled())
        return (x.sin() * x).exp()

    x = leaf([1.0, 2.0])
    y = checkpoint(function, x)
    assert calls == [True]
    y.sum().backward()
    assert calls == [True, True]
    expected = leaf([1.0, 2.0])
    function(expected).sum().backward()
    same(x.grad, expected.grad)


def test_parameters_and_outer_tensors_get_gradients() -> None:
    flame.manual_seed(0)
    layer = nn.Linear(3, 3)
    scale = flame.ones(3, requires_grad=True)
    outer = scale * 2

    def function(x: Any, *, shift: Any, rest: Any) -> Any:
        return flame.tanh(layer(x) * outer + shift) * rest[0]

    def run(call: Any) -> list[Any]:
        x = flame.arange(6.0).reshape(2, 3).requires_grad_()
        shift = flame.ones(3, requires_grad=True)
        call(function, x * 1, shift=shift * 3, rest=[x]).sum().backward(retain_graph=True)
        found = [t.grad for t in (x, shift, scale, layer.weight, layer.bias)]
        for t in (scale, layer.weight, layer.bias):
            t.grad = None
        return found

    plain = run(lambda f, *a, **k: f(*a, **k))
    for ours, theirs in zip(run(checkpoint), plain, strict=True):
        same(ours, theirs)


def test_grad_and_higher_orders_work_through_it() -> None:
    x = leaf([0.5, 1.0])

    def function(v: Any) -> Any:
        return (v**3).sin()

    def orders(call: Any) -> list[Any]:
        (g,) = grad(call(x).sum(), x, create_graph=True)
        (h,) = grad((g * g).sum(), x)
        return [g, h]

    for ours, theirs in zip(
        orders(lambda v: checkpoint(function, v)), orders(function), strict=True
    ):
        same(ours, theirs)
    assert x.grad is None


def test_random_draws_are_repeated() -> None:
    x = flame.ones(1000, requires_grad=True)
    flame.manual_seed(3)
    y = checkpoint(lambda v: nn.functional.dropout(v * 1, 0.5).exp(), x)
    after = flame.rand(1).item()
    y.sum().backward()
    dropped = (y == 1).numpy()
    assert x.grad is not None
    assert np.array_equal(x.grad.numpy() == 0, dropped)
    flame.manual_seed(3)
    checkpoint(lambda v: nn.functional.dropout(v * 1, 0.5).exp(), x).sum().backward()
    flame.manual_seed(3)
    nn.functional.dropout(x * 1, 0.5)
    assert flame.rand(1).item() == after


def test_random_draws_are_not_repeated_on_request() -> None:
    for preserve in (True, False):
        x = flame.ones(1000, requires_grad=True)
        y = checkpoint(lambda v: v * flame.rand(1000), x, preserve_rng_state=preserve)
        y.sum().backward()
        assert x.grad is not None
        assert np.array_equal(x.grad.numpy(), y.detach().numpy()) == preserve


def test_fewer_tensors_are_kept() -> None:
    made: list[Any] = []

    def function(x: Any) -> Any:
        for _ in range(10):
            x = x.sin()
            made.append(weakref.ref(x))
        return x

    gc.disable()
    try:
        x = leaf([1.0, 2.0])
        y = checkpoint(function, x * 1)
        assert sum(r() is not None for r in made) == 1
        plain = function(x * 1)
        assert sum(r() is not None for r in made) == 11
        del plain
        y.sum().backward()
        del y
        assert sum(r() is not None for r in made) == 0
    finally:
        gc.enable()


def test_memory_statistics() -> None:
    from flame.runtime.cpu import ALLOCATOR

    layers = [lambda v: v.sin() for _ in range(20)]

    def forward(x: Any) -> Any:
        for layer in layers:
            x = layer(x)
        return x

    def held(call: Any) -> int:
        x = flame.ones(100_000, requires_grad=True)
        before = ALLOCATOR.statistics().allocated
        y = call(x)
        kept = ALLOCATOR.statistics().allocated - before
        y.sum().backward()
        return int(kept)

    assert held(lambda x: checkpoint(forward, x)) * 5 < held(forward)


def test_nested() -> None:
    x = leaf([0.5, 1.0])

    def inner(v: Any) -> Any:
        return v.sin().exp()

    def outer(v: Any) -> Any:
        return checkpoint(inner, v * v).cos() * v

    def plain(v: Any) -> Any:
        return inner(v * v).cos() * v

    (ours,) = grad(checkpoint(outer, x).sum(), x)
    (theirs,) = grad(plain(x).sum(), x)
    same(ours, theirs)


def test_backward_twice() -> None:
    x = leaf([1.0])
    y = checkpoint(lambda v: v.sin().exp(), x)
    y.backward(retain_graph=True)
    y.backward()
    expected = leaf([1.0])
    expected.sin().exp().backward()
    assert expected.grad is not None
    same(x.grad, expected.grad * 2)
    with pytest.raises(GradientError, match="retain_graph"):
        y.backward()


def test_several_outputs_and_other_arguments() -> None:
    x = leaf([1.0, 2.0])
    a, b, n = checkpoint(lambda v, k: (v.sin(), v * k, k), x, 3)
    assert n == 3
    (a.sum() + b.exp().sum()).backward()
    same(x.grad, np.cos([1, 2]) + 3 * np.exp([3.0, 6.0]))


def test_without_recording() -> None:
    x = leaf([1.0])
    with flame.no_grad():
        assert checkpoint(lambda v: v * 2, x).is_leaf
    assert checkpoint(lambda v: v * 2, flame.ones(1)).is_leaf


def test_a_function_that_changes_its_mind() -> None:
    calls = []

    def function(x: Any) -> Any:
        calls.append(1)
        return x.sin().sin() if len(calls) == 1 else x.sin()

    y = checkpoint(function, leaf([1.0]) * 1)
    with pytest.raises(GradientError, match="same"):
        y.backward()

    def grows(x: Any) -> Any:
        calls.append(1)
        return flame.cat([x] * len(calls)).sin().sum()

    y = checkpoint(grows, leaf([1.0]))
    with pytest.raises(GradientError, match="shape"):
        y.backward()


def test_arguments_that_were_changed() -> None:
    a = leaf([1.0]) * 1
    y = checkpoint(lambda v: v.sin(), a)
    a.add_(1)
    with pytest.raises(GradientError, match="changed"):
        y.backward()


def test_changes_in_place_inside() -> None:
    def function(v: Any) -> Any:
        y = v * 1
        y.mul_(v)
        y[0] = v[1] * 3
        return y.exp_()

    x, plain = leaf([1.0, 2.0]), leaf([1.0, 2.0])
    checkpoint(function, x).sum().backward()
    function(plain).sum().backward()
    same(x.grad, plain.grad)

    def wrong(v: Any) -> Any:
        y = v * 1
        z = y.sin()
        y.add_(1)
        return z

    with pytest.raises(GradientError, match="sin"):
        checkpoint(wrong, x).sum().backward()


def test_sequential() -> None:
    flame.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    x = flame.rand(3, 4)
    model(x).sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    checkpoint_sequential(model, 2, x).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        same(parameter.grad, gradient)
    with pytest.raises(ArgumentError):
        checkpoint_sequential(model, 0, x)
