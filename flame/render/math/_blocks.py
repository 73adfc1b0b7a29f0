"""What the expansions share: floating formats, polynomials, and powers of two made of bits.

Invariant: a number is rounded to the dtype before it becomes a constant, so a table means what the
kernel computes with. Clamps are selects on an ordered comparison: these let NaN through.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.kernel.values import Number, Value, bitcast, compare, const, fma, select

Table = dict[DType, tuple[float, ...]]


@dataclass(frozen=True)
class Format:
    """An IEEE 754 binary format and the signed integer of its width."""

    dtype: DType
    word: DType
    mantissa: int  # stored bits
    bias: int

    @property
    def shifter(self) -> float:
        """x + shifter - shifter is the integer nearest to x, for |x| < 2**(mantissa - 1).

        The low bits of x + shifter then hold that integer, in two's complement.
        """
        return 1.5 * 2.0**self.mantissa

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def sign_bit(self) -> int:
        return -1 << (self.dtype.bits - 1)

    @property
    def exponent_mask(self) -> int:
        """Sign and exponent."""
        return -1 << self.mantissa


FORMATS: Final = {
    dtypes.float32: Format(dtypes.float32, dtypes.int32, 23, 127),
    dtypes.float64: Format(dtypes.float64, dtypes.int64, 52, 1023),
}


def form(x: Value) -> Format:
    return FORMATS[x.dtype]


def number(value: Number, like: Value) -> Value:
    """A constant of ``like``'s dtype, rounded to it."""
    return const(float(like.dtype.numpy.type(value)), like.dtype)


def bits(x: Value) -> Value:
    """The bits of a float as a signed integer."""
    return bitcast(x, form(x).word)


def bits_of(value: float, like: Value) -> int:
    """The bits that ``value`` has in ``like``'s dtype."""
    rounded = np.asarray(value, like.dtype.numpy)
    return int(rounded.view(form(like).word.numpy))


def horner(x: Value, coefficients: Sequence[float]) -> Value:
    """c[0] + c[1] x + c[2] x² + ..."""
    total = number(coefficients[-1], x)
    for coefficient in reversed(coefficients[:-1]):
        total = fma(total, x, number(coefficient, x))
    return total


def long_polynomial(x: Value, coefficients: Sequence[float]) -> Value:
    """As `horner`, from twelve terms on in two chains that run side by side.

    Less exact where the chains cancel.
    """
    if len(coefficients) < 12:
        return horner(x, coefficients)
    square = x * x
    return fma(horner(square, coefficients[1::2]), x, horner(square, coefficients[::2]))


def at_most(x: Value, high: float) -> Value:
    return select(compare("gt", x, number(high, x)), number(high, x), x)


def clamp(x: Value, low: float, high: float) -> Value:
    """NaN stays NaN."""
    x = at_most(x, high)
    return select(compare("lt", x, number(low, x)), number(low, x), x)


def split_constant(value: float, rest: float, like: Value) -> tuple[Value, Value]:
    """A constant as the sum of two of ``like``'s dtype.

    value + rest is the constant to twice the precision of a double.
    """
    high = float(like.dtype.numpy.type(value))
    return number(high, like), number((value - high) + rest, like)


def nearest(x: Value, factor: float) -> tuple[Value, Value]:
    """round(factor * x), as a number that holds it in its low bits and as itself."""
    shifter = number(form(x).shifter, x)
    shifted = x + shifter if factor == 1 else fma(x, number(factor, x), shifter)
    return shifted, shifted - shifter


def power_of_two(shifted: Value, unit: float = 1.0) -> Value:
    """unit * 2**n, with n in the low bits of ``shifted``. The result must be a normal number."""
    exponent = bits(shifted) << form(shifted).mantissa
    return bitcast(exponent + bits_of(unit, shifted), shifted.dtype)


def times_power(x: Value, shifted: Value) -> Value:
    """x * 2**n, with n in the low bits of ``shifted``. x and the result must be normal numbers."""
    return bitcast(bits(x) + (bits(shifted) << form(x).mantissa), x.dtype)


def flip_sign(x: Value, word: Value) -> Value:
    """x, negated where the sign bit of ``word`` is set."""
    return bitcast(bits(x) ^ (word & form(x).sign_bit), x.dtype)


LOG2_E: Final = 1 / math.log(2)
# (the nearest double, the rest)
LN2: Final = (0.6931471805599453, 2.3190468138462996e-17)
PI: Final = (3.141592653589793, 1.2246467991473532e-16)
HALF_PI: Final = (1.5707963267948966, 6.123233995736766e-17)


@functools.cache
def scaled(coefficients: tuple[float, ...], factor: float) -> tuple[float, ...]:
    """The polynomial in factor * x; exact where ``factor`` is a power of two."""
    return tuple(c * factor**power for power, c in enumerate(coefficients))
