"""backward and grad: accumulation, what a graph keeps, which gradients are asked for."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import flame
import flame.nn.functional
from flame.autograd import grad
from flame.core.errors import ArgumentError, DTypeError, GradientError, ShapeError
from flame.testing import gradcheck


def leaf(*values: float, dtype: Any = flame.float64) -> flame.Tensor:
    return flame.tensor(list(values), dtype=dtype, requires_grad=True)


def same(tensor: flame.Tensor | None, values: Any) -> None:
    assert tensor is not None
    np.testing.assert_allclose(tensor.detach().numpy(), values)


def test_gradients_accumulate_into_leaves() -> None:
    x = leaf(1, 2)
    (x * x).sum().backward()
    same(x.grad, [2, 4])
    first = x.grad
    (x * 3).sum().backward()
    assert x.grad is first  # added to in place
    same(x.grad, [5, 7])


def test_paths_that_meet_are_summed() -> None:
    x = leaf(2, 3)
    y = x * x
    (y * y + y + x).sum().backward()
    same(x.grad, [4 * 8 + 4 + 1, 4 * 27 + 6 + 1])


def test_a_leaf_used_many_times() -> None:
    x = leaf(3)
    total = x * 0
    for _ in range(20):
        total = total + x * x
    total.backward()
    same(x.grad, [120])


def test_two_leaves_do_not_share_their_gradient() -> None:
    a, b = leaf(1, 2), leaf(3, 4)
    (a + b).sum().backward()
    assert a.grad is not None
    a.grad.mul_(10)
    same(b.grad, [1, 1])


def test_the_given_gradient_is_not_taken_over() -> None:
    x = leaf(1, 2)
    g = flame.tensor([5.0, 6.0], dtype=flame.float64)
    x.clone().backward(g)
    (x + 0).backward(g)
    same(g, [5, 6])
    same(x.grad, [10, 12])
    y = leaf(1, 2)
    y.backward(g)
    assert y.grad is not None
    y.grad.zero_()
    same(g, [5, 6])


def test_broadcast_gradients_have_the_shape_of_their_tensor() -> None:
    x = flame.ones(3, 1, requires_grad=True)
    y = flame.ones(1, 4, requires_grad=True)
    s = flame.tensor(2.0, requires_grad=True)
    (x * y * s).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (3, 1)
    same(x.grad, np.full((3, 1), 8.0))
    same(y.grad, np.full((1, 4), 6.0))
    same(s.grad, 12.0)


def test_gradients_have_the_dtype_of_their_tensor() -> None:
    x = flame.ones(3, dtype=flame.float32, requires_grad=True)
    w = flame.ones(3, dtype=flame.float64, requires_grad=True)
    h = flame.ones(3, dtype=flame.bfloat16, requires_grad=True)
    (x * w * h).sum().backward()
    for tensor in (x, w, h):
        assert tensor.grad is not None
        assert tensor.grad.dtype is tensor.dtype


def test_gradients_can_be_read_changed_and_replaced() -> None:
    x = leaf(1, 2)
    (x * x).sum().backward()
    assert x.grad is not None
    x.grad *= 0.5
    same(x.grad, [1, 2])
    x.grad[0] = 7
    same(x.grad, [7, 2])
    x.grad = flame.zeros(2, dtype=flame.float64)
    x.sum().backward()
    same(x.grad, [1, 1])
    x.grad = None
    x.sum().backward()
    same(x.grad, [1, 1])


@pytest.mark.parametrize(
    ("value", "error"),
    [("text", DTypeError), (3, DTypeError), (flame.zeros(3), GradientError),
     (flame.zeros(2), GradientError)],
)  # fmt: skip
def test_an_assigned_gradient_must_fit(value: Any, error: type[Exception]) -> None:
    x = leaf(1, 2)
    with pytest.raises(error):
        x.grad = value
    assert x.grad is None


def test_backward_of_a_leaf_itself() -> None:
    x = flame.tensor(3.0, requires_grad=True)
    x.backward()
    same(x.grad, 1)


def test_a_scalar_is_needed_without_a_gradient() -> None:
    x = leaf(1, 2)
    with pytest.raises(GradientError, match=r"shape \(2,\)"):
        (x * 2).backward()


def test_the_gradient_must_have_the_shape() -> None:
    x = leaf(1, 2)
    with pytest.raises(ShapeError):
        (x * 2).backward(flame.ones(3, dtype=flame.float64))
    with pytest.raises(DTypeError):
        (x * 2).backward([1.0, 2.0])  # type: ignore[arg-type]  # on purpose


def test_a_gradient_of_another_dtype_is_converted() -> None:
    x = flame.ones(2, requires_grad=True)
    (x * 2).backward(flame.ones(2, dtype=flame.float64))
    assert x.grad is not None
    assert x.grad.dtype is flame.float32


def test_backward_without_history() -> None:
    with pytest.raises(GradientError, match="requires_grad"):
        flame.ones(1).sum().backward()
    x = leaf(1)
    with flame.no_grad():
        y = (x * 2).sum()
    with pytest.raises(GradientError, match="no_grad"):
        y.backward()


def test_backward_twice() -> None:
    x = leaf(1, 2)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(GradientError, match="retain_graph"):
        y.backward()
    same(x.grad, [2, 4])


def test_a_graph_that_keeps_nothing_can_be_gone_through_again() -> None:
    x = leaf(1, 2)
    y = (x + 1).sum()
    y.backward()
    y.backward()
    same(x.grad, [2, 2])


def test_retain_graph() -> None:
    x = leaf(1, 2)
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    same(x.grad, [4, 8])
    with pytest.raises(GradientError):
        y.backward()


def test_create_graph_gives_higher_orders() -> None:
    x = leaf(2)
    y = x**4
    for order, value in enumerate([32.0, 48.0, 48.0, 24.0]):
        (y,) = grad(y, x, create_graph=True)
        same(y, [value])
        assert y.requires_grad == (order < 3)


def test_create_graph_in_backward() -> None:
    x = leaf(1, 3)
    (x**3).sum().backward(create_graph=True)
    assert x.grad is not None
    assert x.grad.requires_grad
    first = x.grad
    x.grad = None
    (first**2).sum().backward()
    same(x.grad, [2 * 3 * 6, 2 * 27 * 18])


def test_double_backward_through_composites_and_fused_ops() -> None:
    rng = np.random.default_rng(0)
    x = flame.from_numpy(rng.standard_normal((3, 4)))
    w = flame.from_numpy(rng.standard_normal((4, 4)))

    def function(x: Any, w: Any) -> Any:
        hidden = flame.nn.functional.layer_norm(x @ w, (4,))
        hidden = flame.nn.functional.gelu(hidden) * flame.sigmoid(x)
        return flame.log_softmax(hidden, 1)

    assert gradcheck(function, [x, w])


def test_gradient_penalty() -> None:
    x = leaf(0.5, -0.3)
    w = leaf(1.0, 2.0)
    y = flame.tanh(x * w).sum()
    (g,) = grad(y, x, create_graph=True)
    ((g * g).sum()).backward()

    def penalty(v: Any, u: Any) -> Any:
        return np.sum((u * (1 - np.tanh(v * u) ** 2)) ** 2)

    base, step = np.array([1.0, 2.0]), 1e-6
    for i in range(2):
        moved = [base.copy(), base.copy()]
        moved[0][i] += step
        moved[1][i] -= step
        point = np.array([0.5, -0.3])
        numeric = (penalty(point, moved[0]) - penalty(point, moved[1])) / (2 * step)
        assert w.grad is not None
        np.testing.assert_allclose(w.grad[i].item(), numeric, rtol=1e-5)


# --- grad -----------------------------------------------------------------------------------------


def test_grad_leaves_every_grad_alone() -> None:
    x, w = leaf(1, 2), leaf(3, 4)
    (g,) = grad((x * w).sum(), x)
    same(g, [3, 4])
    assert x.grad is None
    assert w.grad is None


def test_grad_of_computed_tensors() -> None:
    x = leaf(1, 2)
    y = x * 3
    z = (y * y).sum()
    gy, gx, gz = grad(z, [y, x, z])
    same(gy, [6, 12])
    same(gx, [18, 36])
    same(gz, 1)


def test_grad_with_weights_and_several_outputs() -> None:
    x = leaf(1, 2)
    g = flame.tensor([1.0, 10.0], dtype=flame.float64)
    (found,) = grad([x * x, x.sum()], [x], grad_outputs=[g, None])
    same(found, [3, 41])
    with pytest.raises(ArgumentError):
        grad([x * x, x.sum()], [x], grad_outputs=[g])


def test_unused_inputs() -> None:
    x, unused = leaf(1, 2), leaf(5)
    y = (x * x).sum()
    with pytest.raises(GradientError, match="input 1"):
        grad(y, [x, unused], retain_graph=True)
    found = grad(y, [x, unused], allow_unused=True, retain_graph=True)
    assert found[1] is None
    found = grad(y, [x, unused], materialize_grads=True)
    same(found[1], [0])


def test_grad_of_what_requires_none() -> None:
    x = leaf(1)
    with pytest.raises(GradientError, match="does not require grad"):
        grad(x.sum(), flame.ones(1))


def test_grad_goes_through_what_leads_to_the_inputs_only() -> None:
    x, w = leaf(1, 2), leaf(3, 4)
    shared = x * 2
    loss = (flame.exp(w) * shared).sum()
    grad(loss, w)
    loss2 = (shared * shared).sum()  # shared was not gone through, so it still can be
    loss2.backward()
    same(x.grad, [8, 16])


def test_backward_into_chosen_inputs() -> None:
    x, w = leaf(1, 2), leaf(3, 4)
    y = x * w
    (y * y).sum().backward(inputs=[w])
    assert x.grad is None
    same(w.grad, [6, 32])
    y = x * w
    (y * y).sum().backward(inputs=y)
    same(y.grad, [6, 16])
    assert x.grad is None
    y = x * w
    (y * y).sum().backward(inputs=[x, y])
    same(y.grad, [6, 16])
    same(x.grad, [18, 64])


def test_an_intermediate_of_another_input() -> None:
    x = leaf(2)
    y = x * x
    z = y * y
    gx, gy = grad(z, [x, y])
    same(gy, [8])
    same(gx, [32])


def test_several_roots() -> None:
    x = leaf(1, 2)
    flame.autograd.backward([x.sum(), (x * x).sum()])
    same(x.grad, [3, 5])


def test_detach_and_requires_grad() -> None:
    x = leaf(1, 2)
    y = x * 2
    d = y.detach()
    assert d.is_leaf
    assert not d.requires_grad
    assert d.data_ptr() == y.data_ptr()
    (d * x).sum().backward()
    same(x.grad, [2, 4])
    with pytest.raises(GradientError):
        y.requires_grad_(False)
    with pytest.raises(GradientError):
        flame.ones(2, dtype=flame.int64).requires_grad_()
    assert y.detach_() is y
    assert y.is_leaf
    assert y.grad_fn is None


def test_grad_fn_and_is_leaf() -> None:
    x = leaf(1)
    assert x.is_leaf
    assert x.grad_fn is None
    y = x * 2
    assert not y.is_leaf
    assert "mul" in repr(y.grad_fn)
    assert y.grad_fn.next_functions[0][0] is x
    assert flame.ones(1).is_leaf


def test_integer_results_carry_no_gradient() -> None:
    x = leaf(3, 1, 2)
    values, indices = x.max(dim=0)
    assert values.requires_grad
    assert not indices.requires_grad
    values.backward()
    same(x.grad, [1, 0, 0])
    assert not (x > 1).requires_grad
    assert not x.argmax().requires_grad


def test_threads_run_backward_at_once() -> None:
    failures: list[BaseException] = []
    x = leaf(*range(1, 51))

    def work() -> None:
        try:
            for _ in range(20):
                own = leaf(1, 2, 3)
                (own * own).sum().backward()
                same(own.grad, [2, 4, 6])
                (g,) = grad((x * x).sum(), x)
                same(g, np.arange(1, 51) * 2)
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_jacobian_and_hvp() -> None:
    x = leaf(1, 2)
    same(flame.autograd.jacobian(lambda v: v * v, x), [[2, 0], [0, 4]])
    (found,) = flame.autograd.hvp(
        lambda v: (v**3).sum(), [x], [flame.tensor([1.0, 10.0], dtype=flame.float64)]
    )
    same(found, [6, 120])


def test_strided_view_of_an_empty_tensor() -> None:
    x = flame.zeros(3, 0, requires_grad=True)
    x.as_strided((2, 0), (1, 1), 0).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (3, 0)
