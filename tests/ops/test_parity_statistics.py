"""Extrema, variance, products, norms and log-sum-exp against PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import flame
from flame.core.errors import DTypeError, FlameError, ShapeError, UnsupportedError

from .database import function_of, op_db, run_entry
from .parity import agree, draw, to_flame

pytestmark = [
    pytest.mark.ops,
    pytest.mark.filterwarnings("ignore"),  # of PyTorch's own samples
]

NAMES = [
    "amax",
    "amin",
    "aminmax",
    "argmax",
    "argmin",
    "max",
    "min",
    "any",
    "all",
    "prod",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "logsumexp",
    "norm",
    "linalg.vector_norm",
    "nansum",
    "nanmean",
    "count_nonzero",
]
ENTRIES = [e for e in op_db if e.name in NAMES and e.variant_test_name != "nuc"]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.name}-{e.variant_test_name}")
def test_database(entry: Any) -> None:
    assert function_of(entry) is not None
    tally = run_entry(entry, 16)
    assert not tally.errors, tally.errors[0]


DIMS: list[Any] = [None, 0, 1, -1, (0, 2), (0, 1, 2)]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("keepdim", [False, True])
def test_reductions(dim: Any, keepdim: bool) -> None:
    x = draw(3, 4, 17)
    options = {"dim": dim, "keepdim": keepdim}
    for name in ("var", "std"):
        for correction in (0, 1, 2.5):
            agree(
                lambda t, n=name, c=correction: getattr(flame, n)(t, correction=c, **options),
                lambda t, n=name, c=correction: getattr(torch, n)(t, correction=c, **options),
                x,
            )
    for order in (2, 1, 3, 0.5, float("inf"), float("-inf")):
        agree(
            lambda t, o=order: flame.linalg.vector_norm(t, o, **options),
            lambda t, o=order: torch.linalg.vector_norm(t, o, **options),
            x, second=order != 1,
        )  # fmt: skip
    fixed = x.detach() * (x.detach() > 0)
    agree(lambda t: flame.linalg.vector_norm(t, 0, **options),
          lambda t: torch.linalg.vector_norm(t, 0, **options), fixed)  # fmt: skip
    if dim is not None:
        agree(lambda t: flame.logsumexp(t, dim, keepdim),
              lambda t: torch.logsumexp(t, dim, keepdim), x)  # fmt: skip
        agree(lambda t: flame.amax(t, dim, keepdim), lambda t: torch.amax(t, dim, keepdim), x)
        agree(lambda t: flame.amin(t.permute(2, 0, 1), dim, keepdim),
              lambda t: torch.amin(t.permute(2, 0, 1), dim, keepdim), x)  # fmt: skip


@pytest.mark.parametrize("name", ["max", "min"])
def test_values_and_places(name: str) -> None:
    rows = torch.tensor([[2.0, 5.0, 5.0, 1.0], [float("nan"), 1.0, float("nan"), 9.0], [3.0] * 4])
    for dim, keepdim in itertools.product((0, 1), (False, True)):
        made = getattr(flame, name)(to_flame(rows), dim, keepdim)
        want = getattr(torch, name)(rows, dim, keepdim)
        np.testing.assert_array_equal(made.values.numpy(), want.values.numpy())
        np.testing.assert_array_equal(made.indices.numpy(), want.indices.numpy())
        places = getattr(flame, f"arg{name}")(to_flame(rows), dim, keepdim)
        np.testing.assert_array_equal(places.numpy(), want.indices.numpy())
    x = draw(3, 5)
    agree(
        lambda t: getattr(flame, name)(t, 1).values, lambda t: getattr(torch, name)(t, 1).values, x
    )
    agree(lambda t: getattr(flame, name)(t), lambda t: getattr(torch, name)(t), x)
    agree(lambda t, u: getattr(flame, name)(t, u), lambda t, u: getattr(torch, name)(t, u),
          x, draw(5, seed=2))  # fmt: skip


def test_places_in_the_tensors_own_order() -> None:
    x = draw(4, 5, 6, grad=False)
    for moved, theirs in ((to_flame(x).permute(2, 0, 1), x.permute(2, 0, 1)),
                          (to_flame(x)[:, 1:4, ::2], x[:, 1:4, ::2])):  # fmt: skip
        assert flame.argmax(moved).item() == torch.argmax(theirs).item()
        assert flame.argmin(moved).item() == torch.argmin(theirs).item()


def test_ties_share_the_gradient_of_the_extremum() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]], dtype=torch.float64, requires_grad=True)
    agree(lambda t: flame.amax(t, 1), lambda t: torch.amax(t, 1), x, second=False)
    agree(lambda t: flame.max(t), lambda t: torch.max(t), x, second=False)
    agree(lambda t: flame.max(t, 1).values, lambda t: torch.max(t, 1).values, x, second=False)


@pytest.mark.parametrize("zeros", [[], [(0, 1)], [(0, 1), (0, 3)], [(0, 0), (1, 2), (2, 1)]])
def test_products_with_zeros(zeros: list[tuple[int, int]]) -> None:
    x = draw(3, 5).detach()
    for place in zeros:
        x[place] = 0.0
    x.requires_grad_()
    agree(lambda t: flame.prod(t, 1), lambda t: torch.prod(t, 1), x)
    agree(lambda t: flame.prod(t, 0, keepdim=True), lambda t: torch.prod(t, 0, keepdim=True), x)
    agree(lambda t: flame.prod(t), lambda t: torch.prod(t), x)


def test_norms_and_deviations_at_zero() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    for order in (2, 3, 1.5):
        agree(lambda t, o=order: flame.norm(t, o, 1), lambda t, o=order: torch.norm(t, o, 1),
              x, second=False)  # fmt: skip
    agree(lambda t: flame.std(t, 1), lambda t: torch.std(t, 1), x, second=False)


def test_log_sum_exp_at_infinity() -> None:
    inf = float("inf")
    rows = torch.tensor([[-inf, -inf], [inf, 0.0], [inf, -inf], [-inf, 1.0], [1e4, 1e4]])
    made = flame.logsumexp(to_flame(rows), 1).numpy()
    np.testing.assert_allclose(made, torch.logsumexp(rows, 1).numpy(), rtol=1e-6)


def test_variance_of_much_with_a_large_mean() -> None:
    x = (np.random.default_rng(0).standard_normal(200_000) + 1000).astype(np.float32)
    for shape in ((200_000,), (2, 100_000), (100, 2000)):
        made = flame.from_numpy(x.reshape(shape))
        want = x.astype(np.float64).reshape(shape)
        np.testing.assert_allclose(flame.var(made, -1).numpy(), want.var(-1, ddof=1), rtol=1e-4)
        np.testing.assert_allclose(flame.std(made).item(), want.std(ddof=1), rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: flame.amax(x[:0], 0), ShapeError),
        (lambda x: flame.argmax(x[:0], 0), ShapeError),
        (lambda x: flame.max(x[:0]), ShapeError),
        (lambda x: flame.amax(x, 2), FlameError),
        (lambda x: flame.argmax(x > 0), DTypeError),
        (lambda x: flame.var(x.to(flame.int64)), DTypeError),
        (lambda x: flame.var(x, 0, unbiased=True, correction=1), FlameError),
        (lambda x: flame.norm(x, "nuc"), UnsupportedError),
        (lambda x: flame.linalg.matrix_norm(x, 2), UnsupportedError),
        (lambda x: flame.norm(x.to(flame.int64)), DTypeError),
    ],
)
def test_wrong_input(call: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        call(flame.ones((2, 3)))
