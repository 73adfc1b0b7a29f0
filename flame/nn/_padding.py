"""Padding layers: positions before and after the last axes, as zeros, a constant, a mirror, or the
border's value.

`padding` is one number, or (before, after) for each axis, last axis first; negative numbers crop.
"""

from __future__ import annotations

import flame.nn.functional as F
from flame.nn._arguments import Size, per_axis
from flame.nn.module import Module
from flame.tensor import Tensor

__all__ = [
    "CircularPad1d",
    "CircularPad2d",
    "ConstantPad1d",
    "ConstantPad2d",
    "ReflectionPad1d",
    "ReflectionPad2d",
    "ReplicationPad1d",
    "ReplicationPad2d",
    "ZeroPad1d",
    "ZeroPad2d",
]


class _Pad(Module):
    axes = 0
    mode = "constant"
    value: float = 0.0

    def __init__(self, padding: Size) -> None:
        super().__init__()
        self.padding = per_axis(padding, 2 * self.axes, "padding")

    def forward(self, input: Tensor) -> Tensor:
        if self.mode == "constant":
            return F.pad(input, self.padding, mode="constant", value=self.value)
        return F.pad(input, self.padding, mode=self.mode)

    def extra_repr(self) -> str:
        return str(self.padding)


class _ConstantPad(_Pad):
    def __init__(self, padding: Size, value: float) -> None:
        super().__init__(padding)
        self.value = value

    def extra_repr(self) -> str:
        return f"padding={self.padding}, value={self.value}"


class ConstantPad1d(_ConstantPad):
    """Pads L of (..., L) with `value`."""

    axes = 1


class ConstantPad2d(_ConstantPad):
    """Pads H and W of (..., H, W) with `value`."""

    axes = 2


class ZeroPad1d(_Pad):
    """Pads L of (..., L) with zeros."""

    axes = 1


class ZeroPad2d(_Pad):
    """Pads H and W of (..., H, W) with zeros."""

    axes = 2


class ReflectionPad1d(_Pad):
    """Pads L of (N, C, L) with its mirror image, the border itself not repeated."""

    axes = 1
    mode = "reflect"


class ReflectionPad2d(_Pad):
    """Pads H and W of (N, C, H, W) with their mirror image, the border itself not repeated."""

    axes = 2
    mode = "reflect"


class ReplicationPad1d(_Pad):
    """Pads L of (N, C, L) with the value at the border."""

    axes = 1
    mode = "replicate"


class ReplicationPad2d(_Pad):
    """Pads H and W of (N, C, H, W) with the value at the border."""

    axes = 2
    mode = "replicate"


class CircularPad1d(_Pad):
    """Pads L of (N, C, L) with the values from its other end."""

    axes = 1
    mode = "circular"


class CircularPad2d(_Pad):
    """Pads H and W of (N, C, H, W) with the values from their other end."""

    axes = 2
    mode = "circular"
