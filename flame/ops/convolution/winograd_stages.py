"""The stages of Winograd kernels: windows to transformed tiles, weights, products, results.

Layouts: transformed source (points, tiles, channels), transformed weights (points, channels,
lanes), products (points, tiles, lanes), each with a gap between points, as distances that are
powers of two would fall into the same places of a cache.
"""

from __future__ import annotations

import itertools

from flame.core import dtypes
from flame.core.types import TensorType
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Operand
from flame.kernel.program import Matrix
from flame.kernel.values import Value, const, fma, read
from flame.ops.convolution.blocking import vector_bytes
from flame.ops.convolution.windows import Strips, Window
from flame.ops.convolution.winograd_transforms import Map, Transform, both_dimensions

TAPS = 9
ROWS = 8  # of a register tile of sums of outer products
_ORIGIN = (const(0), const(0), const(0))


def flat(operand: Operand) -> Operand:
    """The same memory addressed by one offset."""
    return Operand(operand.buffer, (1,), (const(1),))


def store_points(k: KernelBuilder, target: Operand, offset: Value, grid: list[list[Value]]) -> None:
    """Values of all points of a tile; ``target``'s last but one stride lies between points."""
    distance = target.strides[-2]
    for number, value in enumerate(itertools.chain.from_iterable(grid)):
        k.store(flat(target), (offset + distance * number,), value)


def load_points(source: Operand, offset: Value, size: int) -> list[list[Value]]:
    """What `store_points` stored, in its order."""
    distance = source.strides[-2]
    return [
        [values.load(source.buffer, offset + distance * (i * size + j)) for j in range(size)]
        for i in range(size)
    ]


def transform_strip(
    k: KernelBuilder, one: Map, window: Window, columns: int, step: int, tiles: Value,
    target: Operand, offset: Value,
) -> None:  # fmt: skip
    """The tiles of a filled window, ``columns`` wide and ``step`` apart, to their points."""
    with k.loop(tiles) as tile, k.vector(window.depth, 1) as v:
        grid = window.grid(window.at(tile * step) + v, columns)
        results = both_dimensions(k, one, grid)
        store_points(k, target, offset + tile * window.depth + v, results)


class Weights:
    """Weights (O, C, 1, 3, 3) on the way to their points.

    ``summed_axis``: 1 for forward, 0 for the gradient, whose taps are ``flipped``. ``most``:
    channels summed over that are taken together.
    """

    def __init__(
        self, k: KernelBuilder, position: int, type_: TensorType, t: Transform, *,
        summed_axis: int, flipped: bool, lanes: int, most: int,
    ) -> None:  # fmt: skip
        self.k, self.type, self.t = k, type_, t
        self.source = k.tensor("input", position, type_)
        self.forward, self.flipped = summed_axis == 1, flipped
        self.lanes, self.most = lanes, most
        self.summed, self.own = type_.shape[summed_axis], type_.shape[1 - summed_axis]
        self.rows = k.scratch(dtypes.float32, (most * TAPS, lanes))

    def transform(
        self, first: Value, begin: Value, count: Value, target: Operand, offset: Value
    ) -> None:
        """G w G^T for lanes of channels from ``first`` and ``count`` channels summed over from
        ``begin``; zeros for those that the weight has not.
        """
        k = self.k
        length = values.binary("min", k.size(self.summed) - begin, const(self.most))
        self._load(first, begin, length)
        with k.loop(count) as s, k.vector(self.lanes, 1) as v:
            taps = [[self.rows[s * TAPS + self._tap(i, j), v] for j in range(3)] for i in range(3)]
            results = both_dimensions(k, self.t.weight, taps)
            store_points(k, target, offset + s * self.lanes + v, results)

    def _tap(self, i: int, j: int) -> int:
        return 8 - i * 3 - j if self.flipped else i * 3 + j

    def _load(self, first: Value, begin: Value, length: Value) -> None:
        """rows[channel summed over * 9 + tap, lane], with zeros beyond the last channels."""
        k, lanes, source = self.k, self.lanes, self.source
        height = values.binary("min", k.size(self.own) - first, const(lanes))
        if self.own % lanes or self.summed % self.most:
            with k.vector(self.most * TAPS * lanes, 1) as v:
                k.store(flat(self.rows), (v,), const(0, dtypes.float32))
        if not self.type.contiguous:
            with k.loop(length) as s, k.nest((3, 3)) as (i, j), k.vector(height, 1) as v:
                index = (first + v, begin + s) if self.forward else (begin + s, first + v)
                value = source.load(*index, const(0), i, j)
                k.store(self.rows, (s * TAPS + i * 3 + j, v), value)
        elif self.forward:
            place = source.at((first, begin, *_ORIGIN))
            k.transpose(
                height, length * TAPS, Matrix(source.buffer, place, source.strides[0]),
                Matrix(self.rows.buffer, const(0), const(lanes)),
            )  # fmt: skip
        else:
            with k.loop(length) as s:
                place = source.at((begin + s, first, *_ORIGIN))
                k.transpose(
                    height, const(TAPS), Matrix(source.buffer, place, const(TAPS)),
                    Matrix(self.rows.buffer, s * (TAPS * lanes), const(lanes)),
                )  # fmt: skip


