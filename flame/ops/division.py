"""Division with rounding, and remainders.

A float remainder is exact while the quotient is below about 2**46 (float32) or 2**104 (float64);
beyond, it may be NaN. Integers over 0 raise ArgumentError: there is no number to give.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError
from flame.kernel import values
from flame.kernel.values import Value, compare, const, fma, select, unary
from flame.ops.elementwise import Elementwise, common_dtype, elementwise
from flame.ops.mathematics import without_slope
from flame.ops.op import Types

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["floor_divide", "fmod", "remainder"]
METHODS = ("floor_divide", "fmod", "remainder")

Operand = Any  # a Tensor or a Python number
STEPS: Final = 2  # of the reduction, each takes off as many bits of the quotient as a float has


def _rule(name: str, types: Types) -> tuple[list[DType], list[DType]]:
    common = common_dtype(types)
    if common.kind == "b":
        raise DTypeError(f"{name} is not defined for bool tensors; convert them first")
    return [common] * 2, [common]


def _by_zero(x: Value, y: Value) -> Value | None:
    return None if x.dtype.kind == "f" else compare("eq", y, const(0, y.dtype))


def _failure(code: int, types: Types) -> ArgumentError:
    return ArgumentError(
        "integer division or remainder by zero; convert to a floating dtype for inf or NaN"
    )


def _float_fmod(x: Value, y: Value) -> Value:
    """x - trunc(x / y) * y, without rounding."""
    rest = x
    for _ in range(STEPS):
        rest = fma(-unary("trunc", rest / y), y, rest)
    # where x / y was rounded up to a whole number, one y too much was taken off
    zero = const(0, x.dtype)
    crossed = compare("ne", rest, zero) & (compare("lt", rest, zero) ^ compare("lt", x, zero))
    rest = select(crossed, rest + values.binary("copysign", abs(y), x), rest)
    rest = select(compare("eq", rest, zero), values.binary("copysign", rest, x), rest)
    infinite = compare("eq", abs(y), const(math.inf, y.dtype))
    whole = compare("lt", abs(x), const(math.inf, x.dtype))
    known = compare("lt", abs(rest), abs(y))  # else the quotient had more bits than were taken off
    return select(infinite & whole, x, select(known, rest, const(math.nan, x.dtype)))


def _fmod_scalar(x: Value, y: Value) -> Value:
    if x.dtype.kind == "f":
        return _float_fmod(x, y)
    rest = values.binary("mod", x, y)
    if x.dtype.kind == "u":
        return rest
    zero = const(0, x.dtype)
    differs = compare("ne", rest, zero) & (compare("lt", x, zero) ^ compare("lt", y, zero))
    return select(differs, rest - y, rest)


def _against(rest: Value, y: Value) -> Value:
    """Whether a remainder is there, and has not the divisor's sign."""
    zero = const(0, y.dtype)
    return compare("ne", rest, zero) & (compare("lt", rest, zero) ^ compare("lt", y, zero))


def _remainder_scalar(x: Value, y: Value) -> Value:
    if x.dtype.kind != "f":
        return values.binary("mod", x, y)
    rest = _float_fmod(x, y)
    return select(_against(rest, y), rest + y, rest)


def _floor_scalar(x: Value, y: Value) -> Value:
    if x.dtype.kind != "f":
        return values.binary("floordiv", x, y)
    rest = _float_fmod(x, y)
    quotient = (x - rest) / y
    quotient = select(_against(rest, y), quotient - 1.0, quotient)
    zero = const(0, x.dtype)
    exact = x / y
    rounded = unary("round", quotient)  # a whole number, but for the rounding of x - rest
    rounded = select(compare("eq", rounded, zero), values.binary("copysign", zero, exact), rounded)
    # a quotient this large is a whole number, or infinite
    whole = compare("gt", abs(exact), const(2.0 ** (24 if x.dtype.bits == 32 else 53), x.dtype))
    whole = whole & compare("lt", abs(x), const(math.inf, x.dtype))
    return select(compare("eq", y, zero) | whole, exact, rounded)


