"""Arithmetic with broadcasting: add, sub, mul, div and their kin.

Python numbers are operands known at run time, so a changing number compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError
from flame.core.types import TensorType
from flame.kernel.values import Value, select
from flame.ops.autocast import autocasts
from flame.ops.elementwise import (
    Elementwise,
    common_dtype,
    elementwise,
    no_bool,
    scalar_binary,
    scalar_unary,
    to_float,
)  # fmt: skip
from flame.ops.op import Arg, Sample, Types

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "add", "addcdiv", "addcmul", "div", "divide", "lerp", "mul", "multiply", "neg", "negative",
    "rsub", "sub", "subtract", "true_divide",
]  # fmt: skip
METHODS = (
    "add", "addcdiv", "addcmul", "div", "divide", "lerp", "mul", "multiply", "neg", "negative",
    "sub", "subtract", "true_divide",
)  # fmt: skip

Operand = Any  # a Tensor or a Python number
Dtypes = tuple[list[DType], list[DType]]


def _add_scalar(x: Value, y: Value) -> Value:
    return x | y if x.dtype.kind == "b" else x + y


def _mul_scalar(x: Value, y: Value) -> Value:
    return x & y if x.dtype.kind == "b" else x * y


def _sub_rule(name: str, types: Types) -> Dtypes:
    if any((t.dtype if isinstance(t, TensorType) else t) in (dtypes.bool_, bool) for t in types):
        raise DTypeError(f"{name} is not defined for bool; use `^` or logical_not to flip bits")
    common = common_dtype(types)
    return [common] * len(types), [common]


_add = elementwise(
    "add", _add_scalar, inputs=("x", "y"),
    vjp=(lambda g: g, lambda g: g),
    reference=np.add,
)  # fmt: skip

_sub = elementwise(
    "sub", scalar_binary("sub"), inputs=("x", "y"), rule=_sub_rule,
    vjp=(lambda g: g, lambda g: -g),
    reference=np.subtract,
)  # fmt: skip

_mul = elementwise(
    "mul", _mul_scalar, inputs=("x", "y"),
    vjp=(lambda g, y: g * y, lambda g, x: g * x),
    reference=np.multiply,
)  # fmt: skip

_div = elementwise(
    "div", scalar_binary("div"), inputs=("x", "y"), rule=to_float,
    vjp=(lambda g, y: g / y, lambda g, out, y: -g * out / y),
    reference=np.true_divide, domain=(0.5, 3.0),
)  # fmt: skip

neg = elementwise(
    "neg", scalar_unary("neg"), rule=no_bool,
    vjp=(lambda g: -g,),
    reference=np.negative,
)  # fmt: skip


# --- with a factor --------------------------------------------------------------------------------


def _of_tensors(name: str, types: Types) -> Dtypes:
    """The last operand, a factor, takes the dtype of the others."""
    common = common_dtype(types[:-1])
    return [common] * len(types), [common]


def _floats_of_tensors(name: str, types: Types) -> Dtypes:
    common = common_dtype(types[:-1])
    if common.kind != "f":
        raise DTypeError(f"{name} takes floating tensors, got {common.name}; convert them first")
    return [common] * len(types), [common]


def _factor_samples(count: int, low: float) -> list[Sample]:
    shapes: list[list[tuple[int, ...]]] = [[(5, 7)] * count, [()] * count, [(0, 3)] * count,
                                           [(3, 1, 5), (4, 1), (1,)][:count]]  # fmt: skip
    return [Sample((*(Arg(s, low, 3.0) for s in each), 1.5)) for each in shapes]


_add_scaled = elementwise(
    "add_scaled", lambda x, y, factor: _add_scalar(x, _mul_scalar(y, factor)),
    inputs=("x", "y", "factor"), rule=_of_tensors,
    vjp=(lambda g: g, lambda g, factor: g * factor, None),
    reference=lambda x, y, factor: x + y * factor, samples=_factor_samples(2, -3.0),
)  # fmt: skip

_addcmul = elementwise(
    "addcmul", lambda x, y, z, factor: _add_scalar(x, _mul_scalar(factor, _mul_scalar(y, z))),
    inputs=("x", "y", "z", "factor"), rule=_of_tensors,
    vjp=(
        lambda g: g, lambda g, z, factor: g * (z * factor), lambda g, y, factor: g * (y * factor),
        None,
    ),
    reference=lambda x, y, z, factor: x + factor * y * z, samples=_factor_samples(3, -3.0),
)  # fmt: skip

_addcdiv = elementwise(
    "addcdiv", lambda x, y, z, factor: x + factor * (y / z),
    inputs=("x", "y", "z", "factor"), rule=_floats_of_tensors,
    vjp=(
        lambda g: g, lambda g, z, factor: g * (factor / z),
        lambda g, y, z, factor: -g * (factor * y / (z * z)), None,
    ),
    reference=lambda x, y, z, factor: x + factor * y / z, samples=_factor_samples(3, 0.5),
)  # fmt: skip


def _lerp_scalar(x: Value, y: Value, weight: Value) -> Value:
    """From the nearer end, so that weights 0 and 1 give the ends exactly."""
    return select(abs(weight) < 0.5, x + weight * (y - x), y - (y - x) * (1.0 - weight))


def _lerp_rule(name: str, types: Types) -> Dtypes:
    common = common_dtype(types)
    if common_dtype(types[:2]).kind != "f":
        raise DTypeError(f"{name} takes floating tensors, got {common.name}; convert them first")
    return [common] * 3, [common]


_lerp = elementwise(
    "lerp", _lerp_scalar, inputs=("x", "y", "weight"), rule=_lerp_rule,
    vjp=(
        lambda g, weight: g * (1 - weight), lambda g, weight: g * weight,
        lambda g, x, y: g * (y - x),
    ),
    reference=lambda x, y, weight: x + weight * (y - x),
)  # fmt: skip


# --- public functions -----------------------------------------------------------------------------


def _check_alpha(name: str, input: Any, other: Operand, alpha: Any) -> None:
    whole = all(
        x.dtype.kind != "f" if hasattr(x, "dtype") else not isinstance(x, float)
        for x in (input, other)
    )
    if whole and isinstance(alpha, float):
        raise ArgumentError(f"{name}: alpha must be an integer for integer tensors, got {alpha}")


def add(input: Tensor, other: Operand, *, alpha: float = 1) -> Tensor:
    """input + alpha * other, broadcast. Raises ShapeError where the shapes do not fit."""
    result: Tensor
    if alpha == 1:
        result = _add(input, other)
        return result
    _check_alpha("add", input, other, alpha)
    result = _add_scaled(input, other, alpha)
    return result


def sub(input: Tensor, other: Operand, *, alpha: float = 1) -> Tensor:
    """input - alpha * other, broadcast. Raises DTypeError for bool."""
    result: Tensor
    if alpha == 1:
        result = _sub(input, other)
        return result
    _check_alpha("sub", input, other, alpha)
    result = _add_scaled(input, other, -alpha)
    return result


def rsub(input: Tensor, other: Operand, *, alpha: float = 1) -> Tensor:
    """other - alpha * input, broadcast."""
    if alpha == 1:
        return sub(other, input)
    _check_alpha("rsub", input, other, alpha)
    result: Tensor = _add_scaled(other, input, -alpha)
    return result


def mul(input: Tensor, other: Operand) -> Tensor:
    """input * other, broadcast."""
    result: Tensor = _mul(input, other)
    return result


def true_divide(input: Tensor, other: Operand) -> Tensor:
    """input / other, broadcast; integers give floats."""
    result: Tensor = _div(input, other)
    return result


def div(input: Tensor, other: Operand, *, rounding_mode: str | None = None) -> Tensor:
    """input / other, broadcast.

    rounding_mode: None; "floor" rounds down, "trunc" towards zero, and integers then stay integers.
    Raises ArgumentError for another mode, and for integers divided by 0 with a mode.
    """
    if rounding_mode is None:
        result: Tensor = _div(input, other)
        return result
    from flame.ops import division

    return division.rounded(input, other, rounding_mode)


def addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """input + value * tensor1 * tensor2, broadcast."""
    result: Tensor = _addcmul(input, tensor1, tensor2, value)
    return result


def addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """input + value * tensor1 / tensor2, broadcast. Floating tensors only."""
    result: Tensor = _addcdiv(input, tensor1, tensor2, value)
    return result


def lerp(input: Tensor, end: Operand, weight: Operand) -> Tensor:
    """input + weight * (end - input), broadcast. Floating tensors only."""
    result: Tensor = _lerp(input, end, weight)
    return result


multiply, subtract, divide, negative = mul, sub, div, neg


# --- methods in place -----------------------------------------------------------------------------


def _scaled_in_place(op: Elementwise, sign: int) -> Callable[..., Any]:
    def method(self: Tensor, other: Operand, *, alpha: float = 1) -> Tensor:
        if alpha == 1:
            op.into((self,), self, other)
            return self
        _check_alpha(f"{op.name}_", self, other, alpha)
        _add_scaled.into((self,), self, other, sign * alpha)
        return self

    return method


def _mul_in_place(self: Tensor, other: Operand) -> Tensor:
    _mul.into((self,), self, other)
    return self


def _div_in_place(self: Tensor, other: Operand, *, rounding_mode: str | None = None) -> Tensor:
    if rounding_mode is not None:
        from flame.ops import division

        division.round_in_place(self, other, rounding_mode)
    else:
        _div.into((self,), self, other)
    return self


def _addcmul_in_place(
    self: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1
) -> Tensor:
    _addcmul.into((self,), self, tensor1, tensor2, value)
    return self


def _addcdiv_in_place(
    self: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1
) -> Tensor:
    _addcdiv.into((self,), self, tensor1, tensor2, value)
    return self


def _lerp_in_place(self: Tensor, end: Operand, weight: Operand) -> Tensor:
    _lerp.into((self,), self, end, weight)
    return self


def _neg_in_place(self: Tensor) -> Tensor:
    neg.into((self,), self)
    return self


@autocasts("float32")
def _number_over(self: Tensor, other: Operand) -> Tensor:
    """other / self: to autocast a reciprocal, not a division of tensors."""
    result: Tensor = _div(other, self)
    return result


_add_in_place, _sub_in_place = _scaled_in_place(_add, 1), _scaled_in_place(_sub, -1)

OPERATORS: Final[dict[str, Callable[..., Any]]] = {
    "__add__": lambda self, other: _add(self, other),
    "__radd__": lambda self, other: _add(other, self),
    "__sub__": lambda self, other: _sub(self, other),
    "__rsub__": lambda self, other: _sub(other, self),
    "__mul__": lambda self, other: _mul(self, other),
    "__rmul__": lambda self, other: _mul(other, self),
    "__truediv__": lambda self, other: _div(self, other),
    "__rtruediv__": lambda self, other: _number_over(self, other),
    "__neg__": lambda self: neg(self),
    "__pos__": lambda self: self,
    "__iadd__": lambda self, other: _add_in_place(self, other),
    "__isub__": lambda self, other: _sub_in_place(self, other),
    "__imul__": lambda self, other: _mul_in_place(self, other),
    "__itruediv__": lambda self, other: _div_in_place(self, other),
    "add_": _add_in_place,
    "sub_": _sub_in_place,
    "subtract_": _sub_in_place,
    "mul_": _mul_in_place,
    "multiply_": _mul_in_place,
    "div_": _div_in_place,
    "divide_": _div_in_place,
    "true_divide_": _div_in_place,
    "addcmul_": _addcmul_in_place,
    "addcdiv_": _addcdiv_in_place,
    "lerp_": _lerp_in_place,
    "neg_": _neg_in_place,
    "negative_": _neg_in_place,
}
