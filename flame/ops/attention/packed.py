"""Attention within sequences of several lengths that stand one behind the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flame.core.errors import ArgumentError, DTypeError, ShapeError
from flame.ops.attention.functions import scaled_dot_product_attention
from flame.ops.comparison import where
from flame.ops.creation import arange
from flame.ops.indexing import index_select
from flame.ops.shapes import reshape, transpose, unsqueeze
from flame.ops.sorting import searchsorted

if TYPE_CHECKING:
    from flame.tensor import Tensor

NAME = "varlen_attn"


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None,
    max_q: int, max_k: int, *, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Each of N sequences attends to its own keys: (T_q, H, Ev).

    query (T_q, H, E), key (T_k, G, E) and value (T_k, G, Ev) hold the sequences one behind the
    other; G is H, or with ``enable_gqa`` a divisor of it. cu_seq_q and cu_seq_k (N + 1): where each
    sequence begins, and the end of the last; None: the keys' are the queries'. max_q, max_k: the
    longest sequences. scale: 1 / sqrt(E) by default. window_size (left, right): a query of a
    sequence with L queries and S keys sees the keys from ``left`` before to ``right`` behind its
    own place, which for query i is i + S - L; -1 is no end, so (-1, 0) is causal. A query without
    keys gets zeros.

    The sequences are padded to the longest one on the way, so that memory grows with N max_q and
    N max_k (with a window of queries and keys in different places, their product in bytes), never
    with the square of T. Raises IndexRangeError for a sequence longer than max_q or max_k.
    Source: the arguments of PyTorch's function of that name.
    """
    _check(query, key, value, cu_seq_q, cu_seq_k)
    own = cu_seq_k is None
    ends_k = cu_seq_q if cu_seq_k is None else cu_seq_k
    if ends_k.shape != cu_seq_q.shape:
        raise ShapeError(
            f"{NAME}: cu_seq_q and cu_seq_k are of as many sequences; got {cu_seq_q.shape} and "
            f"{ends_k.shape}"
        )
    if own and max_q != max_k:
        raise ArgumentError(f"{NAME}: sequences with their own keys have max_q {max_q} = max_k")
    left, right = window_size
    lengths_q, lengths_k = (unsqueeze(c[1:] - c[:-1], 1) for c in (cu_seq_q, ends_k))
    q = _padded(query, cu_seq_q, lengths_q, max_q)
    k, v = (_padded(t, ends_k, lengths_k, max_k) for t in (key, value))
    # Padding behind one's own place is out of sight in a causal window: no mask is needed.
    causal = own and left < 0 and right == 0
    mask = None
    if not causal:
        mask = _seen(lengths_q, lengths_k, max_q, max_k, left, right)
    made = scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=enable_gqa
    )
    rows = reshape(transpose(made, 1, 2), (-1, *made.shape[1::2]))
    return index_select(rows, 0, _places(cu_seq_q, query.shape[0], max_q))


def _check(query: Tensor, key: Tensor, value: Tensor, *ends: Tensor | None) -> None:
    if not query.ndim == key.ndim == value.ndim == 3 or key.shape[0] != value.shape[0]:
        raise ShapeError(
            f"{NAME}: query (T_q, H, E), key (T_k, G, E) and value (T_k, G, Ev) do not go with "
            f"{query.shape}, {key.shape} and {value.shape}"
        )
    for end in ends:
        if end is not None and end.dtype.kind != "i":
            raise DTypeError(f"{NAME}: places of sequences are integers, got {end.dtype.name}")
        if end is not None and (end.ndim != 1 or not end.numel()):
            raise ShapeError(f"{NAME}: places of N sequences are N + 1 numbers, got {end.shape}")


def _padded(tensor: Tensor, starts: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """(T, H, E) as (N, H, longest, E); behind a sequence stand rows of others, which none sees."""
    steps = arange(longest, dtype=starts.dtype, device=tensor.device)
    places = (unsqueeze(starts[:-1], 1) + steps).clamp(max=max(tensor.shape[0] - 1, 0))
    places = where(lengths <= longest, places, -1)  # of a longer one: refused by the selection
    rows = index_select(tensor, 0, reshape(places, (-1,)))
    shape = (starts.shape[0] - 1, longest, *tensor.shape[1:])
    return transpose(reshape(rows, shape), 1, 2)


def _seen(
    lengths_q: Tensor, lengths_k: Tensor, max_q: int, max_k: int, left: int, right: int
) -> Tensor:
    """Which keys a query sees: (N, 1, 1 or max_q, max_k)."""
    keys = arange(max_k, dtype=lengths_k.dtype, device=lengths_k.device)
    seen = unsqueeze(keys < lengths_k, 1)
    if left >= 0 or right >= 0:
        queries = arange(max_q, dtype=lengths_q.dtype, device=lengths_q.device)
        own = unsqueeze(queries + (lengths_k - lengths_q), 2)
        if left >= 0:
            seen = seen & (keys >= own - left)
        if right >= 0:
            seen = seen & (keys <= own + right)
    return unsqueeze(seen, 1)


def _places(starts: Tensor, count: int, longest: int) -> Tensor:
    """The rows of all padded sequences where those of the packed ones are."""
    rows = arange(count, dtype=starts.dtype, device=starts.device)
    sequence = searchsorted(starts[1:], rows, right=True)
    places: Tensor = sequence * longest + rows - index_select(starts, 0, sequence)
    return places
