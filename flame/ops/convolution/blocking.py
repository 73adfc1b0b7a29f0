"""How convolutions are cut to registers and caches.

Invariant: results do not depend on the number of threads: blocks depend on shapes and the vector
width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from flame.core.dtypes import DType

# Vectors of channels -> positions in a register tile: products for each load are what counts, and
# 32 registers hold vectors * positions sums, the vectors of weights and one position's value.
WIDE_TILES = {1: 8, 2: 8, 3: 8, 4: 6}
NARROW_TILES = {1: 6, 2: 6}  # 16 registers
EFFICIENCY = {1: 0.5, 2: 0.85, 3: 1.0, 4: 1.0}


@functools.cache
def vector_bytes() -> int:
    """Width of the host's vector registers."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx2") else 16


@dataclass(frozen=True)
class Tile:
    """A block of ``positions`` times ``lanes`` sums held in registers."""

    positions: int
    vectors: int
    lanes: int

    def blocks(self, channels: int) -> int:
        return -(-channels // self.lanes)


def tile_for(dtype: DType, channels: int) -> Tile:
    """The register tile for sums of ``dtype`` over so many channels side by side."""
    width = vector_bytes()
    lanes = width // max(dtype.itemsize, 4)
    tiles = WIDE_TILES if width == 64 else NARROW_TILES

    def cost(vectors: int) -> float:
        return -(-channels // (lanes * vectors)) * vectors / EFFICIENCY[vectors]

    best = min(sorted(tiles, reverse=True), key=cost)
    return Tile(tiles[best], best, lanes * best)
