"""Hooks on tensors, and gradients kept for computed ones."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

import flame
from flame.core.errors import DTypeError, GradientError, ShapeError


def leaf(*values: float) -> flame.Tensor:
    return flame.tensor([float(v) for v in values], requires_grad=True)


def same(tensor: Any, values: Any) -> None:
    assert tensor is not None
    np.testing.assert_allclose(tensor.detach().numpy(), values)


def test_a_hook_sees_the_gradient() -> None:
    x = leaf(1, 2)
    y = x * 2
    seen: list[Any] = []
    x.register_hook(lambda g: seen.append(("x", g.tolist())))
    y.register_hook(lambda g: seen.append(("y", g.tolist())))
    (y * y).sum().backward()
    assert seen == [("y", [4.0, 8.0]), ("x", [8.0, 16.0])]


def test_what_a_hook_returns_replaces_the_gradient() -> None:
    x = leaf(1, 2)
    y = x * 2
    y.register_hook(lambda g: g * 10)
    x.register_hook(lambda g: g + 1)
    y.sum().backward()
    same(x.grad, [21, 21])


def test_hooks_run_in_order_on_the_whole_gradient() -> None:
    x = leaf(1)
    y = x * 1
    seen = []
    y.register_hook(lambda g: seen.append(g.item()) or g * 2)
    y.register_hook(lambda g: seen.append(g.item()))
    (y + y + y).sum().backward()
    assert seen == [3.0, 6.0]
    same(x.grad, [6])


def test_hooks_are_removed() -> None:
    x = leaf(1)
    y = x * 2
    first = x.register_hook(lambda g: g * 100)
    second = y.register_hook(lambda g: g * 100)
    first.remove()
    second.remove()
    second.remove()
    with x.register_hook(lambda g: g * 100):
        pass
    y.sum().backward()
    same(x.grad, [2])


def test_hooks_of_leaves_run_for_grad_too() -> None:
    x = leaf(1)
    x.register_hook(lambda g: g * 10)
    same(flame.autograd.grad((x * 2).sum(), x)[0], [20])


def test_hooks_may_be_differentiated() -> None:
    x = leaf(3)
    y = x * x
    y.register_hook(lambda g: g * x)
    (g,) = flame.autograd.grad(y, x, create_graph=True)  # 2x * x
    same(g, [18])
    (h,) = flame.autograd.grad(g, x)
    same(h, [12])


def test_bad_hooks() -> None:
    with pytest.raises(GradientError):
        flame.ones(1).register_hook(print)
    x = leaf(1, 2)
    with pytest.raises(DTypeError):
        x.register_hook(3)  # type: ignore[arg-type]  # on purpose
    handle = x.register_hook(lambda g: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(GradientError, match="int"):
        x.sum().backward()
    handle.remove()
    x.register_hook(lambda g: g[:1])
    with pytest.raises(ShapeError, match=r"\(1,\)"):
        x.sum().backward()


def test_an_error_in_a_hook_comes_out() -> None:
    x = leaf(1)

    def hook(gradient: Any) -> None:
        raise KeyError("mine")

    (x * 2).register_hook(hook)
    x.register_hook(hook)
    with pytest.raises(KeyError, match="mine"):
        x.sum().backward()
    assert flame.is_grad_enabled()


def test_post_accumulate_hooks() -> None:
    x = leaf(1, 2)
    seen = []

    def step(parameter: Any) -> None:
        seen.append(parameter.grad.tolist())
        parameter.grad = None

    handle = x.register_post_accumulate_grad_hook(step)
    (x * 3).sum().backward()
    (x * 4).sum().backward()
    assert seen == [[3.0, 3.0], [4.0, 4.0]]
    handle.remove()
    x.sum().backward()
    same(x.grad, [1, 1])
    with pytest.raises(GradientError):
        (x * 2).register_post_accumulate_grad_hook(step)
    with pytest.raises(GradientError):
        flame.ones(1).register_post_accumulate_grad_hook(step)


def test_retain_grad() -> None:
    x = leaf(1, 2)
    y = x * 2
    assert not y.retains_grad
    y.retain_grad()
    y.retain_grad()
    assert y.retains_grad
    y.register_hook(lambda g: g * 10)  # what is kept is what the hooks made of it
    (y * y).sum().backward()
    same(y.grad, [40, 80])
    same(x.grad, [80, 160])
    x.retain_grad()
    with pytest.raises(GradientError):
        flame.ones(1).retain_grad()


def test_retain_grad_keeps_nothing_alive() -> None:
    gc.disable()
    try:
        x = leaf(1, 2)
        y = x * 2
        y.retain_grad()
        dead = weakref.ref(y)
        del y
        assert dead() is None
    finally:
        gc.enable()
