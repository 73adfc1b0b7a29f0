"""pow, reciprocal and rsqrt.

Method: |x|**y = 2**(y log2 |x|), with log2(m) = 2 / ln 2 * atanh(s), s = (m - 1) / (m + 1), for a
mantissa m in [sqrt(1/2), sqrt(2)). As an error of the product is a relative error of the result,
the logarithm needs more bits than the result has: float32 computes in float64, float64 in pairs of
numbers (Dekker, "A floating-point technique for extending the available precision", 1971, with
fused multiply-adds for exact products). The polynomials were computed by Remez's exchange.
"""

from __future__ import annotations

import math
from typing import Final

from flame.core import dtypes
from flame.kernel.values import (
    Number,
    Value,
    binary,
    cast,
    compare,
    const,
    fma,
    is_const,
    number_of,
    select,
    unary,
)  # fmt: skip
from flame.render.math._blocks import clamp, horner, nearest, number, times_power
from flame.render.math.exponential import exp2_sum
from flame.render.math.logarithm import reduce

# 2 / ln 2 * atanh(s) / s in s²: relative error 2**-45.1
_LOG2_SINGLE: Final = (
    2.8853900817778495, 0.9617966941141173, 0.57707794215594, 0.4122092722368496,
    0.3199049240819739, 0.28291070789311606,
)  # fmt: skip
# 2**r, |r| <= 1/2: relative error 2**-34.3
_EXP2_SINGLE: Final = (
    1.0, 0.6931471807045803, 0.24022651066580505, 0.05550410365918044, 0.009618038129483425,
    0.0013333935090126458, 0.00015466757068144547, 1.5196151589967141e-05,
)  # fmt: skip
# (atanh(s) / s - 1 - s²/3) / s⁴ in s²: error relative to atanh 2**-73.5
_ATANH: Final = (
    0.1999999999999999, 0.1428571428572192, 0.11111111108894794, 0.0909090942201618,
    0.07692279212254208, 0.06668132349852379, 0.05837887914320806, 0.05990899984138246,
)  # fmt: skip
_THIRD: Final = (0.3333333333333333, 1.850371707708594e-17)
_TWO_OVER_LN2: Final = (2.8853900817779268, 4.0710547481862066e-17)

Pair = tuple[Value, Value]  # the unevaluated sum of a number and one below its last place


def reciprocal(x: Value) -> Value:
    """1 / x, within 0.5 ulp."""
    return number(1, x) / x


def rsqrt(x: Value) -> Value:
    """1 / sqrt(x), within 1.5 ulp."""
    return number(1, x) / unary("sqrt", x)


def power(x: Value, y: Value) -> Value:
    """x**y, within 1 ulp, with C's results at zeros, infinities and NaN.

    Integers wrap; a negative exponent gives the quotient 1 / x**-y rounded to zero, and 0 for a
    base of 0, as PyTorch does.
    """
    if x.dtype.kind in "iu":
        return _integer_power(x, y)
    if y.op == "const":
        short = _constant_power(x, number_of(y))
        if short is not None:
            return short
    size = abs(x)
    positive = _single(size, y) if x.dtype is dtypes.float32 else _double(size, y)
    return _edges(x, y, positive)


def _constant_power(x: Value, exponent: Number) -> Value | None:
    """Exponents that need no logarithm."""
    square = x * x
    match exponent:
        case 0:
            return number(1, x)
        case 1:
            return x
        case 2:
            return square
        case 3:
            return square * x
        case -1:
            return reciprocal(x)
        case 0.5:  # of -0 it is 0, of -inf it is inf
            root = abs(unary("sqrt", x))
            return select(compare("eq", x, number(-math.inf, x)), number(math.inf, x), root)
    return None


