"""Batch normalization of channels-last images on a GPU, and its gradient.

Three kernels each way: sums of runs of positions, their totals, then one pass that writes the
result. Sums of squares are taken of differences to a number of the run itself, or to the mean where
it is known; runs are combined by the formula of Chan, Golub and LeVeque ("Updating formulae",
1979). With n elements the error of a variance is below n ulp of it, whatever the numbers are, and
about an ulp where the first of a run is a usual one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from flame.core.dtypes import DType
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const, read
from flame.ops.elementwise import compute_dtype
from flame.ops.norm_kernels import inverse_root
from flame.ops.op import Types
from flame.ops.rows import Rows, type_of
from flame.ops.tiles import Lane, Run, Tiles, fold_runs, runs, sum_runs, tiles_of

Slope = Callable[[Value, Value], Value]  # (grad, y) -> gradient of y by an activation of y
PASS_BLOCKS: Final = 132 * 8  # runs of the pass that writes the result, about
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


def moments_of_runs(
    name: str, x: TensorType, tiles: Tiles, compute: DType, *, position: int = 0
) -> BoundKernel:
    """Temporaries 0 and 1, of an input: each run's mean, and its squared differences to it."""
    k = KernelBuilder(name)
    source = tiles.image(k, "input", position, x.dtype)
    means, spreads = (k.tensor("temporary", i, tiles.sums(compute)) for i in range(2))

    def shift(run: Run, channel: Value) -> Value:
        return cast(source[run.base + channel], compute)

    def terms(lane: Lane) -> Any:
        first = k.register(shift(lane.run, lane.channel))

        def of(place: Value, where: Value | None) -> Sequence[Value]:
            difference = cast(source.load(place, where=where), compute) - read(first)
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
        self.whole = pass_tiles(shape, max(t.dtype.itemsize for t in (x, *others)))

    def parameter(self, t: Any) -> TensorType:
        return tensor_type(t.dtype, (self.channels,), t.strides)

    def run_sums(self, k: KernelBuilder) -> list[Operand]:
        """Temporaries 0 and 1: two numbers of each run and channel."""
        return [k.tensor("temporary", i, self.sums.sums(self.compute)) for i in range(2)]

    def constants(self, k: KernelBuilder, count: int) -> list[Operand]:
        """The temporaries from 2 on: what the last pass needs."""
        kind = self.whole.constants(self.compute)
        return [k.tensor("temporary", 2 + i, kind) for i in range(count)]

    def temporaries(self, constants: int) -> tuple[int, ...]:
        """Their bytes."""
        sums, each = self.sums.sums(self.compute).numel, self.whole.constants(self.compute).numel
        return tuple(n * self.compute.itemsize for n in (sums, sums, *(each,) * constants))


