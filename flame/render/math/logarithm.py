"""log, log2, log10 and log1p.

Method: x = 2**k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and a minimax polynomial for the
logarithm of 1 + f beyond its leading term (Cody & Waite, "Software Manual for the Elementary
Functions", 1980). The polynomials were computed by Remez's exchange for the least relative error of
the result, each coefficient rounded to the dtype before the next were fitted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.kernel.values import Value, binary, bitcast, cast, compare, fma, select
from flame.render.math._blocks import (
    LN2,
    bits,
    bits_of,
    form,
    long_polynomial,
    number,
    split_constant,
)

_SQRT_HALF: Final = math.sqrt(0.5)


@dataclass(frozen=True)
class _Base:
    """log_b(2**k (1 + f)) = k unit + leading f + f P(f)."""

    unit: tuple[float, float]  # log_b 2, in two parts
    leading: float
    series: dict[DType, tuple[float, ...]]


# P(f). Relative error of the logarithm 2**-27.3, 2**-56.6.
_NATURAL: Final = _Base(
    LN2,
    1.0,
    {
        dtypes.float32: (
            0.0, -0.5, 0.3333333, -0.2500082, 0.20001242, -0.16623408, 0.14201573, -0.13159622,
            0.12762305, -0.07636524,
        ),
        dtypes.float64: (
            0.0, -0.5, 0.3333333333333314, -0.2499999999998799, 0.20000000000066764,
            -0.16666666669823546, 0.14285714280082057, -0.12499999691596424, 0.111111111479954,
            -0.10000015201123788, 0.09090923914702144, -0.08332913633148366, 0.07691530171544647,
            -0.07149438685173298, 0.06684584876416132, -0.061966802949714295,
            0.05668404193170847, -0.0567780527878919, 0.06503431265999711, -0.0598158860264427,
            0.026150369712041096,
        ),
    },
)  # fmt: skip
# The first coefficient is the rest of the leading one. Relative error 2**-27.7, 2**-56.8.
_BINARY: Final = _Base(
    (1.0, 0.0),
    1.4426950408889634,
    {
        dtypes.float32: (
            1.925963e-08, -0.72134733, 0.4808982, -0.36069867, 0.28857142, -0.23956734, 0.2044865,
            -0.191391, 0.18708922, -0.11025671,
        ),
        dtypes.float64: (
            2.0355273740931033e-17, -0.7213475204444822, 0.4808983469629834,
            -0.36067376022188014, 0.2885390081790214, -0.24044917354901213, 0.20609929146760808,
            -0.18033687441244528, 0.16029944882017225, -0.14426976267276007,
            0.13115435902063396, -0.12021782065901475, 0.11096393411355454,
            -0.10315176102622882, 0.09645751638579324, -0.08936589062609394,
            0.08164257092612147, -0.08191841197139324, 0.09419911564374046,
            -0.08664620147866399, 0.037759551914995484,
        ),
    },
)  # fmt: skip
# Relative error 2**-27.7, 2**-56.8.
_DECIMAL: Final = _Base(
    (0.3010299956639812, -2.8037281277851704e-18),
    0.4342944819032518,
    {
        dtypes.float32: (
            -1.010305e-08, -0.21714719, 0.14476478, -0.108580895, 0.08686869, -0.07212288,
            0.06155917, -0.057564285, 0.056282643, -0.03327486,
        ),
        dtypes.float64: (
            1.098319650216765e-17, -0.21714724095162607, 0.14476482730108262,
            -0.10857362047570543, 0.08685889638102011, -0.07238241367074343,
            0.062042068816792466, -0.05428680852940057, 0.04825494239026728,
            -0.04342952581474622, 0.0394813957830552, -0.03618917392411464,
            0.03340348109247982, -0.031051735448586096, 0.029036493222586893,
            -0.026901989228471337, 0.02457762876899717, -0.024659907860323994,
            0.02835467409458678, -0.02608112914905437, 0.011366577700671232,
        ),
    },
)  # fmt: skip


def log(x: Value) -> Value:
    """The natural logarithm, within 1 ulp (float64: 1.5)."""
    return _logarithm(x, _NATURAL)


def log2(x: Value) -> Value:
    """The logarithm to base 2, within 1 ulp (float64: 1.5); exact for powers of two."""
    return _logarithm(x, _BINARY)


def log10(x: Value) -> Value:
    """The logarithm to base 10, within 1 ulp (float64: 1.5)."""
    return _logarithm(x, _DECIMAL)


def log1p(x: Value) -> Value:
    """log(1 + x), within 2 ulp: with the k of the rounded 1 + x, but f of the exact one,
    (1 + x) 2**-k - 1."""
    total = x + 1.0
    exponent_bits, exponent = _exponent(total, None)
    inverse = bitcast(bits_of(1.0, x) - exponent_bits, x.dtype)  # 2**-k
    exact = fma(x, inverse, inverse - 1.0)
    # from here on 1 + x is x, and 2**-k may be no number
    huge = compare("gt", x, number(2.0 ** (form(x).mantissa + 2), x))
    fraction = select(huge, _mantissa(total, exponent_bits) - 1.0, exact)
    result = _combine(exponent, fraction, _NATURAL)
    return binary("copysign", _edges(total, result), x)  # log1p(-0) is -0


def _logarithm(x: Value, base: _Base) -> Value:
    exponent, mantissa = reduce(x)
    return _edges(x, _combine(exponent, mantissa - 1.0, base))


def reduce(x: Value, *, subnormal: bool = True) -> tuple[Value, Value]:
    """(k, m) with x = 2**k m, m in [sqrt(1/2), sqrt(2)), for a positive finite x."""
    if not subnormal:
        exponent_bits, exponent = _exponent(x, None)
        return exponent, _mantissa(x, exponent_bits)
    raised = compare("lt", x, number(form(x).smallest_normal, x))
    whole = select(raised, x * 2.0 ** form(x).mantissa, x)
    exponent_bits, exponent = _exponent(whole, raised)
    return exponent, _mantissa(whole, exponent_bits)


def _exponent(x: Value, raised: Value | None) -> tuple[Value, Value]:
    """k of a normal x = 2**k m: in the place of the exponent's bits, and as a number.

    Where ``raised``, x was multiplied by two to the stored bits of the mantissa, and the number is
    that of the original.
    """
    f = form(x)
    exponent_bits = (bits(x) - bits_of(_SQRT_HALF, x)) & f.exponent_mask
    if x.dtype is dtypes.float32:
        unit = number(2.0**-f.mantissa, x)
        if raised is None:
            return exponent_bits, cast(exponent_bits, x.dtype) * unit
        offset = select(raised, number(-f.mantissa, x), number(0, x))
        return exponent_bits, fma(cast(exponent_bits, x.dtype), unit, offset)
    # few CPUs convert int64 vectors: put the biased exponent into the low bits of 2**52 instead
    biased = bitcast(exponent_bits + bits_of(1.0, x), dtypes.uint64) >> f.mantissa
    carrier = 2.0**f.mantissa
    bias = number(carrier + f.bias, x)
    if raised is not None:
        bias = select(raised, number(carrier + f.bias + f.mantissa, x), bias)
    return exponent_bits, bitcast(biased | bits_of(carrier, x), x.dtype) - bias


def _mantissa(x: Value, exponent_bits: Value) -> Value:
    return bitcast(bits(x) - exponent_bits, x.dtype)


def _combine(exponent: Value, fraction: Value, base: _Base) -> Value:
    """k unit + leading f + f P(f), the small terms first."""
    series = base.series[exponent.dtype]
    if series[0]:
        small = fraction * long_polynomial(fraction, series)
    else:
        small = fraction * fraction * long_polynomial(fraction, series[1:])
    unit, rest = split_constant(*base.unit, exponent)
    # in float32 the rest of ln 2 is below 0.05 ulp of any result
    if base is _DECIMAL or (base is _NATURAL and exponent.dtype is dtypes.float64):
        small = fma(exponent, rest, small)
    if base.leading == 1:
        near = fraction + small
    else:
        near = fma(fraction, number(base.leading, exponent), small)
    return exponent + near if base is _BINARY else fma(exponent, unit, near)


def _edges(x: Value, result: Value) -> Value:
    """-inf at 0, NaN below, inf at inf."""
    at_zero = select(compare("eq", x, number(0, x)), number(-math.inf, x), number(math.nan, x))
    positive = select(compare("gt", x, number(0, x)), result, at_zero)
    return select(compare("lt", x, number(math.inf, x)), positive, x)
