"""Functions with a forward and a backward of the user's own."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

import flame
from flame.autograd import Function, grad, once_differentiable
from flame.core.errors import DTypeError, GradientError, ShapeError, UnsupportedError


def leaf(*values: float) -> flame.Tensor:
    return flame.tensor(list(values), dtype=flame.float64, requires_grad=True)


def same(tensor: Any, values: Any) -> None:
    assert tensor is not None
    np.testing.assert_allclose(tensor.detach().numpy(), values)


class Exp(Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        out = x.exp()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        (out,) = ctx.saved_tensors
        return g * out


class Scale(Function):
    """Several arguments, some of them no tensors."""

    @staticmethod
    def forward(ctx: Any, x: Any, factor: float, w: Any, *, sign: int = 1) -> Any:
        ctx.save_for_backward(x, w)
        ctx.factor = factor * sign
        return x * w * ctx.factor

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        x, w = ctx.saved_tensors
        first = g * w * ctx.factor if ctx.needs_input_grad[0] else None
        return first, None, g * x * ctx.factor


class Split(Function):
    """Several outputs, one without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        order = x.argsort()
        ctx.mark_non_differentiable(order)
        return x * 2, order, x * 3

    @staticmethod
    def backward(ctx: Any, first: Any, order: Any, second: Any) -> Any:
        return first * 2 + second * 3


def test_forward_and_backward() -> None:
    x = leaf(0, 1)
    y = Exp.apply(x)
    same(y, np.exp([0, 1]))
    assert "Exp" in repr(y.grad_fn)
    y.sum().backward()
    same(x.grad, np.exp([0, 1]))


def test_arguments() -> None:
    x, w = leaf(1, 2), leaf(3, 4)
    Scale.apply(x, 5.0, w, sign=-1).sum().backward()
    same(x.grad, [-15, -20])
    same(w.grad, [-5, -10])
    w.grad = None
    Scale.apply(flame.ones(2, dtype=flame.float64), 5.0, w).sum().backward()
    same(w.grad, [5, 5])


def test_without_recording() -> None:
    assert Exp.apply(flame.zeros(2)).is_leaf
    with flame.no_grad():
        assert Exp.apply(leaf(1)).is_leaf


def test_double_backward() -> None:
    x = leaf(0.5, 1)
    (g,) = grad(Exp.apply(x).sum(), x, create_graph=True)
    (h,) = grad(g.sum(), x, create_graph=True)
    (k,) = grad(h.sum(), x)
    same(k, np.exp([0.5, 1]))
    assert flame.testing.gradcheck(lambda a, b: Scale.apply(a, 2.0, b), [leaf(1, 2), leaf(3, 4)])


def test_several_outputs() -> None:
    x = leaf(2, 1)
    first, order, second = Split.apply(x)
    assert first.requires_grad
    assert not order.requires_grad
    assert order.tolist() == [1, 0]
    second.sum().backward()  # nothing for the first: zeros
    same(x.grad, [3, 3])


def test_gradients_that_are_not_materialized() -> None:
    seen = []

    class Two(Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.set_materialize_grads(False)
            return x * 1, x * 1

        @staticmethod
        def backward(ctx: Any, a: Any, b: Any) -> Any:
            seen.append((a is None, b is None))
            return b

    x = leaf(1)
    Two.apply(x)[1].sum().backward()
    assert seen == [(True, False)]


def test_outputs_that_are_no_tensors() -> None:
    class Counted(Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x * 2, 7, None

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            return g * 2

    x = leaf(1)
    y, seven, nothing = Counted.apply(x)
    assert (seven, nothing) == (7, None)
    y.backward()
    same(x.grad, [2])


def test_setup_context() -> None:
    class Square(Function):
        @staticmethod
        def forward(x: Any) -> Any:
            return x * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            return g * 2 * ctx.saved_tensors[0]

    x = leaf(3)
    Square.apply(x).backward()
    same(x.grad, [6])


def test_the_identity_does_not_take_its_input_over() -> None:
    class Reverse(Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            return -g

    x = leaf(1)
    y = Reverse.apply(x)
    assert y is not x
    assert x.is_leaf
    y.backward()
    same(x.grad, [-1])


def test_changes_in_place() -> None:
    class Double(Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.mark_dirty(x)
            return x.mul_(2)

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            return g * 2

    x = leaf(1, 2)
    y = x * 3
    assert Double.apply(y) is y
    same(y, [6, 12])
    Double.apply(y[0])
    same(y, [12, 12])
    y.sum().backward()
    same(x.grad, [12, 6])
    with pytest.raises(GradientError, match="leaf"):
        Double.apply(x)


def test_wrong_results_of_backward() -> None:
    def broken(result: Any) -> Any:
        class Broken(Function):
            @staticmethod
            def forward(ctx: Any, x: Any, y: Any) -> Any:
                return x * y

            @staticmethod
            def backward(ctx: Any, g: Any) -> Any:
                return result(g)

        return Broken.apply(leaf(1, 2), leaf(3, 4)).sum()

    with pytest.raises(GradientError, match="1 gradients for 2 inputs"):
        broken(lambda g: g).backward()
    with pytest.raises(GradientError, match="3 gradients for 2 inputs"):
        broken(lambda g: (g, g, g)).backward()
    broken(lambda g: (g, g, None)).backward()
    with pytest.raises(ShapeError, match=r"\(2,\)"):
        broken(lambda g: (g[:1], g)).backward()
    with pytest.raises(DTypeError, match="float"):
        broken(lambda g: (1.0, g)).backward()


def test_missing_methods() -> None:
    class Empty(Function):
        pass

    with pytest.raises(UnsupportedError, match="forward"):
        Empty.apply(leaf(1))


def test_saved_tensors_are_guarded() -> None:
    class Square(Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.save_for_backward(x, None)
            return x * x

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            x, nothing = ctx.saved_tensors
            assert nothing is None
            return g * 2 * x

    x = leaf(1)
    y = x * 1
    z = Square.apply(y)
    y.add_(1)
    with pytest.raises(GradientError, match="Square needs"):
        z.backward()
    z = Square.apply(x)
    z.backward()
    with pytest.raises(GradientError, match="retain_graph"):
        z.backward()

    class Careless(Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.save_for_backward(3)
            return x

    with pytest.raises(DTypeError, match="int"):
        Careless.apply(x)


def test_once_differentiable() -> None:
    class Cube(Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, g: Any) -> Any:
            (x,) = ctx.saved_tensors
            assert not flame.is_grad_enabled()
            return g * 3 * x * x

    x = leaf(2)
    weight = leaf(1)
    Cube.apply(x).backward()
    same(x.grad, [12])
    (g,) = grad((Cube.apply(x) * weight).sum(), x, create_graph=True)
    same(g, [12])
    with pytest.raises(GradientError, match="once_differentiable"):
        g.sum().backward()


def test_no_reference_cycles() -> None:
    gc.disable()
    try:
        x = leaf(1, 2)
        y = Exp.apply(x)
        dead = weakref.ref(y.grad_fn)
        y.sum().backward()
        del y
        assert dead() is None
    finally:
        gc.enable()
