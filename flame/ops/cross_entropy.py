"""Cross entropy with class indices, as a fused kernel forward and one backward.

Invariant: only the log-sum-exp of each row is kept for the backward pass, never the probabilities.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flame.core import dtypes
from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import Lowering
from flame.kernel.values import Value, cast
from flame.ops.class_rows import (
    SAMPLES,
    ClassKernel,
    backward_sample,
    check,
    class_dim,
    failure_of,
    finished,
    infer_backward,
    np_parts,
    ones_like,
    per_row,
    row_operands,
    score_operands,
    spread_rows,
)  # fmt: skip
from flame.ops.conversion import convert
from flame.ops.elementwise import compute_dtype
from flame.ops.loops import broadcast_strides
from flame.ops.op import Joint, Op, Types
from flame.ops.reductions import sum as sum_of
from flame.ops.rows import Index, type_of
from flame.ops.shapes import reshape, unsqueeze
from flame.ops.softmax import softmax_backward, softmax_op

# --- cross entropy --------------------------------------------------------------------------------


def _infer(
    types: Types, *, ignore_index: int, smoothing: float, reduction: str
) -> tuple[TensorType, ...]:
    x, target = type_of(types[0]), type_of(types[1])
    check("cross_entropy", x, target, types[2])
    rows = tensor_type(compute_dtype(x.dtype), target.shape, None, x.device)
    loss = tensor_type(x.dtype, target.shape if reduction == "none" else (), None, x.device)
    return loss, rows, tensor_type(rows.dtype, (), None, x.device)


def _lower(
    types: Types, outputs: tuple[TensorType, ...], *, ignore_index: int, smoothing: float,
    reduction: str,
) -> Lowering:  # fmt: skip
    """Outputs: loss; log-sum-exp of each row; the targets' weights summed."""
    x = type_of(types[0])
    operands, rows = row_operands(types, outputs, reduction=reduction)
    operands["log_sum"] = ("output", 1, rows.dtype, spread_rows(outputs[1], x))
    kernel = ClassKernel("cross_entropy", x, operands)
    error = kernel.k.tensor("error", 0, tensor_type(dtypes.int64, (2,)))
    with kernel.loops.each_row(passes=6) as row:
        chosen, counts = kernel.target(row, ignore_index, error)
        _row_loss(kernel, row, chosen, counts, smoothing=smoothing)
    return finished(kernel.k, rows, outputs, reduction=reduction)


def _row_loss(
    kernel: ClassKernel, row: Index, chosen: Value, counts: Value, *, smoothing: float
) -> None:
    k, first = kernel.k, kernel.first(row)
    peak = k.register(float("-inf"), kernel.compute)
    with kernel.loops.each(row) as index:
        k.accumulate(peak, "max", kernel.load("x", index))
    top = values.read(peak)
    kinds = 3 if smoothing else 1
    sums = [k.register(0.0, kernel.compute) for _ in range(kinds)]  # exp, weight, weight * score
    with kernel.loops.each(row) as index:
        score = kernel.load("x", index)
        k.accumulate(sums[0], "add", values.unary("exp", score - top))
        if smoothing:
            weight = kernel.weight(row, kernel.position(index))
            k.accumulate(sums[1], "add", weight)
            k.accumulate(sums[2], "add", weight * (top - score))
    log_sum = values.unary("log", values.read(sums[0]))
    own = kernel.weight(row, chosen)
    loss = own * (log_sum + (top - kernel.load("x", kernel.at(row, chosen))))
    if smoothing:
        spread = values.read(sums[1]) * log_sum + values.read(sums[2])
        share = kernel.number(smoothing) / cast(kernel.classes, kernel.compute)
        loss = loss * kernel.number(1 - smoothing) + spread * share
    zero = kernel.number(0.0)
    k.store(kernel.found["loss"], first, values.select(counts, loss, zero))
    k.store(kernel.found["mass"], first, values.select(counts, own, zero))
    k.store(kernel.found["log_sum"], first, log_sum + top)


def _lower_backward(
    types: Types, outputs: tuple[TensorType, ...], *, ignore_index: int, smoothing: float,
    reduction: str,
) -> Lowering:  # fmt: skip
    """Of (grad, x, target, weight, log_sum, total): one pass over the scores."""
    grad, x, target, weight, log_sum, total = types
    x = type_of(x)
    operands = score_operands(x, weight, target, (1, 2, 3))
    operands["out"] = ("output", 0, outputs[0].dtype, broadcast_strides(outputs[0], x.shape))
    for label, position, t in (("grad", 0, grad), ("log_sum", 4, log_sum), ("total", 5, total)):
        operands[label] = per_row(position, t, x)
    kernel = ClassKernel("cross_entropy_backward", x, operands)
    with kernel.loops.each_row(passes=4) as row:
        chosen, counts = kernel.target(row, ignore_index)
        _row_gradient(kernel, row, chosen, counts, smoothing=smoothing, reduction=reduction)
    return kernel.k.finish()


