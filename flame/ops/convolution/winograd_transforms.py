"""The linear maps of Winograd's convolution F(m x m, 3 x 3), as straight-line code on values.

A tile of m x m results comes from n x n elements of the source, n = m + 2, as A^T [(G w G^T) *
(B^T d B)] A (Lavin & Gray 2015). The points of F(4 x 4) are 0, +-sqrt(1/2), +-sqrt(2) and infinity:
its errors in float32 are then about twice those of the direct sum, while the usual 0, +-1, +-2 lose
five times more. Rows that belong to points p and -p differ in the signs of their odd coefficients
only, which halves the work.

Invariant: 0 is mapped to exactly 0. An infinity or NaN spreads over its tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from flame.core import dtypes
from flame.kernel.builder import KernelBuilder
from flame.kernel.values import Value, const, fma, read

ROOT = math.sqrt(2)
HALF = math.sqrt(0.5)

Matrix = tuple[tuple[float, ...], ...]
Map = Callable[[Sequence[Value]], list[Value]]


@dataclass(frozen=True)
class Transform:
    """F(m x m, 3 x 3): A (n, m), G (n, 3), B^T (n, n), and the rows that are pairs of p and -p."""

    results: int
    a: Matrix
    g: Matrix
    b: Matrix
    pairs: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """n."""
        return self.results + 2

    @property
    def points(self) -> int:
        """Products for each tile and pair of channels."""
        return self.size**2

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


def _four() -> Transform:
    points = (HALF, -HALF, ROOT, -ROOT)
    factors = (-2 / 3, -2 / 3, 1 / 6, 1 / 6)
    squares = (0.5, 0.5, 2.0, 2.0)
    a = tuple((1.0, p, s, p * s) for p, s in zip(points, squares, strict=True))
    g = tuple((f, f * p, f * s) for f, p, s in zip(factors, points, squares, strict=True))
    b = tuple(
        (0.0, -p * (2.5 - s), s - 2.5, p, 1.0, 0.0) for p, s in zip(points, squares, strict=True)
    )
    return Transform(
        4,
        ((1.0, 0.0, 0.0, 0.0), *a, (0.0, 0.0, 0.0, 1.0)),
        ((1.0, 0.0, 0.0), *g, (0.0, 0.0, 1.0)),
        ((1.0, 0.0, -2.5, 0.0, 1.0, 0.0), *b, (0.0, 1.0, 0.0, -2.5, 0.0, 1.0)),
        ((1, 2), (3, 4)),
    )


def _two() -> Transform:
    return Transform(
        2,
        ((1.0, 0.0), (1.0, 1.0), (1.0, -1.0), (0.0, 1.0)),
        ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0)),
        (
            (1.0, 0.0, -1.0, 0.0),
            (0.0, 1.0, 1.0, 0.0),
            (0.0, -1.0, 1.0, 0.0),
            (0.0, -1.0, 0.0, 1.0),
        ),
        ((1, 2),),
    )


@cache
def transform(results: int) -> Transform:
    """F(4 x 4, 3 x 3) or F(2 x 2, 3 x 3)."""
    return {4: _four, 2: _two}[results]()


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