def _trunc_scalar(x: Value, y: Value) -> Value:
    if x.dtype.kind == "f":
        return unary("trunc", x / y)
    quotient = values.binary("floordiv", x, y)
    if x.dtype.kind == "u":
        return quotient
    inexact = compare("ne", quotient * y, x)
    negative = compare("lt", quotient, const(0, x.dtype))
    return select(inexact & negative, quotient + 1, quotient)


def _division(
    name: str, scalar: Callable[..., Any], reference: Callable[..., Any], **options: Any
) -> Elementwise:
    options.setdefault("vjp", (without_slope, without_slope))
    return elementwise(
        name, scalar, inputs=("x", "y"), rule=_rule, reference=reference, domain=(0.6, 3.0),
        invalid=_by_zero, failure=_failure, **options,
    )  # fmt: skip


_floor_divide = _division("floor_divide", _floor_scalar, np.floor_divide)
_trunc_divide = _division(
    "trunc_divide", _trunc_scalar, lambda x, y: np.trunc(np.true_divide(x, y)).astype(x.dtype)
)
_remainder = _division(
    "remainder", _remainder_scalar, np.remainder,
    vjp=(lambda g: g, lambda g, x, y: -g * rounded(x, y, "floor")),
)  # fmt: skip
_fmod = _division(
    "fmod", _fmod_scalar, np.fmod,
    vjp=(lambda g: g, lambda g, x, y: -g * rounded(x, y, "trunc")),
)  # fmt: skip
_MODES: Final = {"floor": _floor_divide, "trunc": _trunc_divide}


def _mode(rounding_mode: str) -> Elementwise:
    try:
        return _MODES[rounding_mode]
    except KeyError:
        raise ArgumentError(
            f"div: rounding_mode must be None, 'trunc' or 'floor', got {rounding_mode!r}"
        ) from None


def rounded(input: Operand, other: Operand, rounding_mode: str) -> Tensor:
    """The quotient rounded by "floor" or "trunc"."""
    result: Tensor = _mode(rounding_mode)(input, other)
    return result


def round_in_place(input: Tensor, other: Operand, rounding_mode: str) -> None:
    """As `rounded`, with the result written into ``input``."""
    _mode(rounding_mode).into((input,), input, other)


def floor_divide(input: Operand, other: Operand) -> Tensor:
    """The quotient rounded down, broadcast. Raises ArgumentError for integers over 0."""
    result: Tensor = _floor_divide(input, other)
    return result


def remainder(input: Operand, other: Operand) -> Tensor:
    """input - other * floor(input / other), with the divisor's sign, as Python's ``%``.

    Raises ArgumentError for integers over 0.
    """
    result: Tensor = _remainder(input, other)
    return result


def fmod(input: Tensor, other: Operand) -> Tensor:
    """input - other * trunc(input / other), with the sign of ``input``, as C's fmod.

    Raises ArgumentError for integers over 0.
    """
    result: Tensor = _fmod(input, other)
    return result


def _in_place(op: Elementwise) -> Callable[..., Any]:
    def method(self: Tensor, other: Operand) -> Tensor:
        op.into((self,), self, other)
        return self

    return method


OPERATORS: Final[dict[str, Callable[..., Any]]] = {
    "__floordiv__": lambda self, other: _floor_divide(self, other),
    "__rfloordiv__": lambda self, other: _floor_divide(other, self),
    "__mod__": lambda self, other: _remainder(self, other),
    "__rmod__": lambda self, other: _remainder(other, self),
    "__ifloordiv__": _in_place(_floor_divide),
    "__imod__": _in_place(_remainder),
    "floor_divide_": _in_place(_floor_divide),
    "remainder_": _in_place(_remainder),
    "fmod_": _in_place(_fmod),
}
