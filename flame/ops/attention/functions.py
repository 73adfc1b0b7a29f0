"""Scaled dot-product attention, as users call it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flame.core.errors import ArgumentError, ShapeError
from flame.ops.arithmetic import mul
from flame.ops.attention.dropping import blocks
from flame.ops.attention.masked_softmax import masked_softmax
from flame.ops.attention.operation import NAME, attention, check
from flame.ops.autocast import autocasts
from flame.ops.conversion import convert
from flame.ops.elementwise import compute_dtype
from flame.ops.generator import default_generator
from flame.ops.loops import broadcast_shapes
from flame.ops.shapes import reshape, transpose, unsqueeze

if TYPE_CHECKING:
    from flame.tensor import Tensor


@autocasts("lower")
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query keyᵀ scale + mask) value.

    query (..., H, L, E), key (..., H, S, E), value (..., H, S, Ev) give (..., H, L, Ev). attn_mask
    broadcasts to (..., H, L, S): bool (True takes part) or floating (added). is_causal: query i
    sees keys up to i. scale: 1 / sqrt(E) by default. enable_gqa: key and value may have fewer
    heads, each serving as many neighbouring query heads. dropout_p: applied to the probabilities,
    in training and outside; on a GPU none of them is in memory. One seed drops the same elements
    on the CPU and on a GPU where S is a multiple of 64. Raises ArgumentError for dropout_p outside
    [0, 1].
    Source: Vaswani and others, "Attention Is All You Need", 2017.
    """
    check(query.type, key.type, value.type)
    if not 0.0 <= dropout_p <= 1.0:
        raise ArgumentError(f"{NAME}: dropout_p must lie in [0, 1], got {dropout_p}")
    shape = query.shape
    grouped = enable_gqa and query.ndim > 2 and not shape[-3] == key.shape[-3] == value.shape[-3]
    if grouped:
        query, key, value, attn_mask = _grouped(query, key, value, attn_mask)
    factor = 1 / math.sqrt(shape[-1]) if scale is None and shape[-1] else (scale or 1.0)
    options: dict[str, Any] = {"causal": bool(is_causal), "scale": float(factor)}
    result: Tensor
    if dropout_p and not query.is_cuda:
        result = _with_dropout(query, key, value, attn_mask, dropout_p, **options)
    else:
        place = _place(query, key, value) if dropout_p else (None, None)
        result, _ = attention(
            query, key, value, attn_mask, *place, dropout=float(dropout_p), **options
        )
    if grouped:
        result = reshape(result, (*shape[:-1], value.shape[-1]))
    return result


def _place(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int]:
    """Seed and offset of the random blocks that drop probabilities."""
    batch = broadcast_shapes(NAME, [t.shape[:-2] for t in (query, key, value)])
    return default_generator.reserve(blocks(batch, query.shape[-2], key.shape[-2]))


def _with_dropout(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, *,
    causal: bool, scale: float,
) -> Any:  # fmt: skip
    """On the CPU: through all probabilities, of which some are dropped."""
    from flame.ops.dropouts import dropout
    from flame.ops.products import matmul

    dtype = query.dtype
    if compute_dtype(dtype) is not dtype:  # half-width scores would lose too many digits
        wide = compute_dtype(dtype)
        query, key, value = (convert(t, dtype=wide) for t in (query, key, value))
    scores = matmul(mul(query, scale), transpose(key, -2, -1))
    weights = dropout(masked_softmax(scores, mask, causal=causal), dropout_p)
    return convert(matmul(weights, value), dtype=dtype)


def _grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
    """Query heads (..., H, L, E) as (..., G, H / G, L, E); a key head broadcasts over its group."""
    heads = query.shape[-3]
    for other in (key, value):
        if other.ndim < 3 or not other.shape[-3] or heads % other.shape[-3]:
            raise ShapeError(f"{NAME}: {heads} query heads cannot share the heads of {other.shape}")
    groups = max(key.shape[-3], value.shape[-3])

    def split(t: Tensor) -> Tensor:
        own = t.shape[-3]
        if own == heads:
            return reshape(t, (*t.shape[:-3], groups, heads // groups, *t.shape[-2:]))
        if own != groups:  # key and value with different numbers of heads
            t = reshape(unsqueeze(t, -3).expand(
                *t.shape[:-2], groups // own, *t.shape[-2:]), (*t.shape[:-3], groups, *t.shape[-2:])
            )  # fmt: skip
        return unsqueeze(t, -3)

    if mask is not None and mask.ndim >= 3:
        mask = split(mask) if mask.shape[-3] == heads else unsqueeze(mask, -3)
    return split(query), split(key), split(value), mask
