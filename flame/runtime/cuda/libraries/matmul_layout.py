"""A matrix product in the terms of cuBLASLt, as plain data: column-major layouts and flags.

Invariant: nothing is copied. A matrix whose rows are contiguous is, read in columns, its own
transpose; so a row-major d is asked for as dᵀ = bᵀ aᵀ, and whatever else is transposed is said by
a flag. `Description` holds all that decides a plan, hence it is the key under which one is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from flame.core.dtypes import DType, bfloat16, float16, float32, float64
from flame.kernel.library import Batch, MatmulProblem

WIDEST = 16  # bytes that the library loads at once; more alignment than this buys nothing
DTYPES = frozenset(
    {
        (float64, float64),
        (float32, float32),
        (float16, float16),
        (float16, float32),
        (bfloat16, bfloat16),
        (bfloat16, float32),
    }
)
NEEDS_BIAS = frozenset({"bias", "relu_bias", "gelu_bias", "gelu_aux_bias"})
NEEDS_AUX = frozenset({"gelu_aux_bias", "dgelu"})


@dataclass(frozen=True)
class Layout:
    """A column-major matrix: element (i, j) at i + j * leading; of batches, ``step`` apart."""

    rows: int
    columns: int
    leading: int
    step: int


@dataclass(frozen=True)
class Description:
    """result = epilogue(op(first) op(second)), all column-major, for ``count`` matrices at once.

    ``swapped``: first is the problem's b and result is dᵀ; else first is a and result is d.
    ``offsets``: of (a, b, d) in elements, one library call each. ``alignment``: of all pointers, in
    bytes, that the shapes allow. ``empty_sum``: k was 0; the factors are zeros of the workspace, of
    m and of n elements. ``idle``: there is nothing to do.
    """

    dtype: DType
    result_dtype: DType
    precision: str
    epilogue: str
    accumulate: bool
    swapped: bool
    transpose_first: bool
    transpose_second: bool
    first: Layout
    second: Layout
    result: Layout
    count: int
    offsets: tuple[tuple[int, int, int], ...]
    alignment: int
    empty_sum: bool = False
    idle: bool = False

    @property
    def flops(self) -> int:
        """Multiplications and additions of the whole problem."""
        inner = self.first.rows if self.transpose_first else self.first.columns
        each = 2 * self.result.rows * self.result.columns * inner
        return each * self.count * len(self.offsets)


def describe(problem: MatmulProblem) -> Description | None:
    """The problem for cuBLASLt; None where it has no form there:

    - other dtypes, and strides that are no leading dimension;
    - a bias where neither the rows of d are contiguous nor n is 1 (cuBLASLt's runs along columns);
    - an aux whose leading dimension is no multiple of 8;
    - accumulation after anything but the bias, since beta comes before the epilogue there.
    """
    if (problem.dtype, problem.result) not in DTYPES or not _epilogue_fits(problem):
        return None
    if any(batch.size > 1 and batch.d == 0 for batch in problem.batch):
        return None  # matrices of the result that lie in the same place
    problem = _fold_rows(replace(problem, batch=_merge(problem.batch)))
    empty_sum = problem.k == 0
    if empty_sum:
        shared = tuple(Batch(batch.size, 0, 0, batch.d) for batch in problem.batch)
        problem = replace(problem, k=1, a=(1, 1), b=(1, 1), batch=shared)
    return _describe(problem, empty_sum)


def _describe(problem: MatmulProblem, empty_sum: bool) -> Description | None:
    m, n, k = problem.m, problem.n, problem.k
    a, b = _form(m, k, problem.a), _form(k, n, problem.b)
    d = _form(m, n, problem.d, rows_first=True)
    if a is None or b is None or d is None:
        return None
    swapped = d[0]
    if not swapped and problem.epilogue in NEEDS_BIAS:
        return None
    if problem.epilogue in NEEDS_AUX and d[1] % 8:
        return None
    library, looped = _choose(problem.batch)

    def layout(form: tuple[bool, int], rows: int, columns: int, step: int) -> Layout:
        sizes = (columns, rows) if form[0] else (rows, columns)
        return Layout(*sizes, form[1], step)

    of_a, of_b = layout(a, m, k, library.a), layout(b, k, n, library.b)
    first, second = ((b, of_b), (a, of_a)) if swapped else ((a, of_a), (b, of_b))
    offsets = _offsets(looped)
    return Description(
        problem.dtype,
        problem.result,
        problem.precision if problem.dtype is float32 else "highest",
        problem.epilogue,
        problem.accumulate,
        swapped,
        # op(first) is bᵀ where swapped, else a: what a form that keeps rows together holds is the
        # transpose already.
        transpose_first=first[0][0] is not swapped,
        transpose_second=second[0][0] is not swapped,
        first=first[1],
        second=second[1],
        result=layout(d, m, n, library.d),
        count=library.size,
        offsets=offsets,
        alignment=_alignment(problem, library, offsets),
        empty_sum=empty_sum,
        idle=0 in (m, n, *(batch.size for batch in problem.batch))
        or (empty_sum and problem.accumulate and problem.epilogue == "none"),
    )


def _epilogue_fits(problem: MatmulProblem) -> bool:
    if problem.dtype is float64 and "gelu" in problem.epilogue:
        return False
    return not problem.accumulate or problem.epilogue in ("none", "bias")


def _form(
    rows: int, columns: int, strides: tuple[int, int], *, rows_first: bool = False
) -> tuple[bool, int] | None:
    """(whether rows are contiguous, leading dimension) of a matrix; None where neither rows nor
    columns are. Where both are, the longer run is taken, unless ``rows_first``."""
    row, column = strides
    by_row = row if rows > 1 else max(columns, 1)
    by_column = column if columns > 1 else max(rows, 1)
    rows_fit = (column == 1 or columns <= 1) and by_row >= max(columns, 1)
    columns_fit = (row == 1 or rows <= 1) and by_column >= max(rows, 1)
    if rows_fit and (rows_first or not columns_fit or columns > 1 or rows <= 1):
        return True, by_row
    return (False, by_column) if columns_fit else None


def _merge(batches: tuple[Batch, ...]) -> tuple[Batch, ...]:
    """Without dimensions of size 1, and with neighbours joined that all matrices have as one."""
    merged: list[Batch] = []
    for batch in batches:
        if batch.size == 1:
            continue
        outer = merged[-1] if merged else None
        if outer is not None and (outer.a, outer.b, outer.d) == (
            batch.size * batch.a,
            batch.size * batch.b,
            batch.size * batch.d,
        ):
            merged[-1] = Batch(outer.size * batch.size, batch.a, batch.b, batch.d)
        else:
            merged.append(batch)
    return tuple(merged)


def _fold_rows(problem: MatmulProblem) -> MatmulProblem:
    """Batches that share b and continue the rows of a and d, as rows of one larger product."""
    while problem.batch and problem.m > 0:
        *outer, inner = problem.batch
        row_a, row_d = problem.a[0], problem.d[0]
        if problem.m == 1:
            row_a, row_d = inner.a, inner.d
        follows = (inner.a, inner.d) == (problem.m * row_a, problem.m * row_d)
        a, d = (row_a, problem.a[1]), (row_d, problem.d[1])
        m = problem.m * inner.size
        fits = _form(m, problem.k, a) and _form(m, problem.n, d, rows_first=True)
        keeps = problem.d[1] == 1 or problem.n == 1
        if inner.b or not follows or not fits or not keeps:
            break
        problem = replace(problem, m=m, a=a, d=d, batch=tuple(outer))
    return problem


def _choose(batches: tuple[Batch, ...]) -> tuple[Batch, tuple[Batch, ...]]:
    """The largest dimension, for the library's batch; the others, to loop over."""
    if not batches:
        return Batch(1, 0, 0, 0), ()
    at = max(range(len(batches)), key=lambda index: batches[index].size)
    return batches[at], batches[:at] + batches[at + 1 :]


def _offsets(looped: tuple[Batch, ...]) -> tuple[tuple[int, int, int], ...]:
    ranges = [range(batch.size) for batch in looped]
    return tuple(
        (
            sum(i * batch.a for i, batch in zip(at, looped, strict=True)),
            sum(i * batch.b for i, batch in zip(at, looped, strict=True)),
            sum(i * batch.d for i, batch in zip(at, looped, strict=True)),
        )
        for at in product(*ranges)
    )


def _alignment(
    problem: MatmulProblem, library: Batch, offsets: tuple[tuple[int, int, int], ...]
) -> int:
    """Bytes to which every matrix is aligned if the operands are to `WIDEST`."""
    factor, result = problem.dtype.itemsize, problem.result.itemsize
    bits = WIDEST | (library.a | library.b) * factor | library.d * result
    for a, b, d in offsets:
        bits |= (a | b) * factor | d * result
    return bits & -bits
