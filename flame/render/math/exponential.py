"""exp, exp2, expm1 and the hyperbolic functions.

Method: Cody & Waite's reduction ("Software Manual for the Elementary Functions", 1980) to a small
interval, a minimax polynomial there, and a scale by a power of two. The polynomials were computed
by Remez's exchange for the least relative error of the result, each coefficient rounded to the
dtype before the next were fitted. The errors beside the tables are theirs alone, for float32 and
for float64; those in the docstrings are of the results.

Invariant: a result that is subnormal, or that overflows, is rounded once: the scale goes on in two
factors that are each normal, and only the last product may leave the normal range.
"""

from __future__ import annotations

from typing import Final

from flame.core import dtypes
from flame.kernel.values import Value, binary, bitcast, compare, fma, select
from flame.render.math._blocks import (
    LN2,
    LOG2_E,
    Table,
    at_most,
    bits,
    bits_of,
    clamp,
    form,
    horner,
    nearest,
    number,
    power_of_two,
    scaled,
    split_constant,
    times_power,
)  # fmt: skip

# (exp(r) - 1 - r) / r², |r| <= ln 2. Error relative to exp(r): 2**-30.2, 2**-56.5.
_EXP_WIDE: Final[Table] = {
    dtypes.float32: (
        0.5, 0.16666672, 0.041666605, 0.008332655, 0.0013891982, 0.00020092711, 2.4548759e-05,
    ),
    dtypes.float64: (
        0.4999999999999993, 0.16666666666666935, 0.04166666666670208,
        0.008333333333270222, 0.001388888888357929, 0.00019841269892584474,
        2.480159082861883e-05, 2.755730070854326e-06, 2.7556158342594686e-07,
        2.505502539716618e-08, 2.1062307736384734e-09, 1.593600572042185e-10,
    ),
}  # fmt: skip
# exp(r), |r| <= ln(2) / 2. Relative error 2**-28.2, 2**-57.9.
_EXP_NARROW: Final[Table] = {
    dtypes.float32: (1.0, 1.0, 0.49999994, 0.16666521, 0.041668274, 0.008368683, 0.0013820049),
    dtypes.float64: (
        1.0, 1.0, 0.5000000000000011, 0.16666666666666463, 0.041666666666528615,
        0.008333333333471015, 0.0013888888943761986, 0.00019841269545509168,
        2.4801493103180736e-05, 2.755755864267279e-06, 2.7630219428959625e-07,
        2.5007262079241965e-08,
    ),
}  # fmt: skip
# 2**r, |r| <= 1/2. Relative error 2**-28.3, 2**-57.8.
_EXP2: Final[Table] = {
    dtypes.float32: (
        1.0, 0.6931472, 0.24022648, 0.0555036, 0.009618506, 0.0013390807, 0.0001532648,
    ),
    dtypes.float64: (
        1.0, 0.6931471805599453, 0.24022650695910108, 0.05550410866482173, 0.009618129107601606,
        0.001333355814654488, 0.00015403530449034007, 1.525273363508055e-05,
        1.3215438836974463e-06, 1.0178159676243918e-07, 7.073232885085247e-09,
        4.4389079016346144e-10,
    ),
}  # fmt: skip
# (exp(r) - 1 - r) / r², |r| <= ln(2) / 2. Error relative to exp(r) - 1: 2**-26.1, 2**-61.6.
_EXPM1: Final[Table] = {
    dtypes.float32: (0.49999997, 0.16666546, 0.041667435, 0.008366273, 0.0013870697),
    dtypes.float64: (
        0.5, 0.16666666666666677, 0.04166666666666669, 0.008333333333321776,
        0.0013888888888886834, 0.00019841269885343898, 2.4801587294742364e-05,
        2.7557245206716e-06, 2.7557315884124696e-07, 2.510865084776021e-08,
        2.089797398982282e-09,
    ),
}  # fmt: skip
# (sinh(x) / x - 1) / x² in x², |x| <= 1. Error relative to sinh: 2**-31.6, 2**-61.8.
_SINH: Final[Table] = {
    dtypes.float32: (0.16666667, 0.0083333105, 0.00019842896, 2.7822132e-06),
    dtypes.float64: (
        0.16666666666666669, 0.008333333333332912, 0.00019841269841593402,
        2.7557319106762504e-06, 2.505213099721112e-08, 1.6056659334641033e-10,
        7.776593504136657e-13,
    ),
}  # fmt: skip
# (tanh(x) / x - 1) / x² in x², |x| <= 0.6. Error relative to tanh: 2**-28.4, 2**-57.8.
_TANH: Final[Table] = {
    dtypes.float32: (-0.333333, 0.13331936, -0.053784717, 0.020798627, -0.005897972),
    dtypes.float64: (
        -0.33333333333333126, 0.13333333333299766, -0.053968253949334286, 0.021869488003325662,
        -0.008863226786454083, 0.0035920374466442253, -0.0014552156908127654,
        0.0005871894399559549, -0.00023039885177107846, 7.931623868182421e-05,
        -1.7179838109116795e-05,
    ),
}  # fmt: skip


