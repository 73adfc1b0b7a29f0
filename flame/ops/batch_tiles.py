"""Batch normalization of channels-last images on a GPU, and its gradient.

Three kernels each way: sums of runs of positions, their totals, then one pass that writes the
result. Sums of squares are taken of differences to a number of the run itself, or to the mean where
it is known; runs are combined by the formula of Chan, Golub and LeVeque ("Updating formulae",
1979). With n elements the error of a variance is below n ulp of it, whatever the numbers are, and
about an ulp where the first of a run is a usual one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from flame.core.dtypes import DType
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const
from flame.ops.elementwise import compute_dtype
from flame.ops.norm_kernels import inverse_root
from flame.ops.op import Types
from flame.ops.rows import Rows, type_of
from flame.ops.tiles import Lane, Run, Tiles, folded, runs, sum_runs, tiles_of

PASS_BLOCKS: Final = 132 * 16  # runs of the pass that writes the result, about
PASS_TILES: Final = 8  # tiles of a run there, at least


def fits(rows: Rows, which: Sequence[int]) -> bool:
    """Whether the operands ``which`` are (positions, channels), row-major and dense."""
    if len(rows.kept.sizes) != 1 or len(rows.row.sizes) != 1:
        return False
    dense = ((1,), rows.kept.sizes)
    return all((rows.kept.strides[i], rows.row.strides[i]) == dense for i in which)


def pass_tiles(shape: Shape, itemsize: int) -> Tiles:
    """The tiles of the pass that writes the result."""
    return tiles_of(shape, itemsize, blocks=PASS_BLOCKS, shortest=PASS_TILES)


def count_of_run(k: KernelBuilder, tiles: Tiles, compute: DType, run: Value) -> Value:
    """Positions of run number ``run`` of an image, as a number of ``compute``."""
    step = k.size(tiles.step)
    return cast(values.binary("min", k.size(tiles.positions) - run * step, step), compute)


def moments_of_runs(name: str, x: TensorType, tiles: Tiles, compute: DType) -> BoundKernel:
    """Temporaries 0 and 1, of input 0: each run's mean, and its squared differences to it."""
    k = KernelBuilder(name)
    source = tiles.image(k, "input", 0, x.dtype)
    means, spreads = (k.tensor("temporary", i, tiles.sums(compute)) for i in range(2))

    def shift(run: Run, channel: Value) -> Value:
        return cast(source[run.base + channel], compute)

    def terms(lane: Lane) -> Any:
        first = k.register(shift(lane.run, lane.channel))

        def of(place: Value, where: Value | None) -> Sequence[Value]:
            difference = cast(source.load(place, where=where), compute) - values.read(first)
            if where is not None:
                difference = values.select(where, difference, const(0.0, compute))
            return difference, difference * difference

        return of

    def finished(run: Run, channel: Value, sums: list[Value]) -> None:
        average = sums[0] / cast(run.count, compute)
        spread = values.binary("max", sums[1] - sums[0] * average, const(0.0, compute))
        mean = shift(run, channel) + average
        k.store_all(
            [(means, (run.number, channel), mean), (spreads, (run.number, channel), spread)]
        )

    sum_runs(k, tiles, compute, 2, terms, finished)
    return k.bind()


class _Batch:
    """One call: images (1, positions, channels), and the types of its parameters."""

    def __init__(self, rows: Rows, x: TensorType, others: Sequence[TensorType]) -> None:
        (self.positions,), (self.channels,) = rows.row.sizes, rows.kept.sizes
        shape = (1, self.positions, self.channels)
        self.compute = compute_dtype(x.dtype)
        self.sums = tiles_of(shape, x.dtype.itemsize)
        itemsize = max(t.dtype.itemsize for t in (x, *others))
        self.whole = pass_tiles(shape, itemsize)
        self.each = tensor_type(self.compute, (self.channels,))

    def parameter(self, t: Any) -> TensorType:
        return tensor_type(t.dtype, (self.channels,), t.strides)

    def temporaries(self, each: int) -> tuple[int, ...]:
        """Bytes: sums of runs twice, and ``each`` numbers for every channel."""
        sums = self.sums.sums(self.compute).numel
        return tuple(n * self.compute.itemsize for n in (sums, sums, *(self.channels,) * each))


