"""Batch normalization of channels that lie side by side in memory (channels-last).

Invariants: the positions are cut into runs that fit the cache; each run's mean and squared
differences to it come from two passes over the run, and runs are combined by the formula of Chan,
Golub and LeVeque ("Updating formulae", 1979), which cancels nothing. Memory is read twice and
written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from flame.core.dtypes import DType
from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering
from flame.kernel.values import Value, cast, const
from flame.ops import batch_tiles
from flame.ops.elementwise import compute_dtype
from flame.ops.norm_kernels import inverse_root
from flame.ops.op import Types
from flame.ops.rows import COLUMNS, Rows, type_of, unroll_for

RUN: Final = 16384  # elements of a run, about
RUNS: Final = 256  # at most


def fits(rows: Rows) -> bool:
    """Whether the kernels here apply: one dimension of channels, and enough positions."""
    return rows.columns and len(rows.kept.sizes) == len(rows.row.sizes) == 1 and rows.length >= RUNS


class _Columns:
    """The sizes of the problem: (positions, channels), and the runs of positions."""

    def __init__(self, rows: Rows, compute: DType) -> None:
        (self.positions,), (self.channels,) = rows.row.sizes, rows.kept.sizes
        self.rows, self.compute = rows, compute
        step = max(RUN // self.channels, -(-self.positions // RUNS), 1)
        self.step, self.runs = step, -(-self.positions // step)
        self.partial = tensor_type(compute, (self.runs, self.channels))
        self.each = tensor_type(compute, (self.channels,))

    def type_of(self, dtype: DType, which: int) -> TensorType:
        """An operand seen as (positions, channels)."""
        strides = (self.rows.row.strides[which][0], self.rows.kept.strides[which][0])
        return tensor_type(dtype, (self.positions, self.channels), strides)

    def parameter(self, t: Any) -> TensorType:
        return tensor_type(t.dtype, (self.channels,), t.strides)


def lower_columns_backward(rows: Rows, types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    """As `norm_kernels.lower_batch_backward`; x, grad and dx lead ``rows``, in this order.

    Sums over runs, then their totals, then dx: grad and x are read twice.
    """
    if outputs[0].device != "cpu" and batch_tiles.fits(rows, (0, 1, 2)):
        return batch_tiles.lower_backward(rows, types, outputs)
    c = _Columns(rows, compute_dtype(type_of(types[1]).dtype))
    kernels = (
        _gradient_runs(c, types),
        _gradient_totals(c, types, outputs),
        _gradient(c, types, outputs),
    )
    run, each = (t.numel * c.compute.itemsize for t in (c.partial, c.each))
    return Lowering(kernels, (run, run, each, each, each))


class _Pass:
    """A pass over blocks of channels of each run."""

    def __init__(self, c: _Columns, k: KernelBuilder) -> None:
        self.c, self.k = c, k
        self.size, self.positions = k.size(c.channels), k.size(c.positions)
        self.step = k.size(c.step)

    @contextmanager
    def runs(self, work: int) -> Iterator[tuple[Value, Value, Value, Value]]:
        """(run, its first position, how many, channel)."""
        blocks = -(-self.c.channels // COLUMNS)
        with self.k.parallel(self.c.runs, blocks, work=self.c.step * COLUMNS * work) as (run, part):
            begin, start = run * self.step, part * COLUMNS
            count = values.binary("min", self.positions - begin, self.step)
            extent = values.binary("min", self.size - start, const(COLUMNS))
            with self.k.vector(extent, unroll_for(self.c.channels)) as lane:
                yield run, begin, count, start + lane


def _gradient_runs(c: _Columns, types: Types) -> BoundKernel:
    """Temporaries 0 and 1: each run's sums of grad, and of grad times (x - mean)."""
    k = KernelBuilder("batch_norm_backward_runs")
    grad, x = (k.tensor("input", i, c.type_of(type_of(types[i]).dtype, 1 - i)) for i in range(2))
    mean = k.tensor("input", 2, c.parameter(types[2]))
    shifts, slopes = (k.tensor("temporary", i, c.partial) for i in range(2))
    with _Pass(c, k).runs(work=2) as (run, begin, count, channel):
        middle = k.register(cast(mean[channel], c.compute))
        shift, slope = (k.register(0.0, c.compute) for _ in range(2))
        with k.loop(count) as i:
            g = cast(grad[begin + i, channel], c.compute)
            k.accumulate(shift, "add", g)
            centred = cast(x[begin + i, channel], c.compute) - values.read(middle)
            k.accumulate(slope, "add", g * centred)
        k.store_all([(shifts, (run, channel), values.read(shift)),
                     (slopes, (run, channel), values.read(slope))])  # fmt: skip
    return k.bind()


