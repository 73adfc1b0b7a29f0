"""Functions of `flame.nn.functional` that are a few lines over other operations."""

from __future__ import annotations

from flame.core.errors import ShapeError
from flame.ops.autocast import autocasts
from flame.tensor import Tensor

__all__ = ["bilinear", "glu"]


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
