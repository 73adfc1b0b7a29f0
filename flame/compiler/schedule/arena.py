"""Offsets in one block of memory for buffers with lifetimes.

Invariant: two buffers whose lifetimes meet do not overlap; every offset is a multiple of ALIGNMENT;
the offsets depend on sizes and lifetimes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

ALIGNMENT: Final = 64
# Beyond, fewer orders are tried: each takes some tens of microseconds a buffer.
MANY: Final = 4000


@dataclass(frozen=True)
class Interval:
    """A buffer of ``size`` bytes that is needed from step ``begin`` to step ``end``, inclusive."""

    size: int
    begin: int
    end: int


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def place(buffers: Sequence[Interval]) -> tuple[list[int], int]:
    """(offset of each buffer, bytes in all): the best of several orders."""
    floor = needed(buffers)
    best: tuple[list[int], int] | None = None
    for key in _ORDERS[:2] if len(buffers) > MANY else _ORDERS:
        order = sorted(range(len(buffers)), key=lambda i: (*key(buffers[i]), i))
        for tightest in (True, False):
            found = _in_order(buffers, order, tightest=tightest)
            if best is None or found[1] < best[1]:
                best = found
            if best[1] == floor:
                return best
            if len(buffers) > MANY:
                break
    assert best is not None
    return best


def needed(buffers: Sequence[Interval]) -> int:
    """The most bytes that live at one step, below which no placement can get."""
    if not buffers:
        return 0
    changes = np.zeros(max(b.end for b in buffers) + 2, np.int64)
    for b in buffers:
        changes[b.begin] += aligned(b.size)
        changes[b.end + 1] -= aligned(b.size)
    return int(np.cumsum(changes).max())


_ORDERS: Final[tuple[Callable[[Interval], tuple[int, ...]], ...]] = (
    lambda b: (-b.size, b.begin),
    lambda b: (-b.size * (b.end - b.begin + 1), b.begin),
    lambda b: (b.begin - b.end, -b.size),
    lambda b: (b.begin, -b.size),
)


def _in_order(
    buffers: Sequence[Interval], order: Sequence[int], *, tightest: bool
) -> tuple[list[int], int]:
    """Each buffer in the tightest, or the first, gap among those placed before that it meets."""
    offsets = [0] * len(buffers)
    placed = np.zeros((4, len(buffers)), np.int64)  # begin, end, first byte, byte after the last
    count = 0
    total = 0
    for i in order:
        b = buffers[i]
        size = aligned(b.size)
        if size == 0:
            continue
        at = _gap(placed[:, :count], b, size, tightest=tightest)
        offsets[i] = at
        # Sorted by first byte, so that the gaps can be seen in one pass.
        row = int(np.searchsorted(placed[2, :count], at))
        placed[:, row + 1 : count + 1] = placed[:, row:count]
        placed[:, row] = (b.begin, b.end, at, at + size)
        count += 1
        total = max(total, at + size)
    return offsets, total


def _gap(placed: Any, b: Interval, size: int, *, tightest: bool) -> int:
    met = (placed[0] <= b.end) & (placed[1] >= b.begin)
    firsts, lasts = placed[2][met], placed[3][met]
    if not len(firsts):
        return 0
    reach = np.maximum.accumulate(lasts)
    before = np.empty_like(reach)
    before[0], before[1:] = 0, reach[:-1]
    room = firsts - before
    fitting = np.nonzero(room >= size)[0]
    if not len(fitting):
        return int(reach[-1])
    chosen = fitting[np.argmin(room[fitting])] if tightest else fitting[0]
    return int(before[chosen])
