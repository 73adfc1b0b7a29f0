"""Convolution layers in one, two and three dimensions: (N, C_in, ...) -> (N, C_out, ...), the batch
is optional.

`weight` is (out_channels, in_channels / groups, *kernel_size).
"""

from __future__ import annotations

import math

import flame
import flame.nn.functional as F
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError
from flame.nn import init
from flame.nn._arguments import Device, Size, per_axis, wrong_input
from flame.nn.module import Module
from flame.nn.parameter import Parameter
from flame.tensor import Tensor

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvolutionBase"]

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_AXIS_NAMES = {1: "L", 2: "H, W", 3: "D, H, W"}


class ConvolutionBase(Module):
    """What all convolutions share: checked sizes, parameters and their first values, text."""

    axes = 0
    named_paddings: tuple[str, ...] = ()
    weight: Parameter
    bias: Parameter | None
    padding: str | tuple[int, ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        *,
        stride: Size,
        padding: Size | str,
        dilation: Size,
        groups: int,
        bias: bool,
        padding_mode: str,
        weight_channels: tuple[int, int],
        output_padding: Size = 0,
        device: Device,
        dtype: DType | None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = per_axis(kernel_size, self.axes, "kernel_size")
        self.stride = per_axis(stride, self.axes, "stride")
        self.padding = (
            padding if isinstance(padding, str) else per_axis(padding, self.axes, "padding")
        )
        self.dilation = per_axis(dilation, self.axes, "dilation")
        self.output_padding = per_axis(output_padding, self.axes, "output_padding")
        self.groups = groups
        self.padding_mode = padding_mode
        self._check()
        shape = (*weight_channels, *self.kernel_size)
        self.weight = Parameter(flame.empty(shape, device=device, dtype=dtype))
        self.register_parameter(
            "bias",
            Parameter(flame.empty((out_channels,), device=device, dtype=dtype)) if bias else None,
        )
        self.reset_parameters()

    def _check(self) -> None:
        name = self._get_name()
        if self.groups <= 0:
            raise ArgumentError(f"{name}: groups must be positive, got {self.groups}")
        for kind in ("in_channels", "out_channels"):
            if getattr(self, kind) % self.groups:
                raise ArgumentError(
                    f"{name}: {kind}={getattr(self, kind)} must be divisible by "
                    f"groups={self.groups}"
                )
        if self.padding_mode not in _PADDING_MODES:
            raise ArgumentError(
                f"{name}: padding_mode must be one of {_PADDING_MODES}, got {self.padding_mode!r}"
            )
        if isinstance(self.padding, str):
            if self.padding not in self.named_paddings:
                raise ArgumentError(
                    f"{name}: padding must be numbers{self._or_names()}, got {self.padding!r}"
                )
            if self.padding == "same" and any(step != 1 for step in self.stride):
                raise ArgumentError(
                    f"{name}: padding='same' needs stride 1, got stride {self.stride}; give numbers"
                )

    def _or_names(self) -> str:
        return "".join(f" or {name!r}" for name in self.named_paddings)

    def reset_parameters(self) -> None:
        """Draw new values for all parameters: uniform within ±1/sqrt(fan in)."""
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        init.default_bias_(self.bias, self.weight)

    def _check_input(self, input: Tensor) -> None:
        rank = input.ndim - self.axes
        if rank not in (1, 2) or input.shape[rank - 1] != self.in_channels:
            axes = _AXIS_NAMES[self.axes]
            raise wrong_input(
                self,
                f"(N, {self.in_channels}, {axes}) or ({self.in_channels}, {axes})",
                input.shape,
                f"the weight is {tuple(self.weight.shape)} with groups={self.groups}",
            )

    def extra_repr(self) -> str:
        parts = [
            f"{self.in_channels}, {self.out_channels}",
            f"kernel_size={self.kernel_size}",
            f"stride={self.stride}",
        ]
        if self.padding != (0,) * self.axes:
            parts.append(f"padding={self.padding}")
        if self.dilation != (1,) * self.axes:
            parts.append(f"dilation={self.dilation}")
        if self.output_padding != (0,) * self.axes:
            parts.append(f"output_padding={self.output_padding}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode}")
        return ", ".join(parts)


class _Convolution(ConvolutionBase):
    """Convolutions from inputs to outputs (as against transposed ones)."""

    named_paddings = ("same", "valid")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Device = None,
        dtype: DType | None = None,
    ) -> None:
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
            weight_channels=(out_channels, in_channels // groups if groups > 0 else 0),
            device=device,
            dtype=dtype,
        )

    def _padding_of_input(self) -> list[int]:
        """The padding as `pad` takes it: (before, after) for each axis, last axis first."""
        if self.padding == "valid":
            return [0, 0] * self.axes
        if isinstance(self.padding, str):
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            sides = [(total // 2, total - total // 2) for total in totals]
        else:
            sides = [(amount, amount) for amount in self.padding]
        return [amount for side in reversed(sides) for amount in side]

    def forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        padding: str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._padding_of_input(), mode=self.padding_mode)
            padding = (0,) * self.axes
        convolve = _CONVOLUTIONS[self.axes]
        return convolve(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )


class Conv1d(_Convolution):
    """Convolution over one axis: (N, C_in, L) -> (N, C_out, L_out)."""

    axes = 1


class Conv2d(_Convolution):
    """Convolution over two axes: (N, C_in, H, W) -> (N, C_out, H_out, W_out)."""

    axes = 2


class Conv3d(_Convolution):
    """Convolution over three axes: (N, C_in, D, H, W) -> (N, C_out, D_out, H_out, W_out)."""

    axes = 3


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
