"""The kernel of a product: tiles of sums in registers.

For each step along the depth, a tile takes one vector (or a few) of B's row and one element of each
of its rows of A. Tiles at the end reach back over their neighbours, so all are whole; the sums of a
tile pass through a small array, from which the epilogue takes those that are new. Chunks of the
depth are summed on their own and then added up, which also keeps rounding errors small.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from flame.core.dtypes import DType
from flame.core.types import Shape
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Operand
from flame.kernel.values import Value, const, fma, read
from flame.ops.contraction.blocking import Blocking, native_lanes
from flame.ops.contraction.factors import (
    Factor,
    Panels,
    Reader,
    clear,
    first_of,
    flat_of,
    open_both,
    panel_bounds,
)
from flame.ops.contraction.fusion import Epilogue

ON_STACK = 32768  # bytes of an array that needs no scratch memory


@dataclass(frozen=True)
class Ways:
    """Where the inner loop reads its factors: as they are, or from copies that a block makes.

    A ``packed`` second factor stands in panels (batch..., panels, depth, lanes) in memory.
    ``copy_at_first``: the columns are copied while the first tile reads them.
    """

    copy_rows: bool
    copy_columns: bool
    copy_at_first: bool
    packed: bool


class TileKernel:
    """Builds the kernel for one problem."""

    def __init__(
        self, rows: Factor, columns: Factor, batch: Shape, dtype: DType, cut: Blocking, ways: Ways,
        epilogue: Epilogue,
    ) -> None:  # fmt: skip
        self.batch, self.dtype, self.cut, self.ways, self.epilogue = (
            batch, dtype, cut, ways, epilogue
        )  # fmt: skip
        self.k = k = KernelBuilder("product")
        self.tile = cut.tile
        self.columns: Reader | None = None
        self.panels: Operand | None = None
        if ways.packed:
            self.rows = Reader(k, rows, dtype)
            self.panels = k.tensor(columns.ref.role, columns.ref.position, columns.type)
            self.panel_batch = columns.type.shape[:-3]
        else:
            self.rows, self.columns = open_both(k, rows, columns, dtype)
        epilogue.declare(k)
        self.at_once = epilogue.repeatable
        native = native_lanes(dtype)
        self.row_lanes = -(-cut.tile.rows // native) * native
        self.room = _round_up(cut.chunk)
        if ways.copy_rows:
            self.row_by_row = cut.chunks == 1 and rows.deep
            kept = 1 if self.row_by_row else cut.tiles
            self.row_copy = self._memory(kept, self.room, self.row_lanes)
        if ways.copy_columns:
            self.column_copy = self._memory(cut.panels, self.room, self.tile.lanes)
        if cut.chunks > 1 or not self.at_once:
            kept = cut.panels * cut.tiles if cut.chunks > 1 else 1
            self.sums = self._memory(kept, self.tile.rows, self.tile.lanes)
        self.m, self.n, self.depth = k.size(cut.m), k.size(cut.n), k.size(cut.depth)
        self.width, self.last_column = panel_bounds(k, cut.n, self.tile.lanes)
        self.last_row = None if cut.m % cut.tile.rows == 0 else k.size(cut.m - cut.tile.rows)

    def _memory(self, count: int, *shape: int) -> Operand:
        count = _power_of_two(count)
        size = count * shape[0] * shape[1] * self.dtype.itemsize
        make = self.k.local if size <= ON_STACK else self.k.scratch
        return make(self.dtype, (count, *shape))

    # --- loops ------------------------------------------------------------------------------------

    def kernel(self) -> BoundKernel:
        k, cut = self.k, self.cut
        work = cut.tiles * cut.panels * cut.depth * cut.tile.rows * cut.tile.vectors
        blocks = (cut.row_blocks, cut.column_blocks)
        with k.parallel(*self.batch, *blocks, work=work) as (*index, row_block, column_block):
            first_tile, tiles = self._part(row_block, cut.tiles, cut.all_tiles)
            first_panel, panels = self._part(column_block, cut.panels, cut.all_panels)
            with k.loop(k.size(cut.chunks)) as chunk:
                begin = chunk * k.size(cut.chunk)
                length = self.depth
                if cut.chunks > 1:
                    length = values.binary("min", self.depth - begin, k.size(cut.chunk))
                depth = (begin, length)
                if self.ways.copy_columns:
                    if cut.n < self.tile.lanes:
                        clear(k, self.column_copy, const(0), length, self.tile.lanes)
                    if not self.ways.copy_at_first:
                        self._copy_columns(index, depth, first_panel, panels)
                if self.ways.copy_rows and not self.row_by_row:
                    self._copy_rows(index, depth, first_tile, tiles)
                done = 0
                if self.ways.copy_at_first:
                    self._tile(index, depth, (first_panel, panels), (first_tile, const(0)), done)
                    done = 1
                with k.loop(tiles - done) as t:
                    tile = (first_tile + (t + done), t + done)
                    self._tile(index, depth, (first_panel, panels), tile, done)
        return k.bind()

    def _tile(
        self, index: Sequence[Value], depth: tuple[Value, Value], panels: tuple[Value, Value],
        tile: tuple[Value, Value], done: int,
    ) -> None:  # fmt: skip
        """A chunk's products of one tile with all panels; ``done`` tiles have passed before."""
        k = self.k
        if self.ways.copy_rows and self.row_by_row:
            tile = (tile[0], const(0))
            self._copy_rows(index, depth, tile[0], const(1))
        with k.loop(panels[1]) as j:
            panel = (panels[0] + j, j)
            self._sum(index, depth, panel, tile, copying=self.ways.copy_at_first and not done)
            if not self.at_once:
                with self._last(depth):
                    self._finish(index, panel, tile)

    def _part(self, block: Value, size: int, total: int) -> tuple[Value, Value]:
        """(first, count) of a block's tiles or panels."""
        k = self.k
        if size >= total:
            return const(0), k.size(total)
        first = block * k.size(size)
        if total % size == 0:
            return first, k.size(size)
        return first, values.binary("min", k.size(total) - first, k.size(size))

    def _copy_rows(
        self, index: Sequence[Value], depth: tuple[Value, Value], first: Value, count: Value
    ) -> None:
        def begin(i: Value) -> Value:
            return first_of(first + i, self.tile.rows, self.last_row)

        def valid(i: Value) -> Value:
            return values.binary("min", self.m - begin(i), const(self.row_lanes))

        panels = Panels(self.row_lanes, count, begin, valid)
        target = self.row_copy
        self.rows.pack(index, depth, panels, target, lambda i: i * target.strides[0])

    def _copy_columns(
        self, index: Sequence[Value], depth: tuple[Value, Value], first: Value, count: Value
    ) -> None:
        assert self.columns is not None
        lanes, target = self.tile.lanes, self.column_copy
        panels = Panels(
            lanes,
            count,
            lambda i: first_of(first + i, lanes, self.last_column),
            lambda _: self.width,
        )
        self.columns.pack(index, depth, panels, target, lambda i: i * target.strides[0])

    def _first_row(self, tile: Value) -> Value:
        return first_of(tile, self.tile.rows, self.last_row)

    def _first_column(self, panel: Value) -> Value:
        return first_of(panel, self.tile.lanes, self.last_column)

    # --- one tile ---------------------------------------------------------------------------------

    def _vector(self) -> AbstractContextManager[Value]:
        return self.k.vector(self.width, self.tile.vectors)

    def _last(self, depth: tuple[Value, Value]) -> AbstractContextManager[None]:
        """What runs with the last chunk of the depth only."""
        if self.cut.chunks == 1:
            return nullcontext()
        return self.k.when(depth[0] + depth[1] >= self.depth)

    def _place(self, panel: Value, tile: Value) -> Value:
        """Where the sums of a tile stand."""
        if self.cut.chunks == 1:
            return const(0)
        return self.sums.at((panel * self.k.size(self.cut.tiles) + tile, const(0), const(0)))

    def _sum(
        self, index: Sequence[Value], depth: tuple[Value, Value], panel: tuple[Value, Value],
        tile: tuple[Value, Value], *, copying: bool,
    ) -> None:  # fmt: skip
        """A chunk's products of one tile and one panel, which is copied as it is read."""
        k, rows, lanes = self.k, self.tile.rows, self.tile.lanes
        begin, length = depth
        first_row, first_column = self._first_row(tile[0]), self._first_column(panel[0])
        with self._vector() as v:
            sums = [k.register(const(0, self.dtype)) for _ in range(rows)]
            with k.loop(length) as step:
                if copying:
                    assert self.columns is not None
                    vector = self.columns.element(index, begin + step, first_column + v)
                    place = self.column_copy.at((panel[1], step, v))
                    k.store(flat_of(self.column_copy), (place,), vector)
                else:
                    vector = self._column(index, begin, step, panel, first_column, v)
                for i, total in enumerate(sums):
                    value = self._row(index, begin, step, tile[1], first_row, i)
                    k.assign(total, fma(value, vector, read(total)))
            at = self._place(panel[1], tile[1])
            if self.cut.chunks > 1:
                with k.when(begin > 0):
                    for i, total in enumerate(sums):
                        before = values.load(self.sums.buffer, at + i * lanes + v)
                        k.assign(total, read(total) + before)
            if self.cut.chunks > 1 or not self.at_once:
                earlier = self.k.when(begin + length < self.depth)
                with earlier if self.at_once else nullcontext():
                    for i, total in enumerate(sums):
                        k.store(flat_of(self.sums), (at + i * lanes + v,), read(total))
            if self.at_once:
                with self._last(depth):
                    for i, total in enumerate(sums):
                        here = (*index, first_row + i, first_column + v)
                        self.epilogue.store(k, here, read(total))

    def _column(
        self, index: Sequence[Value], begin: Value, step: Value, panel: tuple[Value, Value],
        first: Value, v: Value,
    ) -> Value:  # fmt: skip
        lanes = self.tile.lanes
        if self.ways.copy_columns:
            at = self.column_copy.at((panel[1], const(0), const(0)))
            return values.load(self.column_copy.buffer, at + step * lanes + v)
        if self.panels is not None:
            sizes = self.panel_batch
            given = index[len(index) - len(sizes) :]
            own = [i if s > 1 else const(0) for i, s in zip(given, sizes, strict=True)]
            at = self.panels.at((*own, panel[0], const(0), const(0))) + begin * lanes
            return values.load(self.panels.buffer, at + step * lanes + v)
        assert self.columns is not None
        return self.columns.element(index, begin + step, first + v)

    def _row(
        self, index: Sequence[Value], begin: Value, step: Value, place: Value, first: Value, i: int
    ) -> Value:
        if self.ways.copy_rows:
            at = self.row_copy.at((place, const(0), const(0)))
            return values.load(self.row_copy.buffer, at + step * self.row_lanes + i)
        return self.rows.element(index, begin + step, first + i)

    def _finish(
        self, index: Sequence[Value], panel: tuple[Value, Value], tile: tuple[Value, Value]
    ) -> None:
        """Hand the sums of a tile to the epilogue; not those that its neighbour has, too."""
        k, rows, lanes = self.k, self.tile.rows, self.tile.lanes
        row, column = self._first_row(tile[0]), self._first_column(panel[0])
        known_rows = const(0) if self.last_row is None else tile[0] * rows - row
        known_columns = const(0)
        if self.last_column is not None and self.cut.n > lanes:
            known_columns = panel[0] * lanes - column
        at = self._place(panel[1], tile[1]) + known_rows * lanes + known_columns
        row, column = row + known_rows, column + known_columns
        height, width = const(rows) - known_rows, self.width - known_columns
        with k.loop(height) as i, k.vector(width, self.tile.vectors) as v:
            value = values.load(self.sums.buffer, at + i * lanes + v)
            self.epilogue.store(k, (*index, row + i, column + v), value)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _round_up(depth: int) -> int:
    """Room for a depth, from few sizes, so that texts are shared."""
    return max(16, _power_of_two(depth))
