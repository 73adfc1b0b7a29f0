"""Operands in the order in which the inner loops read them.

A packed source is (N, groups, D, H, W, channels of a group), padded with zeros. Packed weights are
(groups, blocks, taps, channels summed over, lanes): the lanes are channels that the sums lie over, side by
side, and zero beyond the last one.
"""

from __future__ import annotations

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Operand, Role
from flame.kernel.values import Value, cast, const
from flame.ops.convolution.blocking import Tile
from flame.ops.convolution.geometry import Phase
from flame.ops.elementwise import compute_dtype


def packed_source_type(x: TensorType, dtype: DType, groups: int, padded: Shape) -> TensorType:
    return tensor_type(dtype, (x.shape[0], groups, *padded, x.shape[1] // groups))


def pack_source(
    x: TensorType, position: int, packed: TensorType, temporary: int, low: Shape
) -> BoundKernel:
    """Copy (N, C, D, H, W) into a padded source with ``low`` zeros in front of each dimension."""
    k = KernelBuilder("pack_source")
    source = k.tensor("input", position, x)
    target = k.tensor("temporary", temporary, packed)
    images, groups, *padded, channels = packed.shape
    sizes = [k.size(s) for s in x.shape[2:]]
    before = [_signed(k, n) for n in low]
    count = k.size(channels)
    work = padded[2] * channels
    with k.parallel(images, groups, padded[0], padded[1], work=work) as (n, g, d, h):
        inside = _inside(d - before[0], sizes[0]) & _inside(h - before[1], sizes[1])
        with k.loop(k.size(padded[2])) as w:
            here = inside & _inside(w - before[2], sizes[2])
            with k.vector(count, 1) as c:
                index = (n, g * count + c, d - before[0], h - before[1], w - before[2])
                value = source.load(*index, where=here)
                k.store(target, (n, g, d, h, w, c), cast(value, compute_dtype(x.dtype)))
    return k.bind()


def _signed(k: KernelBuilder, number: int) -> Value:
    return k.size(number)


def _inside(index: Value, size: Value) -> Value:
    return (index >= 0) & (index < size)


def packed_weight_type(
    dtype: DType, groups: int, summed: int, lanes: int, tile: Tile, taps: Shape
) -> TensorType:
    """``summed`` and ``lanes``: channels of a group on either side."""
    count = taps[0] * taps[1] * taps[2]
    return tensor_type(dtype, (groups, tile.blocks(lanes), count, summed, tile.lanes))


def pack_weight(
    weight: TensorType, position: int, packed: TensorType, temporary: int, phase: Phase,
    *, summed_axis: int, lanes: int,
) -> BoundKernel:  # fmt: skip
    """Copy a weight (O, C of a group, D, H, W); ``summed_axis`` 1 for forward, 0 for the gradient.

    ``lanes``: channels of a group along the axis that is not summed over.
    """
    k = KernelBuilder("pack_weight")
    source = k.tensor("input", position, weight)
    target = k.tensor("temporary", temporary, packed)
    groups, blocks, _, summed, width = packed.shape
    own, other = k.size(lanes), k.size(summed)
    axes = phase.axes
    first = [k.size(a.first) for a in axes]
    stride = [_step(k, a.stride) for a in axes]
    taps = [k.size(a.taps) for a in axes]
    work = phase.taps[0] * phase.taps[1] * phase.taps[2] * width
    with k.parallel(groups, blocks, summed, work=work) as (g, block, s), k.nest(taps) as t:
        place = [f + i * st for f, i, st in zip(first, t, stride, strict=True)]
        tap = (t[0] * taps[1] + t[1]) * taps[2] + t[2]
        with k.vector(width, 1) as v:
            channel = block * width + v
            inside = channel < own
            channel = values.binary("min", channel, own - 1)
            index = (g * own + channel, s) if summed_axis == 1 else (g * other + s, channel)
            value = cast(source.load(*index, *place), compute_dtype(weight.dtype))
            zero = const(0, value.dtype)
            k.store(target, (g, block, tap, s, v), values.select(inside, value, zero))
    return k.bind()


def _step(k: KernelBuilder, number: int) -> Value:
    return const(number) if number in (1, -1) else k.size(number)


def flat(k: KernelBuilder, role: Role, position: int, type_: TensorType) -> Operand:
    """An operand addressed by offsets that the kernel computes itself."""
    return k.tensor(role, position, tensor_type(type_.dtype, (2,), (1,)))


# --- positions ------------------------------------------------------------------------------------

SPARE = 8  # entries after the last position, for a tile that is not full


def table_type(images: int, phase: Phase) -> TensorType:
    """Where each position (image, d, h, w) begins to read the source; offsets in elements."""
    d, h, w = phase.extent
    return tensor_type(dtypes.int64, (images * d * h * w + SPARE,))


def fill_table(source: TensorType, phase: Phase, temporary: int) -> BoundKernel:
    """Write the table of a phase for a packed source."""
    k = KernelBuilder("positions")
    images = source.shape[0]
    table = k.tensor("temporary", temporary, table_type(images, phase))
    strides = [k.stride(s) for s in (source.strides[0], *source.strides[2:5])]
    axes = phase.axes
    starts, steps = [k.size(a.start) for a in axes], [k.size(a.step) for a in axes]
    d_count, h_count, w_count = (k.size(n) for n in phase.extent)
    with k.parallel(images, *phase.extent[:2], work=phase.extent[2]) as (n, d, h):
        base = n * strides[0] + (starts[0] + d * steps[0]) * strides[1]
        base = base + (starts[1] + h * steps[1]) * strides[2] + starts[2] * strides[3]
        row = ((n * d_count + d) * h_count + h) * w_count
        with k.vector(w_count, 1) as w:
            k.store(table, (row + w,), base + w * (steps[2] * strides[3]))
        with k.when(row + w_count >= k.size(images) * d_count * h_count * w_count):
            with k.loop(SPARE) as i:
                k.store(table, (row + w_count + i,), base)
    return k.bind()
