"""Transposed convolution layers: the gradient of a convolution towards its input, used to enlarge.

`weight` is (in_channels, out_channels / groups, *kernel_size).
"""

from __future__ import annotations

from collections.abc import Sequence

import flame.nn.functional as F
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, ShapeError
from flame.nn._arguments import Device, Size
from flame.nn._convolution import ConvolutionBase
from flame.tensor import Tensor

__all__ = ["ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]


class _TransposedConvolution(ConvolutionBase):
    padding: tuple[int, ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        device: Device = None,
        dtype: DType | None = None,
    ) -> None:
        if padding_mode != "zeros":
            raise ArgumentError(
                f"{type(self).__name__}: padding_mode must be 'zeros', got {padding_mode!r}"
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
            weight_channels=(in_channels, out_channels // groups if groups > 0 else 0),
            output_padding=output_padding,
            device=device,
            dtype=dtype,
        )

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Convolve; `output_size` chooses among the output sizes that the stride makes possible."""
        self._check_input(input)
        output_padding = (
            self.output_padding
            if output_size is None
            else self._output_padding_for(input, tuple(output_size))
        )
        convolve = _CONVOLUTIONS[self.axes]
        return convolve(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )

    def _output_padding_for(self, input: Tensor, output_size: tuple[int, ...]) -> tuple[int, ...]:
        axes = self.axes
        leading = input.ndim - axes
        wanted = output_size[leading:] if len(output_size) == input.ndim else output_size
        if len(wanted) != axes:
            raise ShapeError(
                f"{self._get_name()}: output_size must have {axes} or {input.ndim} entries, "
                f"got {output_size}"
            )
        smallest = [
            (size - 1) * step - 2 * pad + dilation * (kernel - 1) + 1
            for size, step, pad, dilation, kernel in zip(
                input.shape[leading:],
                self.stride,
                self.padding,
                self.dilation,
                self.kernel_size,
                strict=True,
            )
        ]
        extra = tuple(size - least for size, least in zip(wanted, smallest, strict=True))
        if any(not 0 <= more < step for more, step in zip(extra, self.stride, strict=True)):
            largest = tuple(
                least + step - 1 for least, step in zip(smallest, self.stride, strict=True)
            )
            raise ShapeError(
                f"{self._get_name()}: output_size {wanted} is out of reach for an input of shape "
                f"{tuple(input.shape)}; it must lie between {tuple(smallest)} and {largest}"
            )
        return extra


class ConvTranspose1d(_TransposedConvolution):
    """Transposed convolution over one axis: (N, C_in, L) -> (N, C_out, L_out)."""

    axes = 1


class ConvTranspose2d(_TransposedConvolution):
    """Transposed convolution over two axes: (N, C_in, H, W) -> (N, C_out, H_out, W_out)."""

    axes = 2


class ConvTranspose3d(_TransposedConvolution):
    """Transposed convolution over three axes: (N, C_in, D, H, W) -> (N, C_out, D_out, H_out,
    W_out).
    """

    axes = 3


_CONVOLUTIONS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
