"""Negative log-likelihood: log-probabilities picked by class index."""

from __future__ import annotations

from typing import Any

import numpy as np

from flame.core import dtypes
from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import Lowering
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
)  # fmt: skip
from flame.ops.elementwise import compute_dtype
from flame.ops.loops import broadcast_strides
from flame.ops.op import Joint, Op, Sample, Types
from flame.ops.reductions import sum as sum_of
from flame.ops.rows import type_of
from flame.ops.shapes import reshape


def _plain(sample: Sample, drop: tuple[int, ...] = ()) -> Sample:
    attributes = {k: v for k, v in sample.attributes.items() if k != "smoothing"}
    return Sample(tuple(x for i, x in enumerate(sample.inputs) if i not in drop), attributes)


# --- negative log-likelihood ----------------------------------------------------------------------


def _infer_nll(types: Types, *, ignore_index: int, reduction: str) -> tuple[TensorType, ...]:
    x, target = type_of(types[0]), type_of(types[1])
    check("nll_loss", x, target, types[2])
    loss = tensor_type(x.dtype, target.shape if reduction == "none" else (), None, x.device)
    return loss, tensor_type(compute_dtype(x.dtype), (), None, x.device)


def _lower_nll(
    types: Types, outputs: tuple[TensorType, ...], *, ignore_index: int, reduction: str
) -> Lowering:
    """Outputs: loss; the targets' weights summed."""
    x = type_of(types[0])
    operands, rows = row_operands(types, outputs, reduction=reduction)
    kernel = ClassKernel("nll_loss", x, operands)
    k, zero = kernel.k, kernel.number(0.0)
    error = k.tensor("error", 0, tensor_type(dtypes.int64, (2,)))
    with kernel.loops.each_row() as row:
        first = kernel.first(row)
        chosen, counts = kernel.target(row, ignore_index, error)
        own = kernel.weight(row, chosen)
        loss = -own * kernel.load("x", kernel.at(row, chosen))
        k.store(kernel.found["loss"], first, values.select(counts, loss, zero))
        k.store(kernel.found["mass"], first, values.select(counts, own, zero))
    return finished(k, rows, outputs, reduction=reduction)


def _lower_nll_backward(
    types: Types, outputs: tuple[TensorType, ...], *, ignore_index: int, reduction: str
) -> Lowering:
    """Of (grad, x, target, weight, total); of x only the type counts."""
    grad, x, target, weight, total = types
    x = type_of(x)
    operands = score_operands(x, weight, target, (1, 2, 3))
    operands["out"] = ("output", 0, x.dtype, broadcast_strides(outputs[0], x.shape))
    operands["grad"], operands["total"] = per_row(0, grad, x), per_row(4, total, x)
    kernel = ClassKernel("nll_loss_backward", x, operands)
    k, out = kernel.k, kernel.found["out"]
    with kernel.loops.each_row() as row:
        chosen, counts = kernel.target(row, ignore_index)
        scale = kernel.scale(row, counts, reduction=reduction)
        with kernel.loops.each(row) as index:
            k.store(out, index, kernel.number(0.0))
        value = -kernel.weight(row, chosen) * scale
        k.store(out, kernel.at(row, chosen), value, where=counts)
    return k.finish()


def _nll_parts(x: Any, target: Any, weight: Any, ignore_index: int) -> Any:
    """(one-hot targets times weights, the targets' weights), classes last."""
    _, _, aim, own = np_parts(x, target, weight, ignore_index, 0.0)
    return aim, own


def _reference_nll(x: Any, target: Any, weight: Any, *, ignore_index: int, reduction: str) -> Any:
    aim, own = _nll_parts(x, target, weight, ignore_index)
    scores = np.moveaxis(np.asarray(x, np.float64), 1 if x.ndim > 1 else 0, -1)
    loss = -(aim * scores).sum(axis=-1)
    if reduction == "mean":
        loss = loss.sum() / own.sum()
    elif reduction == "sum":
        loss = loss.sum()
    return loss, own.sum()


def _reference_nll_backward(
    grad: Any, x: Any, target: Any, weight: Any, total: Any, *, ignore_index: int, reduction: str
) -> Any:
    aim, _ = _nll_parts(x, target, weight, ignore_index)
    scale = np.asarray(grad, np.float64) / (total if reduction == "mean" else 1.0)
    scale = scale[..., None] if reduction == "none" else scale
    return np.moveaxis(-aim * scale, -1, 1 if x.ndim > 1 else 0)


def _second_nll(
    g: Any, grad: Any, x: Any, target: Any, weight: Any, total: Any, ignore_index: int,
    reduction: str,
) -> Any:  # fmt: skip
    slope = nll_loss_backward(
        ones_like(grad), x, target, weight, total, ignore_index=ignore_index, reduction=reduction
    )
    d_grad = sum_of(g * slope, class_dim(x.type) if reduction == "none" else None)
    return reshape(d_grad, grad.shape), None, None, None, None


def _vjp_nll(
    g: Any, x: Any, target: Any, weight: Any, out: Any, ignore_index: int, reduction: str
) -> Any:
    dx = nll_loss_backward(
        g, x, target, weight, out[1], ignore_index=ignore_index, reduction=reduction
    )
    return dx, None, None


nll_loss_backward: Op = Op(
    "nll_loss_backward", inputs=("grad", "x", "target", "weight", "total"),
    infer=infer_backward, lower=_lower_nll_backward, vjp=Joint(_second_nll),
    reference=_reference_nll_backward,
    samples=[_plain(backward_sample(s), drop=(4,)) for s in SAMPLES],
)  # fmt: skip

nll_loss_op = Op(
    "nll_loss", inputs=("x", "target", "weight"), infer=_infer_nll, lower=_lower_nll, extras=1,
    vjp=Joint(_vjp_nll), reference=_reference_nll, samples=[_plain(s) for s in SAMPLES],
    failure=failure_of("nll_loss"),
)  # fmt: skip
