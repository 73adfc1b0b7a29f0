"""Fused attention: against PyTorch, in every layout, and where softmax is at its limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import flame
from flame.core.errors import DTypeError, ShapeError
from flame.nn.functional import scaled_dot_product_attention
from flame.ops.attention.operation import attention, attention_backward
from flame.tensor import Tensor

Arrays = tuple[np.ndarray, ...]


def operands(query: tuple[int, ...], keys: int, width: int = 0, heads: int = 0) -> Arrays:
    """Query, key, value and the result's gradient as float32."""
    rng = np.random.default_rng(0)
    outer = (*query[:-3], heads or query[-3])
    shapes = (
        query, (*outer, keys, query[-1]), (*outer, keys, width or query[-1]),
        (*query[:-1], width or query[-1]),
    )  # fmt: skip
    return tuple(rng.standard_normal(s).astype(np.float32) for s in shapes)


def ours(arrays: Arrays, mask: Any = None, dtype: Any = None, **options: Any) -> list[Tensor]:
    """Result and gradients."""
    given = [flame.from_numpy(a.copy()).to(dtype or flame.float32) for a in arrays]
    leaves = [t.detach().requires_grad_() for t in given[:3]]
    known = None if mask is None else flame.from_numpy(mask.copy())
    made = scaled_dot_product_attention(*leaves, known, **options)
    made.backward(given[3])
    return [made.detach(), *(leaf.grad for leaf in leaves)]


def theirs(arrays: Arrays, mask: Any = None, dtype: Any = None, **options: Any) -> list[Any]:
    given = [torch.from_numpy(a.copy()).to(dtype or torch.float64) for a in arrays]
    leaves = [t.detach().requires_grad_() for t in given[:3]]
    known = None if mask is None else torch.from_numpy(mask.copy())
    if known is not None and known.dtype != torch.bool:
        known = known.to(given[0].dtype)
    with sdpa_kernel(SDPBackend.MATH):
        made = torch.nn.functional.scaled_dot_product_attention(*leaves, known, **options)
    made.backward(given[3])
    return [made.detach(), *(leaf.grad for leaf in leaves)]


def agree(arrays: Arrays, mask: Any = None, tolerance: float = 2e-5, **options: Any) -> None:
    found, wanted = ours(arrays, mask, **options), theirs(arrays, mask, **options)
    for name, a, b in zip(("result", "query", "key", "value"), found, wanted, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), tolerance, tolerance, err_msg=name)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("length", "keys", "width"),
    [
        (1, 1, 1), (3, 70, 5), (70, 3, 33), (130, 130, 16), (65, 200, 80), (200, 65, 128),
        (64, 64, 7),
    ],
)  # fmt: skip
def test_equals_pytorch(length: int, keys: int, width: int, *, causal: bool) -> None:
    agree(operands((2, 3, length, width), keys), is_causal=causal)


def test_widths_of_values_differ() -> None:
    agree(operands((2, 2, 20, 8), 30, width=100))
    agree(operands((2, 2, 20, 100), 30, width=3), scale=-0.3)


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_grouped_heads(heads: int) -> None:
    agree(operands((2, 4, 33, 8), 40, heads=heads), is_causal=True, enable_gqa=heads < 4)


def masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    some = rng.random((70, 90)) < 0.7
    some[:, 0] = True
    numbers = rng.standard_normal((2, 3, 70, 90)).astype(np.float32)
    return {
        "bool": some,
        "keys": rng.random((2, 1, 1, 90)) < 0.6,
        "float": numbers[0, 0],
        "heads": numbers,
        "turned": np.ascontiguousarray(numbers.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2),
        "infinite": np.where(some, 0.0, -np.inf).astype(np.float32),
        "queries": numbers[:, :1, :, :1],
        "column": numbers[0, 0, 0],
    }


@pytest.mark.parametrize("name", masks())
def test_masks(name: str) -> None:
    agree(operands((2, 3, 70, 24), 90), masks()[name])


def test_a_mask_and_the_order_of_time() -> None:
    allowed = masks()["bool"]
    arrays = operands((2, 3, 70, 24), 90)
    both = allowed & np.tril(np.ones((70, 90), bool))
    found = ours(arrays, allowed, is_causal=True)
    for a, b in zip(found, theirs(arrays, both), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), 2e-5, 2e-5)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_width(name: str) -> None:
    arrays = operands((2, 3, 70, 32), 90)
    found = ours(arrays, dtype=getattr(flame, name))
    rounded = tuple(torch.from_numpy(a).to(getattr(torch, name)).double().numpy() for a in arrays)
    tolerance = 2e-2 if name == "bfloat16" else 3e-3
    for a, b in zip(found, theirs(rounded), strict=True):
        assert a.dtype is getattr(flame, name)
        np.testing.assert_allclose(a.to(flame.float64).numpy(), b.numpy(), tolerance, tolerance)


def test_double_precision() -> None:
    arrays = tuple(a.astype(np.float64) for a in operands((2, 2, 40, 12), 50))
    found = ours(arrays, dtype=flame.float64, is_causal=True)
    for a, b in zip(found, theirs(arrays, is_causal=True), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), 1e-12, 1e-12)


# --- limits of softmax ----------------------------------------------------------------------------