def _edges(x: Value, y: Value, positive: Value) -> Value:
    """x**y of |x|**y; where |x| is 0, 1 or inf also the latter."""
    zero, one, infinite = number(0, x), number(1, x), number(math.inf, x)
    size, falling = abs(x), compare("lt", y, zero)
    whole = compare("eq", unary("trunc", y), y)
    half = y * 0.5
    odd = whole & compare("ne", unary("trunc", half), half)
    extreme = compare("eq", size, zero) | compare("eq", size, infinite)
    grows = compare("gt", size, one) ^ falling
    result = select(extreme, select(grows, infinite, zero), positive)
    result = select(compare("eq", size, one), one, result)
    result = select(odd, binary("copysign", result, x), result)
    negative = compare("lt", x, zero) & compare("ne", size, infinite)
    undefined = (negative & ~whole) | unary("is_nan", x) | unary("is_nan", y)
    result = select(undefined, number(math.nan, x), result)
    return select(compare("eq", y, zero) | compare("eq", x, one), one, result)


def _single(size: Value, y: Value) -> Value:
    wide = cast(size, dtypes.float64)
    exponent, mantissa = reduce(wide, subnormal=False)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    logarithm = fma(ratio, horner(ratio * ratio, _LOG2_SINGLE), exponent)
    product = clamp(cast(y, dtypes.float64) * logarithm, -200.0, 200.0)
    shifted, whole = nearest(product, 1.0)
    return cast(times_power(horner(product - whole, _EXP2_SINGLE), shifted), dtypes.float32)


def _double(size: Value, y: Value) -> Value:
    high, low = _log2_pair(size)
    product = y * high
    rest = fma(y, low, fma(y, high, -product))
    # beyond, an infinite product would make a NaN of the rest
    inside = compare("lt", abs(product), number(2048, product))
    return exp2_sum(clamp(product, -1080.0, 1030.0), select(inside, rest, number(0, rest)))


def _log2_pair(x: Value) -> Pair:
    """log2 of a positive finite x, to about 2**-66 of its size."""
    exponent, m = reduce(x)
    difference = m - 1.0
    total = m + 1.0
    total_rest = m - (total - 1.0)
    inverse = number(1, x) / total
    s = difference * inverse
    s_rest = fma(-s, total_rest, fma(-s, total, difference)) * inverse
    square = s * s
    square_rest = fma(s + s, s_rest, fma(s, s, -square))
    # atanh(s) = s + s * s² * (1/3 + s² P(s²))
    third, third_rest = number(_THIRD[0], x), number(_THIRD[1], x)
    tail = _fast_sum(third, square * horner(square, _ATANH), third_rest)
    cube = _product((s, s_rest), _product((square, square_rest), tail))
    atanh = _fast_sum(s, cube[0], cube[1] + s_rest)
    scale = (number(_TWO_OVER_LN2[0], x), number(_TWO_OVER_LN2[1], x))
    fraction = _product(atanh, scale)
    return _fast_sum(exponent, fraction[0], fraction[1])


def _fast_sum(a: Value, b: Value, rest: Value) -> Pair:
    """a + b + rest, for |a| >= |b| or a = 0."""
    total = a + b
    return total, ((a - total) + b) + rest


def _product(a: Pair, b: Pair) -> Pair:
    high = a[0] * b[0]
    return high, fma(a[0], b[0], -high) + fma(a[0], b[1], a[1] * b[0])


def _integer_power(x: Value, y: Value) -> Value:
    """Square and multiply over every bit of the exponent."""
    one, zero = const(1, x.dtype), const(0, x.dtype)
    if is_const(y) and number_of(y) >= 0:
        return _constant_integer_power(x, int(number_of(y)))
    bits = x.dtype.bits - (x.dtype.kind == "i")
    result, square = one, x
    for bit in range(bits):
        chosen = compare("ne", y & (1 << bit), zero)
        result = select(chosen, result * square, result)
        square = square * square
    if x.dtype.kind == "u":
        return result
    odd = compare("ne", y & 1, zero)
    minus = const(-1, x.dtype)
    quotient = select(compare("eq", x, one), one, zero)
    quotient = select(compare("eq", x, minus), select(odd, minus, one), quotient)
    return select(compare("lt", y, zero), quotient, result)


def _constant_integer_power(x: Value, exponent: int) -> Value:
    result, square = const(1, x.dtype), x
    while exponent:
        if exponent & 1:
            result = result * square
        square, exponent = square * square, exponent >> 1
    return result
