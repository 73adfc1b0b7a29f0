"""Losses and attention against PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as T

import flame
from flame.core.errors import (
    ArgumentError,
    DTypeError,
    IndexRangeError,
    ShapeError,
    UnsupportedError,
)
from flame.nn import functional as F

from .database import function_of, op_db, run_entry
from .parity import agree, draw, to_flame

pytestmark = [
    pytest.mark.ops,
    pytest.mark.filterwarnings("ignore"),  # of PyTorch's own samples
]

NAMES = [
    "nn.functional.cross_entropy",
    "nn.functional.nll_loss",
    "nn.functional.mse_loss",
    "nn.functional.l1_loss",
    "nn.functional.smooth_l1_loss",
    "nn.functional.huber_loss",
    "nn.functional.binary_cross_entropy",
    "nn.functional.binary_cross_entropy_with_logits",
    "nn.functional.kl_div",
    "nn.functional.gaussian_nll_loss",
    "nn.functional.poisson_nll_loss",
    "nn.functional.cosine_similarity",
    "nn.functional.cosine_embedding_loss",
    "nn.functional.margin_ranking_loss",
    "nn.functional.hinge_embedding_loss",
    "nn.functional.soft_margin_loss",
    "nn.functional.multilabel_soft_margin_loss",
    "nn.functional.pairwise_distance",
    "nn.functional.triplet_margin_loss",
]
ENTRIES = [e for e in op_db if e.name in NAMES]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.name}-{e.variant_test_name}")
def test_database(entry: Any) -> None:
    assert function_of(entry) is not None
    tally = run_entry(entry, 10)
    assert not tally.errors, tally.errors[0]


SHAPES = [(7, 5), (3, 5, 4), (2, 5, 3, 2), (5,)]


def targets(shape: tuple[int, ...]) -> torch.Tensor:
    rows = (shape[0], *shape[2:]) if len(shape) > 1 else ()
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 5, rows, generator=generator)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_and_nll(shape: tuple[int, ...], reduction: str) -> None:
    target = targets(shape)
    mine = to_flame(target)
    weight = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)
    for w, ignore, smoothing in itertools.product((None, weight), (-100, 2), (0.0, 0.2)):
        options = {"ignore_index": ignore, "reduction": reduction}
        agree(
            lambda x, w=w, s=smoothing, o=options: F.cross_entropy(
                x, mine, None if w is None else to_flame(w), label_smoothing=s, **o
            ),
            lambda x, w=w, s=smoothing, o=options: T.cross_entropy(
                x, target, w, label_smoothing=s, **o
            ),
            draw(*shape),
        )
        agree(
            lambda x, w=w, o=options: F.nll_loss(x, mine, None if w is None else to_flame(w), **o),
            lambda x, w=w, o=options: T.nll_loss(x, target, w, **o),
            draw(*shape),
        )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_with_probabilities(reduction: str) -> None:
    for shape, smoothing in itertools.product(SHAPES, (0.0, 0.3)):
        dim = 1 if len(shape) > 1 else 0
        target = torch.softmax(draw(*shape, seed=3, grad=False), dim).requires_grad_()
        options = {"reduction": reduction, "label_smoothing": smoothing}
        weight = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)
        agree(
            lambda x, t, w, o=options: F.cross_entropy(x, t, w, **o),
            lambda x, t, w, o=options: T.cross_entropy(x, t, w, **o),
            draw(*shape), target, weight,
        )  # fmt: skip


def test_cross_entropy_of_channels_last_scores() -> None:
    target = targets((2, 5, 3, 2))
    agree(
        lambda x: F.cross_entropy(x.permute(0, 3, 1, 2), to_flame(target)),
        lambda x: T.cross_entropy(x.permute(0, 3, 1, 2), target),
        draw(2, 3, 2, 5),
    )


def test_cross_entropy_where_every_target_is_ignored() -> None:
    made = F.cross_entropy(flame.ones((3, 4)), flame.full((3,), -100, dtype=flame.int64))
    assert np.isnan(made.item())


def test_cross_entropy_of_large_scores() -> None:
    x = torch.tensor([[1e4, -1e4, 0.0]])
    for target in (torch.tensor([0]), torch.tensor([1])):
        got = F.cross_entropy(to_flame(x), to_flame(target)).item()
        assert got == T.cross_entropy(x, target).item()


def _many(name: str, *operands: Any, **options: Any) -> None:
    agree(
        lambda *a: getattr(F, name)(*a, **options),
        lambda *a: getattr(T, name)(*a, **options),
        *operands,
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_pointwise_losses(reduction: str) -> None:
    x, y = draw(4, 6), draw(4, 6, seed=1)
    for name, options in (
        ("mse_loss", {}), ("smooth_l1_loss", {"beta": 0.7}), ("huber_loss", {"delta": 0.6}),
    ):  # fmt: skip
        _many(name, x, y, reduction=reduction, **options)
    agree(lambda a, b: F.l1_loss(a, b, reduction=reduction),
          lambda a, b: T.l1_loss(a, b, reduction=reduction), x, y, second=False)  # fmt: skip
    p = torch.sigmoid(x.detach()).requires_grad_()
    t = torch.sigmoid(y.detach()).requires_grad_()
    weight = draw(6, seed=2, grad=False).abs()
    fixed = t.detach()
    agree(
        lambda a, b, w: F.binary_cross_entropy(a, b, w, reduction=reduction),
        lambda a, b, w: T.binary_cross_entropy(a, b, w, reduction=reduction),
        p, fixed, weight,
    )  # fmt: skip
    agree(
        lambda a, b, w, q: F.binary_cross_entropy_with_logits(
            a, b, w, reduction=reduction, pos_weight=q),
        lambda a, b, w, q: T.binary_cross_entropy_with_logits(
            a, b, w, reduction=reduction, pos_weight=q),
        x, t, weight, weight + 0.5,
    )  # fmt: skip
    _many("kl_div", x, t, reduction=reduction)
    _many("kl_div", x, y, reduction=reduction, log_target=True)


def test_weighted_means_divide_by_the_weights() -> None:
    x, y, w = draw(4, 6), draw(4, 6, seed=1), draw(4, 6, seed=2, grad=False).abs()
    for name in ("mse_loss", "huber_loss"):
        agree(lambda a, b, c, n=name: getattr(F, n)(a, b, weight=c),
              lambda a, b, c, n=name: getattr(T, n)(a, b, weight=c), x, y, w)  # fmt: skip


def test_logits_of_any_size() -> None:
    x = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0])
    t = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0])
    got = F.binary_cross_entropy_with_logits(to_flame(x), to_flame(t), reduction="none").numpy()
    want = T.binary_cross_entropy_with_logits(x, t, reduction="none").numpy()
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda x: F.cross_entropy(x, flame.tensor([0, 4])),
            IndexRangeError,
            "target 4.*3 classes",
        ),
        (lambda x: F.nll_loss(x, flame.tensor([-1, 0])), IndexRangeError, "target -1"),
        (lambda x: F.cross_entropy(x, flame.tensor([0.0, float("nan")])), DTypeError, "int64"),
        (lambda x: F.cross_entropy(x, flame.tensor([0, 1, 2])), ShapeError, r"\(2,\)"),
        (
            lambda x: F.cross_entropy(x, flame.tensor([0, 1]), flame.ones((2,))),
            ShapeError,
            "3 classes",
        ),
        (lambda x: F.cross_entropy(x, x, reduction="median"), ArgumentError, "none, mean or sum"),
        (lambda x: F.cross_entropy(x, x, ignore_index=1), ArgumentError, "ignore_index"),
        (lambda x: F.cross_entropy(x, x, label_smoothing=1.5), ArgumentError, "label_smoothing"),
        (lambda x: F.binary_cross_entropy(x, x[:1]), ShapeError, "target"),
        (lambda x: F.mse_loss(x, flame.ones((4, 2))), ShapeError, "broadcast"),
        (lambda x: F.huber_loss(x, x, delta=0.0), ArgumentError, "delta"),
    ],
)
def test_wrong_input(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(flame.ones((2, 3)))


# --- attention ------------------------------------------------------------------------------------


def attention_operands(heads: int = 4) -> list[torch.Tensor]:
    return [draw(2, 4, 5, 8), draw(2, heads, 6, 8, seed=1), draw(2, heads, 6, 3, seed=2)]


def masks() -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    allowed = torch.rand(5, 6, generator=generator) < 0.7
    allowed[:, 0] = True
    return {
        "none": None, "bool": allowed, "float": draw(5, 6, seed=5, grad=False),
        "heads": draw(2, 4, 5, 6, seed=6, grad=False), "keys": draw(2, 1, 1, 6, seed=7, grad=False),
    }  # fmt: skip


@pytest.mark.parametrize("mask", ["none", "bool", "float", "heads", "keys"])
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_attention(mask: str, heads: int) -> None:
    given = masks()[mask]
    options: dict[str, Any] = {"enable_gqa": heads < 4, "scale": 0.4}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        agree(
            lambda *a: F.scaled_dot_product_attention(*a, **options),
            lambda *a: T.scaled_dot_product_attention(*a, **options),
            *attention_operands(heads), given,
        )  # fmt: skip


def test_causal_attention() -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        agree(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            lambda q, k, v: T.scaled_dot_product_attention(q, k, v, is_causal=True),
            *attention_operands(),
        )


def test_linear_cross_entropy() -> None:
    target = torch.tensor([[1, 0], [4, 4], [2, -100]])
    agree(
        lambda x, w, b: F.linear_cross_entropy(x, w, to_flame(target), linear_bias=b),
        lambda x, w, b: T.linear_cross_entropy(x, w, target, linear_bias=b),
        draw(3, 4), draw(5, 2, 4, seed=1), draw(5, 2, seed=2),
    )  # fmt: skip
    x, w = to_flame(draw(3, 4)), to_flame(draw(5, 4, seed=1))
    with pytest.raises(UnsupportedError, match=r"flame\.compile"):
        F.linear_cross_entropy(x, w, flame.zeros(3, dtype=flame.int64), options=object())  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"input must be \(N, in\)"):
        F.linear_cross_entropy(x[None], w, flame.zeros(1, 3, dtype=flame.int64))
    with pytest.raises(ShapeError, match=r"linear_bias must be \(5,\)"):
        F.linear_cross_entropy(x, w, flame.zeros(3, dtype=flame.int64), linear_bias=w[:, :1])
    with pytest.raises(ShapeError, match=r"\(C, in\)"):
        F.linear_cross_entropy(x, w[0], flame.zeros(3, dtype=flame.int64))


def test_gradient_of_a_floating_mask() -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        agree(F.scaled_dot_product_attention, T.scaled_dot_product_attention,
              *attention_operands(), draw(5, 6, seed=5))  # fmt: skip


def test_attention_of_a_masked_row_is_zero() -> None:
    q, k, v = (to_flame(x) for x in attention_operands())
    allowed = flame.tensor([[True] * 6, [False] * 6] + [[True] * 6] * 3)
    made = F.scaled_dot_product_attention(q, k, v, allowed)
    made.sum().backward()
    assert not made.detach().numpy()[:, :, 1].any()
    assert np.isfinite(q.grad.numpy()).all()
    assert not q.grad.numpy()[:, :, 1].any()


def test_attention_refuses() -> None:
    q, k, v = (to_flame(x.detach()) for x in attention_operands())
    with pytest.raises(ShapeError, match="width"):
        F.scaled_dot_product_attention(q, k[..., :4], v)
    with pytest.raises(DTypeError):
        F.scaled_dot_product_attention(q, k.to(flame.float32), v)
    with pytest.raises(ShapeError, match="broadcast"):
        F.scaled_dot_product_attention(q, k, v, flame.ones((3, 6)))
    with pytest.raises(DTypeError, match="bool or floating"):
        F.scaled_dot_product_attention(q, k, v, flame.ones((5, 6), dtype=flame.int64))
