"""Batch normalization of row-major images on a GPU, and its gradient.

As `batch_tiles`, but positions lie side by side: a run is some images' rows of one channel, which a
team of threads sums together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const, read
from flame.ops.elementwise import compute_dtype
from flame.ops.norm_kernels import inverse_root
from flame.ops.op import Types
from flame.ops.rows import type_of

PACK: Final = 16  # bytes that a thread moves at once
WIDEST: Final = 256  # threads of a team, about
THREADS: Final = 132 * 2048  # of the runs of all channels together, about


def fits(*images: TensorType) -> bool:
    """Whether all images (N, C, ...) are row-major, with several positions."""
    x = images[0]
    rows = all(t.contiguous for t in images)
    return rows and x.device != "cpu" and x.ndim > 2 and x.numel > x.shape[0] * x.shape[1]


class _Rows:
    """One call: images (batch, channels, positions) in runs of ``step`` images."""

    def __init__(self, x: TensorType) -> None:
        self.batch, self.channels = x.shape[:2]
        self.positions = math.prod(x.shape[2:])
        self.compute = compute_dtype(x.dtype)
        team = min(-(-self.positions * x.dtype.itemsize // PACK), WIDEST)
        wanted = max(1, min(self.batch, THREADS // (self.channels * team)))
        self.step = -(-self.batch // wanted)
        self.runs = -(-self.batch // self.step)
        self.sums = tensor_type(self.compute, (self.channels, self.runs))
        self.each = tensor_type(self.compute, (self.channels,))

    def image(self, k: KernelBuilder, role: Any, position: int, t: Any) -> Operand:
        shape = (self.batch, self.channels, self.positions)
        return k.tensor(role, position, tensor_type(t.dtype, shape))

    def parameter(self, k: KernelBuilder, types: Types, position: int) -> Operand | None:
        t = types[position]
        if t is None:
            return None
        kind = tensor_type(type_of(t).dtype, (self.channels,), type_of(t).strides)
        return k.tensor("input", position, kind)

    def temporaries(self, each: int) -> tuple[int, ...]:
        """Bytes: two numbers of each run, then ``each`` of a channel."""
        sizes = (self.sums.numel,) * 2 + (self.channels,) * each
        return tuple(n * self.compute.itemsize for n in sizes)

    def run_kernel(
        self, k: KernelBuilder, first: Callable[[Value, Value], Value],
        terms: Callable[[tuple[Value, ...], Value], Sequence[Value]],
        finished: Callable[[Value, Value, list[Value]], Sequence[Value]],
    ) -> BoundKernel:  # fmt: skip
        """Temporaries 0 and 1: what is ``finished`` of each run's sums of two terms(place, shift),
        shift being first(image, channel) of the run's first image.
        """
        targets = [k.tensor("temporary", i, self.sums) for i in range(2)]
        step, batch = k.size(self.step), k.size(self.batch)
        work = self.step * self.positions
        with k.parallel(self.channels, self.runs, work=work) as (channel, run):
            begin = run * step
            count = values.binary("min", batch - begin, step)
            shift = k.register(first(begin, channel))
            totals = [k.register(0.0, self.compute) for _ in range(2)]
            with k.vector(k.size(self.positions)) as position, k.loop(count) as i:
                found = terms((begin + i, channel, position), read(shift))
                for total, term in zip(totals, found, strict=True):
                    k.accumulate(total, "add", term)
            length = cast(count * k.size(self.positions), self.compute)
            made = finished(read(shift), length, [read(total) for total in totals])
            k.store_all([(t, (channel, run), v) for t, v in zip(targets, made, strict=True)])
        return k.bind()

    def pass_kernel(
        self, k: KernelBuilder, target: Operand, constants: Sequence[Operand],
        value: Callable[[tuple[Value, ...], list[Value]], Value],
    ) -> BoundKernel:  # fmt: skip
        """The kernel that stores value(place, the channel's constants)."""
        with k.parallel(self.batch, self.channels, work=self.positions) as (image, channel):
            known = [k.register(t[channel]) for t in constants]
            with k.vector(k.size(self.positions)) as position:
                place = (image, channel, position)
                k.store(target, place, value(place, [read(r) for r in known]))
        return k.bind()


def lower_forward(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    """As `norm_kernels.lower_forward` with outputs (y, mean, variance)."""
    b = _Rows(type_of(types[0]))
    k = KernelBuilder("batch_norm_runs")
    source = b.image(k, "input", 0, types[0])

    def terms(place: tuple[Value, ...], shift: Value) -> Sequence[Value]:
        difference = cast(source[place], b.compute) - shift
        return difference, difference * difference

    def finished(shift: Value, length: Value, sums: list[Value]) -> Sequence[Value]:
        average = sums[0] / length
        spread = values.binary("max", sums[1] - sums[0] * average, const(0.0, b.compute))
        return shift + average, spread

    moments = b.run_kernel(
        k, lambda image, channel: cast(source[image, channel, const(0)], b.compute), terms, finished
    )
    k = KernelBuilder("batch_norm_scale")
    x, y = b.image(k, "input", 0, types[0]), b.image(k, "output", 0, outputs[0])
    constants = [k.tensor("temporary", i, b.each) for i in (2, 3)]
    scaled = b.pass_kernel(
        k, y, constants, lambda place, known: values.fma(cast(x[place], b.compute), *known)
    )
    return Lowering((moments, _combined(b, types, outputs), scaled), b.temporaries(2))


def _combined(b: _Rows, types: Types, outputs: tuple[TensorType, ...]) -> BoundKernel:
    """Outputs 1 and 2: mean and variance; temporaries 2 and 3: scale and shift."""
    k = KernelBuilder("batch_norm_combine")
    means, spreads = (k.tensor("temporary", i, b.sums) for i in range(2))
    constants = [k.tensor("temporary", i, b.each) for i in (2, 3)]
    found = [k.tensor("output", i, outputs[i]) for i in (1, 2)]
    weight, bias = (b.parameter(k, types, i) for i in (1, 2))
    eps, positions = k.number(3, float), k.size(b.positions)
    step, batch = k.size(b.step), k.size(b.batch)
    whole = cast(batch * positions, b.compute)
    with k.parallel(b.channels, work=b.runs) as (channel,):
        shift = k.register(means[channel, const(0)])
        total, spread = (k.register(0.0, b.compute) for _ in range(2))
        with k.vector(k.size(b.runs)) as run:
            length = cast(values.binary("min", batch - run * step, step) * positions, b.compute)
            apart = means[channel, run] - read(shift)
            k.accumulate(total, "add", apart * length)
            k.accumulate(spread, "add", spreads[channel, run] + apart * apart * length)
        average = read(total) / whole
        inner = values.binary("max", read(spread) - read(total) * average, const(0.0, b.compute))
        mean, variance = read(shift) + average, inner / whole
        scale = inverse_root(variance, eps)
        if weight is not None:
            scale = scale * cast(weight[channel], b.compute)
        moved = -(mean * scale)
        if bias is not None:
            moved = values.fma(-mean, scale, cast(bias[channel], b.compute))
        made = (mean, variance, scale, moved)
        targets = zip((*found, *constants), made, strict=True)
        k.store_all([(t, (channel,), v) for t, v in targets])
    return k.bind()


def lower_backward(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    """As `norm_kernels.lower_batch_backward`."""
    b = _Rows(type_of(types[1]))
    k = KernelBuilder("batch_norm_backward_runs")
    through, source = (b.image(k, "input", i, types[i]) for i in range(2))
    means = b.parameter(k, types, 2)
    assert means is not None
    centre = means

    def terms(place: tuple[Value, ...], mean: Value) -> Sequence[Value]:
        here = cast(through[place], b.compute)
        return here, here * (cast(source[place], b.compute) - mean)

    sums = b.run_kernel(
        k, lambda _, channel: cast(centre[channel], b.compute), terms, lambda _, __, found: found
    )
    k = KernelBuilder("batch_norm_backward_scale")
    grad, x = (b.image(k, "input", i, types[i]) for i in range(2))
    dx = b.image(k, "output", 0, outputs[0])
    constants = [k.tensor("temporary", i, b.each) for i in (2, 3, 4)]

    def value(place: tuple[Value, ...], known: list[Value]) -> Value:
        scale, slant, shift = known
        bent = values.fma(cast(x[place], b.compute), slant, shift)
        return values.fma(cast(grad[place], b.compute), scale, bent)

    last = b.pass_kernel(k, dx, constants, value)
    return Lowering((sums, _gradient_totals(b, types, outputs), last), b.temporaries(3))


def _gradient_totals(b: _Rows, types: Types, outputs: tuple[TensorType, ...]) -> BoundKernel:
    """Outputs 1 and 2: dweight and dbias; temporaries 2 to 4: what the last pass needs."""
    k = KernelBuilder("batch_norm_backward_totals")
    shifts, slopes = (k.tensor("temporary", i, b.sums) for i in range(2))
    constants = [k.tensor("temporary", i, b.each) for i in (2, 3, 4)]
    means, variances, weight = (b.parameter(k, types, i) for i in (2, 3, 4))
    assert means is not None
    assert variances is not None
    found = [k.tensor("output", i, t) for i, t in enumerate(outputs) if i]
    eps = k.number(5, float)
    whole = cast(k.size(b.batch) * k.size(b.positions), b.compute)
    with k.parallel(b.channels, work=b.runs) as (channel,):
        shift, slope = (k.register(0.0, b.compute) for _ in range(2))
        with k.vector(k.size(b.runs)) as run:
            k.accumulate(shift, "add", shifts[channel, run])
            k.accumulate(slope, "add", slopes[channel, run])
        rstd = inverse_root(cast(variances[channel], b.compute), eps)
        scale = rstd if weight is None else rstd * cast(weight[channel], b.compute)
        d_weight, d_bias = read(slope) * rstd, read(shift)
        slant = d_weight / whole * rstd
        bent = values.fma(cast(means[channel], b.compute), slant, -(d_bias / whole)) * scale
        writes = [*zip(constants, (scale, -(slant * scale), bent), strict=True)]
        writes += zip(found, (d_weight, d_bias), strict=False)
        k.store_all([(t, (channel,), v) for t, v in writes])
    return k.bind()
