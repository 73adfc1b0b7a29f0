"""How the attention kernels cut a problem into tiles, and the shared memory that they take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flame.core import dtypes
from flame.core.dtypes import DType


def wide_of(dtype: DType) -> DType:
    """What is computed with."""
    return dtypes.float64 if dtype is dtypes.float64 else dtypes.float32


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts the problem. rows: of the tile that stays, columns: that streams by."""

    rows: int
    columns: int
    threads: int
    shared: int  # bytes
    defines: tuple[tuple[str, int], ...]


def _flash_bytes(rows: int, width: int) -> int:
    return rows * round_up(width, 32) * 2


def flash_forward_tiles(head: int, head_v: int, *, extras: bool) -> Iterator[Tiles]:
    """Candidates, best first. ``extras``: masks and dropout, whose registers half the rows make
    room for; warps of 32 rows read each key from shared memory half as often.
    """
    widest = max(head, head_v)
    if widest > 128:
        shapes = [(4, 1, 32, 2, 0)]
    elif extras:
        shapes = [(8, 1, 64, 1, 0)]
    else:
        shapes = [(4, 2, 64, 2, int(widest <= 64))]
    for warps, m_tiles, columns, blocks, keep in shapes:
        rows = warps * m_tiles * 16
        shared = _flash_bytes(rows, head)
        shared += 2 * (_flash_bytes(columns, head) + _flash_bytes(columns, head_v))
        defines = {
            "WARPS": warps, "M_TILES": m_tiles, "COLUMNS": columns, "BLOCKS": blocks,
            "KEEP_Q": keep,
        }  # fmt: skip
        yield Tiles(rows, columns, 32 * warps, shared, tuple(defines.items()))


def flash_backward_tiles(
    head: int, head_v: int, *, keys: bool, first: bool, second: bool, dropout: bool
) -> Iterator[Tiles]:
    """Candidates, best first; fewer warps need less shared memory."""
    widest = max(head, head_v)
    shapes = [(8, 64), (4, 32), (2, 32)] if widest <= 128 else [(4, 32), (2, 32)]
    for warps, columns in shapes:
        rows = warps * 16
        shared = _flash_bytes(rows, head) + (_flash_bytes(rows, head_v) if first else 0)
        stage = _flash_bytes(columns, head) + _flash_bytes(columns, head_v)
        if keys:  # log_sum and delta of the queries, and a bit for each probability
            stage += 8 * columns + (rows // 16 * columns * 2 if dropout else 0)
        shared += 2 * stage
        defines = {
            "KEYS": int(keys), "FIRST": int(first), "SECOND": int(second), "WARPS": warps,
            "M_TILES": 1, "COLUMNS": columns, "BLOCKS": 1,
        }  # fmt: skip
        yield Tiles(rows, columns, 32 * warps, shared, tuple(defines.items()))


def plain_tiles(
    head: int, head_v: int, dtype: DType, *, backward: bool, keys: bool = False
) -> Iterator[Tiles]:
    """Candidates, best first; accumulators of 256 columns leave registers for half the rows."""
    size = wide_of(dtype).itemsize
    shapes = (
        [(4, 2), (2, 2), (1, 1)] if max(head, head_v) <= 128 and size == 4 else [(2, 2), (1, 1)]
    )
    for m_tiles, n_tiles in shapes:
        rows, columns = 16 * m_tiles, 16 * n_tiles
        if backward:
            words = (rows + columns) * (head + head_v + 2)
        else:
            words = rows * (head + 1) + columns * (max(head, head_v) + 1)
        shared = (words + rows * (columns + 1)) * size
        defines = {"M_TILES": m_tiles, "N_TILES": n_tiles}
        if backward:
            defines["KEYS"] = int(keys)
        yield Tiles(rows, columns, 256, shared, tuple(defines.items()))


def fitting(candidates: Iterator[Tiles], limit: int) -> Tiles | None:
    return next((tiles for tiles in candidates if tiles.shared <= limit), None)
