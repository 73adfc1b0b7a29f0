"""Rows of a table, combined over bags of indices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flame.core import dtypes
from flame.core.errors import ArgumentError, DTypeError, ShapeError
from flame.ops.autocast import autocasts
from flame.ops.comparison import where
from flame.ops.creation import arange, zeros
from flame.ops.embedding import embedding
from flame.ops.indexing import index_add
from flame.ops.scattering import index_reduce
from flame.ops.shapes import unsqueeze, wrap_dim
from flame.ops.sorting import searchsorted

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__: list[str] = []


@autocasts("plain")
def embedding_bag(
    input: Tensor, weight: Tensor, offsets: Tensor | None = None, max_norm: float | None = None,
    norm_type: float = 2, scale_grad_by_freq: bool = False, mode: str = "mean",
    sparse: bool = False, per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False, padding_idx: int | None = None,
) -> Tensor:  # fmt: skip
    """Sums, means or maxima of rows of ``weight`` (V, E) over bags of indices: (B, E).

    input: (B, N), or (N) with ``offsets`` (B), ascending from 0, where each bag begins. A bag
    without indices gives zeros. include_last_offset: the last offset is where the last bag ends.
    padding_idx: an index that does not count. per_sample_weights: factors of the rows, of the shape
    of ``input``, for sums. Raises IndexRangeError for indices beyond the table and for positions
    before the first offset.
    """
    if mode not in ("sum", "mean", "max"):
        raise ArgumentError(f"embedding_bag: mode must be sum, mean or max, got {mode!r}")
    if per_sample_weights is not None and mode != "sum":
        raise ArgumentError(f"embedding_bag: weights of samples are for mode sum, not {mode!r}")
    if input.ndim not in (1, 2):
        raise ShapeError(f"embedding_bag: indices have one or two dimensions, got {input.shape}")
    if (input.ndim == 1) != (offsets is not None):
        raise ArgumentError(
            "embedding_bag: indices of one dimension need offsets, and those of two take none; got "
            f"indices {input.shape} and {'no offsets' if offsets is None else 'offsets'}"
        )
    if input.dtype.kind != "i":
        raise DTypeError(f"embedding_bag: indices must be integers, got {input.dtype.name}")
    if per_sample_weights is not None and per_sample_weights.shape != input.shape:
        raise ShapeError(
            f"embedding_bag: weights of samples {per_sample_weights.shape} do not go with indices "
            f"{input.shape}"
        )
    rows = embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq, sparse)
    if per_sample_weights is not None:
        rows = rows * unsqueeze(per_sample_weights, -1)
    counted = input >= 0
    if padding_idx is not None:
        counted = input != wrap_dim("embedding_bag", padding_idx, weight.shape[0])
    rows = where(unsqueeze(counted, -1), rows, -math.inf if mode == "max" else 0.0)
    if offsets is None:
        return _of_equal_bags(rows, counted, mode)
    return _of_ragged_bags(rows, counted, offsets, mode, ended=include_last_offset)


def _of_equal_bags(rows: Tensor, counted: Tensor, mode: str) -> Tensor:
    """Of rows (B, N, E), those that do not count being neutral."""
    counts = counted.sum(1, keepdim=True)
    if mode == "max" and rows.shape[1]:
        return _or_zero(counts, rows.max(1)[0])
    total: Tensor = rows.sum(1)
    return total / counts.clamp(min=1) if mode == "mean" else total


def _of_ragged_bags(
    rows: Tensor, counted: Tensor, offsets: Tensor, mode: str, *, ended: bool
) -> Tensor:
    """Of rows (N, E) in bags that begin at offsets (B)."""
    if offsets.ndim != 1 or offsets.dtype.kind != "i" or (ended and not offsets.numel()):
        raise ShapeError(
            "embedding_bag: offsets are integers of one dimension"
            f"{', one at least where the last is included' if ended else ''}; got "
            f"{offsets.dtype.name} {offsets.shape}"
        )
    places = arange(rows.shape[0], dtype=offsets.dtype, device=rows.device)
    bags = searchsorted(offsets, places, right=True) - 1
    # What stands behind the last end falls into a bag of its own, which is left out.
    whole, kept = offsets.shape[0], offsets.shape[0] - int(ended)

    def summed(values: Tensor) -> Tensor:
        start = zeros(whole, *values.shape[1:], dtype=values.dtype, device=values.device)
        total: Tensor = index_add(start, 0, bags, values)[:kept]
        return total

    if mode == "sum":
        return summed(rows)
    counts = unsqueeze(summed(counted.to(dtypes.int64)), 1)
    if mode == "mean":
        return summed(rows) / counts.clamp(min=1)
    start = zeros(whole, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    peaks = index_reduce(start, 0, bags, rows, "amax", include_self=False)[:kept]
    return _or_zero(counts, peaks)


def _or_zero(counts: Tensor, peaks: Tensor) -> Tensor:
    """Zeros for bags in which nothing counts."""
    made: Tensor = where(counts > 0, peaks, 0.0)
    return made
