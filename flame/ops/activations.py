"""Activation functions, each one kernel forward and one backward.

`inplace=True` writes the result into the input. At a kink the slope is PyTorch's: that of the left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flame.core.autocast import Policy
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError, ShapeError
from flame.kernel import values
from flame.kernel.values import Value, compare, const, select, unary
from flame.ops.autocast import autocasts
from flame.ops.comparison import minimum, where
from flame.ops.elementwise import Elementwise, common_dtype, elementwise, to_float
from flame.ops.mathematics import erf, exp, sigmoid, tanh
from flame.ops.op import Arg, Sample, Types

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["celu", "celu_", "prelu", "relu", "relu_", "selu", "selu_", "threshold", "threshold_"]
METHODS = ("hardshrink", "prelu", "relu", "relu_")

Dtypes = tuple[list[DType], list[DType]]


def _like_input(name: str, types: Types) -> Dtypes:
    """Numbers take the dtype of the tensor; bool is refused."""
    first = common_dtype(types[:1])
    if first.kind == "b":
        raise DTypeError(f"{name} is not defined for bool tensors; convert them first")
    return [first] * len(types), [first]


def _floating_input(name: str, types: Types) -> Dtypes:
    first = common_dtype(types[:1])
    if first.kind != "f":
        raise DTypeError(f"{name} takes a floating tensor, got {first.name}; convert it first")
    return [first] * len(types), [first]


def _activation(
    name: str,
    scalar: Callable[..., Any],
    vjp: Callable[..., Any],
    reference: Callable[..., Any],
    *numbers: float,
    names: tuple[str, ...] = (),
    rule: Any = _floating_input,
    avoid: tuple[float, ...] = (),
    autocast: Policy | None = None,
) -> Elementwise:
    """An activation with numbers as further operands; ``numbers``: their values in the tests."""
    args = [Arg(s, -4.0, 4.0, avoid=avoid) for s in ((5, 7), (), (0, 3), (2, 3, 19))]
    return elementwise(
        name, scalar, inputs=("x", *names), rule=rule, vjp=(vjp, *(None for _ in names)),
        reference=reference, samples=[Sample((a, *numbers)) for a in args], autocast=autocast,
    )  # fmt: skip


def _zero(x: Value) -> Value:
    return const(0, x.dtype)


# --- rectifiers -----------------------------------------------------------------------------------

_relu = _activation(
    "relu", lambda x: values.binary("max", x, _zero(x)),
    lambda g, out: where(out > 0, g, 0),
    lambda x: np.maximum(x, 0), rule=_like_input, avoid=(0.0,),
)  # fmt: skip

_hardtanh = _activation(
    "hardtanh", lambda x, low, high: values.binary("min", values.binary("max", x, low), high),
    lambda g, x, low, high: where((x > low) & (x < high), g, 0),
    np.clip, -1.0, 2.0, names=("low", "high"), rule=_like_input, avoid=(-1.0, 2.0),
)  # fmt: skip

_threshold = _activation(
    "threshold", lambda x, limit, value: select(compare("le", x, limit), value, x),
    lambda g, x, limit: where(x > limit, g, 0),
    lambda x, limit, value: np.where(x <= limit, value, x), 0.5, -7.0,
    names=("limit", "value"), rule=_like_input, avoid=(0.5,),
)  # fmt: skip

_leaky_relu = _activation(
    "leaky_relu", lambda x, slope: select(x > 0, x, x * slope),
    lambda g, x, slope: where(x > 0, g, g * slope),
    lambda x, slope: np.where(x > 0, x, x * slope), 0.1, names=("slope",), avoid=(0.0,),
)  # fmt: skip

_prelu = elementwise(
    "prelu", lambda x, weight: select(x > 0, x, x * weight), inputs=("x", "weight"),
    rule=_floating_input,
    vjp=(lambda g, x, weight: where(x > 0, g, g * weight), lambda g, x: where(x > 0, 0, g * x)),
    reference=lambda x, weight: np.where(x > 0, x, x * weight), avoid=(0.0,),
)  # fmt: skip


def _elu_scalar(x: Value, alpha: Value, scale: Value, steepness: Value) -> Value:
    return scale * select(x > 0, x, alpha * unary("expm1", x * steepness))


_elu = _activation(
    "elu", _elu_scalar,
    lambda g, x, alpha, scale, steepness: where(
        x > 0, g * scale, g * (scale * alpha * steepness) * exp(minimum(x, 0) * steepness)
    ),
    lambda x, alpha, scale, steepness: scale
    * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0) * steepness)),
    1.3, 1.1, 0.8, names=("alpha", "scale", "steepness"), avoid=(0.0,),
)  # fmt: skip

# --- smooth ones ----------------------------------------------------------------------------------

_ROOT_HALF: Final = math.sqrt(0.5)
_TANH_SCALE: Final = math.sqrt(2 / math.pi)
_TANH_CUBE: Final = 0.044715


def _normal_below(x: Any) -> Any:
    """The probability that a standard normal number is below x."""
    return 0.5 * (1 + erf(x * _ROOT_HALF))


_gelu = _activation(
    "gelu", lambda x: x * _normal_below(x),
    lambda g, x: g
    * (_normal_below(x) + x * exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))),
    lambda x: x * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(x * _ROOT_HALF)),
)  # fmt: skip


# 0.5 (1 + tanh(u)) is sigmoid(2 u): one exponential, and no digits are lost where it is small.
def _gelu_power(x: Any) -> Any:
    return (2 * _TANH_SCALE) * x * (1 + _TANH_CUBE * x * x)


def _gelu_tanh_slope(g: Any, x: Any) -> Any:
    rate = sigmoid(_gelu_power(x))
    steepness = (2 * _TANH_SCALE) * (1 + 3 * _TANH_CUBE * x * x)
    return g * (rate * (1 + x * (1 - rate) * steepness))


_gelu_tanh = _activation(
    "gelu_tanh", lambda x: x / (1.0 + unary("exp", -_gelu_power(x))), _gelu_tanh_slope,
    lambda x: 0.5 * x * (1 + np.tanh(_TANH_SCALE * (x + _TANH_CUBE * x**3))),
)  # fmt: skip


def _silu_slope(g: Any, x: Any) -> Any:
    rate = sigmoid(x)
    return g * (rate * (1 + x * (1 - rate)))


_silu = _activation(
    "silu", lambda x: x / (1.0 + unary("exp", -x)), _silu_slope, lambda x: x / (1 + np.exp(-x))
)

_softplus = _activation(
    "softplus",
    lambda x, beta, limit: select(
        x * beta > limit, x, unary("log1p", unary("exp", x * beta)) / beta
    ),
    lambda g, x, beta, limit: where(x * beta > limit, g, g * sigmoid(x * beta)),
    lambda x, beta, limit: np.where(x * beta > limit, x, np.log1p(np.exp(x * beta)) / beta),
    1.5, 20.0, names=("beta", "limit"), autocast="float32",
)  # fmt: skip

_logsigmoid = _activation(
    "logsigmoid",
    lambda x: values.binary("min", x, _zero(x)) - unary("log1p", unary("exp", -abs(x))),
    lambda g, x: g * sigmoid(-x),
    lambda x: np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))),
)  # fmt: skip


def _mish_tanh(x: Any) -> Any:
    """tanh(log(1 + e)) with e = exp(x), as n / (n + 2) with n = e (e + 2); it rounds to 1 at 20."""
    e = exp(minimum(x, 20))
    n = e * (e + 2)
    return n / (n + 2)


def _mish_slope(g: Any, x: Any) -> Any:
    t = _mish_tanh(x)
    return g * (t + x * (1 - t * t) * sigmoid(x))


_mish = _activation(
    "mish", lambda x: x * _mish_tanh(x), _mish_slope,
    lambda x: x * np.tanh(np.log1p(np.exp(x))),
)  # fmt: skip

_tanhshrink = elementwise(
    "tanhshrink", lambda x: x - unary("tanh", x), rule=to_float,
    vjp=(lambda g, x: g * tanh(x) * tanh(x),), reference=lambda x: x - np.tanh(x),
)  # fmt: skip

_softsign = elementwise(
    "softsign", lambda x: x / (1.0 + abs(x)), rule=to_float,
    vjp=(lambda g, x: g / ((1 + abs(x)) * (1 + abs(x))),),
    reference=lambda x: x / (1 + np.abs(x)), avoid=(0.0,),
)  # fmt: skip

# --- piecewise linear and quadratic ---------------------------------------------------------------


def _gate(x: Value) -> Value:
    """x + 3 within [0, 6]."""
    return values.binary("min", values.binary("max", x + 3.0, _zero(x)), const(6, x.dtype))


_hardswish = _activation(
    "hardswish", lambda x: x * _gate(x) / 6.0,
    lambda g, x: where(x <= -3, 0, where(x >= 3, g, g * (x / 3 + 0.5))),
    lambda x: x * np.clip(x + 3, 0, 6) / 6, avoid=(-3.0, 3.0),
)  # fmt: skip

_hardsigmoid = _activation(
    "hardsigmoid", lambda x: _gate(x) / 6.0,
    lambda g, x: where((x > -3) & (x < 3), g / 6, 0),
    lambda x: np.clip(x + 3, 0, 6) / 6, avoid=(-3.0, 3.0),
)  # fmt: skip

_softshrink = _activation(
    "softshrink",
    lambda x, width: select(x > width, x - width, select(x < -width, x + width, x * 0.0)),
    lambda g, x, width: where((x > width) | (x < -width), g, 0),
    lambda x, width: np.sign(x) * np.maximum(np.abs(x) - width, 0), 0.5, names=("width",),
    avoid=(-0.5, 0.5),
)  # fmt: skip

_hardshrink = _activation(
    "hardshrink",
    lambda x, width: select((x >= -width) & (x <= width), _zero(x), x),
    lambda g, x, width: where((x >= -width) & (x <= width), 0, g),
    lambda x, width: np.where(np.abs(x) <= width, 0, x), 0.5, names=("width",), avoid=(-0.5, 0.5),
)  # fmt: skip


# --- public functions -----------------------------------------------------------------------------


def _call(op: Elementwise, input: Tensor, inplace: bool, *numbers: float) -> Tensor:
    if not inplace:
        result: Tensor = op(input, *numbers)
        return result
    slope = op.formulas[0]
    if input.requires_grad and slope is not None and op.inputs[0] in slope.saved:
        # The slope needs the input as it was, which writing over it would destroy.
        return input.copy_(op(input.clone(), *numbers))
    op.into((input,), input, *numbers)
    return input


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(input, 0)."""
    return _call(_relu, input, inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(input, 0), 6)."""
    return _call(_hardtanh, input, inplace, 0, 6)


def hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    """``input``, but at least min_val and at most max_val. Raises ArgumentError for min > max."""
    if min_val > max_val:
        raise ArgumentError(f"hardtanh: min_val {min_val} is above max_val {max_val}")
    return _call(_hardtanh, input, inplace, min_val, max_val)


def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """``input`` where it is above ``threshold``, else ``value``."""
    return _call(_threshold, input, inplace, threshold, value)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """input where it is positive, else negative_slope * input."""
    return _call(_leaky_relu, input, inplace, negative_slope)


@autocasts("lower")
def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """input where it is positive, else weight * input.

    weight: (1,), or (channels,) with the channels in dimension 1 of ``input``. Raises ShapeError.
    """
    if weight.ndim > 1:
        raise ShapeError(f"prelu: weight must be 0-d or 1-d, got shape {weight.shape}")
    if weight.numel() != 1:
        channels = input.shape[1] if input.ndim > 1 else 1
        if weight.numel() != channels:
            raise ShapeError(
                f"prelu: weight {weight.shape} does not fit input {input.shape}, which has "
                f"{channels} channels; give one weight, or one for each channel"
            )
        weight = weight.reshape((channels,) + (1,) * (input.ndim - 2))
    elif input.ndim == 0:
        weight = weight.reshape(())
    if weight.dtype is not input.dtype:
        raise DTypeError(
            f"prelu: input is {input.dtype.name} and weight {weight.dtype.name}; convert one"
        )
    result: Tensor = _prelu(input, weight)
    return result


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """input where it is positive, else alpha * (exp(input) - 1). Source: Clevert et al., 2015."""
    return _call(_elu, input, inplace, alpha, 1.0, 1.0)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """A scaled elu that keeps mean 0 and variance 1. Source: Klambauer et al., 2017."""
    return _call(_elu, input, inplace, 1.6732632423543772, 1.0507009873554805, 1.0)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """input where it is positive, else alpha * (exp(input / alpha) - 1). Source: Barron, 2017."""
    if alpha == 0:
        raise ArgumentError("celu: alpha must not be 0")
    return _call(_elu, input, inplace, alpha, 1.0, 1.0 / alpha)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """input * Phi(input), Phi the normal distribution function, or with "tanh" a formula near it.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    if approximate not in ("none", "tanh"):
        raise ArgumentError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return _call(_gelu if approximate == "none" else _gelu_tanh, input, False)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """input * sigmoid(input)."""
    return _call(_silu, input, inplace)


