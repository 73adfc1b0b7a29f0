"""The public functions of convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flame.core.errors import ArgumentError, DTypeError, ShapeError
from flame.core.handle import is_tensor
from flame.core.types import Shape
from flame.ops.autocast import autocasts
from flame.ops.convolution import operation
from flame.ops.convolution.arguments import (
    check_operands,
    padding_of,
    per_dimension,
    window_sizes,
)  # fmt: skip
from flame.ops.shapes import squeeze, unsqueeze

if TYPE_CHECKING:
    from flame.tensor import Tensor


def _tensors(name: str, *operands: Any) -> None:
    for operand in operands:
        if not is_tensor(operand):
            raise DTypeError(f"{name} takes tensors, got {type(operand).__name__}")


@autocasts("lower")
def _convolve(
    name: str, rank: int, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any,
    padding: Any, dilation: Any, groups: int,
) -> Tensor:  # fmt: skip
    _tensors(name, input, weight, *([] if bias is None else [bias]))
    check_operands(name, input, weight, bias, groups, rank, transposed=False)
    steps = per_dimension(name, "stride", stride, rank, 1)
    spread = per_dimension(name, "dilation", dilation, rank, 1)
    kernel = weight.shape[2:]
    pads = padding_of(name, padding, rank, kernel, steps, spread)
    size = window_sizes(name, input.shape[-rank:], kernel, steps, pads, spread)
    batched = input.ndim == rank + 2
    result: Tensor = operation.convolution(
        input if batched else unsqueeze(input, 0), weight, bias, stride=steps,
        padding=tuple(before for before, _ in pads), dilation=spread, groups=groups, size=size,
    )  # fmt: skip
    return result if batched else squeeze(result, 0)


def conv1d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """Convolution (cross-correlation) of (N, C, L) or (C, L) with (O, C / groups, K).

    ``padding``: zeros on both sides, as numbers, 'same' or 'valid'. Raises ShapeError where
    channels, groups or sizes do not fit.
    """
    return _convolve("conv1d", 1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """Convolution of (N, C, H, W) or (C, H, W) with (O, C / groups, KH, KW); see `conv1d`."""
    return _convolve("conv2d", 2, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """Convolution of (N, C, D, H, W) or (C, D, H, W) with (O, C / groups, KD, KH, KW); see
    `conv1d`.
    """
    return _convolve("conv3d", 3, input, weight, bias, stride, padding, dilation, groups)


def _transposed_sizes(
    name: str, sizes: Shape, kernel: Shape, stride: Shape, padding: Shape, extra: Shape,
    dilation: Shape,
) -> Shape:  # fmt: skip
    found = []
    for n, k, s, p, e, d in zip(sizes, kernel, stride, padding, extra, dilation, strict=True):
        if e >= max(s, d):
            raise ArgumentError(
                f"{name}: output_padding {extra} must be smaller than stride {stride} or dilation "
                f"{dilation}"
            )
        size = (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        if size < 1:
            raise ShapeError(
                f"{name}: an input of spatial sizes {sizes} with kernel {kernel}, stride {stride} "
                f"and padding {padding} leaves no output"
            )
        found.append(size)
    return tuple(found)


@autocasts("lower")
def _convolve_transposed(
    name: str, rank: int, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any,
    padding: Any, output_padding: Any, groups: int, dilation: Any,
) -> Tensor:  # fmt: skip
    _tensors(name, input, weight, *([] if bias is None else [bias]))
    check_operands(name, input, weight, bias, groups, rank, transposed=True)
    steps = per_dimension(name, "stride", stride, rank, 1)
    spread = per_dimension(name, "dilation", dilation, rank, 1)
    pads = per_dimension(name, "padding", padding, rank, 0)
    extra = per_dimension(name, "output_padding", output_padding, rank, 0)
    sizes = input.shape[-rank:]
    size = _transposed_sizes(name, sizes, weight.shape[2:], steps, pads, extra, spread)
    batched = input.ndim == rank + 2
    result: Tensor = operation.convolution_input_gradient(
        input if batched else unsqueeze(input, 0), weight, bias, stride=steps, padding=pads,
        dilation=spread, groups=groups, size=size,
    )  # fmt: skip
    return result if batched else squeeze(result, 0)


def conv_transpose1d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Tensor:  # fmt: skip
    """The transpose of `conv1d`: (N, C, L) with a weight (C, O / groups, K) to (N, O, L').

    L' = (L - 1) * stride - 2 * padding + dilation * (K - 1) + output_padding + 1.
    """
    return _convolve_transposed(
        "conv_transpose1d",
        1,
        input,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
    )


def conv_transpose2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Tensor:  # fmt: skip
    """The transpose of `conv2d`, with a weight (C, O / groups, KH, KW); see `conv_transpose1d`."""
    return _convolve_transposed(
        "conv_transpose2d",
        2,
        input,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
    )


def conv_transpose3d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Tensor:  # fmt: skip
    """The transpose of `conv3d`, with a weight (C, O / groups, KD, KH, KW); see
    `conv_transpose1d`.
    """
    return _convolve_transposed(
        "conv_transpose3d",
        3,
        input,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
    )
