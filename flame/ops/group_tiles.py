"""Group normalization of channels-last images on a GPU, and its gradient.

As `batch_tiles`: sums of runs of positions for each channel, their totals for each group of a
sample, then one pass that writes the result. The gradient takes the statistics and its own sums
from one visit of x and grad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const
from flame.ops.batch_tiles import count_of_run, moments_of_runs, pass_tiles
from flame.ops.elementwise import compute_dtype
from flame.ops.norm_kernels import inverse_root, sum_parts
from flame.ops.op import Types
from flame.ops.rows import type_of
from flame.ops.tiles import Lane, Run, image_shape, runs, sum_runs, tiles_of


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
        self.group_type = tensor_type(self.compute, (self.batch, groups))
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
            apart = means[place] - values.read(shift)
            k.accumulate(total, "add", apart * n)
            k.accumulate(spread, "add", spreads[place] + apart * apart * n)
        average = values.read(total) / whole
        inner = values.binary(
            "max", values.read(spread) - values.read(total) * average, const(0.0, compute)
        )
        return values.read(shift) + average, inner / whole


def lower_forward(types: Types, outputs: tuple[TensorType, ...], *, groups: int) -> Lowering:
    """y = (x - mean) * rstd * weight + bias, of (x, weight, bias, eps)."""
    x = type_of(types[0])
    g = _Groups((x, outputs[0]), groups)
    kernels = (
        moments_of_runs("group_norm_runs", x, g.sums, g.compute),
        _combined(g),
        _scaled(g, types, outputs[0]),
    )
    return Lowering(
        kernels, g.nbytes(g.run_type, g.run_type, g.group_type, g.group_type)
    )  # fmt: skip


def _combined(g: _Groups) -> BoundKernel:
    """Temporaries 2 and 3: mean and 1 / sqrt(variance + eps) of each group."""
    k = KernelBuilder("group_norm_combine")
    means, spreads = (k.tensor("temporary", i, g.run_type) for i in range(2))
    centres, scales = (k.tensor("temporary", i, g.group_type) for i in (2, 3))
    eps = k.number(3, float)
    with k.parallel(g.batch, g.groups, work=g.sums.runs * g.width) as (sample, group):
        at = (sample, group)
        mean, variance = g.moments(k, sample, group, means, spreads)
        k.store_all([(centres, at, mean), (scales, at, inverse_root(variance, eps))])
    return k.bind()


def _scaled(g: _Groups, types: Types, out: TensorType) -> BoundKernel:
    """Output 0: (x - mean) * scale + bias."""
    k = KernelBuilder("group_norm_scale")
    x = g.whole.image(k, "input", 0, type_of(types[0]).dtype)
    y = g.whole.image(k, "output", 0, out.dtype)
    centres, scales = (k.tensor("temporary", i, g.group_type) for i in (2, 3))
    weight, bias = (g.parameter(k, types, i) for i in (1, 2))
    with runs(k, g.whole, backwards=True) as run, run.lanes() as lane:
        at = (run.sample, values.binary("udiv", lane.channel, k.size(g.width)))
        mean, scale = k.register(centres[at]), k.register(scales[at])
        if weight is not None:
            k.assign(scale, values.read(scale) * cast(weight[lane.channel], g.compute))
        if bias is not None:
            shift = k.register(cast(bias[lane.channel], g.compute))

        def write(place: Value, where: Value | None) -> None:
            centred = cast(x.load(place, where=where), g.compute) - values.read(mean)
            made = centred * values.read(scale)
            if bias is not None:
                made = made + values.read(shift)
            k.store(y, (place,), made, where)

        lane.visit(write)
    return k.bind()


def lower_backward(types: Types, outputs: tuple[TensorType, ...], *, groups: int) -> Lowering:
    """Of (grad, x, weight, eps): dx, dweight and dbias."""
    grad, x = type_of(types[0]), type_of(types[1])
    g = _Groups((x, grad, outputs[0]), groups)
    kernels = (
        _gradient_runs(g, types),
        _gradient_totals(g, types),
        _gradient(g, types, outputs[0]),
    )
    totals = tuple(sum_parts(g.channel_type, 8 + i, t, i + 1) for i, t in enumerate(outputs[1:]))
    temporaries = (*(g.run_type,) * 4, *(g.group_type,) * 4, *(g.channel_type,) * 2)
    return Lowering((*kernels, *totals), g.nbytes(*temporaries))


def _gradient_runs(g: _Groups, types: Types) -> BoundKernel:
    """Temporaries 0 to 3: each run's mean m, squared differences to it, sums of grad and of
    grad times (x - m).
    """
    k = KernelBuilder("group_norm_backward_runs")
    compute = g.compute
    grad, x = (g.sums.image(k, "input", i, type_of(types[i]).dtype) for i in range(2))
    targets = [k.tensor("temporary", i, g.run_type) for i in range(4)]

    def shift(run: Run, channel: Value) -> Value:
        return cast(x[run.base + channel], compute)

    def terms(lane: Lane) -> Any:
        first = k.register(shift(lane.run, lane.channel))

        def of(place: Value, where: Value | None) -> Sequence[Value]:
            apart = cast(x.load(place, where=where), compute) - values.read(first)
            if where is not None:
                apart = values.select(where, apart, const(0.0, compute))
            through = cast(grad.load(place, where=where), compute)
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
    """Temporaries 4 to 7: what `_gradient` needs of each group; 8 and 9: the gradients of weight
    and bias by one sample.
    """
    k = KernelBuilder("group_norm_backward_totals")
    compute = g.compute
    means, spreads, sums, slopes = (k.tensor("temporary", i, g.run_type) for i in range(4))
    found = [k.tensor("temporary", i, g.group_type) for i in range(4, 8)]
    d_weight, d_bias = (k.tensor("temporary", i, g.channel_type) for i in (8, 9))
    weight = g.parameter(k, types, 2)
    eps = k.number(3, float)
    count = k.size(g.sums.runs)
    whole = cast(k.size(g.width * g.positions), compute)
    with k.parallel(g.batch, g.groups, work=g.sums.runs * g.width * 3) as (sample, group):
        centre, variance = g.moments(k, sample, group, means, spreads)
        mean, scale = k.register(centre), k.register(inverse_root(variance, eps))
        through, along = (k.register(0.0, compute) for _ in range(2))
        with k.vector(k.size(g.width)) as lane:
            channel = group * k.size(g.width) + lane
            shift, slope = (k.register(0.0, compute) for _ in range(2))
            with k.loop(count) as run:
                place = (sample * count + run, channel)
                here = sums[place]
                k.accumulate(shift, "add", here)
                apart = means[place] - values.read(mean)
                k.accumulate(slope, "add", slopes[place] + apart * here)
            normal = values.read(slope) * values.read(scale)
            factor = const(1.0, compute) if weight is None else cast(weight[channel], compute)
            k.accumulate(through, "add", values.read(shift) * factor)
            k.accumulate(along, "add", normal * factor)
            index = (sample, channel)
            k.store_all([(d_weight, index, normal), (d_bias, index, values.read(shift))])
        rstd = values.read(scale)
        made = (
            values.read(mean), rstd, values.read(through) / whole * rstd,
            values.read(along) / whole * rstd * rstd,
        )  # fmt: skip
        k.store_all([(t, (sample, group), v) for t, v in zip(found, made, strict=True)])
    return k.bind()


def _gradient(g: _Groups, types: Types, out: TensorType) -> BoundKernel:
    """Output 0: grad * weight * rstd - average - (x - mean) * slant."""
    k = KernelBuilder("group_norm_backward_scale")
    compute = g.compute
    grad, x = (g.whole.image(k, "input", i, type_of(types[i]).dtype) for i in range(2))
    dx = g.whole.image(k, "output", 0, out.dtype)
    found = [k.tensor("temporary", i, g.group_type) for i in range(4, 8)]
    weight = g.parameter(k, types, 2)
    with runs(k, g.whole, backwards=True) as run, run.lanes() as lane:
        at = (run.sample, values.binary("udiv", lane.channel, k.size(g.width)))
        mean, scale, average, slant = (k.register(t[at]) for t in found)
        if weight is not None:
            k.assign(scale, values.read(scale) * cast(weight[lane.channel], compute))

        def write(place: Value, where: Value | None) -> None:
            centred = cast(x.load(place, where=where), compute) - values.read(mean)
            through = cast(grad.load(place, where=where), compute) * values.read(scale)
            made = through - values.read(average) - centred * values.read(slant)
            k.store(dx, (place,), made, where)

        lane.visit(write)
    return k.bind()
