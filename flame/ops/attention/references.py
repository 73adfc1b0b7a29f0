"""The meaning of attention and of its backward pass, in NumPy, and their samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from flame.ops.attention.dropping import reference_kept
from flame.ops.op import Arg, Sample


def scores(query: Any, key: Any, mask: Any, *, causal: bool, scale: float) -> Any:
    """(..., L, S) with -inf where masked."""
    made = np.asarray(query, np.float64) @ np.swapaxes(np.asarray(key, np.float64), -1, -2) * scale
    if mask is not None:
        made = np.where(mask, made, -np.inf) if mask.dtype == bool else made + mask
    if causal:
        made = np.where(np.tril(np.ones(made.shape[-2:], bool)), made, -np.inf)
    return made


def _kept(p: Any, value: Any, dropout: float, seed: Any, offset: Any) -> Any:
    """What probabilities p are multiplied by."""
    if not dropout:
        return 1.0
    batch = np.broadcast_shapes(p.shape[:-2], value.shape[:-2])
    return reference_kept((*batch, *p.shape[-2:]), dropout, seed, offset)


def attention(
    query: Any, key: Any, value: Any, mask: Any, seed: Any, offset: Any, *, causal: bool,
    scale: float, dropout: float,
) -> tuple[Any, Any]:  # fmt: skip
    found = scores(query, key, mask, causal=causal, scale=scale)
    peak = found.max(axis=-1, keepdims=True, initial=-np.inf)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    power = np.exp(found - peak)
    total = power.sum(axis=-1, keepdims=True)
    some = total != 0
    total = np.where(some, total, 1.0)
    shape = (*np.broadcast_shapes(found.shape[:-2], value.shape[:-2]), found.shape[-2])
    log_sum = np.where(some, np.log(total) + peak, 0.0)[..., 0]
    weights = power / total * _kept(power, value, dropout, seed, offset)
    return weights @ np.asarray(value, np.float64), np.broadcast_to(log_sum, shape)


def attention_backward(
    grad: Any, shift: Any, query: Any, key: Any, value: Any, mask: Any, out: Any, log_sum: Any,
    seed: Any, offset: Any, *, causal: bool, scale: float, dropout: float,
) -> tuple[Any, Any, Any]:  # fmt: skip
    g, q, k, v, o, base = (
        np.asarray(x, np.float64) for x in (grad, query, key, value, out, log_sum)
    )
    p = np.exp(scores(q, k, mask, causal=causal, scale=scale) - base[..., None])
    delta = (g * o).sum(axis=-1) - shift
    kept = _kept(p, v, dropout, seed, offset)
    slope = p * (kept * (g @ np.swapaxes(v, -1, -2)) - delta[..., None])
    return (
        slope @ k * scale,
        np.swapaxes(slope, -1, -2) @ q * scale,
        np.swapaxes(p * kept, -1, -2) @ g,
    )


def _sample(
    query: tuple[int, ...], keys: int, width: int = 0, *, mask: Arg | None = None,
    causal: bool = False, scale: float = 0.4, batch: tuple[int, ...] | None = None,
    dropout: float = 0.0,
) -> Sample:  # fmt: skip
    """``width`` of values; ``batch`` of keys and values, the query's by default."""
    outer = query[:-2] if batch is None else batch
    operands = (Arg(query), Arg((*outer, keys, query[-1])), Arg((*outer, keys, width or query[-1])))
    place = (2**40 + 7, 2**32 - 3) if dropout else (None, None)
    options = {"causal": causal, "scale": scale, "dropout": dropout}
    return Sample((*operands, mask, *place), options)


SAMPLES = [
    _sample((3, 4), 5),
    _sample((1, 1), 1),
    _sample((2, 3, 5, 8), 5, causal=True),
    _sample((2, 7, 5), 3, causal=True, width=3),
    _sample((3, 5), 7, causal=True),
    _sample((2, 70, 3), 70, causal=True),
    _sample((2, 1, 33), 70, width=17, scale=0.1),
    _sample((1, 130, 1), 66, width=2),
    _sample((2, 3, 4), 5, mask=Arg((3, 5))),
    _sample((2, 2, 3, 4), 70, mask=Arg((2, 1, 1, 70))),
    _sample((2, 3, 4), 5, mask=Arg((2, 3, 5), kind="bool")),
    _sample((2, 3, 4), 5, mask=Arg((5,), kind="bool"), causal=True),
    _sample((2, 2, 3, 4), 5, batch=(2, 1)),
    _sample((0, 3, 4), 5),
    _sample((3, 4), 0),
    _sample((2, 4, 0), 3, width=2),
    _sample((0, 4), 3),
    _sample((3, 4), 5, dropout=0.3),
    _sample((2, 1, 70, 3), 130, causal=True, dropout=0.4),
    _sample((2, 3, 5, 8), 70, batch=(2, 1), mask=Arg((5, 70)), dropout=0.3, width=3),
    _sample((2, 4), 3, dropout=1.0),
]


def backward_sample(sample: Sample) -> Sample:
    """Operands of the backward pass, drawn apart from each other: it is exact for any of them."""
    query, key, value, mask, *place = sample.inputs
    batch = np.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    rows = (*batch, query.shape[-2])
    out = (*rows, value.shape[-1])
    return Sample(
        (Arg(out), Arg(rows), query, key, value, mask, Arg(out), Arg(rows, 2.0, 4.0), *place),
        sample.attributes,
    )
