"""Gradients of the normalizations within samples: of rows, and of groups of channels.

Invariant: gradients of scale and shift are sums in an order that depends on shapes alone: each run
of rows sums its own, and then the runs are summed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from flame.core.dtypes import DType
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const
from flame.ops import schedules
from flame.ops.elementwise import compute_dtype
from flame.ops.norm_kernels import inverse_root, spread_of
from flame.ops.op import Types
from flame.ops.rows import COLUMNS, type_of, unroll_for

PARTS: Final = 64  # runs of rows whose contributions to a parameter's gradient are summed apart


def _inputs(
    k: KernelBuilder, types: Types, shape: Shape, scale: Shape
) -> tuple[Operand, Operand, Operand | None]:
    """grad, x and weight, all row-major, seen with these shapes."""
    grad, x, weight = types[:3]
    return (
        k.tensor("input", 0, tensor_type(type_of(grad).dtype, shape)),
        k.tensor("input", 1, tensor_type(type_of(x).dtype, shape)),
        None if weight is None else k.tensor("input", 2, tensor_type(type_of(weight).dtype, scale)),
    )


def _with_sums(k: KernelBuilder, sums: TensorType, outputs: tuple[TensorType, ...]) -> Lowering:
    """The kernel, then the sums over runs of the temporaries that it filled."""
    if len(outputs) > 1 and schedules.on_gpu(outputs[0]):
        given = [(i, sums) for i, _ in enumerate(outputs[1:])]
        rest, more = schedules.sum_runs(given, list(enumerate(outputs))[1:], len(given))
        nbytes = max(sums.numel, 1) * sums.dtype.itemsize
        return Lowering((k.bind(), *rest), (*(nbytes for _ in given), *more))
    totals = [sum_parts(sums, i, out, i + 1) for i, out in enumerate(outputs[1:])]
    nbytes = max(sums.numel, 1) * sums.dtype.itemsize
    return Lowering((k.bind(), *totals), (nbytes,) * len(totals))


def lower_layer_backward(
    types: Types, outputs: tuple[TensorType, ...], *, length: int, centred: bool, samples: int = 1
) -> Lowering:
    """Of (grad, x, weight, eps): dx, and the sums dweight and dbias, from one visit of each row.

    Rows are taken in at most `PARTS` runs (see `schedules.row_runs` for a GPU); each run sums its
    own dweight and dbias. samples: so many equal parts of the rows have a weight (samples, 1,
    length) each.
    """
    x = type_of(types[1])
    compute = compute_dtype(x.dtype)
    rows = x.numel // length if length else 0
    count = rows // samples
    gpu = schedules.on_gpu(outputs[0])
    most = (
        PARTS
        if not gpu
        else schedules.row_runs(rows, length * x.dtype.itemsize)
        if len(outputs) > 1
        else rows
    )
    step = max(1, -(-count // max(most // samples, 1)))
    parts = max(1, -(-count // step))
    sums = tensor_type(compute, (samples * parts, length))
    k = KernelBuilder("layer_norm_backward" if centred else "rms_norm_backward")
    each = (length,) if samples == 1 else (samples, length)
    g_rows, x_rows, scale = _inputs(k, types, (rows, length), each)
    eps = k.number(3, float)
    dx = k.tensor("output", 0, tensor_type(outputs[0].dtype, (rows, length)))
    partial = [k.tensor("temporary", i, sums) for i, _ in enumerate(outputs[1:])]
    held = gpu and length <= schedules.HELD
    rooms = [k.local(compute, (schedules.power_of_two(length),)) for _ in partial] if held else []
    size, total, run = k.size(length), k.size(count), k.size(step)
    unroll = unroll_for(length)

    def add(part: Value, i: Value, found: list[Value]) -> None:
        """To the sums of a run, which are kept in registers where there are rooms for them."""
        if rooms:
            k.store_all([(t, (i,), t[i] + v) for t, v in zip(rooms, found, strict=False)])
        elif partial:
            places = [(t, (part, i)) for t in partial]
            k.store_all([(t, at, t[at] + v) for (t, at), v in zip(places, found, strict=False)])

    extents = (parts,) if samples == 1 else (samples, parts)
    with k.parallel(*extents, work=step * length * 6) as (*sample, part):
        begin = part * run
        row, number = begin, part
        if sample:
            row, number = sample[0] * total + begin, sample[0] * k.size(parts) + part

        def weight(i: Value) -> Value | None:
            return None if scale is None else scale[*sample, i]

        for target in rooms or partial:
            with k.vector(size, unroll) as i:
                k.store(target, (i,) if rooms else (number, i), const(0.0, compute))
        with k.loop(values.binary("min", total - begin, run)) as offset:
            _layer_row(
                k,
                row + offset,
                size,
                unroll,
                compute,
                g_rows,
                x_rows,
                weight,
                eps,
                dx,
                lambda i, found: add(number, i, found),
                centred,
                gpu,
            )
        for room, target in zip(rooms, partial, strict=False):
            with k.vector(size, unroll) as i:
                k.store(target, (number, i), room[i])
    if samples == 1:
        return _with_sums(k, sums, outputs)
    totals = _sum_parts_of_samples(sums, samples, outputs)
    return Lowering((k.bind(), totals), (max(sums.numel, 1) * compute.itemsize,) * len(partial))


def _sum_parts_of_samples(
    sums: TensorType, samples: int, outputs: tuple[TensorType, ...]
) -> BoundKernel:
    """Outputs from 1 on, (samples, 1, n): the rows of temporaries (samples * parts, n) summed."""
    rows, length = sums.shape
    k = KernelBuilder("sum_parts")
    sources = [k.tensor("temporary", i, sums) for i, _ in enumerate(outputs[1:])]
    targets = [
        k.tensor("output", i, tensor_type(t.dtype, (samples, length)))
        for i, t in enumerate(outputs) if i
    ]  # fmt: skip
    size, parts = k.size(length), k.size(rows // samples)
    work = rows // samples * COLUMNS
    with k.parallel(samples, -(-length // COLUMNS), work=work) as (sample, block):
        start = block * COLUMNS
        extent = values.binary("min", size - start, const(COLUMNS))
        with k.vector(extent, unroll_for(length)) as lane:
            totals = [k.register(0.0, sums.dtype) for _ in sources]
            with k.loop(parts) as part:
                for total, source in zip(totals, sources, strict=True):
                    k.accumulate(total, "add", source[sample * parts + part, start + lane])
            k.store_all([
                (t, (sample, start + lane), values.read(v))
                for t, v in zip(targets, totals, strict=True)
            ])  # fmt: skip
    return k.bind()


def _layer_row(
    k: KernelBuilder, row: Value, size: Value, unroll: int, compute: DType,
    grad: Operand, x: Operand, weight: Callable[[Value], Value | None], eps: Value, dx: Operand,
    add: Callable[[Value, list[Value]], None], centred: bool, at_once: bool,
) -> None:  # fmt: skip
    """dx of one row, and its contributions to the run's sums, which ``add`` takes.

    at_once: all sums from one visit of the row, see `Statistics.moments`.
    """
    count = cast(size, compute)

    def sums(terms: Callable[[Value], list[Value]], n: int) -> list[Value]:
        totals = [k.register(0.0, compute) for _ in range(n)]
        with k.vector(size, unroll) as i:
            for total, term in zip(totals, terms(i), strict=True):
                k.accumulate(total, "add", term)
        return [values.read(total) for total in totals]

    def loaded(i: Value) -> Value:
        return cast(x[row, i], compute)

    def gradient(i: Value) -> tuple[Value, Value]:
        """Of the result, and of the normalized row."""
        g, factor = cast(grad[row, i], compute), weight(i)
        return g, g if factor is None else g * cast(factor, compute)

    if at_once:
        shift = values.read(k.register(loaded(const(0)))) if centred else const(0.0, compute)

        def all_terms(i: Value) -> list[Value]:
            apart, (_, through) = loaded(i) - shift if centred else loaded(i), gradient(i)
            return [apart, apart * apart, through, through * apart]

        total, squares, through, along = sums(all_terms, 4)
        if centred:
            mean = shift + total / count
            scale = inverse_root(spread_of(total, squares, count), eps)
            along = along - total / count * through
        else:
            mean, scale = const(0.0, compute), inverse_root(squares / count, eps)
        average, slope = through / count, along * scale / count
    else:
        mean = sums(lambda i: [loaded(i)], 1)[0] / count if centred else const(0.0, compute)

        def square(i: Value) -> list[Value]:
            return [(loaded(i) - mean) * (loaded(i) - mean)]

        scale = inverse_root(sums(square, 1)[0] / count, eps)

        totals = [k.register(0.0, compute) for _ in range(2)]
        with k.vector(size, unroll) as i:
            g, through = gradient(i)
            normal = (loaded(i) - mean) * scale
            k.accumulate(totals[0], "add", through)
            k.accumulate(totals[1], "add", through * normal)
            add(i, [g * normal, g])
        average, slope = (values.read(t) / count for t in totals)
    with k.vector(size, unroll) as i:
        g, through = gradient(i)
        normal = (loaded(i) - mean) * scale
        inner = through - average if centred else through
        if at_once:
            add(i, [g * normal, g])
        k.store(dx, (row, i), (inner - normal * slope) * scale)


def sum_parts(partial: TensorType, position: int, out: TensorType, number: int) -> BoundKernel:
    """The columns of a temporary (parts, n) summed, in order, into a row-major output."""
    parts, length = partial.shape
    k = KernelBuilder("sum_parts")
    source = k.tensor("temporary", position, partial)
    target = k.tensor("output", number, tensor_type(out.dtype, (length,)))
    size, rows = k.size(length), k.size(parts)
    with k.parallel(-(-length // COLUMNS), work=parts * COLUMNS) as (block,):
        start = block * COLUMNS
        extent = values.binary("min", size - start, const(COLUMNS))
        with k.vector(extent, unroll_for(length)) as i:
            total = k.register(0.0, partial.dtype)
            with k.loop(rows) as part:
                k.accumulate(total, "add", source[part, start + i])
            k.store(target, (start + i,), values.read(total))
    return k.bind()


def lower_group_backward(types: Types, outputs: tuple[TensorType, ...], *, groups: int) -> Lowering:
    """Of (grad, x, weight, eps), x being (N, C, ...): dx, dweight and dbias."""
    x = type_of(types[1])
    compute = compute_dtype(x.dtype)
    batch, channels = x.shape[:2]
    width = channels // groups
    space = x.numel // max(batch * channels, 1)
    sums = tensor_type(compute, (batch, channels))
    k = KernelBuilder("group_norm_backward")
    shape = (batch * groups, width, space)
    g_rows, x_rows, scale = _inputs(k, types, shape, (groups, width))
    eps = k.number(3, float)
    dx = k.tensor("output", 0, tensor_type(outputs[0].dtype, shape))
    flat = tensor_type(compute, shape[:2])
    partial = [k.tensor("temporary", i, flat) for i, _ in enumerate(outputs[1:])]
    with k.parallel(batch, groups, work=width * space * 6) as (n, group):
        row = n * k.size(groups) + group
        weights = None if scale is None else (lambda c: cast(scale[group, c], compute))
        _group_row(k, row, shape, compute, g_rows, x_rows, weights, eps, dx, partial)
    return _with_sums(k, sums, outputs)


def _group_row(
    k: KernelBuilder, row: Value, shape: Shape, compute: DType, grad: Operand, x: Operand,
    weight: Callable[[Value], Value] | None, eps: Value, dx: Operand, partial: list[Operand],
) -> None:  # fmt: skip
    """dx of one group of one sample, and the sums for each of its channels."""
    _, width, space = shape
    channels, size, run = k.size(width), k.size(space), k.size(width * space)
    count = cast(run, compute)
    unroll, wide = unroll_for(space), unroll_for(width * space)
    whole = Operand(x.buffer, (shape[0], width * space), (k.size(width * space), const(1)))

    def average(term: Callable[[Value], Value]) -> Value:
        total = k.register(0.0, compute)
        with k.vector(run, wide) as i:
            k.accumulate(total, "add", term(i))
        return values.read(total) / count

    def loaded(i: Value) -> Value:
        return cast(whole[row, i], compute)

    mean = average(loaded)
    scale = inverse_root(average(lambda i: (loaded(i) - mean) * (loaded(i) - mean)), eps)

    def pair(c: Value, s: Value) -> tuple[Value, Value]:
        return cast(grad[row, c, s], compute), (cast(x[row, c, s], compute) - mean) * scale

    through = [k.register(0.0, compute) for _ in range(2)]
    with k.loop(channels) as c:
        mine = [k.register(0.0, compute) for _ in range(2)]
        with k.vector(size, unroll) as s:
            g, normal = pair(c, s)
            k.accumulate(mine[0], "add", g * normal)
            k.accumulate(mine[1], "add", g)
        for target, total in zip(partial, mine, strict=False):
            k.store(target, (row, c), values.read(total))
        for total, channel in zip(through, mine, strict=True):
            part = values.read(channel)
            k.accumulate(total, "add", part if weight is None else part * weight(c))
    slope, shift = (values.read(t) / count for t in through)
    with k.loop(channels) as c, k.vector(size, unroll) as s:
        g, normal = pair(c, s)
        inner = g if weight is None else g * weight(c)
        k.store(dx, (row, c, s), (inner - shift - normal * slope) * scale)
