"""First values of parameters. Every function writes into the tensor it is given, unrecorded, and
returns it.

Fan in and fan out of a weight (out, in, *kernel) are in · kernel and out · kernel.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import flame
from flame.core.errors import ArgumentError, ShapeError
from flame.tensor import Tensor

__all__ = [
    "calculate_gain",
    "constant_",
    "default_bias_",
    "dirac_",
    "eye_",
    "fan_in_and_fan_out",
    "kaiming_normal_",
    "kaiming_uniform_",
    "normal_",
    "ones_",
    "orthogonal_",
    "trunc_normal_",
    "uniform_",
    "xavier_normal_",
    "xavier_uniform_",
    "zeros_",
]

Generator = Any

_LINEAR = (
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "sigmoid",
)


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """The factor that keeps the variance of a layer's output through `nonlinearity`.

    `param` is the negative slope of 'leaky_relu' (default 0.01). Source: He et al., 2015
    (arXiv:1502.01852).
    """
    if nonlinearity in _LINEAR:
        return 1.0
    if nonlinearity == "tanh":
        return 5.0 / 3.0
    if nonlinearity == "relu":
        return math.sqrt(2.0)
    if nonlinearity == "leaky_relu":
        slope = 0.01 if param is None else float(param)
        return math.sqrt(2.0 / (1.0 + slope**2))
    if nonlinearity == "selu":
        return 3.0 / 4.0
    raise ArgumentError(
        f"calculate_gain: nonlinearity must be one of {_LINEAR}, 'tanh', 'relu', 'leaky_relu' or "
        f"'selu', got {nonlinearity!r}"
    )


def fan_in_and_fan_out(tensor: Tensor) -> tuple[int, int]:
    """How many inputs each output of a weight (out, in, *kernel) has, and how many outputs each
    input has.
    """
    if tensor.ndim < 2:
        raise ShapeError(
            f"fan in and fan out need a weight of two or more dimensions, got {tuple(tensor.shape)}"
        )
    kernel = math.prod(tensor.shape[2:])
    return tensor.shape[1] * kernel, tensor.shape[0] * kernel


def uniform_(tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: Generator = None) -> Tensor:
    """Uniform in [a, b)."""
    with flame.no_grad():
        tensor.uniform_(a, b, generator=generator)
    return tensor


def normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Generator = None
) -> Tensor:
    """Normal with the given mean and standard deviation."""
    with flame.no_grad():
        tensor.normal_(mean, std, generator=generator)
    return tensor


def trunc_normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    generator: Generator = None,
) -> Tensor:
    """Normal with the given mean and deviation before truncation, kept within [a, b].

    Source: inversion of the cumulative distribution (Devroye, "Non-Uniform Random Variate
    Generation", 1986, ch. II.2).
    """
    if not a < b or std < 0:
        raise ArgumentError(f"trunc_normal_: needs a < b and std >= 0, got a={a}, b={b}, std={std}")
    if std == 0:
        return constant_(tensor, min(max(mean, a), b))
    low, high = (math.erf((bound - mean) / (std * math.sqrt(2.0))) for bound in (a, b))
    with flame.no_grad():
        # In float64, as the inverse error function is steep near ±1.
        options = {"dtype": flame.float64, "device": tensor.device, "generator": generator}
        draw = flame.rand(tuple(tensor.shape), **options)
        values = _inverse_erf(low + (high - low) * draw) * (std * math.sqrt(2.0)) + mean
        tensor.copy_(values.clamp(a, b))
    return tensor


def _inverse_erf(y: Tensor) -> Tensor:
    """The inverse of erf for float64 `y` strictly between -1 and 1 (others are moved inside).

    A polynomial of relative error 1e-6 or less, then two Newton steps on erf take it to rounding.
    Source: Giles, "Approximating the erfinv function", 2012.
    """
    nearest = 1.0 - 2.0**-53
    y = y.clamp(-nearest, nearest)
    w = -flame.log1p(-y * y)
    centre, tail = _polynomial(_CENTRE, w - 2.5), _polynomial(_TAIL, w.sqrt() - 3.0)
    x: Tensor = y * flame.where(w < 5.0, centre, tail)
    for _ in range(2):
        x = x - (flame.erf(x) - y) * (0.5 * math.sqrt(math.pi)) * flame.exp(x * x)
    return x


_CENTRE = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
_TAIL = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """By Horner's rule, the highest power first."""
    result = flame.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + coefficient
    return result


def constant_(tensor: Tensor, val: float) -> Tensor:
    """`val` everywhere."""
    with flame.no_grad():
        tensor.fill_(val)
    return tensor


def ones_(tensor: Tensor) -> Tensor:
    """1 everywhere."""
    return constant_(tensor, 1.0)


def zeros_(tensor: Tensor) -> Tensor:
    """0 everywhere."""
    with flame.no_grad():
        tensor.zero_()
    return tensor


def eye_(tensor: Tensor) -> Tensor:
    """The identity in a matrix, so that a linear layer starts by keeping its input."""
    if tensor.ndim != 2:
        raise ShapeError(f"eye_: takes a matrix, got shape {tuple(tensor.shape)}")
    with flame.no_grad():
        tensor.copy_(
            flame.eye(tensor.shape[0], tensor.shape[1], dtype=tensor.dtype, device=tensor.device)
        )
    return tensor


def dirac_(tensor: Tensor, groups: int = 1) -> Tensor:
    """The identity in a convolution's weight (out, in, *kernel): as many channels as possible
    are kept, per group.
    """
    if tensor.ndim not in (3, 4, 5):
        raise ShapeError(
            f"dirac_: takes a weight of 3, 4 or 5 dimensions, got shape {tuple(tensor.shape)}"
        )
    if groups < 1 or tensor.shape[0] % groups:
        raise ArgumentError(
            f"dirac_: {tensor.shape[0]} output channels must be divisible by groups={groups}"
        )
    per_group = tensor.shape[0] // groups
    centre = tuple(size // 2 for size in tensor.shape[2:])
    values = np.zeros(tuple(tensor.shape), dtype=np.float64)
    for group in range(groups):
        for channel in range(min(per_group, tensor.shape[1])):
            values[(group * per_group + channel, channel, *centre)] = 1.0
    with flame.no_grad():
        tensor.copy_(flame.tensor(values))
    return tensor


def xavier_uniform_(tensor: Tensor, gain: float = 1.0, generator: Generator = None) -> Tensor:
    """Uniform within ±gain · sqrt(6 / (fan in + fan out)).

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", 2010.
    """
    bound = gain * math.sqrt(6.0 / sum(fan_in_and_fan_out(tensor)))
    return uniform_(tensor, -bound, bound, generator)


def xavier_normal_(tensor: Tensor, gain: float = 1.0, generator: Generator = None) -> Tensor:
    """Normal with deviation gain · sqrt(2 / (fan in + fan out)).

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", 2010.
    """
    std = gain * math.sqrt(2.0 / sum(fan_in_and_fan_out(tensor)))
    return normal_(tensor, 0.0, std, generator)


def _kaiming_std(tensor: Tensor, a: float, mode: str, nonlinearity: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ArgumentError(f"mode must be 'fan_in' or 'fan_out', got {mode!r}")
    fan = fan_in_and_fan_out(tensor)[mode == "fan_out"]
    return calculate_gain(nonlinearity, a) / math.sqrt(fan)


def kaiming_uniform_(
    tensor: Tensor,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator = None,
) -> Tensor:
    """Uniform within ±gain · sqrt(3 / fan), with the gain of `nonlinearity` (`a` is the slope
    of leaky_relu).

    Source: He et al., "Delving Deep into Rectifiers", 2015.
    """
    if 0 in tensor.shape:
        return tensor
    bound = math.sqrt(3.0) * _kaiming_std(tensor, a, mode, nonlinearity)
    return uniform_(tensor, -bound, bound, generator)


def kaiming_normal_(
    tensor: Tensor,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator = None,
) -> Tensor:
    """Normal with deviation gain / sqrt(fan), with the gain of `nonlinearity` (`a` is the slope
    of leaky_relu).

    Source: He et al., "Delving Deep into Rectifiers", 2015.
    """
    if 0 in tensor.shape:
        return tensor
    return normal_(tensor, 0.0, _kaiming_std(tensor, a, mode, nonlinearity), generator)


def orthogonal_(tensor: Tensor, gain: float = 1, generator: Generator = None) -> Tensor:
    """Orthonormal rows or columns (whichever are fewer) of the weight as a matrix (out, rest),
    times `gain`.

    Source: Saxe, McClelland and Ganguli, "Exact solutions to the nonlinear dynamics of learning
    in deep linear
    neural networks", 2013; signs made uniform as in Mezzadri, "How to generate random
    matrices", 2007.
    """
    if tensor.ndim < 2:
        raise ShapeError(
            f"orthogonal_: takes two or more dimensions, got shape {tuple(tensor.shape)}"
        )
    if 0 in tensor.shape:
        return tensor
    rows = tensor.shape[0]
    columns = math.prod(tensor.shape[1:])
    with flame.no_grad():
        draw = flame.randn((rows, columns), dtype=flame.float64, generator=generator).numpy()
        q, r = np.linalg.qr(draw.T if rows < columns else draw)
        q = q * np.sign(np.diag(r))
        q = q.T if rows < columns else q
        tensor.copy_(flame.tensor(gain * q.reshape(tuple(tensor.shape))))
    return tensor


def default_bias_(
    bias: Tensor | None, weight: Tensor, generator: Generator = None
) -> Tensor | None:
    """The bias of a linear or convolution layer: uniform within ±1 / sqrt(fan in of the weight).

    Source: LeCun et al., "Efficient BackProp", 1998.
    """
    if bias is None:
        return None
    fan_in, _ = fan_in_and_fan_out(weight)
    bound = 1.0 / math.sqrt(fan_in) if fan_in else 0.0
    return uniform_(bias, -bound, bound, generator)
