"""Group normalization of channels-last tensors, whose channels lie side by side, and its gradient.

Invariants: a step of the parallel loop takes whole groups of one sample, vectors run across their
channels; sums of channels are added up to those of groups in scratch memory, so no lane needs
another's; variances are means of squared differences, from a second pass over a block in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from flame.core.dtypes import DType
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand, Role
from flame.kernel.values import Value, cast, const
from flame.ops import group_tiles
from flame.ops.elementwise import compute_dtype
from flame.ops.loops import broadcast_strides, by_stride, coalesce
from flame.ops.norm_gradients import sum_parts
from flame.ops.norm_kernels import inverse_root
from flame.ops.op import Types
from flame.ops.rows import type_of, unroll_for

CHANNELS: Final = 64  # channels of a block, about


def fits(x: TensorType) -> bool:
    """Whether the kernels here suit a tensor (N, C, ...): channels side by side, not positions."""
    return x.ndim > 2 and x.strides[1] == 1 and not x.contiguous and x.numel > 0


class Position:
    """A position of a sample: how operands are addressed there."""

    def __init__(self, sample: Value, place: Sequence[Value]) -> None:
        self.sample, self.place = sample, tuple(place)


class _Groups:
    """A kernel over blocks of groups of each sample; ``images`` are tensors like x, x first."""

    def __init__(
        self, name: str, images: Sequence[tuple[Role, int, TensorType]], groups: int
    ) -> None:
        x = images[0][2]
        self.k = k = KernelBuilder(name)
        self.compute: DType = compute_dtype(x.dtype)
        self.batch, self.channels = x.shape[:2]
        self.groups, self.width = groups, self.channels // groups
        self.together = max(1, min(groups, CHANNELS // self.width))  # groups of a block
        order = [d for d in by_stride(x.strides, x.shape) if d > 1]
        strides = [broadcast_strides(t, x.shape) for _, _, t in images]
        nest = coalesce(x.shape, strides, order)
        self.images = [
            k.tensor(role, position, _seen(t, (self.batch, self.channels, *nest.sizes), s, steps))
            for (role, position, t), s, steps in zip(images, strides, nest.strides, strict=True)
        ]
        self.sizes = [k.size(n) for n in nest.sizes]
        self.space = x.numel // (self.batch * self.channels)
        self.lanes = self.together * self.width
        self.unroll = unroll_for(self.lanes)
        self.count = cast(k.size(self.width * self.space), self.compute)

    def each(self, position: int, t: Any) -> Operand:
        """A parameter, one number a channel."""
        return self.k.tensor("input", position, tensor_type(t.dtype, (self.channels,), t.strides))

    def scratch(self) -> Operand:
        """One number for each channel of a block."""
        return self.k.scratch(self.compute, (self.lanes,))

    @contextmanager
    def blocks(self, passes: int) -> Iterator[tuple[Value, Value]]:
        """The parallel loop: sample, and the first channel of the block."""
        blocks = -(-self.groups // self.together)
        work = self.lanes * self.space * passes
        with self.k.parallel(self.batch, blocks, work=work) as (sample, block):
            first = block * self.together
            self.here = values.binary("min", self.k.size(self.groups) - first, const(self.together))
            yield sample, first * self.width

    @contextmanager
    def across(self) -> Iterator[Value]:
        """The vector loop over the channels of a block."""
        with self.k.vector(self.here * self.width, self.unroll) as lane:
            yield lane

    def sums(
        self, sample: Value, terms: Callable[[Value, Position], Sequence[Value]],
        targets: Sequence[Operand],
    ) -> None:  # fmt: skip
        """targets[lane] = sums of terms over the positions of the sample."""
        k = self.k
        with self.across() as lane:
            totals = [k.register(0.0, self.compute) for _ in targets]
            with k.nest(self.sizes) as place:
                found = terms(lane, Position(sample, place))
                for total, term in zip(totals, found, strict=True):
                    k.accumulate(total, "add", term)
            k.store_all(
                [(t, (lane,), values.read(v)) for t, v in zip(targets, totals, strict=True)]
            )

    def by_group(self, source: Operand, target: Operand, change: Callable[[Value], Value]) -> None:
        """target[lane] = change(the sum of source over the lane's group)."""
        k = self.k
        with k.loop(self.here) as group:
            total = k.register(0.0, self.compute)
            begin = group * self.width
            with k.vector(self.width, 1) as i:
                k.accumulate(total, "add", source[begin + i])
            made = change(values.read(total))
            with k.vector(self.width, 1) as i:
                k.store(target, (begin + i,), made)

    def load(self, image: int, first: Value, lane: Value, at: Position) -> Value:
        return cast(self.images[image][(at.sample, first + lane, *at.place)], self.compute)

    def statistics(
        self, image: int, sample: Value, first: Value, means: Operand, scales: Operand, eps: Value
    ) -> None:
        """means[lane] and scales[lane] = 1 / sqrt(variance + eps) of the lane's group."""

        def value(lane: Value, at: Position) -> Sequence[Value]:
            return (self.load(image, first, lane, at),)

        def square(lane: Value, at: Position) -> Sequence[Value]:
            difference = self.load(image, first, lane, at) - means[lane]
            return (difference * difference,)

        self.sums(sample, value, [scales])
        self.by_group(scales, means, lambda total: total / self.count)
        self.sums(sample, square, [scales])
        self.by_group(scales, scales, lambda total: inverse_root(total / self.count, eps))


def _seen(t: TensorType, shape: Shape, strides: Shape, steps: Shape) -> TensorType:
    return tensor_type(t.dtype, shape, (*strides[:2], *steps))


def lower_forward(types: Types, outputs: tuple[TensorType, ...], *, groups: int) -> Lowering:
    """y = (x - mean) * rstd * weight + bias, of (x, weight, bias, eps)."""
    x = type_of(types[0])
    if x.device != "cpu" and group_tiles.fits(x, outputs[0]):
        return group_tiles.lower_forward(types, outputs, groups=groups)
    g = _Groups("group_norm", [("input", 0, x), ("output", 0, outputs[0])], groups)
    k = g.k
    weight, bias = (None if t is None else g.each(i, t) for i, t in enumerate(types[1:3], 1))
    eps = k.number(3, float)
    means, scales = g.scratch(), g.scratch()
    with g.blocks(passes=4) as (sample, first):
        g.statistics(0, sample, first, means, scales, eps)
        with g.across() as lane:
            mean, scale = k.register(means[lane]), k.register(scales[lane])
            if weight is not None:
                k.assign(scale, values.read(scale) * cast(weight[first + lane], g.compute))
            shift = k.register(0.0, g.compute)
            if bias is not None:
                k.assign(shift, cast(bias[first + lane], g.compute))
            with k.nest(g.sizes) as place:
                at = Position(sample, place)
                centred = g.load(0, first, lane, at) - values.read(mean)
                made = centred * values.read(scale) + values.read(shift)
                k.store(g.images[1], (sample, first + lane, *place), made)
    return k.finish()


def lower_backward(types: Types, outputs: tuple[TensorType, ...], *, groups: int) -> Lowering:
    """Of (grad, x, weight, eps): dx, dweight and dbias."""
    grad, x = type_of(types[0]), type_of(types[1])
    if x.device != "cpu" and group_tiles.fits(x, grad, outputs[0]):
        return group_tiles.lower_backward(types, outputs, groups=groups)
    images: list[tuple[Role, int, TensorType]] = [
        ("input", 1, x), ("input", 0, grad), ("output", 0, outputs[0]),
    ]  # fmt: skip
    g = _Groups("group_norm_backward", images, groups)
    k = g.k
    weight = None if types[2] is None else g.each(2, types[2])
    eps = k.number(3, float)
    sums = tensor_type(g.compute, (g.batch, g.channels))
    partial = [k.tensor("temporary", i, sums) for i, _ in enumerate(outputs[1:])]
    means, scales, shifts, slopes = (g.scratch() for _ in range(4))

    def scaled(value: Value, first: Value, lane: Value) -> Value:
        return value if weight is None else value * cast(weight[first + lane], g.compute)

    with g.blocks(passes=6) as (sample, first):
        g.statistics(0, sample, first, means, scales, eps)

        def terms(lane: Value, at: Position) -> Sequence[Value]:
            made = g.load(1, first, lane, at)
            return made * (g.load(0, first, lane, at) - means[lane]), made

        g.sums(sample, terms, [slopes, shifts])
        with g.across() as lane:
            slope, shift = slopes[lane] * scales[lane], shifts[lane]
            writes: list[tuple[Operand, tuple[Value, ...], Value]] = [
                (slopes, (lane,), scaled(slope, first, lane)),
                (shifts, (lane,), scaled(shift, first, lane)),
            ]
            sums_of = zip(partial, (slope, shift), strict=False)
            k.store_all(writes + [(t, (sample, first + lane), v) for t, v in sums_of])
        g.by_group(slopes, slopes, lambda total: total / g.count)
        g.by_group(shifts, shifts, lambda total: total / g.count)
        with g.across() as lane:
            mean, scale = k.register(means[lane]), k.register(scales[lane])
            slant, average = k.register(slopes[lane] * scales[lane]), k.register(shifts[lane])
            factor = k.register(1.0, g.compute)
            if weight is not None:
                k.assign(factor, cast(weight[first + lane], g.compute))
            with k.nest(g.sizes) as place:
                at = Position(sample, place)
                centred = g.load(0, first, lane, at) - values.read(mean)
                through = g.load(1, first, lane, at) * values.read(factor)
                inner = through - values.read(average) - centred * values.read(slant)
                k.store(g.images[2], (sample, first + lane, *place), inner * values.read(scale))
    totals = [sum_parts(sums, i, out, i + 1) for i, out in enumerate(outputs[1:])]
    nbytes = max(sums.numel, 1) * sums.dtype.itemsize
    return Lowering((k.bind(), *totals), (nbytes,) * len(totals))