def _gradient_totals(c: _Columns, types: Types, outputs: tuple[TensorType, ...]) -> BoundKernel:
    """Outputs 1 and 2: dweight and dbias; temporaries 2 to 4: what `_gradient` needs."""
    k = KernelBuilder("batch_norm_backward_totals")
    shifts, slopes = (k.tensor("temporary", i, c.partial) for i in range(2))
    averages, slants, scales = (k.tensor("temporary", i, c.each) for i in range(2, 5))
    variance = k.tensor("input", 3, c.parameter(types[3]))
    weight = None if types[4] is None else k.tensor("input", 4, c.parameter(types[4]))
    found = [k.tensor("output", i, c.parameter(t)) for i, t in enumerate(outputs) if i]
    eps = k.number(5, float)
    size, runs = k.size(c.channels), k.size(c.runs)
    whole = cast(k.size(c.positions), c.compute)
    with k.parallel(-(-c.channels // COLUMNS), work=c.runs * COLUMNS) as (block,):
        start = block * COLUMNS
        extent = values.binary("min", size - start, const(COLUMNS))
        with k.vector(extent, unroll_for(c.channels)) as lane:
            channel = start + lane
            shift, slope = (k.register(0.0, c.compute) for _ in range(2))
            with k.loop(runs) as run:
                k.accumulate(shift, "add", shifts[run, channel])
                k.accumulate(slope, "add", slopes[run, channel])
            scale = inverse_root(cast(variance[channel], c.compute), eps)
            d_weight, d_bias = values.read(slope) * scale, values.read(shift)
            outer = scale if weight is None else scale * cast(weight[channel], c.compute)
            writes = [(averages, (channel,), d_bias / whole),
                      (slants, (channel,), d_weight / whole * scale),
                      (scales, (channel,), outer)]  # fmt: skip
            writes += [(t, (channel,), v) for t, v in zip(found, (d_weight, d_bias), strict=False)]
            k.store_all(writes)
    return k.bind()


def _gradient(c: _Columns, types: Types, outputs: tuple[TensorType, ...]) -> BoundKernel:
    """Output 0: (grad - average - (x - mean) * slant) * scale."""
    k = KernelBuilder("batch_norm_backward_scale")
    grad, x = (k.tensor("input", i, c.type_of(type_of(types[i]).dtype, 1 - i)) for i in range(2))
    mean = k.tensor("input", 2, c.parameter(types[2]))
    averages, slants, scales = (k.tensor("temporary", i, c.each) for i in range(2, 5))
    dx = k.tensor("output", 0, c.type_of(outputs[0].dtype, 2))
    with _Pass(c, k).runs(work=1) as (_, begin, count, channel):
        middle = k.register(cast(mean[channel], c.compute))
        average, slant, scale = (k.register(t[channel]) for t in (averages, slants, scales))
        with k.loop(count) as i:
            place = (begin + i, channel)
            centred = cast(x[place], c.compute) - values.read(middle)
            inner = cast(grad[place], c.compute) - values.read(average)
            k.store(dx, place, (inner - centred * values.read(slant)) * values.read(scale))
    return k.bind()


def lower_columns(rows: Rows, types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    """As `norm_kernels.lower_forward` with outputs (y, mean, variance); x and y lead ``rows``."""
    given = sum(1 for t in types[1:3] if t is not None)
    if outputs[0].device != "cpu" and batch_tiles.fits(rows, (0, given + 1)):
        return batch_tiles.lower_forward(rows, types, outputs)
    c = _Columns(rows, compute_dtype(type_of(types[0]).dtype))
    kernels = (_runs(c, types), _combined(c, types, outputs), _scaled(c, types, outputs, given + 1))
    nbytes = c.partial.numel * c.compute.itemsize
    return Lowering(kernels, (nbytes, nbytes, c.channels * c.compute.itemsize))


def _runs(c: _Columns, types: Types) -> BoundKernel:
    """Temporaries 0 and 1: each run's mean, and its squared differences to that mean."""
    k = KernelBuilder("batch_norm_runs")
    x = k.tensor("input", 0, c.type_of(type_of(types[0]).dtype, 0))
    means, spreads = (k.tensor("temporary", i, c.partial) for i in range(2))
    blocks = -(-c.channels // COLUMNS)
    size, positions, step = k.size(c.channels), k.size(c.positions), k.size(c.step)
    with k.parallel(c.runs, blocks, work=c.step * COLUMNS * 2) as (run, block):
        begin, start = run * step, block * COLUMNS
        count = values.binary("min", positions - begin, step)
        extent = values.binary("min", size - start, const(COLUMNS))
        with k.vector(extent, unroll_for(c.channels)) as lane:
            channel = start + lane
            total, spread = (k.register(0.0, c.compute) for _ in range(2))
            with k.loop(count) as i:
                k.accumulate(total, "add", cast(x[begin + i, channel], c.compute))
            mean = values.read(total) / cast(count, c.compute)
            with k.loop(count) as i:
                difference = cast(x[begin + i, channel], c.compute) - mean
                k.accumulate(spread, "add", difference * difference)
            k.store_all([(means, (run, channel), mean),
                         (spreads, (run, channel), values.read(spread))])  # fmt: skip
    return k.bind()


def _combined(c: _Columns, types: Types, outputs: tuple[TensorType, ...]) -> BoundKernel:
    """Outputs 1 and 2: mean and variance; temporary 2: weight / sqrt(variance + eps)."""
    k = KernelBuilder("batch_norm_combine")
    means, spreads = (k.tensor("temporary", i, c.partial) for i in range(2))
    scales = k.tensor("temporary", 2, c.each)
    mean_out, variance_out = (k.tensor("output", i, c.parameter(outputs[i])) for i in (1, 2))
    weight = None if types[1] is None else k.tensor("input", 1, c.parameter(types[1]))
    eps = k.number(3, float)
    size, positions, step, runs = (
        k.size(n) for n in (c.channels, c.positions, c.step, c.runs)
    )  # fmt: skip
    whole = cast(positions, c.compute)

    def count(run: Value) -> Value:
        return cast(values.binary("min", positions - run * step, step), c.compute)

    with k.parallel(-(-c.channels // COLUMNS), work=c.runs * COLUMNS) as (block,):
        start = block * COLUMNS
        extent = values.binary("min", size - start, const(COLUMNS))
        with k.vector(extent, unroll_for(c.channels)) as lane:
            channel = start + lane
            total, spread = (k.register(0.0, c.compute) for _ in range(2))
            with k.loop(runs) as run:
                k.accumulate(total, "add", means[run, channel] * count(run))
            mean = values.read(total) / whole
            with k.loop(runs) as run:
                apart = means[run, channel] - mean
                k.accumulate(spread, "add", spreads[run, channel] + apart * apart * count(run))
            variance = values.read(spread) / whole
            scale = inverse_root(variance, eps)
            if weight is not None:
                scale = scale * cast(weight[channel], c.compute)
            k.store_all([(mean_out, (channel,), mean), (variance_out, (channel,), variance),
                         (scales, (channel,), scale)])  # fmt: skip
    return k.bind()


def _scaled(c: _Columns, types: Types, outputs: tuple[TensorType, ...], which: int) -> BoundKernel:
    """Output 0: (x - mean) * scale + bias."""
    k = KernelBuilder("batch_norm_scale")
    x = k.tensor("input", 0, c.type_of(type_of(types[0]).dtype, 0))
    y = k.tensor("output", 0, c.type_of(outputs[0].dtype, which))
    means = k.tensor("output", 1, c.parameter(outputs[1]))
    scales = k.tensor("temporary", 2, c.each)
    bias = None if types[2] is None else k.tensor("input", 2, c.parameter(types[2]))
    blocks = -(-c.channels // COLUMNS)
    size, positions, step = k.size(c.channels), k.size(c.positions), k.size(c.step)
    with k.parallel(c.runs, blocks, work=c.step * COLUMNS) as (run, block):
        begin, start = run * step, block * COLUMNS
        extent = values.binary("min", size - start, const(COLUMNS))
        with k.vector(extent, unroll_for(c.channels)) as lane:
            channel = start + lane
            mean, scale = (k.register(t[channel]) for t in (means, scales))
            shift = k.register(
                const(0.0, c.compute) if bias is None else cast(bias[channel], c.compute)
            )
            with k.loop(values.binary("min", positions - begin, step)) as i:
                centred = cast(x[begin + i, channel], c.compute) - values.read(mean)
                made = centred * values.read(scale) + values.read(shift)
                k.store(y, (begin + i, channel), made)
    return k.bind()
