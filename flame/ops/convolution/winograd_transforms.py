"""The linear maps of Winograd's convolutions with 3 x 3 kernels, as straight-line code on values.

With stride 1 a tile of 4 x 4 results comes from 6 x 6 elements of the source, and in general from
n x n products for each pair of channels, as A^T [(G w G^T) * (B^T d B)] A (Lavin & Gray 2015).

The points of F(4, 3) are 0, +-sqrt(1/2), +-sqrt(2) and infinity: its errors in float32 are then
about twice those of the direct sum, while the usual 0, +-1, +-2 lose five times more. Rows that
belong to points p and -p differ in the signs of some coefficients only, which halves the work.

With stride 2, taps 0 and 2 read every other element of the source, tap 1 the elements between: the
first is F(4, 2), of points +-1, +-1/2 and infinity, the second needs 4 products, with one and the
same weight, for 4 results. So 81 products do the work of 144; the input gradient is the same sum
the other way round.

Invariant: 0 is mapped to exactly 0. An infinity or NaN spreads over its tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from flame.core import dtypes
from flame.kernel import values
from flame.kernel.builder import KernelBuilder
from flame.kernel.values import Value, const, fma, read

ROOT = math.sqrt(2)
HALF = math.sqrt(0.5)

Matrix = tuple[tuple[float, ...], ...]
Map = Callable[[Sequence[Value]], list[Value]]


@dataclass(frozen=True)
class Transform:
    """A (n, results), G (n, 3), B^T (n, elements of the source), and the rows that are pairs of p
    and -p. Tiles of the source begin ``step`` elements apart. G's last row stands for all that
    would follow, as they are equal.
    """

    a: Matrix
    g: Matrix
    b: Matrix
    pairs: tuple[tuple[int, int], ...]
    step: int

    @property
    def size(self) -> int:
        """n."""
        return len(self.a)

    @property
    def points(self) -> int:
        """Products for each tile and pair of channels."""
        return self.size**2

    @property
    def weights(self) -> int:
        """Different rows of G."""
        return len(self.g)

    def weight_of(self, point: Value) -> tuple[Value, Value]:
        """(the number of a point's weight, whether no point before has the same)."""
        if self.weights == self.size:
            return point, const(True, dtypes.bool_)
        last = const(self.weights - 1)
        row = values.binary("udiv", point, const(self.size))
        column = point - row * self.size
        number = values.binary("min", row, last) * self.weights + values.binary("min", column, last)
        return number, (row <= last) & (column <= last)

    @property
    def results(self) -> int:
        """Of a tile, in each dimension."""
        return len(self.a[0])

    @property
    def reach(self) -> int:
        """Elements of the source that a tile reads, in each dimension."""
        return len(self.b[0])

    def source(self, d: Sequence[Value]) -> list[Value]:
        """B^T d."""
        return _expand(self.b, self.pairs, d)

    def weight(self, w: Sequence[Value]) -> list[Value]:
        """G w."""
        return _expand(self.g, self.pairs, w)

    def gradient(self, y: Sequence[Value]) -> list[Value]:
        """A y."""
        return _expand(self.a, self.pairs, y)

    def result(self, products: Sequence[Value]) -> list[Value]:
        """A^T m."""
        return _contract(self.a, self.pairs, products)

    def weight_result(self, products: Sequence[Value]) -> list[Value]:
        """G^T m."""
        return _contract(self.g, self.pairs, products)


def _unit(length: int, place: int) -> tuple[float, ...]:
    return tuple(float(i == place) for i in range(length))


@cache
def unstrided() -> Transform:
    """F(4, 3); flipped weights make it the input gradient's."""
    points = (HALF, -HALF, ROOT, -ROOT)
    factors = (-2 / 3, -2 / 3, 1 / 6, 1 / 6)
    squares = (0.5, 0.5, 2.0, 2.0)
    a = tuple((1.0, p, s, p * s) for p, s in zip(points, squares, strict=True))
    g = tuple((f, f * p, f * s) for f, p, s in zip(factors, points, squares, strict=True))
    b = tuple(
        (0.0, -p * (2.5 - s), s - 2.5, p, 1.0, 0.0) for p, s in zip(points, squares, strict=True)
    )
    return Transform(
        (_unit(4, 0), *a, _unit(4, 3)),
        (_unit(3, 0), *g, _unit(3, 2)),
        ((1.0, 0.0, -2.5, 0.0, 1.0, 0.0), *b, (0.0, 1.0, 0.0, -2.5, 0.0, 1.0)),
        ((1, 2), (3, 4)),
        step=4,
    )


def _two_taps() -> tuple[Matrix, Matrix, Matrix]:
    """A (5, 4), G (5, 2) and B^T (5, 5) of F(4, 2); its first four rows are pairs."""
    points = (1.0, -1.0, 0.5, -0.5)
    squares = (0.25, 0.25, 1.0, 1.0)  # of the other pair
    a = tuple((1.0, p, p**2, p**3) for p in points)
    factors = [1 / (2 * p * (p * p - q)) for p, q in zip(points, squares, strict=True)]
    g = tuple((f, f * p) for f, p in zip(factors, points, strict=True))
    b = tuple((-p * q, -q, p, 1.0, 0.0) for p, q in zip(points, squares, strict=True))
    return (*a, _unit(4, 3)), (*g, _unit(2, 1)), (*b, (0.25, 0.0, -1.25, 0.0, 1.0))


def _every_other(row: tuple[float, ...], length: int, first: int) -> tuple[float, ...]:
    """A row spread to the places first, first + 2, ... of a longer one."""
    found = [0.0] * length
    found[first : first + 2 * len(row) : 2] = row
    return tuple(found)


@cache
def strided() -> Transform:
    """4 results of stride 2 from 9 elements of the source."""
    a, g, b = _two_taps()
    return Transform(
        (*a, *(_unit(4, i) for i in range(4))),
        (*(_every_other(row, 3, 0) for row in g), _unit(3, 1)),
        (*(_every_other(row, 9, 0) for row in b), *(_unit(9, 2 * i + 1) for i in range(4))),
        ((0, 1), (2, 3)),
        step=8,
    )


@cache
def strided_gradient() -> Transform:
    """8 elements of the source's gradient, the first of them read by tap 1 alone, from 5 of the
    result's.
    """
    a, g, b = _two_taps()
    return Transform(
        (*(_every_other(row, 8, 1) for row in a), *(_unit(8, 2 * i) for i in range(4))),
        (*(_every_other(row[::-1], 3, 0) for row in g), _unit(3, 1)),
        (*b, *(_unit(5, i) for i in range(4))),
        ((0, 1), (2, 3)),
        step=4,
    )


def both_dimensions(
    k: KernelBuilder, one: Map, grid: Sequence[Sequence[Value]]
) -> list[list[Value]]:
    """``one`` along the columns of a grid of values, then along its rows.

    Columns are kept in registers one after the other, so that few loads wait at a time.
    """
    columns = [
        [read(k.register(value)) for value in one(column)] for column in zip(*grid, strict=True)
    ]
    return [one(row) for row in zip(*columns, strict=True)]


def _number(number: float) -> Value:
    return const(number, dtypes.float32)


def _sum(terms: Sequence[tuple[float, Value]]) -> Value:
    """The sum of factor * value, starting with a term that needs no product."""
    kept = sorted((t for t in terms if t[0]), key=lambda t: t[0] != 1)
    factor, value = kept[0]
    total = value if factor == 1 else -value if factor == -1 else value * _number(factor)
    for factor, value in kept[1:]:
        if factor in (1, -1):
            total = total + value if factor == 1 else total - value
        else:
            total = fma(value, _number(factor), total)
    return total


def _expand(matrix: Matrix, pairs: Sequence[tuple[int, int]], x: Sequence[Value]) -> list[Value]:
    """matrix @ x."""
    found: dict[int, Value] = {}
    for first, second in pairs:
        rows = [*zip(matrix[first], matrix[second], x, strict=True)]
        even = [(p, value) for p, q, value in rows if p and p == q]
        odd = [(p, value) for p, q, value in rows if p and p != q]
        lead = odd[-1][0]
        e, o = _sum(even), _sum([(p / lead, value) for p, value in odd])
        found[first] = _sum([(1.0, e), (lead, o)])
        found[second] = _sum([(1.0, e), (-lead, o)])
    return [
        found[i] if i in found else _sum([*zip(row, x, strict=True)])
        for i, row in enumerate(matrix)
    ]


def _contract(matrix: Matrix, pairs: Sequence[tuple[int, int]], x: Sequence[Value]) -> list[Value]:
    """matrix^T @ x."""
    sums = [x[i] + x[j] for i, j in pairs]
    differences = [x[i] - x[j] for i, j in pairs]
    alone = [i for i in range(len(matrix)) if not any(i in pair for pair in pairs)]
    results = []
    for column in range(len(matrix[0])):
        terms = [(matrix[i][column], x[i]) for i in alone]
        for (i, j), s, d in zip(pairs, sums, differences, strict=True):
            p, q = matrix[i][column], matrix[j][column]
            terms.append((p, s if p == q else d))
        results.append(_sum(terms))
    return results
