"""Functions of `flame.nn.functional` that are a few lines over other operations."""

from __future__ import annotations

from collections.abc import Sequence

import flame
from flame.core.errors import ArgumentError, ShapeError
from flame.tensor import Tensor

__all__ = [
    "bilinear",
    "circular_pad",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "glu",
    "pixel_unshuffle",
]


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """a · sigmoid(b), with a and b the halves of `input` along `dim`, whose size must be even.

    Source: Dauphin et al., "Language Modeling with Gated Convolutional Networks", 2016.
    """
    if input.ndim == 0 or input.shape[dim] % 2:
        raise ShapeError(f"glu: dimension {dim} of {tuple(input.shape)} must have an even size")
    first, second = input.chunk(2, dim)
    result: Tensor = first * second.sigmoid()
    return result


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
    result: Tensor = (products * input2.unsqueeze(-2)).sum(dim=-1)
    return result if bias is None else result + bias


def pixel_unshuffle(input: Tensor, downscale_factor: int) -> Tensor:
    """(..., C, H·r, W·r) -> (..., C·r², H, W) with r = `downscale_factor`: pixel_shuffle undone."""
    factor = downscale_factor
    if input.ndim < 3 or input.shape[-2] % factor or input.shape[-1] % factor:
        raise ShapeError(
            f"pixel_unshuffle: takes (..., C, H, W) with H and W divisible by {factor}, "
            f"got {tuple(input.shape)}"
        )
    *batch, channels, height, width = input.shape
    rows, columns = height // factor, width // factor
    split = input.reshape(-1, channels, rows, factor, columns, factor)
    moved = split.permute(0, 1, 3, 5, 2, 4)
    result: Tensor = moved.reshape(*batch, channels * factor * factor, rows, columns)
    return result


def circular_pad(input: Tensor, pad: Sequence[int]) -> Tensor:
    """Values from the other end, (before, after) for each of the last axes, the last one first."""
    for place in range(0, len(pad), 2):
        before, after = pad[place], pad[place + 1]
        dim = input.ndim - 1 - place // 2
        size = input.shape[dim]
        if max(before, after) > size:
            raise ShapeError(
                f"pad: circular padding {tuple(pad)} is larger than dimension {dim} of "
                f"{tuple(input.shape)}"
            )
        kept = size + min(before, 0) + min(after, 0)
        parts = [input.narrow(dim, max(-before, 0), kept)]
        if before > 0:
            parts.insert(0, input.narrow(dim, size - before, before))
        if after > 0:
            parts.append(input.narrow(dim, 0, after))
        input = flame.cat(parts, dim) if len(parts) > 1 else parts[0]
    return input


def _channel_dropout(
    input: Tensor, p: float, *, training: bool, inplace: bool, leading: int
) -> Tensor:
    """Zero whole channels: one draw for each index of the first `leading` dimensions."""
    if not 0.0 <= p <= 1.0:
        raise ArgumentError(f"dropout: p must lie in [0, 1], got {p}")
    if not training or p == 0.0:
        return input
    shape = (*input.shape[:leading], *(1,) * (input.ndim - leading))
    ones = flame.ones(shape, dtype=input.dtype, device=input.device)
    result: Tensor = input * flame.nn.functional.dropout(ones, p)
    return input.copy_(result) if inplace else result


def _check_rank(name: str, input: Tensor, ranks: tuple[int, ...]) -> None:
    if input.ndim not in ranks:
        raise ShapeError(
            f"{name}: takes {' or '.join(map(str, ranks))} dimensions, got {tuple(input.shape)}"
        )


def dropout1d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Zero each channel of (N, C, L) or (C, L) with probability `p`, and scale the rest.

    Source: Tompson et al., "Efficient Object Localization Using Convolutional Networks", 2015.
    """
    _check_rank("dropout1d", input, (2, 3))
    leading = input.ndim - 1
    return _channel_dropout(input, p, training=training, inplace=inplace, leading=leading)


def dropout2d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Zero each channel of (N, C, H, W) or (N, C, L) with probability `p`, and scale the rest.

    Source: Tompson et al., "Efficient Object Localization Using Convolutional Networks", 2015.
    """
    _check_rank("dropout2d", input, (3, 4))
    return _channel_dropout(input, p, training=training, inplace=inplace, leading=2)


def dropout3d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Zero each channel of (N, C, D, H, W) or (C, D, H, W) with probability `p`, scale the rest.

    Source: Tompson et al., "Efficient Object Localization Using Convolutional Networks", 2015.
    """
    _check_rank("dropout3d", input, (4, 5))
    leading = input.ndim - 3
    return _channel_dropout(input, p, training=training, inplace=inplace, leading=leading)
