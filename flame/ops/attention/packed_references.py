"""The meaning of attention within packed sequences, in NumPy, and samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from flame.core.errors import FlameError, IndexRangeError
from flame.ops.attention import references
from flame.ops.op import Arg, Sample


def misplaced(name: str, sequence: int) -> FlameError:
    """The error for a sequence that is not where it may be."""
    return IndexRangeError(
        f"varlen_attn: sequence {sequence} of cu_seq_{name} is longer than max_{name}, or the "
        "places do not ascend from 0 to the number of rows"
    )


def _spans(starts: Any, rows: int, longest: int, name: str) -> list[slice]:
    places = [int(n) for n in starts]
    for n, (begin, end) in enumerate(itertools.pairwise(places)):
        ends = (n > 0 or begin == 0) and (n + 2 < len(places) or end == rows)
        if not (0 <= begin <= end <= rows and end - begin <= longest and ends):
            raise misplaced(name, n)
    return [slice(*pair) for pair in itertools.pairwise(places)]


def _mask(queries: int, keys: int, slopes: Any, left: int, right: int) -> Any:
    """What is added to scores (1 or H, L, S)."""
    own = np.arange(queries)[:, None] + keys - queries
    other = np.arange(keys)
    seen = np.ones((queries, keys), bool)
    if left >= 0:
        seen &= other >= own - left
    if right >= 0:
        seen &= other <= own + right
    bias = np.zeros(1) if slopes is None else np.asarray(slopes, np.float64)
    return np.where(seen, -bias[:, None, None] * abs(own - other), -np.inf)


def _heads(array: Any, rows: slice, repeats: int = 1) -> Any:
    """(T, G, E) as (H, L, E) of one sequence."""
    return np.repeat(np.asarray(array, np.float64)[rows].swapaxes(0, 1), repeats, 0)


def _parts(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, slopes: Any, *, max_q: int,
    max_k: int, left: int, right: int,
) -> Iterator[tuple[slice, slice, Any, Any, Any, Any]]:  # fmt: skip
    """Of each sequence: its rows and keys, and q, k, v and mask by heads."""
    repeats = query.shape[1] // max(key.shape[1], 1)
    places = zip(
        _spans(cu_seq_q, query.shape[0], max_q, "q"), _spans(cu_seq_k, key.shape[0], max_k, "k"),
        strict=True,
    )  # fmt: skip
    for rows, keys in places:
        q, k, v = _heads(query, rows), _heads(key, keys, repeats), _heads(value, keys, repeats)
        yield rows, keys, q, k, v, _mask(q.shape[1], k.shape[1], slopes, left, right)


def attention_packed(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, slopes: Any, *, scale: float,
    **limits: int,
) -> tuple[Any, Any]:  # fmt: skip
    result = np.zeros((*query.shape[:2], value.shape[2]))
    log_sum = np.zeros(query.shape[1::-1])
    parts = _parts(query, key, value, cu_seq_q, cu_seq_k, slopes, **limits)
    for rows, _, q, k, v, mask in parts:
        made, sums = references.attention(
            q, k, v, mask, None, None, causal=False, scale=scale, dropout=0.0
        )
        result[rows], log_sum[:, rows] = made.swapaxes(0, 1), sums
    return result, log_sum


def attention_packed_backward(
    grad: Any, shift: Any, query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any,
    slopes: Any, result: Any, log_sum: Any, *, scale: float, **limits: int,
) -> tuple[Any, Any, Any]:  # fmt: skip
    made = (np.zeros(query.shape), np.zeros(key.shape), np.zeros(value.shape))
    groups = key.shape[1]
    parts = _parts(query, key, value, cu_seq_q, cu_seq_k, slopes, **limits)
    for rows, keys, q, k, v, mask in parts:
        less = np.zeros(q.shape[:2]) if shift is None else shift[:, rows]
        dq, dk, dv = references.attention_backward(
            _heads(grad, rows), less, q, k, v, mask, _heads(result, rows), log_sum[:, rows], None,
            None, causal=False, scale=scale, dropout=0.0,
        )  # fmt: skip
        made[0][rows] = dq.swapaxes(0, 1)
        for whole, d in zip(made[1:], (dk, dv), strict=True):
            shared = d.reshape(groups, len(d) // max(groups, 1), *d.shape[1:]).sum(1)
            whole[keys] = shared.swapaxes(0, 1)
    return made


def _sample(
    queries: tuple[int, ...], keys: tuple[int, ...] | None = None, *, heads: int = 2,
    key_heads: int = 0, width: int = 8, value_width: int = 0, left: int = -1, right: int = -1,
    slopes: bool = False, spare: int = 0,
) -> Sample:  # fmt: skip
    """Of sequences of these lengths; ``spare``: how much longer they may be."""
    keys = queries if keys is None else keys
    groups = key_heads or heads
    operands = (
        Arg((sum(queries), heads, width)), Arg((sum(keys), groups, width)),
        Arg((sum(keys), groups, value_width or width)),
        *(
            Arg(
                (len(lengths) + 1,), kind="int32",
                values=tuple(np.cumsum((0, *lengths)).tolist()),
            )
            for lengths in (queries, keys)
        ),
        Arg((heads,), 0.0, 1.0, kind="float32") if slopes else None,
    )  # fmt: skip
    options = {"max_q": max(queries, default=0) + spare, "max_k": max(keys, default=0) + spare}
    return Sample(operands, {"scale": 0.4, **options, "left": left, "right": right})


SAMPLES = [
    _sample((3, 0, 5), right=0),
    _sample((2, 3), (4, 1), heads=4, key_heads=2, width=5, value_width=3, spare=2),
    _sample((3, 0, 7, 1), (4, 2, 5, 0), right=0),
    _sample((4, 9), (7, 6), left=2, right=1, slopes=True),
    _sample((70, 2, 33), heads=1, width=16, left=10, slopes=True),
    _sample((5, 3), heads=2, key_heads=1, right=0, slopes=True, width=3),
    _sample((0,), (3,)),
    _sample((3,), (0,)),
    _sample(()),
]


def backward_sample(sample: Sample) -> Sample:
    """Operands of the backward pass, drawn apart from each other: it is exact for any of them.

    In float32 and float64, where log_sum has the dtype of the rest.
    """
    query, key, value, *places = sample.inputs
    (rows, heads, _), width = query.shape, value.shape[2]
    whole, sums = (rows, heads, width), (heads, rows)
    given = (Arg(s, kind="double") for s in (whole, sums, query.shape, key.shape, value.shape))
    return Sample(
        (*given, *places, Arg(whole, kind="double"), Arg(sums, 2.0, 4.0, kind="double")),
        sample.attributes,
    )