def _row_gradient(
    kernel: ClassKernel, row: Index, chosen: Value, counts: Value, *, smoothing: float,
    reduction: str,
) -> None:  # fmt: skip
    k, out, zero = kernel.k, kernel.found["out"], kernel.number(0.0)
    scale = kernel.scale(row, counts, reduction=reduction)
    base = kernel.load("log_sum", kernel.first(row))
    own = kernel.weight(row, chosen) * kernel.number(1 - smoothing)
    share = kernel.number(smoothing) / cast(kernel.classes, kernel.compute)
    mass = own
    if smoothing:
        weights = k.register(0.0, kernel.compute)
        with kernel.loops.each(row) as index:
            k.accumulate(weights, "add", kernel.weight(row, kernel.position(index)))
        mass = own + values.read(weights) * share

    with kernel.loops.each(row) as index:
        position = kernel.position(index)
        made = values.unary("exp", kernel.load("x", index) - base) * mass
        if smoothing:
            made = made - kernel.weight(row, position) * share
        # Here and not in a store of its own afterwards: the score is read before its gradient
        # comes to lie over it.
        made = made - values.select(values.compare("eq", position, chosen), own, zero)
        k.store(out, index, values.select(counts, made * scale, zero))


def _reference(
    x: Any, target: Any, weight: Any, *, ignore_index: int, smoothing: float, reduction: str
) -> Any:
    scores, log_sum, aim, own = np_parts(x, target, weight, ignore_index, smoothing)
    loss = (aim * (log_sum[..., None] - scores)).sum(axis=-1)
    if reduction == "mean":
        loss = loss.sum() / own.sum()
    elif reduction == "sum":
        loss = loss.sum()
    return loss, log_sum, own.sum()


def _reference_backward(
    grad: Any, x: Any, target: Any, weight: Any, log_sum: Any, total: Any, *, ignore_index: int,
    smoothing: float, reduction: str,
) -> Any:  # fmt: skip
    scores, _, aim, _ = np_parts(x, target, weight, ignore_index, smoothing)
    scale = np.asarray(grad, np.float64) / (total if reduction == "mean" else 1.0)
    scale = scale[..., None] if reduction == "none" else scale
    power = np.exp(scores - np.asarray(log_sum, np.float64)[..., None])
    dx = (power * aim.sum(axis=-1, keepdims=True) - aim) * scale
    return np.moveaxis(dx, -1, 1 if x.ndim > 1 else 0)


def _second(
    g: Any, grad: Any, x: Any, target: Any, weight: Any, log_sum: Any, total: Any,
    ignore_index: int, smoothing: float, reduction: str,
) -> Any:  # fmt: skip
    """dx = s (Q p - q): linear in s, and through the probabilities p in x."""
    dim = class_dim(x.type)
    options = {"ignore_index": ignore_index, "smoothing": smoothing, "reduction": reduction}
    ones = ones_like(grad)
    slope = cross_entropy_backward(ones, x, target, weight, log_sum, total, **options)
    d_grad = sum_of(g * slope, dim if reduction == "none" else None)
    p = softmax_op(x, dim=dim)
    mass = row_mass(x, target, weight, ignore_index=ignore_index, smoothing=smoothing)
    scale = grad / total if reduction == "mean" else grad
    if reduction == "none" and x.ndim > 1:
        scale = unsqueeze(scale, dim)
    d_x = softmax_backward(g, p, dim=dim) * (unsqueeze(mass, dim) * scale)
    return reshape(d_grad, grad.shape), d_x, None, None, None, None


def row_mass(x: Any, target: Any, weight: Any, *, ignore_index: int, smoothing: float) -> Any:
    """The sum of the distribution that each row aims at."""
    from flame.ops.comparison import ne, where
    from flame.ops.indexing import index_select

    counts = ne(target, ignore_index)
    if weight is None:
        return convert(counts, dtype=x.dtype)
    known = reshape(where(counts, target, 0), (-1,))
    own = reshape(index_select(weight, 0, known), target.shape)
    mass = own * (1 - smoothing) + sum_of(weight) * (smoothing / weight.shape[0])
    return where(counts, mass, 0.0)


def _vjp(
    g: Any, x: Any, target: Any, weight: Any, out: Any, ignore_index: int, smoothing: float,
    reduction: str,
) -> Any:  # fmt: skip
    _, log_sum, total = out
    dx = cross_entropy_backward(
        g, x, target, weight, log_sum, total,
        ignore_index=ignore_index, smoothing=smoothing, reduction=reduction,
    )  # fmt: skip
    return dx, None, None


cross_entropy_backward: Op = Op(
    "cross_entropy_backward", inputs=("grad", "x", "target", "weight", "log_sum", "total"),
    infer=infer_backward, lower=_lower_backward, vjp=Joint(_second),
    reference=_reference_backward, samples=[backward_sample(s) for s in SAMPLES], widens=True,
    overlays=(1,),
)  # fmt: skip

cross_entropy_op = Op(
    "cross_entropy", inputs=("x", "target", "weight"), infer=_infer, lower=_lower, extras=2,
    vjp=Joint(_vjp), reference=_reference, samples=SAMPLES, failure=failure_of("cross_entropy"),
    widens=True,
)  # fmt: skip
