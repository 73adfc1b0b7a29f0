"""Functions of `flame.nn.functional` that are a few lines over other operations."""

from __future__ import annotations

from flame.core.errors import ShapeError, UnsupportedError
from flame.ops.affine import linear
from flame.ops.autocast import autocasts
from flame.ops.losses import cross_entropy
from flame.tensor import Tensor

__all__ = ["bilinear", "glu", "linear_cross_entropy"]


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """a · sigmoid(b), with a and b the halves of `input` along `dim`, whose size must be even.

    Source: Dauphin et al., "Language Modeling with Gated Convolutional Networks", 2016.
    """
    if input.ndim == 0 or input.shape[dim] % 2:
        raise ShapeError(f"glu: dimension {dim} of {tuple(input.shape)} must have an even size")
    first, second = input.chunk(2, dim)
    result: Tensor = first * second.sigmoid()
    return result


@autocasts("widest")
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[o] = x1ᵀ W[o] x2 + b[o]: (..., in1), (..., in2), (out, in1, in2) -> (..., out)."""
    outputs, size1, size2 = weight.shape
    if input1.shape[:-1] != input2.shape[:-1] or (input1.shape[-1], input2.shape[-1]) != (
        size1,
        size2,
    ):
        raise ShapeError(
            f"bilinear: inputs {tuple(input1.shape)} and {tuple(input2.shape)} do not fit a weight "
            f"{tuple(weight.shape)}; they must be (..., {size1}) and (..., {size2})"
        )
    products = input1 @ weight.permute(1, 0, 2).reshape(size1, outputs * size2)
    products = products.reshape(*input1.shape[:-1], outputs, size2)
    terms = products * input2.unsqueeze(-2)
    result: Tensor = terms.sum(dim=-1, dtype=terms.dtype)  # integers are not widened here
    return result if bias is None else result + bias


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: None = None,
) -> Tensor:
    """`cross_entropy` of ``linear(input, linear_weight, linear_bias)``.

    input: (N, in) or (in,). linear_weight: (C, in), or (C, d1, ..., in) for targets (N, d1, ...).
    In a compiled step large scores come in blocks of rows by themselves, with the gradients of each
    block, so PyTorch's ``options`` for that are not taken: UnsupportedError.
    """
    if options is not None:
        raise UnsupportedError(
            "linear_cross_entropy: there are no options; compile the step (flame.compile), and "
            "large scores are computed in blocks"
        )
    if linear_weight.ndim < 2:
        raise ShapeError(
            f"linear_cross_entropy: linear_weight must be (C, in) or (C, d1, ..., in), got "
            f"{tuple(linear_weight.shape)}"
        )
    *outputs, size = linear_weight.shape
    if input.ndim not in (1, 2):
        raise ShapeError(
            f"linear_cross_entropy: input must be (N, in) or (in,), got {tuple(input.shape)}; "
            "flatten its first dimensions, and those of target"
        )
    if linear_bias is not None and tuple(linear_bias.shape) != tuple(outputs):
        raise ShapeError(
            f"linear_cross_entropy: linear_bias must be {tuple(outputs)}, as linear_weight without "
            f"its last dimension, got {tuple(linear_bias.shape)}"
        )
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    scores = linear(input, linear_weight.reshape(-1, size), bias)
    if len(outputs) > 1:
        scores = scores.reshape(*input.shape[:-1], *outputs)
    ignored = -100 if ignore_index is None else ignore_index
    result: Tensor = cross_entropy(
        scores, target, weight, ignore_index=ignored, reduction=reduction,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    return result
