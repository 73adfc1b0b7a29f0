"""Windows of a source in scratch memory, with zeros where they reach beyond it.

Tiles are numbered (image, row of tiles, column of tiles). A block of them is cut into strips, the
tiles of one row of tiles, whose window is a few whole rows of the source with channels side by
side: so every layout of the source is read in the order of its memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from flame.core import dtypes
from flame.core.types import TensorType
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Operand
from flame.kernel.program import Matrix
from flame.kernel.values import Value, const

FIRST = const(0)
SHORT = 8  # tiles of a strip
GAP = 16  # elements between planes that would else lie a power of two apart


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def extent_of(k: KernelBuilder, number: int) -> Value:
    """A size that is a parameter even where it is 0 or 1, so that more sizes share a text."""
    return k.size(number + 2) - 2


def split_index(k: KernelBuilder, index: Value, extents: Sequence[int]) -> tuple[Value, ...]:
    """The counters of a parallel loop over all ``extents``, each a parameter."""
    found: list[Value] = []
    for extent in reversed(extents[1:]):
        size = extent_of(k, extent)
        found.insert(0, values.binary("urem", index, size))
        index = values.binary("udiv", index, size)
    return index, *found


class Strips:
    """The strips of a block of tiles of a grid (rows, columns) in each image.

    ``most`` tiles a strip are what scratch memory is for: few sizes, so that texts are shared.
    """

    def __init__(self, k: KernelBuilder, grid: tuple[int, int], part: int) -> None:
        self.k, self.grid = k, grid
        self.most = SHORT if grid[1] <= SHORT else round_up(min(part, grid[1]), 2 * SHORT)

    @contextmanager
    def over(self, begin: Value, end: Value) -> Iterator[tuple[Value, Value, Value, Value, Value]]:
        """A loop over the strips: (image, row, column, tiles, number of the first tile in the
        block).
        """
        k = self.k
        rows, columns = (extent_of(k, n) for n in self.grid)
        first = values.binary("udiv", begin, columns)
        count = values.binary("udiv", end - 1, columns) - first + 1
        with k.loop(count) as i:
            line = first + i
            low = values.binary("max", begin, line * columns)
            high = values.binary("min", end, (line + 1) * columns)
            image = values.binary("udiv", line, rows)
            yield image, line - image * rows, low - line * columns, high - low, low - begin


class Window:
    """Scratch memory (rows, columns, depth) for up to ``depth`` channels of a source
    (N, C, 1, H, W); channels that it has not are zeros.
    """

    def __init__(
        self, k: KernelBuilder, source: Operand, type_: TensorType, *, rows: int, columns: int,
        depth: int,
    ) -> None:  # fmt: skip
        self.k, self.source, self.type = k, source, type_
        self.rows, self.depth, self.channels = rows, depth, type_.shape[1]
        self.memory = k.scratch(dtypes.float32, (rows, columns, depth))
        self.flat = Operand(self.memory.buffer, (1,), (const(1),))

    def at(self, column: Value) -> Value:
        return self.memory.at((const(0), column, const(0)))

    def grid(self, at: Value, columns: int) -> list[list[Value]]:
        """The elements of all rows and some columns from ``at``."""
        row, column = self.memory.strides[0], self.memory.strides[1]
        return [
            [values.load(self.memory.buffer, at + (row * i + column * j)) for j in range(columns)]
            for i in range(self.rows)
        ]

    def fill(
        self, image: Value, top: Value, left: Value, columns: Value, channel: Value = FIRST
    ) -> None:
        """Copy the source from row ``top`` and column ``left``, which may be negative."""
        k = self.k
        height, width = k.size(self.type.shape[3]), k.size(self.type.shape[4])
        zero = const(0)
        start = values.binary("min", values.binary("max", -left, zero), columns)
        stop = values.binary("max", values.binary("min", width - left, columns), start)
        count = const(self.depth)
        if self.channels % self.depth:
            count = values.binary("min", k.size(self.channels) - channel, count)
        with k.loop(self.rows) as i:
            row = top + i
            inside = (row >= 0) & (row < height)
            place = self.memory.at((i, zero, zero))
            with k.when(inside):
                if self.channels % self.depth:
                    self._clear(place, zero, columns)
                else:
                    self._clear(place, zero, start)
                    self._clear(place, stop, columns)
                index = image, channel, zero, row, left + start
                self._copy(self.source.at(index), place + start * self.depth, stop - start, count)
            with k.when(~inside):
                self._clear(place, zero, columns)

    def _clear(self, place: Value, begin: Value, end: Value) -> None:
        with self.k.vector((end - begin) * self.depth, 1) as v:
            offset = place + begin * self.depth
            self.k.store(self.flat, (offset + v,), const(0, dtypes.float32))

    def _copy(self, source: Value, place: Value, columns: Value, count: Value) -> None:
        """``columns`` positions of a row, ``count`` channels of each."""
        k, strides, memory = self.k, self.type.strides, self.source.buffer
        step = self.source.strides[4]
        if strides[1] != 1 and (strides[4] == 1 or self.type.shape[4] == 1):
            k.transpose(
                count, columns, Matrix(memory, source, self.source.strides[1]),
                Matrix(self.memory.buffer, place, const(self.depth)),
            )  # fmt: skip
        else:
            unroll = 4 if self.depth % 64 == 0 else 1
            with k.loop(columns) as j, k.vector(count, unroll) as v:
                value = values.load(memory, source + j * step + v * self.source.strides[1])
                k.store(self.flat, (place + j * self.depth + v,), value)