def lower_forward(rows: Rows, types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    """As `norm_kernels.lower_forward` with outputs (y, mean, variance)."""
    x = type_of(types[0])
    b = _Batch(rows, x, outputs[:1])
    kernels = (
        moments_of_runs("batch_norm_runs", x, b.sums, b.compute),
        _combined(b, types, outputs),
        _scaled(b, types, outputs),
    )
    return Lowering(kernels, b.temporaries(1))


def _combined(b: _Batch, types: Types, outputs: tuple[TensorType, ...]) -> BoundKernel:
    """Outputs 1 and 2: mean and variance; temporary 2: weight / sqrt(variance + eps)."""
    k = KernelBuilder("batch_norm_combine")
    compute = b.compute
    means, spreads = (k.tensor("temporary", i, b.sums.sums(compute)) for i in range(2))
    scales = k.tensor("temporary", 2, b.each)
    mean_out, variance_out = (k.tensor("output", i, b.parameter(outputs[i])) for i in (1, 2))
    weight = None if types[1] is None else k.tensor("input", 1, b.parameter(types[1]))
    eps = k.number(3, float)
    whole = cast(k.size(b.positions), compute)
    shift = const(0)

    def terms(run: Value, channel: Value) -> Sequence[Value]:
        count = count_of_run(k, b.sums, compute, run)
        apart = means[run, channel] - means[shift, channel]
        return apart * count, spreads[run, channel] + apart * apart * count

    with folded(k, b.sums.runs, b.channels, compute, 2, terms) as (channel, where, sums):
        average = sums[0] / whole
        inner = values.binary("max", sums[1] - sums[0] * average, const(0.0, compute))
        first = means.load(shift, channel, where=where)
        mean, variance = first + average, inner / whole
        scale = inverse_root(variance, eps)
        if weight is not None:
            scale = scale * cast(weight.load(channel, where=where), compute)
        index = (channel,)
        writes = [(mean_out, index, mean), (variance_out, index, variance), (scales, index, scale)]
        k.store_all(writes, where)
    return k.bind()


def _scaled(b: _Batch, types: Types, outputs: tuple[TensorType, ...]) -> BoundKernel:
    """Output 0: (x - mean) * scale + bias."""
    k = KernelBuilder("batch_norm_scale")
    x = b.whole.image(k, "input", 0, type_of(types[0]).dtype)
    y = b.whole.image(k, "output", 0, outputs[0].dtype)
    means = k.tensor("output", 1, b.parameter(outputs[1]))
    scales = k.tensor("temporary", 2, b.each)
    bias = None if types[2] is None else k.tensor("input", 2, b.parameter(types[2]))
    with runs(k, b.whole, backwards=True) as run, run.lanes() as lane:
        channel = lane.channel
        mean, scale = (k.register(t[channel]) for t in (means, scales))
        if bias is not None:
            shift = k.register(cast(bias[channel], b.compute))

        def write(place: Value, where: Value | None) -> None:
            centred = cast(x.load(place, where=where), b.compute) - values.read(mean)
            made = centred * values.read(scale)
            if bias is not None:
                made = made + values.read(shift)
            k.store(y, (place,), made, where)

        lane.visit(write)
    return k.bind()


def lower_backward(rows: Rows, types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    """As `norm_kernels.lower_batch_backward`."""
    x = type_of(types[1])
    b = _Batch(rows, x, (type_of(types[0]), outputs[0]))
    kernels = (
        _gradient_runs(b, types),
        _gradient_totals(b, types, outputs),
        _gradient(b, types, outputs),
    )
    return Lowering(kernels, b.temporaries(3))


def _gradient_runs(b: _Batch, types: Types) -> BoundKernel:
    """Temporaries 0 and 1: each run's sums of grad, and of grad times (x - mean)."""
    k = KernelBuilder("batch_norm_backward_runs")
    grad, x = (b.sums.image(k, "input", i, type_of(types[i]).dtype) for i in range(2))
    means = k.tensor("input", 2, b.parameter(types[2]))
    shifts, slopes = (k.tensor("temporary", i, b.sums.sums(b.compute)) for i in range(2))

    def terms(lane: Lane) -> Any:
        mean = k.register(cast(means[lane.channel], b.compute))

        def of(place: Value, where: Value | None) -> Sequence[Value]:
            g = cast(grad.load(place, where=where), b.compute)  # 0 where not `where`
            centred = cast(x.load(place, where=where), b.compute) - values.read(mean)
            return g, g * centred

        return of

    def finished(run: Run, channel: Value, sums: list[Value]) -> None:
        index = (run.number, channel)
        k.store_all([(shifts, index, sums[0]), (slopes, index, sums[1])])

    sum_runs(k, b.sums, b.compute, 2, terms, finished)
    return k.bind()


def _gradient_totals(b: _Batch, types: Types, outputs: tuple[TensorType, ...]) -> BoundKernel:
    """Outputs 1 and 2: dweight and dbias; temporaries 2 to 4: what `_gradient` needs."""
    k = KernelBuilder("batch_norm_backward_totals")
    shifts, slopes = (k.tensor("temporary", i, b.sums.sums(b.compute)) for i in range(2))
    averages, slants, scales = (k.tensor("temporary", i, b.each) for i in range(2, 5))
    variance = k.tensor("input", 3, b.parameter(types[3]))
    weight = None if types[4] is None else k.tensor("input", 4, b.parameter(types[4]))
    found: list[Operand] = [
        k.tensor("output", i, b.parameter(t)) for i, t in enumerate(outputs) if i
    ]
    eps = k.number(5, float)
    whole = cast(k.size(b.positions), b.compute)

    def terms(run: Value, channel: Value) -> Sequence[Value]:
        return shifts[run, channel], slopes[run, channel]

    with folded(k, b.sums.runs, b.channels, b.compute, 2, terms) as (channel, where, sums):
        scale = inverse_root(cast(variance.load(channel, where=where), b.compute), eps)
        d_weight, d_bias = sums[1] * scale, sums[0]
        outer = scale
        if weight is not None:
            outer = scale * cast(weight.load(channel, where=where), b.compute)
        writes = [(averages, (channel,), d_bias / whole),
                  (slants, (channel,), d_weight / whole * scale),
                  (scales, (channel,), outer)]  # fmt: skip
        writes += [(t, (channel,), v) for t, v in zip(found, (d_weight, d_bias), strict=False)]
        k.store_all(writes, where)
    return k.bind()


def _gradient(b: _Batch, types: Types, outputs: tuple[TensorType, ...]) -> BoundKernel:
    """Output 0: (grad - average - (x - mean) * slant) * scale."""
    k = KernelBuilder("batch_norm_backward_scale")
    grad, x = (b.whole.image(k, "input", i, type_of(types[i]).dtype) for i in range(2))
    dx = b.whole.image(k, "output", 0, outputs[0].dtype)
    means = k.tensor("input", 2, b.parameter(types[2]))
    averages, slants, scales = (k.tensor("temporary", i, b.each) for i in range(2, 5))
    with runs(k, b.whole, backwards=True) as run, run.lanes() as lane:
        channel = lane.channel
        mean = k.register(cast(means[channel], b.compute))
        average, slant, scale = (k.register(t[channel]) for t in (averages, slants, scales))

        def write(place: Value, where: Value | None) -> None:
            centred = cast(x.load(place, where=where), b.compute) - values.read(mean)
            inner = cast(grad.load(place, where=where), b.compute) - values.read(average)
            made = (inner - centred * values.read(slant)) * values.read(scale)
            k.store(dx, (place,), made, where)

        lane.visit(write)
    return k.bind()
