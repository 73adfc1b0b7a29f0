"""Layer normalization with a scale and shift of each sample, for compiled steps.

y = normalized(x) * weight + bias, of x (N, ..., C), weight and bias (N, 1, ..., C): what networks
do whose norms a condition steers. No normalized row is written and read again, and one visit of
each row gives all gradients (`passes.modulated` finds it).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flame.core.errors import ShapeError
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel.builder import Lowering
from flame.ops import norm_gradients, norm_kernels
from flame.ops.loops import broadcast_strides
from flame.ops.norm_ops import EPS
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Op, Sample, Types
from flame.ops.rows import type_of


def of_samples(x: TensorType, weight: TensorType) -> bool:
    """Whether a factor of normalized rows is one of each sample."""
    ones = (1,) * (x.ndim - 2)
    return x.ndim > 2 and weight.shape == (x.shape[0], *ones, x.shape[-1])


def _check(name: str, x: TensorType, *parameters: TensorType) -> None:
    for p in parameters:
        if not of_samples(x, p):
            raise ShapeError(
                f"{name}: a scale or shift of shape {p.shape} is none of each sample of {x.shape}; "
                "they must be (N, 1, ..., C) and (N, ..., C)"
            )


def _infer(types: Types) -> TensorType:
    x, weight, bias = (type_of(t) for t in types[:3])
    _check("modulated_norm", x, weight, bias)
    return tensor_type(x.dtype, x.shape, None, x.device)


def _lower(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    x = type_of(types[0])
    strides: list[Shape | None] = [
        broadcast_strides(type_of(t), x.shape) for t in (*types[:3], outputs[0])
    ]
    return norm_kernels.lower_forward(
        "layer_norm", x.shape, (x.ndim - 1,), types, outputs, strides, centred=True
    )


def _reference(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return (_normal(x, eps)[0] * weight + bias).astype(x.dtype)


def _normal(x: Any, eps: float) -> tuple[Any, Any]:
    centred = x - x.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return centred * rstd, rstd


def _infer_backward(types: Types) -> tuple[TensorType, ...]:
    x, weight = type_of(types[1]), type_of(types[2])
    _check("modulated_norm_backward", x, weight)
    each = tensor_type(weight.dtype, weight.shape, None, weight.device)
    return tensor_type(x.dtype, x.shape, None, x.device), each, each


def _lower_backward(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    samples, *_, length = type_of(types[1]).shape
    return norm_gradients.lower_layer_backward(
        types, outputs, length=length, centred=True, samples=samples
    )


def _reference_backward(grad: Any, x: Any, weight: Any, eps: float) -> Any:
    normal, rstd = _normal(x, eps)
    through = grad * weight
    slope = (through * normal).mean(-1, keepdims=True)
    dx = (through - through.mean(-1, keepdims=True) - normal * slope) * rstd
    rows = tuple(range(1, x.ndim - 1))
    sums = ((grad * normal).sum(rows, keepdims=True), grad.sum(rows, keepdims=True))
    return (dx.astype(x.dtype), *(t.astype(weight.dtype) for t in sums))


_SHAPES = ((2, 5, 19), (3, 1, 8), (1, 70, 3), (5, 4, 70), (2, 3, 2, 9))
_EACH = tuple((n, *(1 for _ in rest), c) for n, *rest, c in _SHAPES)

modulated_norm = Op(
    "modulated_norm", inputs=("x", "weight", "bias", "eps"), infer=_infer, lower=_lower,
    vjp=NOT_DIFFERENTIABLE, reference=_reference, widens=True,
    samples=[Sample((Arg(s), Arg(w), Arg(w), EPS)) for s, w in zip(_SHAPES, _EACH, strict=True)],
)  # fmt: skip

modulated_norm_backward = Op(
    "modulated_norm_backward", inputs=("grad", "x", "weight", "eps"), infer=_infer_backward,
    lower=_lower_backward, vjp=NOT_DIFFERENTIABLE, reference=_reference_backward, widens=True,
    reads=lambda type_: type_.contiguous,
    samples=[Sample((Arg(s), Arg(s), Arg(w), EPS)) for s, w in zip(_SHAPES, _EACH, strict=True)],
)  # fmt: skip
