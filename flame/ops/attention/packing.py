"""Sequences of several lengths, one behind the other, as a padded batch and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.ops.comparison import where
from flame.ops.conversion import convert
from flame.ops.creation import arange
from flame.ops.indexing import index_select
from flame.ops.mathematics import abs as absolute
from flame.ops.shapes import reshape, transpose, unsqueeze
from flame.ops.sorting import searchsorted

if TYPE_CHECKING:
    from flame.tensor import Tensor


def padded(tensor: Tensor, starts: Tensor, longest: int) -> Tensor:
    """(T, H, E) as (N, H, longest, E); behind a sequence stand rows of others, which none sees.

    Raises IndexRangeError for a sequence longer than ``longest``.
    """
    lengths = unsqueeze(starts[1:] - starts[:-1], 1)
    steps = arange(longest, dtype=starts.dtype, device=tensor.device)
    places = (unsqueeze(starts[:-1], 1) + steps).clamp(max=max(tensor.shape[0] - 1, 0))
    places = where(lengths <= longest, places, -1)  # of a longer one: refused by the selection
    rows = index_select(tensor, 0, reshape(places, (-1,)))
    shape = (starts.shape[0] - 1, longest, *tensor.shape[1:])
    return transpose(reshape(rows, shape), 1, 2)


def unpadded(tensor: Tensor, starts: Tensor, count: int) -> Tensor:
    """(N, H, longest, E) as (count, H, E). Raises IndexRangeError for a row of no sequence."""
    entries, heads, longest, width = tensor.shape
    rows = arange(count, dtype=starts.dtype, device=starts.device)
    sequence = searchsorted(starts[1:], rows, right=True)
    places: Tensor = sequence * longest + rows - index_select(starts, 0, sequence)
    lines = reshape(transpose(tensor, 1, 2), (entries * longest, heads, width))
    return index_select(lines, 0, places)


@dataclass(frozen=True)
class Packing:
    """Where N sequences begin, in queries and keys (N + 1, the last is the end), their longest
    lengths, what a query sees (`flame.kernel.library.Sequences`), and slopes (H) of a bias."""

    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int
    left: int
    right: int
    slopes: Tensor | None

    @property
    def causal(self) -> bool:
        """Whether a padded batch needs no mask: padding behind one's own place is out of sight."""
        own = self.cu_seq_q is self.cu_seq_k and self.slopes is None
        return own and self.left < 0 and self.right == 0

    def mask(self, dtype: DType, *, whole: bool = False) -> Any:
        """What is added to scores (N, 1 or H, 1 or max_q, max_k), in ``dtype``, or which take part
        if there are no slopes. whole: padding among the queries takes no part either."""
        device = self.cu_seq_k.device
        lengths_q, lengths_k = (
            unsqueeze(c[1:] - c[:-1], 1) for c in (self.cu_seq_q, self.cu_seq_k)
        )
        keys = arange(self.max_k, dtype=dtypes.int32, device=device)
        queries = arange(self.max_q, dtype=dtypes.int32, device=device)
        own = unsqueeze(queries + (lengths_k - lengths_q), 2)
        seen = unsqueeze(keys < lengths_k, 1)
        if whole:
            seen = seen & unsqueeze(queries < lengths_q, 2)
        if self.left >= 0:
            seen = seen & (keys >= own - self.left)
        if self.right >= 0:
            seen = seen & (keys <= own + self.right)
        seen = unsqueeze(seen, 1)
        if self.slopes is None:
            return seen
        distance = unsqueeze(absolute(own - keys), 1)
        slopes = reshape(convert(self.slopes, dtype=dtype), (-1, 1, 1))
        return where(seen, distance * -slopes, -math.inf)
