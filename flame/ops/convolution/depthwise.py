"""Convolutions with few channels in a group, as depthwise ones: vectors along the width.

A register tile of channels would be nearly empty there, so each result is summed straight from
memory.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flame.core import dtypes
from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const, read
from flame.ops.convolution.contraction import product_sum
from flame.ops.convolution.geometry import SPATIAL, Geometry
from flame.ops.elementwise import compute_dtype

MOST = 4  # channels of a group, on either side


def fits(groups: int, summed: int, own: int) -> bool:
    """Whether the kernels of this file are the better ones."""
    return groups > 1 and summed <= MOST and own <= MOST


class Reads:
    """Where a tap reads for a position of one dimension, and whether that is inside."""

    def __init__(
        self, k: KernelBuilder, g: Geometry, i: int, size: int, extent: int, *, turned: bool
    ) -> None:
        self.stride, self.dilation, self.turned = g.stride[i], g.dilation[i], turned
        self.padding, self.size = k.size(g.padding[i]), k.size(size)
        first, last = -g.padding[i], (extent - 1) * g.stride[i] - g.padding[i]
        last += (g.kernel[i] - 1) * g.dilation[i]
        self.whole = not turned and first >= 0 and last < size

    def at(self, position: Value, tap: Value) -> tuple[Value, Value | None]:
        """(index, inside); inside is None where it always holds."""
        if not self.turned:
            index = position * self.stride - self.padding + tap * self.dilation
            return index, None if self.whole else (index >= 0) & (index < self.size)
        index = position + self.padding - tap * self.dilation
        return index, (index >= 0) & (index < self.size)


def forward(
    x: TensorType, weight: TensorType, bias: TensorType | None, out: TensorType, g: Geometry
) -> Lowering:
    """y[n, o, j] = bias[o] + sum over c, t of x * weight."""
    k = KernelBuilder("depthwise")
    source, filters = k.tensor("input", 0, x), k.tensor("input", 1, weight)
    offsets = None if bias is None else k.tensor("input", 2, bias)
    target = k.tensor("output", 0, out)
    own, summed = out.shape[1] // g.groups, weight.shape[1]
    dtype = compute_dtype(x.dtype)
    reads = [Reads(k, g, i, x.shape[2 + i], out.shape[2 + i], turned=False) for i in range(SPATIAL)]
    n, c, d, h, w = out.shape
    work = w * summed * math.prod(g.kernel)
    with k.parallel(n, c, d, h, work=work) as (image, o, od, oh):
        first = values.binary("udiv", o, k.size(own)) * summed
        with k.vector(k.size(w)) as ow:
            start = const(0, dtype) if offsets is None else cast(offsets[o], dtype)
            total = k.register(start)
            with k.nest([const(summed), *map(const, g.kernel)]) as (channel, *taps):
                places, inside = place_in(reads, (od, oh, ow), taps)
                value = cast(source.load(image, first + channel, *places, where=inside), dtype)
                factor = cast(filters.load(o, channel, *taps), dtype)
                k.assign(total, product_sum(value, factor, read(total)))
            k.store(target, (image, o, od, oh, ow), read(total))
    return k.finish()


def place_in(
    reads: list[Reads], position: tuple[Value, ...], taps: list[Value]
) -> tuple[list[Value], Value]:
    """Source indices of a tap of each dimension, and whether all are inside."""
    places, inside = [], const(True, dtypes.bool_)
    for r, p, t in zip(reads, position, taps, strict=True):
        place, here = r.at(p, t)
        places.append(place)
        inside = inside if here is None else inside & here
    return places, inside


def input_gradient(
    y: TensorType, weight: TensorType, bias: TensorType | None, out: TensorType, g: Geometry
) -> Lowering:
    """x[n, c, i] = bias[c] + sum over o, t of y * weight, over the places that read i.

    With strides, tables say for each position and tap which result read it, if any.
    """
    k = KernelBuilder("depthwise_input_gradient")
    source, filters = k.tensor("input", 0, y), k.tensor("input", 1, weight)
    offsets = None if bias is None else k.tensor("input", 2, bias)
    target = k.tensor("output", 0, out)
    own, summed = weight.shape[1], y.shape[1] // g.groups
    dtype = compute_dtype(y.dtype)
    constants: list[Any] = []
    reads = [reader(k, g, i, y.shape[2 + i], out.shape[2 + i], constants) for i in range(SPATIAL)]
    n, c, d, h, w = out.shape
    work = w * summed * math.prod(g.kernel)
    with k.parallel(n, c, d, h, work=work) as (image, channel, i_d, i_h):
        group = values.binary("udiv", channel, k.size(own))
        inner = channel - group * own
        with k.vector(k.size(w)) as i_w:
            start = const(0, dtype) if offsets is None else cast(offsets[channel], dtype)
            total = k.register(start)
            with k.nest([const(summed), *map(const, g.kernel)]) as (o, *taps):
                places, inside = place_in(reads, (i_d, i_h, i_w), taps)
                index = (image, group * summed + o, *places)
                value = cast(source.load(*index, where=inside), dtype)
                factor = cast(filters.load(group * summed + o, inner, *taps), dtype)
                k.assign(total, product_sum(value, factor, read(total)))
            k.store(target, (image, channel, i_d, i_h, i_w), read(total))
    lowering = k.finish()
    return Lowering(lowering.kernels, constants=tuple(constants))


class _Table(Reads):
    """Reads of a strided dimension, looked up."""

    def __init__(self, index: Operand, there: Operand) -> None:
        self.index, self.there = index, there

    def at(self, position: Value, tap: Value) -> tuple[Value, Value | None]:
        return self.index[tap, position], self.there[tap, position] > 0


def reader(
    k: KernelBuilder, g: Geometry, i: int, results: int, size: int, constants: list[Any]
) -> Reads:
    """For each of ``size`` elements and each tap: which of ``results`` read it, if any."""
    if g.stride[i] == 1:
        return Reads(k, g, i, results, size, turned=True)
    position, tap = np.arange(size), np.arange(g.kernel[i])[:, None]
    reach = position + g.padding[i] - tap * g.dilation[i]
    index = reach // g.stride[i]
    there = (reach % g.stride[i] == 0) & (index >= 0) & (index < results)
    made = []
    for array in (np.where(there, index, 0).astype(np.int64), there.astype(np.int32)):
        dtype = dtypes.int64 if array.dtype == np.int64 else dtypes.int32
        made.append(k.tensor("constant", len(constants), tensor_type(dtype, array.shape)))
        constants.append(array)
    return _Table(made[0], made[1])


def weight_gradient(y: TensorType, x: TensorType, out: TensorType, g: Geometry) -> Lowering:
    """w[o, c, t] = sum over n, j of y * x: one iteration for each weight, vectors along the
    width.
    """
    k = KernelBuilder("depthwise_weight_gradient")
    columns, source = k.tensor("input", 0, y), k.tensor("input", 1, x)
    target = k.tensor("output", 0, out)
    own, summed = out.shape[0] // g.groups, out.shape[1]
    dtype = compute_dtype(x.dtype)
    reads = [Reads(k, g, i, x.shape[2 + i], y.shape[2 + i], turned=False) for i in range(SPATIAL)]
    n, _, *extent = y.shape
    with k.parallel(*out.shape, work=n * math.prod(extent)) as (o, channel, *taps):
        first = values.binary("udiv", o, k.size(own)) * summed
        total = k.register(const(0, dtype))
        rows = [k.size(n), k.size(extent[0]), k.size(extent[1])]
        with k.nest(rows) as (image, od, oh), k.vector(k.size(extent[2]), 2) as ow:
            places, inside = place_in(reads, (od, oh, ow), taps)
            index = (image, first + channel, *places)
            value = cast(source.load(*index, where=inside), dtype)
            other = cast(columns.load(image, o, od, oh, ow), dtype)
            k.accumulate(total, "add", value * other)
        k.store(target, (o, channel, *taps), read(total))
    return k.finish()
