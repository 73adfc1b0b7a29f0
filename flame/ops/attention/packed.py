"""Attention within sequences of several lengths that stand one behind the other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flame.core import dtypes
from flame.core.errors import ArgumentError, DTypeError, GradientError, ShapeError
from flame.ops.attention.functions import scaled_dot_product_attention
from flame.ops.attention.packed_operation import NAME, attention_packed, check, is_taken
from flame.ops.attention.packing import Packing, padded, unpadded
from flame.ops.autocast import autocasts
from flame.ops.conversion import convert
from flame.ops.elementwise import compute_dtype

if TYPE_CHECKING:
    from flame.tensor import Tensor


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None,
    max_q: int, max_k: int, *, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    alibi_slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Each of N sequences attends to its own keys: (T_q, H, Ev).

    query (T_q, H, E), key (T_k, G, E) and value (T_k, G, Ev) hold the sequences one behind the
    other; G is H, or with ``enable_gqa`` a divisor of it. cu_seq_q and cu_seq_k (N + 1): where each
    sequence begins, from 0 on, and the end of the last; None: the keys' are the queries'. max_q,
    max_k: lengths that no sequence exceeds. scale: 1 / sqrt(E) by default. window_size (left,
    right): a query of a sequence with L queries and S keys sees the keys from ``left`` before to
    ``right`` behind its own place, which for query i is i + S - L; -1 is no end, so (-1, 0) is
    causal. A query without keys gets zeros. alibi_slopes (H): -slope |i + S - L - j| is added to
    the score of query i and key j of a head (Press and others, "Train Short, Test Long", 2022);
    they get no gradient.

    On a GPU kernels read the places of the sequences on the device: nothing is padded, and a
    compiled step serves any lengths up to max_q and max_k. On the CPU, and for heads wider than
    256, the sequences are padded to the longest one on the way, so that memory grows with N max_q
    and N max_k; with a window of queries and keys in different places with their product in bytes,
    with slopes with H times that in float32. Gradients of gradients are of padded sequences too.

    Raises IndexRangeError for a sequence longer than max_q or max_k, and for rows that belong to no
    sequence; on a GPU at the next wait.
    Source: the arguments of PyTorch's function of that name; slopes as in the library
    flash-attention.
    """
    if cu_seq_k is None and max_q != max_k:
        raise ArgumentError(f"{NAME}: sequences with their own keys have max_q {max_q} = max_k")
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise GradientError(f"{NAME}: alibi_slopes get no gradient; detach them")
    left, right = window_size
    starts_q = _starts(cu_seq_q)
    starts_k = starts_q if cu_seq_k is None else _starts(cu_seq_k)
    slopes = None if alibi_slopes is None else convert(alibi_slopes, dtype=dtypes.float32)
    packing = Packing(
        starts_q, starts_k, max_q, max_k,
        left if left < max_k else -1, right if right < max_q else -1, slopes,
    )  # fmt: skip
    if not enable_gqa and query.ndim == key.ndim == 3 and query.shape[1] != key.shape[1]:
        raise ShapeError(
            f"{NAME}: {query.shape[1]} query heads share {key.shape[1]} key heads with "
            "enable_gqa=True alone"
        )
    result: Tensor = _attend(query, key, value, packing, scale)
    return result


def _starts(places: Tensor) -> Tensor:
    if places.dtype.kind != "i":
        raise DTypeError(f"{NAME}: places of sequences are integers, got {places.dtype.name}")
    return convert(places, dtype=dtypes.int32)


@autocasts("lower")
def _attend(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None
) -> Any:
    p = packing
    width = query.shape[-1] if query.ndim else 0
    factor = float(scale if scale is not None else 1 / math.sqrt(width or 1))
    limits = {"max_q": p.max_q, "max_k": p.max_k, "left": p.left, "right": p.right}
    types = (t.type for t in (query, key, value, p.cu_seq_q, p.cu_seq_k))
    check((*types, None if p.slopes is None else p.slopes.type), **limits)
    if query.is_cuda and is_taken(query.type.dtype, width, value.shape[-1], query.type.device):
        given = (p.cu_seq_q, p.cu_seq_k, p.slopes)
        result, _ = attention_packed(query, key, value, *given, scale=factor, **limits)
        return result
    made = scaled_dot_product_attention(
        padded(query, p.cu_seq_q, p.max_q), padded(key, p.cu_seq_k, p.max_k),
        padded(value, p.cu_seq_k, p.max_k),
        None if p.causal else p.mask(compute_dtype(query.dtype)), is_causal=p.causal, scale=factor,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return unpadded(made, p.cu_seq_q, query.shape[0])
