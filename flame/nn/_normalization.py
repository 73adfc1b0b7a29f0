"""Normalization within each sample: LayerNorm, RMSNorm, GroupNorm. They keep no statistics."""

from __future__ import annotations

from collections.abc import Sequence

import flame
import flame.nn.functional as F
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError
from flame.nn import init
from flame.nn._arguments import Device, wrong_input
from flame.nn.module import Module
from flame.nn.parameter import Parameter
from flame.tensor import Tensor

__all__ = ["GroupNorm", "LayerNorm", "RMSNorm"]


class _TrailingNorm(Module):
    """Normalization over the last dimensions, of the sizes `normalized_shape`."""

    weight: Parameter | None
    normalized_shape: tuple[int, ...]

    def _set_shape(self, normalized_shape: int | Sequence[int]) -> None:
        self.normalized_shape = (
            (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        )
        if not self.normalized_shape:
            raise ArgumentError(f"{self._get_name()}: normalized_shape must name a dimension")

    def _check_input(self, input: Tensor) -> None:
        if tuple(input.shape[-len(self.normalized_shape) :]) != self.normalized_shape:
            raise wrong_input(
                self,
                "(..., " + ", ".join(map(str, self.normalized_shape)) + ")",
                input.shape,
                f"normalized_shape is {self.normalized_shape}",
            )


class LayerNorm(_TrailingNorm):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias over the last dimensions.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """

    bias: Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Device = None,
        dtype: DType | None = None,
    ) -> None:
        super().__init__()
        self._set_shape(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine

        def parameter(wanted: bool) -> Parameter | None:
            shape = self.normalized_shape
            return Parameter(flame.empty(shape, device=device, dtype=dtype)) if wanted else None

        self.register_parameter("weight", parameter(elementwise_affine))
        self.register_parameter("bias", parameter(elementwise_affine and bias))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1, shift 0."""
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, "
            f"elementwise_affine={self.elementwise_affine}, "
            f"bias={self.bias is not None}"
        )


class RMSNorm(_TrailingNorm):
    """y = x / sqrt(mean(x²) + eps) * weight over the last dimensions; eps=None is the dtype's
    epsilon.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Device = None,
        dtype: DType | None = None,
    ) -> None:
        super().__init__()
        self._set_shape(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        weight = None
        if elementwise_affine:
            weight = Parameter(flame.empty(self.normalized_shape, device=device, dtype=dtype))
        self.register_parameter("weight", weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1."""
        if self.weight is not None:
            init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
        )


class GroupNorm(Module):
    """Normalization of (N, C, ...) over each of `num_groups` groups of channels and all positions.

    Source: Wu and He, "Group Normalization", 2018.
    """

    weight: Parameter | None
    bias: Parameter | None

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Device = None,
        dtype: DType | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if num_groups <= 0 or num_channels % num_groups:
            raise ArgumentError(
                f"GroupNorm: num_channels={num_channels} must be divisible by "
                f"num_groups={num_groups}"
            )
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.affine = affine

        def parameter(wanted: bool) -> Parameter | None:
            shape = (num_channels,)
            return Parameter(flame.empty(shape, device=device, dtype=dtype)) if wanted else None

        self.register_parameter("weight", parameter(affine))
        self.register_parameter("bias", parameter(affine and bias))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1, shift 0."""
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim < 2 or input.shape[1] != self.num_channels:
            raise wrong_input(
                self,
                f"(N, {self.num_channels}, ...)",
                input.shape,
                f"num_channels is {self.num_channels}",
            )
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, "
            f"bias={self.bias is not None}"
        )
