"""Kernels of the normalizations: statistics, scale and shift in one visit of each row.

Invariants: variances are means of squared differences to the mean, taken in a second pass over a
row that is in cache, so no cancellation occurs (on a GPU see `Statistics.moments`); statistics of
half-width floats are float32.
"""

from __future__ import annotations

from collections.abc import Callable

from flame.core.dtypes import DType
from flame.core.types import Shape, TensorType
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const
from flame.ops import schedules
from flame.ops.elementwise import compute_dtype
from flame.ops.op import Types
from flame.ops.rows import Index, RowLoops, Rows, rows_of, type_of

Load = Callable[[Operand, Index], Value]


class Statistics:
    """Sums over one row, written into a kernel."""

    def __init__(self, loops: RowLoops, compute: DType, count: Value) -> None:
        self.loops, self.k, self.compute = loops, loops.k, compute
        self.count = cast(count, compute)

    def load(self, operand: Operand, index: Index) -> Value:
        return cast(operand[index], self.compute)

    def sums(self, row: Index, terms: Callable[[Index], tuple[Value, ...]], n: int) -> list[Value]:
        """Sums of ``n`` terms over the row."""
        totals = [self.k.register(0.0, self.compute) for _ in range(n)]
        with self.loops.each(row) as index:
            for total, term in zip(totals, terms(index), strict=True):
                self.k.accumulate(total, "add", term)
        return [values.read(total) for total in totals]

    def mean(self, x: Operand, row: Index) -> Value:
        (total,) = self.sums(row, lambda index: (self.load(x, index),), 1)
        return total / self.count

    def variance(self, x: Operand, row: Index, mean: Value) -> Value:
        def square(index: Index) -> tuple[Value]:
            difference = self.load(x, index) - mean
            return (difference * difference,)

        return self.sums(row, square, 1)[0] / self.count

    def moments(self, x: Operand, row: Index, first: Index) -> tuple[Value, Value]:
        """Mean and variance from one visit, for a GPU, where each sum is a wait of all threads.

        Differences are those to an element of the row, so little cancels: with n elements the error
        of the variance is below n ulp of it, and about an ulp where that element is a usual one.
        """
        shift = self.k.register(self.load(x, first))

        def terms(index: Index) -> tuple[Value, Value]:
            difference = self.load(x, index) - values.read(shift)
            return difference, difference * difference

        total, squares = self.sums(row, terms, 2)
        return values.read(shift) + total / self.count, spread_of(total, squares, self.count)


def spread_of(total: Value, squares: Value, count: Value) -> Value:
    """The variance of ``count`` numbers from their sum and that of their squares."""
    inner = squares - total * (total / count)
    return values.binary("max", inner, const(0.0, inner.dtype)) / count


def inverse_root(variance: Value, eps: Value) -> Value:
    """1 / sqrt(variance + eps)."""
    return const(1.0, variance.dtype) / values.unary("sqrt", variance + cast(eps, variance.dtype))


class NormKernel:
    """A kernel over the rows of x, with scale and shift as far as they are given.

    operands: (role, position, dtype, strides in the dimensions ``sizes``); the first decides the
    order of the loops.
    """

    def __init__(
        self, name: str, sizes: Shape, reduced: tuple[int, ...],
        operands: list[tuple[str, int, DType, Shape]], compute: DType,
    ) -> None:  # fmt: skip
        self.k = KernelBuilder(name)
        self.rows: Rows = rows_of(sizes, reduced, [o[3] for o in operands])
        self.loops = RowLoops(self.k, self.rows)
        self.operands: dict[tuple[str, int], Operand] = {}
        for which, (role, position, dtype, _) in enumerate(operands):
            made = self.rows.operand(self.k, role, position, dtype, which)  # type: ignore[arg-type]
            self.operands[role, position] = made
        self.statistics = Statistics(self.loops, compute, self.k.size(self.rows.length))


def lower_forward(
    name: str, sizes: Shape, reduced: tuple[int, ...], types: Types,
    outputs: tuple[TensorType, ...], strides: list[Shape | None], *, centred: bool,
) -> Lowering:  # fmt: skip
    """y = (x - mean) * rstd * weight + bias; outputs (y,) or (y, mean, variance).

    ``strides`` of x, weight, bias and the outputs in the dimensions ``sizes``; None: left out.
    """
    x_type = type_of(types[0])
    compute = compute_dtype(x_type.dtype)
    operands: list[tuple[str, int, DType, Shape]] = []
    for position in range(3):
        s = strides[position]
        if s is not None:
            operands.append(("input", position, type_of(types[position]).dtype, s))
    for position, out in enumerate(outputs):
        s = strides[3 + position]
        assert s is not None
        operands.append(("output", position, out.dtype, s))
    kernel = NormKernel(name, sizes, reduced, operands, compute)
    k, statistics = kernel.k, kernel.statistics
    eps = k.number(3, float)
    found = kernel.operands
    x, y = found["input", 0], found["output", 0]
    weight, bias = found.get(("input", 1)), found.get(("input", 2))
    load = statistics.load
    with kernel.loops.each_row(passes=4) as row:
        first = (*row, *(const(0) for _ in kernel.rows.row.sizes))
        if centred and schedules.on_gpu(outputs[0]):
            mean, variance = statistics.moments(x, row, first)
        elif centred:
            mean = statistics.mean(x, row)
            variance = statistics.variance(x, row, mean)
        else:
            mean = const(0.0, compute)
            variance = statistics.variance(x, row, mean)
        scale = inverse_root(variance, eps)
        with kernel.loops.each(row) as index:
            made = (load(x, index) - mean) * scale
            if weight is not None:
                made = made * load(weight, index)
            if bias is not None:
                made = made + load(bias, index)
            k.store(y, index, made)
        if len(outputs) > 1:
            k.store(found["output", 1], first, mean)
            k.store(found["output", 2], first, variance)
    return k.finish()


def lower_batch_backward(
    sizes: Shape, reduced: tuple[int, ...], types: Types, outputs: tuple[TensorType, ...],
    strides: list[Shape | None],
) -> Lowering:  # fmt: skip
    """Of (grad, x, mean, variance, weight, eps): dx, dweight, dbias; each row is a channel."""
    compute = compute_dtype(type_of(types[1]).dtype)
    operands: list[tuple[str, int, DType, Shape]] = []
    for position in (1, 0, 2, 3, 4):  # x first: it decides the order of the loops
        s = strides[position]
        if s is not None:
            operands.append(("input", position, type_of(types[position]).dtype, s))
    for position, out in enumerate(outputs):
        s = strides[6 + position]
        assert s is not None
        operands.append(("output", position, out.dtype, s))
    kernel = NormKernel("batch_norm_backward", sizes, reduced, operands, compute)
    k, statistics, found = kernel.k, kernel.statistics, kernel.operands
    eps = k.number(5, float)
    load = statistics.load
    grad, x, dx = found["input", 0], found["input", 1], found["output", 0]
    with kernel.loops.each_row(passes=3) as row:
        first = (*row, *(const(0) for _ in kernel.rows.row.sizes))
        mean = load(found["input", 2], first)
        scale = inverse_root(load(found["input", 3], first), eps)

        def terms(index: Index) -> tuple[Value, Value]:
            g = load(grad, index)
            return g, g * ((load(x, index) - mean) * scale)

        shift, slope = statistics.sums(row, terms, 2)
        if len(outputs) > 1:
            k.store(found["output", 1], first, slope)
            k.store(found["output", 2], first, shift)
        outer = scale
        if ("input", 4) in found:
            outer = scale * load(found["input", 4], first)
        average, along = shift / statistics.count, slope / statistics.count * scale
        with kernel.loops.each(row) as index:
            centred = load(x, index) - mean
            k.store(dx, index, (load(grad, index) - average - centred * along) * outer)
    return k.finish()