def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """log(1 + exp(beta * input)) / beta; input itself where beta * input > threshold."""
    return _call(_softplus, input, False, beta, threshold)


def logsigmoid(input: Tensor) -> Tensor:
    """log(sigmoid(input)), without overflow."""
    return _call(_logsigmoid, input, False)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """input * tanh(softplus(input)). Source: Misra, "Mish", 2019."""
    return _call(_mish, input, inplace)


def tanhshrink(input: Tensor) -> Tensor:
    """input - tanh(input)."""
    return _call(_tanhshrink, input, False)


def softsign(input: Tensor) -> Tensor:
    """input / (1 + |input|)."""
    return _call(_softsign, input, False)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """input * relu6(input + 3) / 6. Source: Howard et al., "Searching for MobileNetV3", 2019."""
    return _call(_hardswish, input, inplace)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """relu6(input + 3) / 6."""
    return _call(_hardsigmoid, input, inplace)


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """input moved towards 0 by lambd, 0 within it. Raises ArgumentError for a negative lambd."""
    if lambd < 0:
        raise ArgumentError(f"softshrink: lambd must not be negative, got {lambd}")
    return _call(_softshrink, input, False, lambd)


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """input, 0 where it is within [-lambd, lambd]."""
    return _call(_hardshrink, input, False, lambd)


def relu_(input: Tensor) -> Tensor:
    """`relu` in place."""
    return relu(input, True)


def selu_(input: Tensor) -> Tensor:
    """`selu` in place."""
    return selu(input, True)


def celu_(input: Tensor, alpha: float = 1.0) -> Tensor:
    """`celu` in place."""
    return celu(input, alpha, True)


def threshold_(input: Tensor, threshold: float, value: float) -> Tensor:
    """`threshold` in place."""
    return _call(_threshold, input, True, threshold, value)