def exp(x: Value) -> Value:
    """e**x, within 1.5 ulp (float64: 2)."""
    low, high = (-105.0, 89.0) if x.dtype is dtypes.float32 else (-746.0, 710.0)
    return _exp(clamp(x, low, high))


def _exp(x: Value, last: float = 1.0) -> Value:
    """last * e**x, for a power of two ``last``, and x not far beyond under- and overflow."""
    shifted, half = nearest(x, LOG2_E / 2)
    high, low = split_constant(2 * LN2[0], 2 * LN2[1], x)
    # the first difference is exact: both operands are multiples of the same power of two
    rest = fma(half, -low, fma(half, -high, x))
    scale = power_of_two(shifted)
    final = scale if last == 1 else power_of_two(shifted, last)
    near = fma(rest * rest, horner(rest, _EXP_WIDE[x.dtype]), rest)
    return fma(near, scale, scale) * final


def exp2(x: Value) -> Value:
    """2**x, within 1 ulp; exact for integers."""
    low, high = (-151.0, 129.0) if x.dtype is dtypes.float32 else (-1076.0, 1025.0)
    return exp2_sum(clamp(x, low, high), None)


def exp2_sum(x: Value, tail: Value | None) -> Value:
    """2**(x + tail) for a small ``tail``, and x not far beyond under- and overflow."""
    shifted, whole = nearest(x, 1.0)
    rest = x - whole
    if tail is not None:
        rest = rest + tail
    # n = m + (n - m) with m = round(n / 2): each power is a normal number
    halved, _ = nearest(whole, 0.5)
    other = (bits(shifted) - bits(halved)) << form(x).mantissa
    scale = bitcast(other + bits_of(1.0, x), x.dtype)
    return horner(rest, _EXP2[x.dtype]) * power_of_two(halved) * scale


def expm1(x: Value) -> Value:
    """e**x - 1, within 2 ulp."""
    single = x.dtype is dtypes.float32
    bounded = clamp(x, -20.0, 89.0) if single else clamp(x, -40.0, 710.0)
    shifted, whole = nearest(bounded, LOG2_E)
    high, low = split_constant(*LN2, x)
    rest = fma(whole, -low, fma(whole, -high, bounded))
    near = fma(rest * rest, horner(rest, _EXPM1[x.dtype]), rest)
    # half of 2**n (1 + near) - 1, as 2**n itself may overflow where the result does not
    scale = power_of_two(shifted, 0.5)
    half = fma(scale, near, scale - 0.5)
    tiny = compare("lt", abs(x), number(2.0**-25 if single else 2.0**-54, x))
    return select(tiny, x, half + half)


def sinh(x: Value) -> Value:
    """(e**x - e**-x) / 2, within 3 ulp; an odd polynomial below 1."""
    size = abs(x)
    half = _half_exp(size)
    large = half - _quarter_over(half)
    square = x * x
    small = fma(size * square, horner(square, _SINH[x.dtype]), size)
    chosen = select(compare("ge", size, number(1.0, x)), large, small)
    return binary("copysign", chosen, x)


def cosh(x: Value) -> Value:
    """(e**x + e**-x) / 2, within 2 ulp."""
    half = _half_exp(abs(x))
    return half + _quarter_over(half)


def _half_exp(size: Value) -> Value:
    """e**size / 2, which overflows where sinh and cosh do."""
    return _exp(at_most(size, 90.0 if size.dtype is dtypes.float32 else 711.0), 0.5)


def _quarter_over(half: Value) -> Value:
    """e**-size / 2 of e**size / 2."""
    return number(0.25, half) / half


def tanh(x: Value) -> Value:
    """The hyperbolic tangent, within 1.5 ulp (float64: 2).

    An odd polynomial to 0.6; above, 1 - 2 E / (1 + E) with E = e**(-2 |x|), where the rounding
    errors of E and of the division count for less than half.
    """
    size = abs(x)
    decayed = decaying_exp(at_most(size, 10.0 if x.dtype is dtypes.float32 else 20.0), -2.0)
    large = fma(number(-2, x), decayed / (decayed + 1.0), number(1, x))
    square = x * x
    small = fma(size * square, horner(square, _TANH[x.dtype]), size)
    chosen = select(compare("gt", size, number(0.6, x)), large, small)
    return binary("copysign", chosen, x)


def vanishing_exp2(x: Value) -> Value:
    """2**x for x up to 100, within 1 ulp; 0 where that would be no normal number.

    What is left of exp2 where arguments are known not to overflow; attention's weights are such.
    """
    shifted, whole = nearest(x, 1.0)
    made = horner(x - whole, _EXP2[x.dtype]) * power_of_two(shifted)
    lowest = -126.0 if x.dtype is dtypes.float32 else -1022.0
    return select(compare("lt", x, number(lowest, x)), number(0, x), made)


def decaying_exp(x: Value, factor: float) -> Value:
    """e**(factor x) for a result in [2**-60, 1] and ``factor`` plus or minus a power of two.

    The relative error grows as the result falls: good for results that are added to 1.
    """
    shifted, whole = nearest(x, factor * LOG2_E)
    rest = fma(whole, number(-LN2[0] / factor, x), x)
    return times_power(horner(rest, scaled(_EXP_NARROW[x.dtype], factor)), shifted)
