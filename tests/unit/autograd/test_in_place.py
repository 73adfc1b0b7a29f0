"""In-place changes: of leaves, of computed tensors, through views, and of what backward needs.

Where PyTorch is installed, programs of random in-place writes are compared with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
from flame.core.errors import GradientError, ShapeError


def leaf(values: Any) -> flame.Tensor:
    return flame.tensor(values, dtype=flame.float64, requires_grad=True)


def same(tensor: Any, values: Any) -> None:
    assert tensor is not None
    np.testing.assert_allclose(tensor.detach().numpy(), values)


# --- leaves ---------------------------------------------------------------------------------------


def test_a_leaf_cannot_be_changed_while_recording() -> None:
    x = leaf([1.0, 2.0])
    for change in (
        lambda: x.add_(1), lambda: x.zero_(), lambda: x.mul_(x), lambda: x.copy_(flame.zeros(2)),
        lambda: x.__setitem__(0, 1.0), lambda: x[0].add_(1), lambda: x.view(1, 2).mul_(2),
    ):  # fmt: skip
        with pytest.raises(GradientError, match="leaf"):
            change()
    same(x, [1, 2])
    with flame.no_grad():
        x.add_(1)
        x[0] = 7
    same(x, [7, 3])
    assert x.is_leaf
    assert x.requires_grad


def test_a_plain_leaf_takes_on_the_history_of_what_is_written() -> None:
    w = leaf([1.0, 2.0, 3.0])
    x = flame.zeros(2, 3, dtype=flame.float64)
    x[1] = w * w
    assert x.requires_grad
    assert not x.is_leaf
    (x * 5).sum().backward()
    same(w.grad, [10, 20, 30])


# --- computed tensors -----------------------------------------------------------------------------


def test_in_place_chains() -> None:
    w = leaf([1.0, 2.0])
    y = w * 1
    y.mul_(3).add_(1).div_(2)
    y += w
    y.exp_()
    y.sum().backward()
    same(w.grad, np.exp((3 * np.array([1.0, 2.0]) + 1) / 2 + [1, 2]) * 2.5)


def test_the_overwritten_value_may_be_needed() -> None:
    w, x = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    y = x * 1
    y.mul_(w)
    y.sin_()
    y.sum().backward()
    same(w.grad, np.cos([3, 8]) * [3, 4])
    same(x.grad, np.cos([3, 8]) * [1, 2])


def test_a_change_of_what_backward_needs() -> None:
    w = leaf([1.0, 2.0])
    y = w * 2
    z = y * y
    y.add_(1)
    with pytest.raises(GradientError, match=r"mul needs .* in-place"):
        z.sum().backward()
    a = w.exp()
    a.add_(1)
    with pytest.raises(GradientError, match="exp needs out"):
        a.sum().backward()


def test_a_change_through_another_view_is_noticed() -> None:
    w = leaf([1.0, 2.0])
    y = w * 2
    z = y.sin()
    y[0] = 5
    with pytest.raises(GradientError, match="sin"):
        z.sum().backward()
    d = flame.ones(2, dtype=flame.float64)
    z = w * d
    d.view(2, 1).zero_()
    with pytest.raises(GradientError, match="mul"):
        z.sum().backward()
    d = flame.ones(2, dtype=flame.float64)
    z = w * d
    d.data = flame.zeros(2, dtype=flame.float64)
    with pytest.raises(GradientError, match="mul"):
        z.sum().backward()


def test_a_change_of_what_backward_does_not_need() -> None:
    w = leaf([1.0, 2.0])
    y = w * 2
    z = y + 1
    y.add_(1)
    (z + y).sum().backward()
    same(w.grad, [4, 4])


def test_versions() -> None:
    x = flame.zeros(4)
    v = x[1:]
    assert x._version == 0
    v.add_(1)
    x[0] = 2
    assert x._version == v._version == x.detach()._version == 2


# --- views ----------------------------------------------------------------------------------------


def test_a_write_into_a_view_is_seen_by_the_base() -> None:
    w = leaf([1.0, 2.0, 3.0])
    y = w * w
    y[0].add_(10)
    y[1].mul_(w[2])
    same(y, [11, 12, 9])
    y.sum().backward()
    same(w.grad, [2, 12, 6 + 4])


def test_a_write_into_the_base_is_seen_by_views() -> None:
    w = leaf([1.0, 2.0, 3.0])
    y = w * 2
    v = y[1:]
    y.mul_(w)
    same(v, [8, 18])
    v.sum().backward()
    same(w.grad, [0, 8, 12])


def test_several_views_of_one_base() -> None:
    w = leaf([[1.0, 2.0], [3.0, 4.0]])
    y = w * 1
    row, column, transposed = y[0], y[:, 0], y.t()
    row.mul_(10)
    column.mul_(100)
    same(y, [[1000, 20], [300, 4]])
    same(transposed, [[1000, 300], [20, 4]])
    (transposed * transposed).sum().backward()
    same(w.grad, [[2 * 1000 * 1000, 2 * 20 * 10], [2 * 300 * 100, 8]])


def test_views_of_views() -> None:
    w = leaf(np.arange(24.0).reshape(2, 3, 4).tolist())
    y = w * 1
    y.permute(2, 0, 1)[1:3].flatten(1)[:, ::2].mul_(3)
    expected = np.ones((2, 3, 4))
    part = expected.transpose(2, 0, 1)[1:3]
    for i in range(2):
        for j, (a, b) in enumerate(np.ndindex(2, 3)):
            if j % 2 == 0:
                part[i, a, b] = 3
    y.sum().backward()
    same(w.grad, expected)


def test_item_assignment_has_gradients_to_both() -> None:
    w, v = leaf([1.0, 2.0, 3.0]), leaf([5.0])
    y = w * 2
    y[1] = v * v
    (y * y).sum().backward()
    same(w.grad, [8, 0, 24])
    same(v.grad, [2 * 25 * 10])


def test_item_assignment_by_index_and_mask() -> None:
    w, v = leaf([1.0, 2.0, 3.0]), leaf([5.0, 6.0])
    y = w * 2
    y[flame.tensor([2, 0])] = v
    (y * y).sum().backward()
    same(w.grad, [0, 16, 0])
    same(v.grad, [10, 12])
    w.grad = None
    y = w * 2
    y[y > 3] = 0.0
    (y * y).sum().backward()
    same(w.grad, [8, 0, 0])


def test_overwritten_gradients_do_not_leak() -> None:
    w = leaf([1.0, 2.0])
    y = w * 1
    y[0] = 4.0
    (1 / (y - 4)).sum().backward()  # infinite where it was overwritten
    same(w.grad, [0, -0.25])


def test_copy_with_broadcasting_and_conversion() -> None:
    w = flame.tensor([2.0], requires_grad=True)
    y = flame.zeros(3, dtype=flame.float64)
    y.copy_(w * w)
    y.sum().backward()
    assert w.grad is not None
    assert w.grad.dtype is flame.float32
    same(w.grad, [12])


def test_double_backward_through_writes() -> None:
    x, v = leaf([1.0, 2.0, 3.0]), leaf([5.0])

    def function(x: Any, v: Any) -> Any:
        y = x * x
        y[1] = v * x[0]
        y[1:].mul_(x[2])
        y.add_(y.clone() * v)
        return y

    assert flame.testing.gradcheck(function, [x.detach(), v.detach()])


def test_expanded_tensors_cannot_be_changed() -> None:
    x = flame.zeros(1, 2).expand(3, 2)
    with pytest.raises(ShapeError, match="clone"):
        x.add_(1)
    with pytest.raises(ShapeError):
        flame.zeros(2).add_(flame.ones(3, 2))


def test_operands_that_overlap() -> None:
    x = flame.arange(6.0)
    x[1:].copy_(x[:-1])
    same(x, [0, 0, 1, 2, 3, 4])
    x = flame.arange(9.0).reshape(3, 3)
    x.add_(x.t())
    same(x, np.arange(9.0).reshape(3, 3) + np.arange(9.0).reshape(3, 3).T)


# --- random programs against PyTorch --------------------------------------------------------------


def _program(library: Any, rng: np.random.Generator, x: Any, w: Any) -> Any:
    """In-place writes into views of views, the same in either library."""
    y = x * 1.0
    views = [y]
    for _ in range(8):
        target = views[rng.integers(len(views))]
        choice = rng.integers(8)
        if choice == 0 and target.ndim > 1:
            views.append(target[rng.integers(target.shape[0])])
        elif choice == 1 and target.ndim > 1:
            views.append(target.transpose(0, 1))
        elif choice == 2 and target.ndim:
            views.append(target[::2])
        elif choice == 3 and target.ndim:
            views.append(target.unsqueeze(0))
        elif choice == 4:
            target.mul_(w[0])
        elif choice == 5:
            target.add_(w[1])
        elif choice == 6 and target.ndim and target.shape[0] > 1:
            target[1] = w[2]
        else:
            target.copy_(target.clone().sin() * w[3])
    total = (y * y).sum()
    for view in views:
        total = total + view.sum()
    return total


@pytest.mark.parametrize("seed", range(25))
def test_random_programs_as_pytorch(seed: int) -> None:
    torch = pytest.importorskip("torch")
    start = np.random.default_rng(seed).standard_normal((3, 4))
    weights = np.random.default_rng(seed + 100).standard_normal(4)
    results = []
    for library in (flame, torch):
        x = library.tensor(start.tolist(), dtype=library.float64, requires_grad=True)
        w = library.tensor(weights.tolist(), dtype=library.float64, requires_grad=True)
        total = _program(library, np.random.default_rng(seed), x, w)
        total.backward()
        results.append([total.item(), x.grad.tolist(), None if w.grad is None else w.grad.tolist()])
    for ours, theirs in zip(*results, strict=True):
        if theirs is None:
            assert ours is None
        else:
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