def test_great_scores_do_not_overflow() -> None:
    query, key, value, grad = operands((1, 2, 70, 16), 70)
    agree((query * 100, key * 100, value, grad), tolerance=1e-2)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masked_rows_are_zero(kind: str) -> None:
    allowed = np.ones((70, 90), bool)
    allowed[5] = allowed[69] = False
    mask = allowed if kind == "bool" else np.where(allowed, 0, -np.inf).astype(np.float32)
    result, query, key, value = ours(operands((2, 3, 70, 24), 90), mask)
    for t in (result, query, key, value):
        assert np.isfinite(t.numpy()).all()
    for t in (result, query):
        assert not t.numpy()[:, :, [5, 69]].any()
        assert t.numpy()[:, :, 6].any()


def test_nan_stays_where_it_came_in() -> None:
    arrays = operands((1, 2, 70, 24), 70)
    arrays[0][0, 1, 3] = math.nan
    made = ours(arrays, is_causal=True)[0].numpy()
    assert np.isnan(made[0, 1, 3]).all()
    assert np.isnan(made).sum() == 24


def test_no_keys_give_zeros() -> None:
    result, query, _, _ = ours(operands((2, 3, 4, 8), 0))
    assert not result.numpy().any()
    assert not query.numpy().any()


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    result, query, key, _ = ours(operands(shape, 5))
    assert result.shape == query.shape == shape
    assert not key.numpy().any()


# --- layouts --------------------------------------------------------------------------------------


def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    def rebuilt(order: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        back = tuple(np.argsort(order).tolist())
        return lambda t: t.permute(*order).contiguous().permute(*back)

    return {
        "heads inside": rebuilt((0, 2, 1, 3)),
        "positions inside": rebuilt((0, 1, 3, 2)),
        "batch inside": rebuilt((3, 2, 1, 0)),
        "spread": lambda t: flame.stack([t, t], -1)[..., 0],
    }


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts_change_nothing(name: str, dtype: str) -> None:
    arrays = operands((2, 3, 70, 24), 90, width=17)
    given = [flame.from_numpy(a).to(getattr(flame, dtype)) for a in arrays]
    results = []
    for lay in (lambda t: t, layouts()[name]):
        leaves = [lay(t).detach().requires_grad_() for t in given[:3]]
        made = scaled_dot_product_attention(*leaves, is_causal=True)
        made.backward(lay(given[3]))
        results.append([made.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(
            a.to(flame.float32).numpy(), b.to(flame.float32).numpy()
        )  # fmt: skip


def test_results_lie_as_their_operands() -> None:
    """Heads that are a view of (B, T, 3, H, E) give a result and gradients that are too."""
    packed = flame.randn(2, 70, 3, 4, 8)
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    made, log_sum = attention(
        query, key, value, None, None, None, causal=True, scale=1.0, dropout=0.0
    )
    assert made.transpose(1, 2).type.contiguous
    grads = attention_backward(
        made, flame.zeros(log_sum.shape), query, key, value, None, made, log_sum,
        None, None, causal=True, scale=1.0, dropout=0.0,
    )  # fmt: skip
    assert all(g.transpose(1, 2).type.contiguous for g in grads)


def test_log_sum_is_a_result() -> None:
    """It may be used, and differentiated."""
    query, key, value = (flame.randn(2, 5, 4).requires_grad_() for _ in range(3))
    _, log_sum = attention(
        query, key, value, None, None, None, causal=False, scale=0.5, dropout=0.0
    )
    (grad,) = flame.autograd.grad(log_sum.sum(), [query])
    scores = (query * 0.5) @ key.transpose(-2, -1)
    (wanted,) = flame.autograd.grad(flame.logsumexp(scores, -1).sum(), [query])
    np.testing.assert_allclose(grad.numpy(), wanted.numpy(), 1e-5, 1e-5)


# --- threads, chance, errors ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 2, 300, 24), (1, 1, 300, 24)])
def test_threads_change_no_bit(shape: tuple[int, ...]) -> None:
    arrays = operands(shape, 200)
    before = flame.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            flame.set_num_threads(count)
            found.append([t.numpy().tobytes() for t in ours(arrays, is_causal=True)])
    finally:
        flame.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_dropout_keeps_the_mean() -> None:
    flame.manual_seed(0)
    query, key, _, _ = (flame.from_numpy(a) for a in operands((4, 4, 64, 16), 64))
    ones = flame.ones((4, 4, 64, 16))
    made = scaled_dot_product_attention(query, key, ones, dropout_p=0.25)
    assert abs(float(made.mean()) - 1) < 0.02
    assert float(made.var()) > 1e-3


def test_refuses() -> None:
    query, key = flame.ones((2, 3, 4)), flame.ones((2, 5, 4))
    with pytest.raises(ShapeError, match="broadcast"):
        scaled_dot_product_attention(flame.ones((3, 3, 4)), key, key)
    with pytest.raises(ShapeError, match="width"):
        scaled_dot_product_attention(query, key[..., :3], key)
    with pytest.raises(DTypeError, match="floating"):
        scaled_dot_product_attention(*[flame.ones((2, 2), dtype=flame.int64)] * 3)
    with pytest.raises(DTypeError, match="bool or floating"):
        scaled_dot_product_attention(query, key, key, flame.ones((3, 5), dtype=flame.int64))
    grouped = flame.ones((1, 2, 5, 4))
    with pytest.raises(ShapeError, match="heads"):
        scaled_dot_product_attention(flame.ones((1, 3, 5, 4)), grouped, grouped, enable_gqa=True)