class Products:
    """Products (points, tiles, lanes) of a block of tiles in scratch memory, in register tiles of
    ``rows`` tiles and ``vectors`` vectors of channels.
    """

    def __init__(
        self, k: KernelBuilder, t: Transform, *, part: int, rows: int, lanes: int, vectors: int,
        gap: int,
    ) -> None:  # fmt: skip
        self.k, self.t, self.rows, self.lanes, self.vectors = k, t, rows, lanes, vectors
        self.memory = k.scratch(dtypes.float32, (t.points, part * lanes + gap))

    def add(
        self, point: Value, groups: Value, left: tuple[Operand, Value, int],
        right: tuple[Operand, Value], length: Value, *, fresh: bool,
    ) -> None:  # fmt: skip
        """products[point] (+)= left @ right: ``left`` (groups * rows, length) with the given
        distance of rows, ``right`` (length, lanes); each with the offset of its first element.

        Sums over ``length`` start from 0 and are added to what is there: so rounding errors grow
        with the square root of the length of a run, not of all.
        """
        k, lanes = self.k, self.lanes
        (source, start, distance), (weights, first) = left, right
        memory = flat(self.memory)
        with k.loop(groups) as group:
            begin = start + group * (self.rows * distance)
            target = self.memory.at((point, group * (self.rows * lanes)))
            with k.vector(lanes, self.vectors) as v:
                sums = [k.register(const(0, dtypes.float32)) for _ in range(self.rows)]
                with k.loop(length) as c:
                    vector = values.load(weights.buffer, first + c * lanes + v)
                    for i, total in enumerate(sums):
                        value = values.load(source.buffer, begin + c + i * distance)
                        k.assign(total, fma(value, vector, read(total)))
                for i, total in enumerate(sums):
                    at = target + v + i * lanes
                    k.store(memory, (at,), read(total) if fresh else memory[at] + read(total))


def add_outer_products(
    k: KernelBuilder, sums: Operand, target: Value, left: tuple[Operand, Value],
    right: tuple[Operand, Value], shape: tuple[int, int], length: Value, *, fresh: bool,
) -> None:  # fmt: skip
    """sums (+)= left^T @ right: ``left`` (length, rows) and ``right`` (length, lanes), each with
    the offset of its first element. ``rows`` is a multiple of `ROWS`, ``lanes`` of a vector; the
    sums (rows, lanes) begin at ``target``.
    """
    (source, begin), (other, start), (rows, lanes) = left, right, shape
    dtype = sums.dtype
    native = vector_bytes() // dtype.itemsize
    vectors = next(n for n in (2, 3, 1) if lanes % (n * native) == 0)
    memory = flat(sums)
    with k.loop(lanes // (vectors * native)) as part, k.loop(rows // ROWS) as group:
        column, row = part * (vectors * native), group * ROWS
        place = target + row * lanes + column
        with k.vector(vectors * native, vectors) as v:
            totals = [k.register(const(0, dtype)) for _ in range(ROWS)]
            with k.loop(length) as t:
                vector = values.load(other.buffer, start + column + t * lanes + v)
                for i, total in enumerate(totals):
                    value = values.load(source.buffer, begin + row + t * rows + i)
                    k.assign(total, fma(value, vector, read(total)))
            for i, total in enumerate(totals):
                at = place + v + i * lanes
                k.store(memory, (at,), read(total) if fresh else memory[at] + read(total))


class Results:
    """The way from products to the result (N, O, 1, H, W)."""

    def __init__(
        self, k: KernelBuilder, t: Transform, strips: Strips, out: TensorType,
        bias: TensorType | None, lanes: int,
    ) -> None:  # fmt: skip
        self.k, self.t, self.strips, self.type, self.lanes = k, t, strips, out, lanes
        self.bias = None if bias is None else k.tensor("input", 2, bias)
        self.out = k.tensor("output", 0, out)
        m = t.results
        self.strip = k.scratch(dtypes.float32, (m, strips.most * m, lanes))

    def write(self, products: Operand, begin: Value, end: Value, channel: Value) -> None:
        """Results of the tiles from ``begin`` to ``end``, for ``lanes`` channels."""
        k, m, lanes = self.k, self.t.results, self.lanes
        own = k.size(self.type.shape[1])
        with self.strips.over(begin, end) as (image, row, column, count, first):
            with k.loop(count) as tile, k.vector(lanes, 1) as v:
                start = None
                if self.bias is not None:
                    start = self.bias.load(channel + v, where=channel + v < own)
                grid = load_points(products, (first + tile) * lanes + v, self.t.size)
                results = both_dimensions(k, self.t.result, grid)
                for i, j in itertools.product(range(m), range(m)):
                    value = results[i][j] if start is None else results[i][j] + start
                    k.store(self.strip, (const(i), tile * m + j, v), value)
            height = values.binary("min", k.size(self.type.shape[3]) - row * m, const(m))
            width = values.binary("min", k.size(self.type.shape[4]) - column * m, count * m)
            with k.loop(height) as line:
                self._store_row((image, channel, row * m + line, column * m), line, width)

    def _store_row(
        self, index: tuple[Value, Value, Value, Value], line: Value, width: Value
    ) -> None:
        """Results of ``width`` neighbouring positions, and of a block of channels, from ``index``
        (image, channel, row, column): here, and only here, results leave the kernel.
        """
        k, lanes, channels = self.k, self.lanes, self.type.shape[1]
        image, channel, row, column = index
        place = self.out.at((image, channel, const(0), row, column))
        count = const(lanes)
        if channels % lanes:
            count = values.binary("min", k.size(channels) - channel, const(lanes))
        if self.type.strides[1] == 1:
            with k.loop(width) as j, k.vector(count, 1) as v:
                at = place + j * self.out.strides[4] + v
                k.store(flat(self.out), (at,), self.strip[line, j, v])
            return
        begin = self.strip.at((line, const(0), const(0)))
        k.transpose(
            width, count, Matrix(self.strip.buffer, begin, const(lanes)),
            Matrix(self.out.buffer, place, self.out.strides[1]),
        )  # fmt: skip
