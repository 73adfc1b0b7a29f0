"""Row kernels: several passes over the same elements, row by row, while a row is in cache.

Invariants: a row is all elements that share a kept index. One body serves two layouts: rows that
lie along memory (vectors run along the row), and rows side by side (vectors run across rows, every
lane its own row). In both, `RowLoops.each` visits a row's elements, and registers made before it
hold what the row accumulates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from flame.core.dtypes import DType
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Operand, Role
from flame.kernel.values import Value
from flame.ops.loops import Nest, by_stride, coalesce

COLUMNS: Final = 64  # rows side by side that one step of a parallel loop takes, at most
SHORT: Final = 64  # elements along memory that are few for the threads of a GPU's team
BLOCKS: Final = 8  # steps that are enough to keep the threads busy

Index = tuple[Value, ...]


@dataclass(frozen=True)
class Rows:
    """Kept and row dimensions, each coalesced over all operands, outermost first."""

    kept: Nest
    row: Nest
    columns: bool  # rows lie side by side: vectors run across them

    @property
    def length(self) -> int:
        return math.prod(self.row.sizes)

    @property
    def count(self) -> int:
        return math.prod(self.kept.sizes)

    def operand(
        self, k: KernelBuilder, role: Role, position: int, dtype: DType, which: int
    ) -> Operand:
        """The operand whose strides were given as number ``which``, indexed by (kept, row)."""
        sizes = (*self.kept.sizes, *self.row.sizes)
        strides = (*self.kept.strides[which], *self.row.strides[which])
        return k.tensor(role, position, tensor_type(dtype, sizes, strides))


def rows_of(sizes: Shape, row_dims: Sequence[int], strides: Sequence[Shape]) -> Rows:
    """The rows over ``row_dims``; ``strides`` of all operands, the first one decides the order."""
    order = by_stride(strides[0], sizes)
    kept = coalesce(sizes, strides, [d for d in order if d not in row_dims])
    row = coalesce(sizes, strides, [d for d in order if d in row_dims])
    columns = bool(kept.sizes) and (not row.sizes or kept.strides[0][-1] < row.strides[0][-1])
    return Rows(kept, row, columns)


def _block_width(kept: Shape) -> int:
    """How many rows side by side one step takes: fewer where there would be few steps."""
    width = COLUMNS
    while width > 16 and math.prod(kept[:-1]) * -(-kept[-1] // width) < BLOCKS:
        width //= 2
    return width


class RowLoops:
    """Writes the loops over `Rows` into a kernel."""

    def __init__(self, k: KernelBuilder, rows: Rows, *, flat: bool = False) -> None:
        self.k, self.rows = k, rows
        short = len(rows.row.sizes) > 1 and rows.row.sizes[-1] < SHORT
        self.flat = flat and short and not rows.columns  # a row's dimensions as one loop
        self.width = _block_width(rows.kept.sizes) if rows.columns else 0
        self.unroll = unroll_for(self.width or (rows.row.sizes[-1] if rows.row.sizes else 1))
        self.sizes = [k.size(n) for n in rows.row.sizes]
        self.lane = values.const(0)  # of rows side by side: the row's number in its block

    @contextmanager
    def each_row(self, passes: int = 1) -> Iterator[Index]:
        """The parallel loop over rows; yields the kept index."""
        k, kept = self.k, self.rows.kept.sizes
        work = self.rows.length * passes
        if not self.rows.columns:
            with k.parallel(*kept, work=work) as counters:
                yield counters if kept else ()
            return
        width = self.width
        blocks = -(-kept[-1] // width)
        with k.parallel(*kept[:-1], blocks, work=work * width) as (*outer, block):
            start = block * width
            extent = values.binary("min", k.size(kept[-1]) - start, values.const(width))
            with k.vector(extent, self.unroll) as lane:
                self.lane = lane
                yield (*outer, start + lane)

    @contextmanager
    def each(self, kept: Index, limit: Value | None = None) -> Iterator[Index]:
        """The loop over the elements of the row ``kept``; yields the full index.

        limit: visits only the first so many along the innermost dimension of a row along memory.
        """
        k, sizes = self.k, self.sizes
        if limit is not None:
            sizes = [*sizes[:-1], limit]
        if self.rows.columns:
            with k.nest(sizes) as inner:
                yield (*kept, *inner)
        elif not sizes:
            yield kept
        elif self.flat and limit is None:
            total = k.size(self.rows.length)
            with k.vector(total, self.unroll) as rest:
                places: list[Value] = []
                for size in reversed(sizes[1:]):
                    places.insert(0, values.binary("urem", rest, size))
                    rest = values.binary("udiv", rest, size)
                yield (*kept, rest, *places)
        else:
            with k.nest(sizes[:-1]) as inner, k.vector(sizes[-1], self.unroll) as last:
                yield (*kept, *inner, last)


def unroll_for(extent: int) -> int:
    """Native vectors to handle together in a loop of ``extent`` float32 steps."""
    return 4 if extent >= 64 else 2 if extent >= 32 else 1


def type_of(x: object) -> TensorType:
    """``x``, known to be a tensor's type."""
    assert isinstance(x, TensorType)
    return x
