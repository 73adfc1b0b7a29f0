"""Group normalization of channels-last images on a GPU, and its gradient.

As `batch_tiles`: sums of runs of positions for each channel, their totals for each group of a
sample, then one pass that writes the result. The gradient takes the statistics and its own sums
from one visit of x and grad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const, read
from flame.ops.batch_tiles import (
    Slope,
    count_of_run,
    gradient_pass,
    line_of,
    moments_of_runs,
    pass_tiles,
    scale_and_shift,
)
from flame.ops.elementwise import compute_dtype
from flame.ops.norm_kernels import inverse_root
from flame.ops.op import Types
from flame.ops.rows import COLUMNS, type_of
from flame.ops.tiles import Lane, Run, each_constant, image_shape, sum_runs, tiles_of

LINE: Final = (9, 10)  # temporaries of a gradient with a slope: scale and shift of its result


def fits(*images: TensorType) -> bool:
    """Whether all images (N, C, ...) are dense and channels-last."""
    return all(image_shape(t) is not None for t in images)


class _Groups:
    """One call: the tiles of its images, and the types of what its kernels share."""

    def __init__(self, images: Sequence[TensorType], groups: int) -> None:
        shape = image_shape(images[0])
        assert shape is not None
        self.compute = compute_dtype(images[0].dtype)
        itemsize = max(t.dtype.itemsize for t in images)
        self.batch, self.positions, self.channels = shape
        self.groups, self.width = groups, self.channels // groups
        self.sums = tiles_of(shape, max(t.dtype.itemsize for t in images[:-1]))
        self.whole = pass_tiles(shape, itemsize)
        self.run_type = self.sums.sums(self.compute)
        self.constant_type = self.whole.constants(self.compute)
        self.channel_type = tensor_type(self.compute, (self.batch, self.channels))

    def parameter(self, k: KernelBuilder, types: Types, position: int) -> Operand | None:
        t = types[position]
        if t is None:
            return None
        kind = type_of(t)
        return k.tensor("input", position, tensor_type(kind.dtype, (self.channels,), kind.strides))

    def nbytes(self, *types: TensorType) -> tuple[int, ...]:
        return tuple(t.numel * t.dtype.itemsize for t in types)

    def moments(
        self, k: KernelBuilder, sample: Value, group: Value, means: Operand, spreads: Operand
    ) -> tuple[Value, Value]:
        """Mean and variance of a group, from those of runs of its channels."""
        compute, width, count = self.compute, k.size(self.width), k.size(self.sums.runs)
        first, channel = sample * count, group * width
        whole = cast(k.size(self.width * self.positions), compute)
        shift = k.register(means[first, channel])
        total, spread = (k.register(0.0, compute) for _ in range(2))
        with k.vector(k.size(self.sums.runs * self.width)) as lane:
            run = values.binary("udiv", lane, width)
            place = (first + run, channel + values.binary("urem", lane, width))
            n = count_of_run(k, self.sums, compute, run)
            apart = means[place] - read(shift)
            k.accumulate(total, "add", apart * n)
            k.accumulate(spread, "add", spreads[place] + apart * apart * n)
        average = read(total) / whole
        inner = values.binary("max", read(spread) - read(total) * average, const(0.0, compute))
        return read(shift) + average, inner / whole


def lower_forward(types: Types, outputs: tuple[TensorType, ...], *, groups: int) -> Lowering:
    """y = (x - mean) * rstd * weight + bias, of (x, weight, bias, eps)."""
    x = type_of(types[0])
    g = _Groups((x, outputs[0]), groups)
    kernels = (
        moments_of_runs("group_norm_runs", x, g.sums, g.compute),
        _combined(g, types, weight=1, bias=2),
        _scaled(g, types, outputs[0]),
    )
    kinds = (g.run_type,) * 2 + (g.constant_type,) * 2
    return Lowering(kernels, g.nbytes(*kinds))


def _combined(
    g: _Groups, types: Types, *, weight: int, bias: int, targets: tuple[int, int] = (2, 3)
) -> BoundKernel:
    """Temporaries ``targets``: scale and shift of each channel of a sample, by these inputs."""
    k = KernelBuilder("group_norm_combine")
    means, spreads = (k.tensor("temporary", i, g.run_type) for i in range(2))
    scales, shifts = (k.tensor("temporary", i, g.constant_type) for i in targets)
    factors, offsets = (g.parameter(k, types, i) for i in (weight, bias))
    eps = k.number(3, float)
    with k.parallel(g.batch, g.groups, work=g.sums.runs * g.width) as (sample, group):
        centre, variance = g.moments(k, sample, group, means, spreads)
        mean, rstd = k.register(centre), k.register(inverse_root(variance, eps))
        width = k.size(g.width)
        with each_constant(k, g.whole, group * width, width) as (channel, place):
            factor, offset = (None if t is None else t[channel] for t in (factors, offsets))
            scale, shift = line_of(read(mean), read(rstd), factor, offset)
            k.store_all([(scales, (sample, place), scale), (shifts, (sample, place), shift)])
    return k.bind()


def _scaled(g: _Groups, types: Types, out: TensorType) -> BoundKernel:
    """Output 0: x * scale + shift."""
    k = KernelBuilder("group_norm_scale")
    x = g.whole.image(k, "input", 0, type_of(types[0]).dtype)
    y = g.whole.image(k, "output", 0, out.dtype)
    scales, shifts = (k.tensor("temporary", i, g.constant_type) for i in (2, 3))
    scale_and_shift(k, g.whole, x, y, scales, shifts)
    return k.bind()


def lower_backward(
    types: Types, outputs: tuple[TensorType, ...], *, groups: int, slope: Slope | None = None
) -> Lowering:
    """Of (grad, x, weight, eps): dx, dweight and dbias.

    With a slope, grad is that of an activation of the result, and input 4 the bias: the statistics
    come first then, from a visit of x alone.
    """
    grad, x = type_of(types[0]), type_of(types[1])
    g = _Groups((x, grad, outputs[0]), groups)
    kernels: tuple[BoundKernel, ...] = (
        _gradient_runs(g, types, slope),
        _gradient_totals(g, types),
        _gradient(g, types, outputs[0], slope),
    )
    kinds = [*(g.run_type,) * 4, *(g.constant_type,) * 3, *(g.channel_type,) * 2]
    if slope is not None:
        first = moments_of_runs("group_norm_runs", x, g.sums, g.compute, position=1)
        kernels = (first, _combined(g, types, weight=2, bias=4, targets=LINE), *kernels)
        kinds += [g.constant_type] * 2
    if len(outputs) > 1:
        kernels = (*kernels, _sum_samples(g, outputs))
    return Lowering(kernels, g.nbytes(*kinds))


def _gradient_runs(g: _Groups, types: Types, slope: Slope | None) -> BoundKernel:
    """Temporaries 0 to 3: each run's mean m, squared differences to it, sums of grad and of
    grad times (x - m).
    """
    k = KernelBuilder("group_norm_backward_runs")
    compute = g.compute
    grad, x = (g.sums.image(k, "input", i, type_of(types[i]).dtype) for i in range(2))
    targets = [k.tensor("temporary", i, g.run_type) for i in range(4)]
    lines = [] if slope is None else [k.tensor("temporary", i, g.constant_type) for i in LINE]

    def shift(run: Run, channel: Value) -> Value:
        return cast(x[run.base + channel], compute)

    def terms(lane: Lane) -> Any:
        first = k.register(shift(lane.run, lane.channel))
        line = [k.register(t[lane.run.sample, lane.channel]) for t in lines]

        def of(place: Value, where: Value | None) -> Sequence[Value]:
            here = cast(x.load(place, where=where), compute)
            apart = here - read(first)
            if where is not None:
                apart = values.select(where, apart, const(0.0, compute))
            through = cast(grad.load(place, where=where), compute)  # 0 where not `where`
            if slope is not None:
                through = slope(through, values.fma(here, *map(read, line)))
            return apart, apart * apart, through, through * apart

        return of

    def finished(run: Run, channel: Value, sums: list[Value]) -> None:
        total, squares, through, slope = sums
        average = total / cast(run.count, compute)
        spread = values.binary("max", squares - total * average, const(0.0, compute))
        found = (shift(run, channel) + average, spread, through, slope - average * through)
        index = (run.number, channel)
        k.store_all([(t, index, v) for t, v in zip(targets, found, strict=True)])

    sum_runs(k, g.sums, compute, 4, terms, finished)
    return k.bind()


def _gradient_totals(g: _Groups, types: Types) -> BoundKernel:
    """Temporaries 4 to 6: what `gradient_pass` needs; 7 and 8: the gradients of weight and bias by
    one sample.
    """
    k = KernelBuilder("group_norm_backward_totals")
    compute = g.compute
    means, spreads, sums, slopes = (k.tensor("temporary", i, g.run_type) for i in range(4))
    constants = [k.tensor("temporary", i, g.constant_type) for i in (4, 5, 6)]
    d_weight, d_bias = (k.tensor("temporary", i, g.channel_type) for i in (7, 8))
    weight = g.parameter(k, types, 2)
    eps = k.number(3, float)
    count, width = k.size(g.sums.runs), k.size(g.width)
    whole = cast(k.size(g.width * g.positions), compute)
    with k.parallel(g.batch, g.groups, work=g.sums.runs * g.width * 3) as (sample, group):
        centre, variance = g.moments(k, sample, group, means, spreads)
        mean, rstd = k.register(centre), k.register(inverse_root(variance, eps))
        through, along = (k.register(0.0, compute) for _ in range(2))
        with k.vector(width) as lane:
            channel = group * width + lane
            shift, slope = (k.register(0.0, compute) for _ in range(2))
            with k.loop(count) as run:
                place = (sample * count + run, channel)
                here = sums[place]
                k.accumulate(shift, "add", here)
                k.accumulate(slope, "add", slopes[place] + (means[place] - read(mean)) * here)
            normal = read(slope) * read(rstd)
            factor = const(1.0, compute) if weight is None else cast(weight[channel], compute)
            k.accumulate(through, "add", read(shift) * factor)
            k.accumulate(along, "add", normal * factor)
            index = (sample, channel)
            k.store_all([(d_weight, index, normal), (d_bias, index, read(shift))])
        # rstd * (grad * weight - average - (x - mean) * rstd * along)
        slant = k.register(-(read(along) / whole * read(rstd) * read(rstd)))
        average = read(through) / whole * read(rstd)
        bent = k.register(values.fma(-read(mean), read(slant), -average))
        with each_constant(k, g.whole, group * width, width) as (channel, at):
            scale = read(rstd)
            if weight is not None:
                scale = scale * cast(weight[channel], compute)
            made = (scale, read(slant), read(bent))
            k.store_all([(t, (sample, at), v) for t, v in zip(constants, made, strict=True)])
    return k.bind()


def _gradient(g: _Groups, types: Types, out: TensorType, slope: Slope | None) -> BoundKernel:
    k = KernelBuilder("group_norm_backward_scale")
    grad, x = (g.whole.image(k, "input", i, type_of(types[i]).dtype) for i in range(2))
    dx = g.whole.image(k, "output", 0, out.dtype)
    places = (4, 5, 6) if slope is None else (4, 5, 6, LINE[1])
    constants = [k.tensor("temporary", i, g.constant_type) for i in places]
    gradient_pass(k, g.whole, grad, x, dx, constants, slope)
    return k.bind()


def _sum_samples(g: _Groups, outputs: tuple[TensorType, ...]) -> BoundKernel:
    """Outputs 1 and 2: the gradients of weight and bias."""
    k = KernelBuilder("group_norm_backward_sum")
    sources = [k.tensor("temporary", i, g.channel_type) for i in (7, 8)]
    targets = [
        k.tensor("output", i, tensor_type(t.dtype, (g.channels,), t.strides))
        for i, t in enumerate(outputs) if i
    ]  # fmt: skip
    size, batch = k.size(g.channels), k.size(g.batch)
    with k.parallel(-(-g.channels // COLUMNS), work=g.batch * COLUMNS * 2) as (block,):
        start = block * COLUMNS
        extent = values.binary("min", size - start, const(COLUMNS))
        with k.vector(extent) as lane:
            totals = [k.register(0.0, g.compute) for _ in sources]
            with k.loop(batch) as sample:
                for total, source in zip(totals, sources, strict=True):
                    k.accumulate(total, "add", source[sample, start + lane])
            k.store_all(
                [(t, (start + lane,), read(v)) for t, v in zip(targets, totals, strict=True)]
            )
    return k.bind()