def lower_forward(rows: Rows, types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    """As `norm_kernels.lower_forward` with outputs (y, mean, variance)."""
    x = type_of(types[0])
    b = _Batch(rows, x, outputs[:1])
    kernels = (
        moments_of_runs("batch_norm_runs", x, b.sums, b.compute),
        _combined(b, types, outputs),
        _scaled(b, types, outputs),
    )
    return Lowering(kernels, b.temporaries(2))


def _combined(b: _Batch, types: Types, outputs: tuple[TensorType, ...]) -> BoundKernel:
    """Outputs 1 and 2: mean and variance; temporaries 2 and 3: scale and shift of a channel."""
    k = KernelBuilder("batch_norm_combine")
    compute = b.compute
    means, spreads = b.run_sums(k)
    constants = b.constants(k, 2)
    mean_out, variance_out = (k.tensor("output", i, b.parameter(outputs[i])) for i in (1, 2))
    weight, bias = (
        None if t is None else k.tensor("input", i, b.parameter(t))
        for i, t in enumerate(types[1:3], 1)
    )
    eps = k.number(3, float)
    whole = cast(k.size(b.positions), compute)
    start = const(0)

    def terms(run: Value, channel: Value) -> Sequence[Value]:
        count = count_of_run(k, b.sums, compute, run)
        apart = means[run, channel] - means[start, channel]
        return apart * count, spreads[run, channel] + apart * apart * count

    def finished(channel: Value, exists: Value, sums: list[Value]) -> Sequence[Value]:
        average = sums[0] / whole
        inner = values.binary("max", sums[1] - sums[0] * average, const(0.0, compute))
        mean, variance = means.load(start, channel, where=exists) + average, inner / whole
        index = (channel,)
        k.store_all([(mean_out, index, mean), (variance_out, index, variance)], exists)
        factor, offset = (
            None if t is None else t.load(channel, where=exists) for t in (weight, bias)
        )
        return line_of(mean, inverse_root(variance, eps), factor, offset)

    fold_runs(k, b.sums.runs, b.channels, compute, 2, terms, finished, constants, b.whole.rows)
    return k.bind()


def line_of(
    mean: Value, rstd: Value, weight: Value | None, bias: Value | None
) -> tuple[Value, Value]:
    """(scale, shift) of y = x * scale + shift; with them a gradient finds the same y again."""
    scale = rstd if weight is None else rstd * cast(weight, rstd.dtype)
    if bias is None:
        return scale, -(mean * scale)
    return scale, values.fma(-mean, scale, cast(bias, rstd.dtype))


def _scaled(b: _Batch, types: Types, outputs: tuple[TensorType, ...]) -> BoundKernel:
    """Output 0: x * scale + shift."""
    k = KernelBuilder("batch_norm_scale")
    x = b.whole.image(k, "input", 0, type_of(types[0]).dtype)
    y = b.whole.image(k, "output", 0, outputs[0].dtype)
    scale_and_shift(k, b.whole, x, y, *b.constants(k, 2))
    return k.bind()


def scale_and_shift(
    k: KernelBuilder, tiles: Tiles, x: Operand, y: Operand, scales: Operand, shifts: Operand
) -> None:
    """The loops of the kernel that writes y = x * scale + shift."""
    with runs(k, tiles, backwards=True) as run, run.lanes() as lane:
        scale, shift = (k.register(t[lane.constant]) for t in (scales, shifts))

        def write(place: Value, where: Value | None) -> None:
            here = cast(x.load(place, where=where), scales.dtype)
            k.store(y, (place,), values.fma(here, read(scale), read(shift)), where)

        lane.visit(write)


def lower_backward(
    rows: Rows, types: Types, outputs: tuple[TensorType, ...], slope: Slope | None = None
) -> Lowering:
    """As `norm_kernels.lower_batch_backward`; with a slope, grad is that of an activation of the
    result, and input 6 the bias.
    """
    x = type_of(types[1])
    b = _Batch(rows, x, (type_of(types[0]), outputs[0]))
    kernels = (
        _gradient_runs(b, types, slope),
        _gradient_totals(b, types, outputs, slope),
        _gradient(b, types, outputs, slope),
    )
    return Lowering(kernels, b.temporaries(3 if slope is None else 4))


class _Parameters:
    """What the gradient's kernels know of a channel: inputs 2 to 6, the last with a slope only."""

    def __init__(self, b: _Batch, k: KernelBuilder, types: Types, slope: Slope | None) -> None:
        self.compute = b.compute
        self.mean, self.variance = (k.tensor("input", i, b.parameter(types[i])) for i in (2, 3))
        self.weight = None if types[4] is None else k.tensor("input", 4, b.parameter(types[4]))
        self.eps = k.number(5, float)
        self.bias = None
        if slope is not None and types[6] is not None:
            self.bias = k.tensor("input", 6, b.parameter(types[6]))

    def of(self, channel: Value, exists: Value | None = None) -> tuple[Value, Value, Value, Value]:
        """(mean, rstd, scale, shift), see `line_of`."""
        mean, variance = (
            cast(t.load(channel, where=exists), self.compute) for t in (self.mean, self.variance)
        )
        rstd = inverse_root(variance, self.eps)
        factor, offset = (
            None if t is None else t.load(channel, where=exists) for t in (self.weight, self.bias)
        )
        return mean, rstd, *line_of(mean, rstd, factor, offset)


def _gradient_runs(b: _Batch, types: Types, slope: Slope | None) -> BoundKernel:
    """Temporaries 0 and 1: each run's sums of grad, and of grad times (x - mean)."""
    k = KernelBuilder("batch_norm_backward_runs")
    grad, x = (b.sums.image(k, "input", i, type_of(types[i]).dtype) for i in range(2))
    known = _Parameters(b, k, types, slope) if slope is not None else None
    means = k.tensor("input", 2, b.parameter(types[2])) if known is None else known.mean
    shifts, slopes = b.run_sums(k)

    def terms(lane: Lane) -> Any:
        mean = k.register(cast(means[lane.channel], b.compute))
        line = [] if known is None else [k.register(v) for v in known.of(lane.channel)[2:]]

        def of(place: Value, where: Value | None) -> Sequence[Value]:
            g = cast(grad.load(place, where=where), b.compute)  # 0 where not `where`
            here = cast(x.load(place, where=where), b.compute)
            if slope is not None:
                g = slope(g, values.fma(here, *map(read, line)))
            return g, g * (here - read(mean))

        return of

    def finished(run: Run, channel: Value, sums: list[Value]) -> None:
        index = (run.number, channel)
        k.store_all([(shifts, index, sums[0]), (slopes, index, sums[1])])

    sum_runs(k, b.sums, b.compute, 2, terms, finished)
    return k.bind()


def _gradient_totals(
    b: _Batch, types: Types, outputs: tuple[TensorType, ...], slope: Slope | None
) -> BoundKernel:
    """Outputs 1 and 2: dweight and dbias; temporaries from 2 on: what `gradient_pass` needs."""
    k = KernelBuilder("batch_norm_backward_totals")
    compute = b.compute
    shifts, slopes = b.run_sums(k)
    constants = b.constants(k, 3 if slope is None else 4)
    known = _Parameters(b, k, types, slope)
    found = [k.tensor("output", i, b.parameter(t)) for i, t in enumerate(outputs) if i]
    whole = cast(k.size(b.positions), compute)

    def terms(run: Value, channel: Value) -> Sequence[Value]:
        return shifts[run, channel], slopes[run, channel]

    def finished(channel: Value, exists: Value, sums: list[Value]) -> Sequence[Value]:
        mean, rstd, scale, shift = known.of(channel, exists)
        d_weight, d_bias = sums[1] * rstd, sums[0]
        writes = [(t, (channel,), v) for t, v in zip(found, (d_weight, d_bias), strict=False)]
        if writes:
            k.store_all(writes, exists)
        slant = d_weight / whole * rstd
        # (grad - average - (x - mean) * slant) * scale
        bent = values.fma(mean, slant, -(d_bias / whole)) * scale
        return (scale, -(slant * scale), bent, shift)[: len(constants)]

    fold_runs(k, b.sums.runs, b.channels, compute, 2, terms, finished, constants, b.whole.rows)
    return k.bind()


def _gradient(
    b: _Batch, types: Types, outputs: tuple[TensorType, ...], slope: Slope | None
) -> BoundKernel:
    k = KernelBuilder("batch_norm_backward_scale")
    grad, x = (b.whole.image(k, "input", i, type_of(types[i]).dtype) for i in range(2))
    dx = b.whole.image(k, "output", 0, outputs[0].dtype)
    gradient_pass(k, b.whole, grad, x, dx, b.constants(k, 3 if slope is None else 4), slope)
    return k.bind()


def gradient_pass(
    k: KernelBuilder, tiles: Tiles, grad: Operand, x: Operand, dx: Operand,
    constants: Sequence[Operand], slope: Slope | None = None,
) -> None:  # fmt: skip
    """The loops of the kernel that writes dx = grad * scale + x * slant + shift.

    With a slope, grad is that of an activation of y = x * scale + the fourth of the constants.
    """
    compute = constants[0].dtype
    with runs(k, tiles, backwards=True) as run, run.lanes() as lane:
        scale, slant, shift, *offset = (k.register(t[lane.constant]) for t in constants)

        def write(place: Value, where: Value | None) -> None:
            through, here = (cast(t.load(place, where=where), compute) for t in (grad, x))
            if slope is not None:
                through = slope(through, values.fma(here, read(scale), read(offset[0])))
            bent = values.fma(here, read(slant), read(shift))
            k.store(dx, (place,), values.fma(through, read(scale), bent), where)

        lane.visit(write)
