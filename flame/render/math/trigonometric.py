"""sin, cos, tan and their inverses.

Method: Cody & Waite's reduction by multiples of pi/2 in three parts ("Software Manual for the
Elementary Functions", 1980), and minimax polynomials computed by Remez's exchange for the least
relative error of the result, each coefficient rounded to the dtype before the next were fitted.
Arguments beyond `_LIMIT`, which are rare, go to the C library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from flame.core import dtypes
from flame.kernel.values import Value, binary, compare, fma, libm, select, unary
from flame.render.math._blocks import (
    HALF_PI,
    PI,
    Table,
    bits,
    flip_sign,
    horner,
    nearest,
    number,
    split_constant,
)  # fmt: skip

# pi/2 in three parts. Multiples of the first, and arguments above 1/2, are multiples of one unit of
# which a remainder below 1 has no more than fit into a mantissa: subtracting the first is exact.
_HALF_PI: Final[Table] = {
    dtypes.float32: (1.5707964, -4.371139e-08, -1.7151245e-15),
    dtypes.float64: (1.5707963267948966, 6.123233995736766e-17, -1.4973849048591815e-33),
}
_LIMIT: Final = {dtypes.float32: 2.0**20, dtypes.float64: 2.0**30}

# (sin(x) / x - 1) / x² in x², |x| <= pi/4. Error relative to sin: 2**-27.8, 2**-57.9.
_SIN: Final[Table] = {
    dtypes.float32: (-0.16666654, 0.008332106, -0.00019507883),
    dtypes.float64: (
        -0.1666666666666663, 0.00833333333332184, -0.0001984126982935854, 2.755731353852376e-06,
        -2.5050734392041336e-08, 1.5895433540886902e-10,
    ),
}  # fmt: skip
# cos(x) in x², |x| <= pi/4. Error relative to cos: 2**-32.9, 2**-63.9.
_COS: Final[Table] = {
    dtypes.float32: (1.0, -0.5, 0.041666646, -0.0013887305, 2.4431425e-05),
    dtypes.float64: (
        1.0, -0.5, 0.041666666666666595, -0.0013888888888873338, 2.4801587288997468e-05,
        -2.7557314215291606e-07, 2.0875705113604173e-09, -1.1358732690187189e-11,
    ),
}  # fmt: skip
# (asin(x) / x - 1) / x² in x², |x| <= 1/2. Error relative to asin: 2**-27.6, 2**-59.9.
_ASIN: Final[Table] = {
    dtypes.float32: (0.16666752, 0.074953094, 0.04546915, 0.024184784, 0.04215829),
    dtypes.float64: (
        0.1666666666666676, 0.07499999999970863, 0.04464285717456433, 0.030381942709689094,
        0.022372214941091966, 0.017351612756953308, 0.013980812487875246, 0.011398972636477621,
        0.010779939535064675, 0.003707512212694273, 0.02170492589180778, -0.020995692033007152,
        0.0326266222337119,
    ),
}  # fmt: skip
# (atan(x) / x - 1) / x² in x², |x| <= 1. Error relative to atan: 2**-28.5, 2**-57.6.
_ATAN: Final[Table] = {
    dtypes.float32: (
        -0.333333, 0.19998534, -0.14264098, 0.10951454, -0.08401345, 0.057921786, -0.0311422,
        0.010895404, -0.0017893001,
    ),
    dtypes.float64: (
        -0.3333333333333307, 0.19999999999951742, -0.14285714282587542, 0.11111111007324256,
        -0.09090907007470203, 0.07692279884986039, -0.0666640439080665, 0.05880529613235244,
        -0.05253525912591453, 0.047223454223068485, -0.04219235921082067, 0.03664300529832232,
        -0.029905504298299593, 0.021986781124461865, -0.013902298814481918,
        0.007197686515559978, -0.00288550587266765, 0.0008315224596132562,
        -0.00015220298776711576, 1.3229173375724044e-05,
    ),
}  # fmt: skip


def sin(x: Value) -> Value:
    """The sine of x in radians, within 1.5 ulp."""

    def by_quadrant(quadrant: Value, sine: Value, cosine: Value) -> Value:
        flipped = bits(x) ^ (quadrant << (x.dtype.bits - 2))
        return flip_sign(select(_odd(quadrant), cosine, sine), flipped)

    return _circular("sin", x, by_quadrant)


def cos(x: Value) -> Value:
    """The cosine of x in radians, within 1.5 ulp."""

    def by_quadrant(quadrant: Value, sine: Value, cosine: Value) -> Value:
        flipped = (quadrant + 1) << (x.dtype.bits - 2)
        return flip_sign(select(_odd(quadrant), sine, cosine), flipped)

    return _circular("cos", x, by_quadrant)


def tan(x: Value) -> Value:
    """The tangent of x in radians, within 3 ulp."""

    def by_quadrant(quadrant: Value, sine: Value, cosine: Value) -> Value:
        odd = _odd(quadrant)
        ratio = select(odd, cosine, sine) / select(odd, sine, cosine)
        return flip_sign(ratio, bits(x) ^ (quadrant << (x.dtype.bits - 1)))

    return _circular("tan", x, by_quadrant)


def _odd(quadrant: Value) -> Value:
    return compare("ne", quadrant & 1, quadrant & 0)


def _circular(name: str, x: Value, by_quadrant: Callable[[Value, Value, Value], Value]) -> Value:
    """``by_quadrant(n, sin(r), cos(r))`` for |x| = n pi/2 + r; only the low bits of n are right."""
    size = abs(x)
    shifted, count = nearest(size, 2 / math.pi)
    rest, lost = _remainder(size, count)
    square = rest * rest
    # what the remainder's rounding lost is up to a unit of the sine's last place, but half of the
    # cosine's
    sine = rest + fma(rest * square, horner(square, _SIN[x.dtype]), lost)
    cosine = horner(square, _COS[x.dtype])
    near = by_quadrant(bits(shifted), sine, cosine)
    far = compare("gt", size, number(_LIMIT[x.dtype], x))
    return select(far, libm(name, x, far), near)


def _remainder(size: Value, count: Value) -> tuple[Value, Value]:
    """size - count pi/2, as a number and what its rounding lost."""
    first, second, third = (number(-part, size) for part in _HALF_PI[size.dtype])
    exact = fma(count, first, size)
    # Dekker's fast sum: right where |exact| >= |small|, and where they cancel and the sum is exact
    small = count * second
    rest = exact + small
    lost = small - (rest - exact)
    return rest, lost + fma(count, third, fma(count, second, -small))


def asin(x: Value) -> Value:
    """The angle in [-pi/2, pi/2], within 2.5 ulp; NaN beyond [-1, 1].

    Above 1/2 it is pi/2 - 2 asin(sqrt((1 - x) / 2)).
    """
    size = abs(x)
    outer, angle = _asin_folded(size)
    half_pi, rest = split_constant(*HALF_PI, x)
    large = fma(number(-2, x), angle, half_pi) + rest
    return binary("copysign", select(outer, large, angle), x)


def acos(x: Value) -> Value:
    """The angle in [0, pi], within 1.5 ulp; NaN beyond [-1, 1]. Folded as `asin`."""
    outer, angle = _asin_folded(abs(x))
    half_pi, half_rest = split_constant(*HALF_PI, x)
    pi, rest = split_constant(*PI, x)
    twice = angle + angle
    large = select(compare("lt", x, number(0, x)), pi - (twice - rest), twice)
    small = half_pi - (binary("copysign", angle, x) - half_rest)
    return select(outer, large, small)


def _asin_folded(size: Value) -> tuple[Value, Value]:
    """Whether size > 1/2; and asin(sqrt((1 - size) / 2)) where so, asin(size) elsewhere."""
    outer = compare("gt", size, number(0.5, size))
    square = select(outer, fma(size, number(-0.5, size), number(0.5, size)), size * size)
    root = select(outer, unary("sqrt", square), size)
    return outer, fma(root * square, horner(square, _ASIN[size.dtype]), root)


def atan(x: Value) -> Value:
    """The angle in [-pi/2, pi/2], within 2 ulp. Above 1 it is pi/2 - atan(1/x)."""
    size = abs(x)
    inverted = compare("gt", size, number(1, x))
    angle = _atan_below_one(select(inverted, number(1, x) / size, size))
    half_pi, rest = split_constant(*HALF_PI, x)
    return binary("copysign", select(inverted, half_pi - (angle - rest), angle), x)


def _atan_below_one(ratio: Value) -> Value:
    square = ratio * ratio
    return fma(ratio * square, horner(square, _ATAN[ratio.dtype]), ratio)


def atan2(y: Value, x: Value) -> Value:
    """The angle of the point (x, y) in [-pi, pi], within 2 ulp.

    Zeros and infinities give C's results.
    """
    zero, one = number(0, x), number(1, x)
    high, wide = abs(y), abs(x)
    steep = compare("gt", high, wide)
    low, top = select(steep, wide, high), select(steep, high, wide)
    top = select(compare("eq", top, zero), one, top)
    ratio = select(compare("eq", low, top), one, low / top)  # inf / inf counts as 1
    angle = _atan_below_one(ratio)
    left = compare("lt", bits(x), bits(zero))  # -0 counts as negative
    angle = select(steep ^ left, -angle, angle)
    (half_pi, half_rest), (pi, rest) = split_constant(*HALF_PI, x), split_constant(*PI, x)
    base = select(steep, half_pi, select(left, pi, zero))
    base_rest = select(steep, half_rest, select(left, rest, zero))
    return binary("copysign", base + (angle + base_rest), y)
