"""The weight gradient of convolutions whose kernel is 1 in each dimension.

weight (O, C) is the sum over positions of the result's gradient times the source. With channels
last an iteration takes a block of channels of both and a part of the positions, and sums register
tiles straight from the tensors. Parts are added up in order, so results do not depend on the number
of threads.
"""

from __future__ import annotations

from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Operand
from flame.kernel.program import Matrix
from flame.kernel.values import Value, const, read
from flame.ops.convolution.blocking import vector_bytes
from flame.ops.convolution.pointwise import Picked, Plan, memory_of
from flame.ops.convolution.winograd_stages import ROWS, add_outer_products, flat

POSITIONS = 64  # whose channels stay in the first-level cache
PARTS = 8  # of the positions, at most
BAND = 4  # blocks of channels of an iteration, on either side
LEAST_SPAN = 256  # positions of a part


def fits(plan: Plan) -> bool:
    """Whether blocks of channels are whole vectors and register tiles."""
    if not plan.last:
        return True
    return _block(plan, plan.source) > 0 and _block(plan, plan.result) > 0


def _block(plan: Plan, x: TensorType) -> int:
    """Channels of a block: the widest of a few vectors that divides them."""
    vector = max(vector_bytes() // plan.source.dtype.itemsize, ROWS)
    return next((n * vector for n in (4, 2, 1) if x.shape[1] % (n * vector) == 0), 0)


def lower(plan: Plan, weight: TensorType) -> Lowering:
    """The kernels; operand 0 is the result's gradient, operand 1 the source."""
    return _lower_last(plan, weight) if plan.last else _lower_first(plan, weight)


# --- channels last --------------------------------------------------------------------------------


def _lower_last(plan: Plan, weight: TensorType) -> Lowering:
    rows, lanes = _block(plan, plan.source), _block(plan, plan.result)
    blocks = weight.shape[1] // rows, weight.shape[0] // lanes
    parts = max(1, min(PARTS, plan.total // LEAST_SPAN))
    span = -(-plan.total // parts)
    parts = -(-plan.total // span)
    partial = tensor_type(weight.dtype, (parts, *blocks, rows * lanes))
    kernels = _sum_products(plan, partial, (rows, lanes), span), _add_parts(partial, weight, lanes)
    return Lowering(kernels, (partial.numel * weight.dtype.itemsize,))


def _sum_products(
    plan: Plan, partial: TensorType, shape: tuple[int, int], span: int
) -> BoundKernel:
    """An iteration: a part of the positions, ``BAND`` blocks of channels of both."""
    k = KernelBuilder("pointwise_gradient")
    g, x = memory_of(k, "input", 0, plan.result), memory_of(k, "input", 1, plan.source)
    out = k.tensor("temporary", 0, partial)
    parts, *blocks, _ = partial.shape
    rows, lanes = shape
    picked = Picked(k, plan) if plan.strided else None
    left = k.scratch(partial.dtype, (min(BAND, blocks[0]), POSITIONS, rows))
    right = k.scratch(partial.dtype, (min(BAND, blocks[1]), POSITIONS, lanes))
    channels, own = k.size(plan.source.shape[1]), k.size(plan.result.shape[1])
    bands = [-(-n // BAND) for n in blocks]
    with k.parallel(parts, *bands, work=span * BAND * rows * lanes // 16) as (part, high, wide):
        first_row, first_lane = high * BAND, wide * BAND
        counts = [
            values.binary("min", k.size(n) - first, const(BAND))
            for n, first in zip(blocks, (first_row, first_lane), strict=True)
        ]
        begin = part * k.size(span)
        end = values.binary("min", k.size(plan.total), begin + k.size(span))
        chunks = values.binary("udiv", end - begin + (POSITIONS - 1), const(POSITIONS))

        zero = const(0)

        def multiply(i: Value, *, fresh: bool) -> None:
            position = begin + i * POSITIONS
            length = values.binary("min", end - position, const(POSITIONS))
            with k.loop(length) as row:
                here = position + row
                there = here if picked is None else picked.place(here)
                _copy(k, x, there * channels + first_row * rows, left, row, counts[0])
                _copy(k, g, here * own + first_lane * lanes, right, row, counts[1])
            with k.nest(counts) as (r, n):
                target = out.at((part, first_row + r, first_lane + n, const(0)))
                add_outer_products(
                    k, out, target, (left, left.at((r, zero, zero))),
                    (right, right.at((n, zero, zero))), shape, length, fresh=fresh,
                )  # fmt: skip

        multiply(const(0), fresh=True)
        with k.loop(chunks - 1) as i:
            multiply(i + 1, fresh=False)
    return k.bind()


def _copy(
    k: KernelBuilder, source: Operand, begin: Value, target: Operand, row: Value, blocks: Value
) -> None:
    """Blocks of channels of a position to ``row`` of each block."""
    width = target.shape[2]
    native = vector_bytes() // source.dtype.itemsize
    with k.loop(blocks) as block, k.vector(width, width // native) as v:
        k.store(target, (block, row, v), values.load(source.buffer, begin + block * width + v))


def _add_parts(partial: TensorType, weight: TensorType, lanes: int) -> BoundKernel:
    """The sum of all parts, in order, turned to (O, C)."""
    k = KernelBuilder("pointwise_gradient_sum")
    source, out = k.tensor("temporary", 0, partial), memory_of(k, "output", 0, weight)
    parts, row_blocks, lane_blocks, count = partial.shape
    rows = count // lanes
    sums = k.scratch(partial.dtype, (rows, lanes))
    columns = k.size(weight.shape[1])
    with k.parallel(row_blocks, lane_blocks, work=parts * rows * lanes // 8) as (row, lane):
        zero = const(0)
        base = source.at((zero, row, lane, zero))
        with k.vector(rows * lanes, 4) as v:
            total = k.register(values.load(source.buffer, base + v))
            with k.loop(k.size(parts - 1)) as i:
                value = values.load(source.buffer, base + (i + 1) * source.strides[0] + v)
                k.assign(total, read(total) + value)
            k.store(flat(sums), (v,), read(total))
        k.transpose(
            const(rows), const(lanes), Matrix(sums.buffer, zero, const(lanes)),
            Matrix(out.buffer, lane * lanes * columns + row * rows, columns),
        )  # fmt: skip
    return k.bind()


# --- channels first -------------------------------------------------------------------------------


def _lower_first(plan: Plan, weight: TensorType) -> Lowering:
    """Products of whole images, a few of them in each part."""
    images = plan.result.shape[0]
    span = -(-images // min(images, PARTS))
    parts = -(-images // span)
    partial = tensor_type(weight.dtype, (parts, 1, 1, *weight.shape[:2]))
    k = KernelBuilder("pointwise_gradient_columns")
    g, x = memory_of(k, "input", 0, plan.result), memory_of(k, "input", 1, plan.source)
    out = k.tensor("temporary", 0, partial)
    own, inner, length = (
        k.size(n) for n in (plan.result.shape[1], plan.source.shape[1], plan.positions)
    )
    with k.parallel(parts, work=span * plan.positions * weight.numel // 16) as (part,):
        first = part * k.size(span)
        count = values.binary("min", k.size(images) - first, k.size(span))
        with k.loop(count) as i:
            image = first + i
            k.gemm(
                own, inner, length, Matrix(g.buffer, image * own * length, length),
                Matrix(x.buffer, image * inner * length, length, transposed=True),
                Matrix(out.buffer, part * own * inner, inner),
                values.select(i > 0, const(1), const(0)),
            )  # fmt: skip
    total = _add_images(partial, weight)
    return Lowering((k.bind(), total), (partial.numel * weight.dtype.itemsize,))


def _add_images(partial: TensorType, weight: TensorType) -> BoundKernel:
    k = KernelBuilder("pointwise_gradient_sum_columns")
    source, out = k.tensor("temporary", 0, partial), memory_of(k, "output", 0, weight)
    parts, _, _, rows, columns = partial.shape
    with k.parallel(rows, work=parts * columns // 8) as (row,):
        begin = row * k.size(columns)
        with k.vector(k.size(columns), 4) as v:
            total = k.register(values.load(source.buffer, begin + v))
            with k.loop(k.size(parts - 1)) as i:
                value = values.load(source.buffer, (i + 1) * source.strides[0] + begin + v)
                k.assign(total, read(total) + value)
            k.store(flat(out), (begin + v,), read(total))
    return k.bind()
