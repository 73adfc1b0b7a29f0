"""Powers, with the common exponents as cheap ops of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError
from flame.kernel import values
from flame.kernel.values import Value
from flame.ops.autocast import autocasts
from flame.ops.comparison import where
from flame.ops.elementwise import common_dtype, elementwise, to_float
from flame.ops.mathematics import log, reciprocal, sqrt, square
from flame.ops.op import Arg, Sample, Types

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["float_power", "pow"]
METHODS = ("float_power", "pow")
IN_PLACE = ("pow",)

Operand = Any  # a Tensor, or a Python number


def _rule(name: str, types: Types) -> tuple[list[DType], list[DType]]:
    common = common_dtype(types)
    if common.kind == "b":
        raise DTypeError(f"{name} is not defined for bool tensors alone; convert them first")
    return [common, common], [common]


def logarithm(x: Any) -> Any:
    """log(x) of a tensor, or of a Python number."""
    if not isinstance(x, (bool, int, float)):
        return log(x)
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


def _of_base(g: Any, x: Any, exponent: Any) -> Any:
    """x**(e - 1) may be infinite where e is 0, and the gradient is 0 there."""
    return where(exponent == 0, 0, g * (exponent * pow(x, exponent - 1)))


def _of_exponent(g: Any, out: Any, x: Any, exponent: Any) -> Any:
    return where((x == 0) & (exponent >= 0), 0, g * (out * logarithm(x)))


_pow = elementwise(
    "pow", lambda x, y: values.binary("pow", x, y), inputs=("x", "exponent"), rule=_rule,
    vjp=(_of_base, _of_exponent),
    reference=np.power, domain=(0.3, 2.5), autocast="float32",
    samples=[
        Sample((Arg((3, 1, 5), 0.3, 2.5), Arg((4, 1), -2.0, 2.0))),
        Sample((Arg((), 0.3, 2.5), Arg(()))), Sample((Arg((0, 3)), Arg((3,)))),
        Sample((Arg((5, 7), 0.3, 2.5), 2.5)), Sample((1.7, Arg((2, 3, 19), -2.0, 2.0))),
    ],
)  # fmt: skip

_cube = elementwise("cube", lambda x: x * x * x, rule=to_float,
                    vjp=(lambda g, x: 3 * g * (x * x),), reference=lambda x: x * x * x,
                    autocast="float32")  # fmt: skip


def pow(input: Operand, exponent: Operand) -> Tensor:
    """input ** exponent, broadcast; each a tensor or a number, not both numbers.

    Integers to integer powers stay integers. Raises ArgumentError for integers to a negative
    integer number, whose results are no integers.
    """
    if isinstance(exponent, (bool, int, float)) and not isinstance(input, (bool, int, float)):
        made: Tensor = _to_number(input, exponent)
        return made
    result: Tensor = _pow(input, exponent)
    return result


def _to_number(input: Any, exponent: Any) -> Any:
    whole = input.dtype.kind != "f"
    if whole and isinstance(exponent, int) and exponent < 0:
        raise ArgumentError(
            f"pow: {input.dtype.name} to the power of {exponent} is no integer; convert the tensor "
            "to a floating dtype"
        )
    if isinstance(input, Value):
        return _pow(input, exponent)
    if input.dtype.kind == "b" and exponent is True:
        return input.clone()
    if exponent == 2 and not (whole and isinstance(exponent, float)) and input.dtype.kind != "b":
        return square(input)
    if whole:
        return _pow(input, exponent)
    if exponent == 3:
        return _cube(input)
    if exponent == -1:
        return reciprocal(input)
    if exponent == 0.5:
        return _root(input)
    return _pow(input, exponent)


_root = autocasts("float32")(sqrt)  # autocast tells a power of a half from a square root


def float_power(input: Operand, exponent: Operand) -> Tensor:
    """input ** exponent in float64."""

    def double(x: Operand) -> Operand:
        return float(x) if isinstance(x, (bool, int, float)) else x.to(dtypes.float64)

    return pow(double(input), double(exponent))


def _float_power_in_place(self: Tensor, exponent: Operand) -> Tensor:
    if self.dtype is not dtypes.float64:
        raise DTypeError(
            f"float_power_ gives float64, which a {self.dtype.name} tensor cannot hold; convert it"
        )
    return self.copy_(float_power(self, exponent))


OPERATORS: Final[dict[str, Callable[..., Any]]] = {
    "__pow__": lambda self, other: pow(self, other),
    "__ipow__": lambda self, other: self.pow_(other),
    "float_power_": _float_power_in_place,
    "__rpow__": lambda self, other: _pow(other, self),
}
