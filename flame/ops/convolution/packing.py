"""Operands in the order in which the inner loops read them.

A packed source is (N, groups, D, H, W, channels of a group), padded with zeros. Packed weights are
(groups, blocks, taps, channels summed over, lanes): the lanes are channels that the sums lie over,
side by side, and zero beyond the last one.
"""

from __future__ import annotations

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Operand, Role
from flame.kernel.program import Matrix
from flame.kernel.values import Value, cast, const
from flame.ops.convolution.blocking import Tile, vector_bytes
from flame.ops.convolution.geometry import Phase
from flame.ops.elementwise import compute_dtype


def packed_source_type(x: TensorType, dtype: DType, groups: int, padded: Shape) -> TensorType:
    return tensor_type(dtype, (x.shape[0], groups, *padded, x.shape[1] // groups))


def flat_of(operand: Operand) -> Operand:
    """The same memory addressed by one offset."""
    return Operand(operand.buffer, (1,), (const(1),))


def turnable(source: DType, target: DType) -> bool:
    """Whether a matrix of such elements can be transposed as it is copied."""
    return source is target and source.itemsize >= 4


def _joined(x: TensorType, packed: TensorType, low: Shape) -> tuple[TensorType, TensorType]:
    """Spatial dimensions without padding as one, where memory allows it: longer rows to turn."""
    shape, strides, target = list(x.shape), list(x.strides), list(packed.shape)
    for axis in (3, 2):
        whole = shape[4] == target[4] and shape[axis] == target[axis]
        if whole and (shape[axis] == 1 or strides[axis] == shape[4] * strides[4]):
            shape[4], target[4] = shape[4] * shape[axis], target[4] * target[axis]
            shape[axis] = target[axis] = 1
        else:
            break
    if any(low):
        return x, packed
    return tensor_type(x.dtype, tuple(shape), tuple(strides)), tensor_type(
        packed.dtype, tuple(target)
    )


def pack_source(
    x: TensorType, position: int, packed: TensorType, temporary: int, low: Shape
) -> BoundKernel:
    """Copy (N, C, D, H, W) into a padded source with ``low`` zeros in front of each dimension."""
    if turnable(x.dtype, packed.dtype) and (x.strides[4] == 1 or x.shape[4] == 1):
        return _turn_source(x, position, packed, temporary, low)
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


def _turn_source(
    x: TensorType, position: int, packed: TensorType, temporary: int, low: Shape
) -> BoundKernel:
    """As `pack_source`, for rows that lie side by side: each (channels, W) is a matrix to turn."""
    x, packed = _joined(x, packed, low)
    k = KernelBuilder("turn_source")
    source = k.tensor("input", position, x)
    target = k.tensor("temporary", temporary, packed)
    images, groups, *padded, channels = packed.shape
    sizes = [k.size(s) for s in x.shape[2:4]]
    before = [_signed(k, n) for n in low[:2]]
    count = k.size(channels)
    # padding alone may fill a row, where the kernel reaches no further
    first, skipped = min(max(0, low[2]), padded[2]), max(0, -low[2])
    columns = max(0, min(x.shape[4] - skipped, padded[2] - first))
    zero = const(0, packed.dtype)

    def clear(at: tuple[Value, ...], begin: int, end: int) -> None:
        if end > begin:
            with k.vector(k.size((end - begin) * channels), 1) as v:
                offset = target.at((*at, const(0), const(0))) + k.size(begin * channels)
                k.store(flat_of(target), (offset + v,), zero)

    with k.parallel(images, groups, padded[0], padded[1], work=padded[2] * channels) as at:
        n, g, d, h = at
        inside = _inside(d - before[0], sizes[0]) & _inside(h - before[1], sizes[1])
        with k.when(inside):
            clear(at, 0, first)
            index = (n, g * count, d - before[0], h - before[1], k.size(skipped))
            place = target.at((*at, k.size(first), const(0)))
            k.transpose(
                count, k.size(columns),
                Matrix(source.buffer, source.at(index), source.strides[1]),
                Matrix(target.buffer, place, target.strides[4]),
            )  # fmt: skip
            clear(at, first + columns, padded[2])
        if any(low) or packed.shape[2:4] != x.shape[2:4]:
            with k.when(~inside):
                clear(at, 0, padded[2])
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
    turned = weight.contiguous and turnable(weight.dtype, packed.dtype)
    pack = _turn_weight if turned else _gather_weight
    return pack(weight, position, packed, temporary, phase, summed_axis, lanes)


def _gather_weight(
    weight: TensorType, position: int, packed: TensorType, temporary: int, phase: Phase,
    summed_axis: int, lanes: int,
) -> BoundKernel:  # fmt: skip
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


COLUMNS = 256  # of a matrix that is turned in scratch memory


def _turn_weight(
    weight: TensorType, position: int, packed: TensorType, temporary: int, phase: Phase,
    summed_axis: int, lanes: int,
) -> BoundKernel:  # fmt: skip
    """Turn (channels, channels summed over and taps) in scratch memory, then put rows in order.

    For the gradient the taps of one channel summed over are such a matrix.
    """
    k = KernelBuilder("turn_weight")
    source = k.tensor("input", position, weight)
    target = k.tensor("temporary", temporary, packed)
    groups, blocks, _, summed, width = packed.shape
    count = weight.shape[2] * weight.shape[3] * weight.shape[4]
    own, other, all_taps = k.size(lanes), k.size(summed), k.size(count)
    axes = phase.axes
    first = [k.size(a.first) for a in axes]
    stride = [_step(k, a.stride) for a in axes]
    taps = [k.size(a.taps) for a in axes]
    sizes = [k.size(s) for s in weight.shape[3:]]
    together = min(summed, max(1, COLUMNS // count)) if summed_axis == 1 else 1
    rows = k.scratch(packed.dtype, (max(COLUMNS, count), width))
    with k.parallel(
        groups, blocks, -(-summed // together), work=together * count * width // 4
    ) as at:
        g, block, part = at
        begin = part * k.size(together)
        height = values.binary("min", own - block * width, const(width))
        channel = g * own + block * width
        if summed_axis == 1:
            length = values.binary("min", other - begin, k.size(together))
            offset, distance = (channel * other + begin) * all_taps, other * all_taps
        else:
            length = const(1)
            offset, distance = ((g * other + begin) * own + block * width) * all_taps, all_taps
        k.transpose(
            height, length * all_taps, Matrix(source.buffer, offset, distance),
            Matrix(rows.buffer, const(0), const(width)),
        )  # fmt: skip
        with k.nest(taps) as t, k.loop(length) as s:
            place = [f + i * st for f, i, st in zip(first, t, stride, strict=True)]
            row = (place[0] * sizes[0] + place[1]) * sizes[1] + place[2] + s * all_taps
            tap = (t[0] * taps[1] + t[1]) * taps[2] + t[2]
            with k.vector(width, width * packed.dtype.itemsize // vector_bytes()) as v:
                value = values.select(v < height, rows[row, v], const(0, packed.dtype))
                k.store(target, (g, block, tap, begin + s, v), value)
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
        last = row + w_count >= k.size(images) * d_count * h_count * w_count
        with k.when(last), k.loop(SPARE) as i:
            k.store(table, (row + w_count + i,), base)
    return k.bind()
