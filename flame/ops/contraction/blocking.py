"""How products are cut to registers, caches and threads.

Invariant: what an element of the result is does not depend on the cuts that follow the number of
threads; only the depth of a chunk matters, which depends on the depth alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from flame.core.dtypes import DType

CHUNK = 256  # depth that is summed in registers at once
SMALL = 1 << 18  # products that are worth a thread
ROWS_TOGETHER = 8  # tiles whose sums and copies of A stay in the second-level cache
PANELS_TOGETHER = 32  # at most; half of it where sums are kept between chunks, too
WHOLE = 24  # so many tiles still make up one block
WIDE = 80  # tiles that share what is copied from a row of memory


@functools.cache
def vector_bytes() -> int:
    """Width of the host's vector registers."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx2") else 16


def native_lanes(dtype: DType) -> int:
    """Elements of sums that stand in one vector register."""
    return vector_bytes() // max(dtype.itemsize, 4)


def tallest(vectors: int) -> int:
    """Rows of a register tile: sums, the vectors of B and one element of A fill the registers.

    0 where so many vectors do not fit.
    """
    registers = 32 if vector_bytes() == 64 else 16
    return min(registers - 4, (registers - vectors - 1) // vectors)


@dataclass(frozen=True)
class Tile:
    """Sums held in registers: ``rows`` times ``vectors``, which are ``lanes`` elements wide."""

    rows: int
    vectors: int
    lanes: int


@dataclass(frozen=True)
class Blocking:
    """A problem (m, n, depth), its tile, and the tiles and panels that one iteration takes."""

    m: int
    n: int
    depth: int
    tile: Tile
    tiles: int  # of a block
    panels: int  # of a block

    @property
    def all_tiles(self) -> int:
        return -(-self.m // self.tile.rows)

    @property
    def all_panels(self) -> int:
        return -(-self.n // self.tile.lanes)

    @property
    def row_blocks(self) -> int:
        return -(-self.all_tiles // self.tiles)

    @property
    def column_blocks(self) -> int:
        return -(-self.all_panels // self.panels)

    @property
    def chunks(self) -> int:
        return max(1, -(-self.depth // CHUNK))

    @property
    def chunk(self) -> int:
        """Depth of all chunks but the last one."""
        return -(-self.depth // self.chunks)

    @property
    def products(self) -> int:
        return self.m * self.n * self.depth


def tile_for(dtype: DType, m: int, n: int) -> Tile:
    """The register tile that wastes the least."""
    native = native_lanes(dtype)
    best: tuple[float, Tile] | None = None
    for vectors in (2, 1, 4, 8):  # LLVM takes sums in 3 vectors apart
        limit = tallest(vectors)
        if not limit:
            continue
        lanes = native * vectors
        panels = -(-n // lanes)
        tiles = -(-m // limit)
        rows = -(-m // tiles)
        sums = rows * vectors
        # a step along the depth costs its products, or its loads, or what a chain of sums waits for
        step = max(sums / 2, (rows + vectors) / 2 + 0.1 * rows, 4) + 0.3
        cost = panels * tiles * step
        if best is None or cost < 0.97 * best[0]:
            best = cost, Tile(rows, vectors, lanes)
    assert best is not None
    return best[1]


def blocking_for(
    dtype: DType, m: int, n: int, depth: int, batch: int, threads: int, *, deep: bool
) -> Blocking:
    """How a problem of non-empty sizes is cut; ``batch`` such problems stand side by side.

    ``deep``: the elements of a row of the first factor are neighbours in memory.
    """
    tile = tile_for(dtype, m, n)
    made = Blocking(m, n, depth, tile, 1, 1)
    tiles, panels = made.all_tiles, made.all_panels
    if not deep:
        tiles = -(-tiles // -(-tiles // WIDE))
    elif tiles > WHOLE and made.chunks > 1:
        tiles = ROWS_TOGETHER
    limit = PANELS_TOGETHER if made.chunks == 1 else PANELS_TOGETHER // 2
    panels = -(-panels // -(-panels // limit))
    made = replace(made, tiles=tiles, panels=panels)
    wanted = 2 * threads if threads > 1 else 1
    least = max(1, made.products * batch // SMALL)
    while batch * made.row_blocks * made.column_blocks < min(wanted, least):
        if made.tiles > 2 * made.panels:
            made = replace(made, tiles=-(-made.tiles // 2))
        elif made.panels > 1:
            made = replace(made, panels=-(-made.panels // 2))
        elif made.tiles > 1:
            made = replace(made, tiles=-(-made.tiles // 2))
        else:
            break
    return made
