"""Dropout of probabilities inside the kernels of attention, and as numbers for higher orders.

Invariant: the element (b, i, j) of (batch, L, S), the batch counted in row-major order, takes the
word at position (b L + i) S' + j of a draw whose four elements share a block (see
`flame.ops.philox`), with S' the length S rounded up to a multiple of 64. So a block of 64 keys of
a query is a group of 16 random blocks, and kernels of all devices and tiles drop the same elements.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.types import Shape
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Operand
from flame.kernel.values import Value, bitcast, const
from flame.ops import philox
from flame.ops.attention.tiles import KEYS, Tile

UNIT_BITS: Final = 24  # of a word, compared with the probability

assert KEYS == philox.GROUP


def pitch(keys: int) -> int:
    """Elements that a row of probabilities takes of the draw."""
    return -(-keys // philox.GROUP) * philox.GROUP


def blocks(batch: Shape, queries: int, keys: int) -> int:
    """How many random blocks the probabilities (batch..., queries, keys) take."""
    return philox.shared_blocks(math.prod(batch) * queries * pitch(keys))


def gain(dropout: float) -> float:
    """What kept elements are multiplied by."""
    return 0.0 if dropout == 1.0 else 1.0 / (1.0 - dropout)


class Dropping:
    """Draws for blocks of scores (keys, queries), each random block once for its four elements."""

    def __init__(
        self, k: KernelBuilder, position: int, tile: Tile, dropout: float, sizes: Shape,
        queries: int, keys: int,
    ) -> None:  # fmt: skip
        """``position``: of the operand seed, the offset follows; ``sizes``: of the batch."""
        self.k, self.tile, self.sizes = k, tile, sizes
        self.queries, self.steps = queries, pitch(keys) // 4
        self.seed, self.offset = k.number(position, int), k.number(position + 1, int)
        self.gain = gain(dropout)
        self.least = math.ceil(float(np.float32(dropout)) * 2**UNIT_BITS)  # that is kept

    def apply(
        self, source: Operand, target: Operand, index: tuple[Value, ...], query: Value, key: Value,
        gain: float = 1.0,
    ) -> None:  # fmt: skip
        """target (keys, queries) = source times ``gain`` where kept, else 0.

        ``query`` and ``key``: the first ones, ``key`` a multiple of 64. All 64 keys are written.
        """
        k = self.k
        entry = const(0)
        for i, size in zip(index, self.sizes, strict=True):
            entry = entry * k.size(size) + i
        row, step = entry * k.size(self.queries) + query, k.size(self.steps)
        first = self.offset + values.binary("udiv", key, const(4))
        least = const(self.least, dtypes.int32)
        with k.loop(philox.RUN) as place, k.vector(self.tile.lanes) as v:
            words = philox.words(self.seed, first + (row + v) * step + place)
            for number, word in enumerate(words):
                j = place + number * philox.RUN
                kept = bitcast(word >> (32 - UNIT_BITS), dtypes.int32) >= least
                found = source[j, v]
                made = found if gain == 1.0 else found * const(gain, target.dtype)
                k.store(target, (j, v), values.select(kept, made, const(0.0, target.dtype)))


def kept(
    batch: Shape, queries: int, keys: int, dropout: float, seed: Any, offset: Any, *, dtype: Any,
    device: Any,
) -> Any:  # fmt: skip
    """(batch..., queries, keys): what probabilities are multiplied by, as a tensor."""
    from flame.ops.creation import ones
    from flame.ops.draws import drop
    from flame.ops.shapes import narrow

    whole = ones((*batch, queries, pitch(keys)), dtype=dtype, device=device)
    return narrow(drop(whole, float(dropout), gain(dropout), seed, offset), -1, 0, keys)


def reference_kept(shape: Shape, dropout: float, seed: int, offset: int) -> Any:
    """As `kept`, in NumPy; ``shape`` is (batch..., queries, keys)."""
    *rows, keys = shape
    whole = (*rows, pitch(keys))
    words = philox.reference_shared(seed, offset, math.prod(whole)).reshape(whole)[..., :keys]
    units = (words >> (32 - UNIT_BITS)) * 2.0**-UNIT_BITS
    return np.where(units >= np.float32(dropout), gain(dropout), 0.0)
