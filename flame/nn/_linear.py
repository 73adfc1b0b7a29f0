"""Layers without structure in space: Identity, Flatten, Unflatten, Linear, Bilinear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flame
import flame.nn.functional as F
from flame.core.dtypes import DType
from flame.nn import init
from flame.nn._arguments import Device, wrong_input
from flame.nn.module import Module
from flame.nn.parameter import Parameter
from flame.tensor import Tensor

__all__ = ["Bilinear", "Flatten", "Identity", "Linear", "Unflatten"]


class Identity(Module):
    """Gives back its input; takes and ignores any arguments, so that it can stand for any layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        return input


class Flatten(Module):
    """Merges the dimensions from `start_dim` to `end_dim` into one."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim = start_dim
        self.end_dim = end_dim

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = input.flatten(self.start_dim, self.end_dim)
        return result

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"


class Unflatten(Module):
    """Splits dimension `dim` into several of the sizes `unflattened_size` (one of them may be
    -1).
    """

    def __init__(self, dim: int, unflattened_size: Sequence[int]) -> None:
        super().__init__()
        self.dim = dim
        self.unflattened_size = tuple(unflattened_size)

    def forward(self, input: Tensor) -> Tensor:
        shape = list(input.shape)
        dim = self.dim % len(shape) if shape else 0
        shape[dim : dim + 1] = self.unflattened_size
        if -1 not in self.unflattened_size and math.prod(shape) != input.numel():
            raise wrong_input(
                self,
                f"with dimension {self.dim} of size {math.prod(self.unflattened_size)}",
                input.shape,
                "the sizes must multiply to the dimension that they replace",
            )
        result: Tensor = input.reshape(shape)
        return result

    def extra_repr(self) -> str:
        return f"dim={self.dim}, unflattened_size={self.unflattened_size}"


class Linear(Module):
    """y = x Wᵀ + b on the last dimension: (..., in_features) -> (..., out_features).

    `weight` is (out_features, in_features), `bias` is (out_features,); both start uniform
    within ±1/sqrt(in_features).
    """

    weight: Parameter
    bias: Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: DType | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = Parameter(
            flame.empty((out_features, in_features), device=device, dtype=dtype)
        )
        self.register_parameter(
            "bias",
            Parameter(flame.empty((out_features,), device=device, dtype=dtype)) if bias else None,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new values for all parameters."""
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        init.default_bias_(self.bias, self.weight)

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 0 or input.shape[-1] != self.in_features:
            raise wrong_input(
                self,
                f"(..., {self.in_features})",
                input.shape,
                f"the weight is {tuple(self.weight.shape)}",
            )
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class Bilinear(Module):
    """y[o] = x1ᵀ W[o] x2 + b[o] on the last dimensions: (..., in1), (..., in2) -> (..., out).

    `weight` is (out_features, in1_features, in2_features).
    """

    weight: Parameter
    bias: Parameter | None

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: DType | None = None,
    ) -> None:
        super().__init__()
        self.in1_features = in1_features
        self.in2_features = in2_features
        self.out_features = out_features
        shape = (out_features, in1_features, in2_features)
        self.weight = Parameter(flame.empty(shape, device=device, dtype=dtype))
        self.register_parameter(
            "bias",
            Parameter(flame.empty((out_features,), device=device, dtype=dtype)) if bias else None,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new values for all parameters."""
        bound = 1 / math.sqrt(self.in1_features) if self.in1_features else 0.0
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound)

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        for input, features in ((input1, self.in1_features), (input2, self.in2_features)):
            if input.ndim == 0 or input.shape[-1] != features:
                raise wrong_input(
                    self,
                    f"(..., {features})",
                    input.shape,
                    f"the weight is {tuple(self.weight.shape)}",
                )
        return F.bilinear(input1, input2, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in1_features={self.in1_features}, in2_features={self.in2_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )
