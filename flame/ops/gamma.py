"""Gamma, zeta and Bessel functions, and the inverse of erf: elementwise ops in scalar instructions.

Methods: arguments are moved to where an asymptotic series converges (Stirling's, Euler's and
Maclaurin's), by recurrence and reflection; erfinv starts from Giles, "Approximating the erfinv
function", 2010, and takes two of Newton's steps; Bessel functions are power series, and asymptotic
ones beyond 20.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core.errors import ArgumentError
from flame.kernel.values import Value, binary, compare, const, select, unary
from flame.ops.comparison import where
from flame.ops.complementary_error import erfc as erfc_scalar
from flame.ops.elementwise import Elementwise, elementwise, to_float
from flame.ops.mathematics import exp, sign
from flame.ops.op import Arg, Sample

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["digamma", "erfinv", "i0", "lgamma", "mvlgamma", "polygamma"]
METHODS = ("digamma", "erfinv", "i0", "lgamma", "mvlgamma", "polygamma")
IN_PLACE = ("digamma", "erfinv", "i0", "lgamma", "mvlgamma", "polygamma")

SHIFT = 8  # steps of recurrence before a series


def _series(step: Value, coefficients: Sequence[float]) -> Value:
    """The polynomial with these coefficients, the constant one first."""
    total = const(coefficients[-1], step.dtype)
    for coefficient in reversed(coefficients[:-1]):
        total = total * step + coefficient
    return total


def _below(x: Value, limit: float) -> Value:
    return compare("lt", x, const(limit, x.dtype))


def _is(x: Value, number: float) -> Value:
    return compare("eq", x, const(number, x.dtype))


def _fraction(x: Value) -> Value:
    return x - unary("floor", x)


# --- gamma ----------------------------------------------------------------------------------------


def _lgamma_scalar(x: Value) -> Value:
    reflected = _below(x, 0.5)
    z = select(reflected, 1.0 - x, x)
    small = _below(z, float(SHIFT))
    product = z
    for k in range(1, SHIFT):
        product = product * (z + float(k))
    w = select(small, z + float(SHIFT), z)
    inverse = 1.0 / w
    tail = inverse * _series(
        inverse * inverse, (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360)
    )
    stirling = (w - 0.5) * unary("log", w) - w + (0.5 * math.log(2 * math.pi)) + tail
    whole = stirling - select(small, unary("log", product), const(0.0, x.dtype))
    turn = unary("log", math.pi / abs(unary("sin", _fraction(x) * math.pi))) - whole
    infinite = _is(abs(x), math.inf)
    return select(infinite, const(math.inf, x.dtype), select(reflected, turn, whole))


def _digamma_scalar(x: Value) -> Value:
    reflected = _below(x, 0.5)
    z = select(reflected, 1.0 - x, x)
    small = _below(z, float(SHIFT))
    total = 1.0 / z
    for k in range(1, SHIFT):
        total = total + 1.0 / (z + float(k))
    w = select(small, z + float(SHIFT), z)
    inverse = 1.0 / w
    square = inverse * inverse
    tail = square * _series(
        square, (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760, 1 / 12)
    )
    whole = unary("log", w) - inverse * 0.5 - tail
    whole = whole - select(small, total, const(0.0, x.dtype))
    angle = _fraction(x) * math.pi
    turn = whole - math.pi * unary("cos", angle) / unary("sin", angle)
    made = select(reflected, turn, whole)
    pole = select(_is(_fraction(x), 0.0), const(math.nan, x.dtype), made)
    made = select(_below(x, 0.0), pole, made)
    return select(_is(x, 0.0), -1.0 / x, select(_is(x, math.inf), x, made))


_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510)


def _zeta_scalar(s: Value, q: Value) -> Value:
    def power(base: Value) -> Value:
        return binary("pow", base, -s)

    count = 20  # so that q may be negative, as far as -10
    total = power(q)
    for k in range(1, count):
        total = total + power(q + float(k))
    edge = q + float(count)
    at_edge = power(edge)
    total = total + at_edge * edge / (s - 1.0) + at_edge * 0.5
    factor, inverse = s, 1.0 / edge
    term = at_edge * inverse
    for j, bernoulli in enumerate(_BERNOULLI, start=1):
        total = total + factor * term * (bernoulli / math.factorial(2 * j))
        factor = factor * (s + float(2 * j - 1)) * (s + float(2 * j))
        term = term * inverse * inverse
    nan = const(math.nan, s.dtype)
    whole_q = compare("eq", _fraction(q), const(0.0, q.dtype))
    whole_s = compare("eq", _fraction(s), const(0.0, s.dtype))
    left = select(whole_q, const(math.inf, s.dtype), select(whole_s, total, nan))
    made = select(compare("le", q, const(0.0, q.dtype)), left, total)
    made = select(_is(s, 1.0), const(math.inf, s.dtype), made)
    return select(_below(s, 1.0), nan, made)


def _np_zeta(s: Any, q: Any) -> Any:
    terms = sum((q + k) ** -s for k in range(4000))
    edge = q + 4000.0
    return terms + edge ** (1 - s) / (s - 1) + edge**-s / 2 + s * edge ** (-s - 1) / 12


_zeta: Elementwise = elementwise(
    "zeta", _zeta_scalar, inputs=("s", "q"), rule=to_float,
    vjp=(None, lambda g, s, q: g * -s * _zeta(s + 1, q)),
    reference=_np_zeta, tolerance=4.0,
    samples=[Sample((Arg((5, 7), 2.0, 5.0, differentiable=False), Arg((5, 7), 0.5, 4.0)))],
)  # fmt: skip

_digamma: Elementwise = elementwise(
    "digamma", _digamma_scalar, rule=to_float,
    vjp=(lambda g, x: g * _zeta(2.0 + x * 0, x),),
    reference=lambda x: sum(1 / (k + 1) - 1 / (x + k) for k in range(200_000)) - np.euler_gamma
    + (x - 1) / (x + 200_000), domain=(0.6, 4.0), tolerance=1e3,
)  # fmt: skip

_lgamma = elementwise(
    "lgamma", _lgamma_scalar, rule=to_float, vjp=(lambda g, x: g * _digamma(x),),
    reference=np.vectorize(math.lgamma, otypes=[float]), domain=(0.3, 6.0), tolerance=4.0,
)  # fmt: skip


def lgamma(input: Tensor) -> Tensor:
    """The logarithm of the gamma function's magnitude."""
    result: Tensor = _lgamma(input)
    return result


def digamma(input: Tensor) -> Tensor:
    """The derivative of `lgamma`."""
    result: Tensor = _digamma(input)
    return result


def zeta(input: Any, other: Any) -> Tensor:
    """Hurwitz's zeta function: the sum of (k + other) ** -input over k from 0."""
    result: Tensor = _zeta(input, other)
    return result


def polygamma(n: Any, input: Any) -> Tensor:
    """The derivative of order n of `digamma`; as a method, ``input.polygamma(n)``."""
    if hasattr(n, "storage"):
        n, input = input, n
    if n.__class__ is not int or n < 0:
        raise ArgumentError(f"polygamma: the order must be an integer from 0, got {n!r}")
    if n == 0:
        return digamma(input)
    factor = math.factorial(n) * (-1) ** (n + 1)
    floats = input if input.dtype.kind == "f" else input * 1.0
    result: Tensor = zeta(floats.detach() * 0 + float(n + 1), floats) * float(factor)
    return result


def mvlgamma(input: Tensor, p: int) -> Tensor:
    """The multivariate `lgamma` of dimension p."""
    if p.__class__ is not int or p < 1:
        raise ArgumentError(f"mvlgamma: p must be an integer from 1, got {p!r}")
    total = lgamma(input)
    for j in range(1, p):
        total = total + lgamma(input - 0.5 * j)
    result: Tensor = total + p * (p - 1) / 4 * math.log(math.pi)
    return result


# --- inverse of the error function ----------------------------------------------------------------

_CENTRE = (
    1.50140941, 0.246640727, -0.00417768164, -0.00125372503, 0.00021858087, -4.39150654e-06,
    -3.5233877e-06, 3.43273939e-07, 2.81022636e-08,
)  # fmt: skip
_TAIL = (
    2.83297682, 1.00167406, 0.00943887047, -0.0076224613, 0.00573950773, -0.00367342844,
    0.00134934322, 0.000100950558, -0.000200214257,
)  # fmt: skip


def _erfinv_scalar(x: Value) -> Value:
    size = abs(x)
    w = -unary("log", (1.0 - size) * (1.0 + size))
    centre, tail = _series(w - 2.5, _CENTRE), _series(unary("sqrt", w) - 3.0, _TAIL)
    start = select(_below(w, 5.0), centre, tail)
    y = start * size
    for _ in range(2):
        near = size - unary("erf", y)
        far = erfc_scalar(y) - (1.0 - size)
        error = select(_below(size, 0.5), near, far)
        y = y + error * unary("exp", y * y) * (math.sqrt(math.pi) / 2)
    y = select(_is(size, 1.0), const(math.inf, x.dtype), y)
    return select(_below(x, 0.0), -y, y)


def _np_erfinv(x: Any) -> Any:
    y, erf = np.zeros_like(x), np.vectorize(math.erf, otypes=[float])
    for _ in range(60):
        y = y - (erf(y) - x) * np.exp(y * y) * math.sqrt(math.pi) / 2
    return y


_erfinv = elementwise(
    "erfinv", _erfinv_scalar, rule=to_float,
    vjp=(lambda g, out: g * exp(out * out) * (math.sqrt(math.pi) / 2),),
    reference=_np_erfinv, domain=(-0.7, 0.7), tolerance=2.0, autocast="float32",
)  # fmt: skip


def erfinv(input: Tensor) -> Tensor:
    """The number whose erf is ``input``; infinite at -1 and 1, NaN beyond."""
    result: Tensor = _erfinv(input)
    return result


# --- Bessel functions -----------------------------------------------------------------------------


def _bessel(order: int, x: Value, *, scaled: bool) -> Value:
    """I0 or I1 of |x|, times exp(-|x|) if ``scaled``."""
    size = abs(x)
    t = binary("min", size, const(20.0, x.dtype))
    t = t * t * 0.25
    total = const(1.0, x.dtype)
    for k in range(50, 0, -1):
        total = total * t * (1 / (k * (k + order))) + 1.0
    if order:
        total = total * size * 0.5
    inverse = 1.0 / binary("max", size, const(1.0, x.dtype))
    mu, tail, coefficients = 4 * order * order, 1.0, [1.0]
    for k in range(1, 14):
        tail *= -(mu - (2 * k - 1) ** 2) / (k * 8)
        coefficients.append(tail)
    large = _series(inverse, coefficients) * unary("sqrt", inverse * (1 / (2 * math.pi)))
    decay = unary("exp", -size)
    grown = unary("exp", size * 0.5)
    small = total * decay if scaled else total
    wide = large if scaled else large * grown * grown
    made = select(_below(size, 20.0), small, wide)
    return select(_below(x, 0.0), -made, made) if order else made


def _np_bessel(order: int, *, scaled: bool) -> Callable[[Any], Any]:
    def reference(x: Any) -> Any:
        total = sum(
            (x / 2) ** (2 * k + order) / (math.factorial(k) * math.factorial(k + order))
            for k in range(60)
        )
        return total * np.exp(-np.abs(x)) if scaled else total

    return reference


def _slope_of_odd(even: Any, odd: Any, x: Any) -> Any:
    """I0 - I1 / x, which is 1/2 at 0."""
    return where(x == 0, 0.5, even - odd / where(x == 0, 1.0, x))


_i0: Elementwise = elementwise(
    "i0", lambda x: _bessel(0, x, scaled=False), rule=to_float,
    vjp=(lambda g, x: g * _i1(x),), reference=_np_bessel(0, scaled=False), tolerance=4.0,
)  # fmt: skip
_i1: Elementwise = elementwise(
    "i1", lambda x: _bessel(1, x, scaled=False), rule=to_float,
    vjp=(lambda g, out, x: g * _slope_of_odd(_i0(x), out, x),),
    reference=_np_bessel(1, scaled=False), domain=(0.5, 3.0), tolerance=4.0,
)  # fmt: skip
_i0e: Elementwise = elementwise(
    "i0e", lambda x: _bessel(0, x, scaled=True), rule=to_float,
    vjp=(lambda g, out, x: g * (_i1e(x) - sign(x) * out),),
    reference=_np_bessel(0, scaled=True), domain=(0.5, 3.0), tolerance=4.0,
)  # fmt: skip
_i1e: Elementwise = elementwise(
    "i1e", lambda x: _bessel(1, x, scaled=True), rule=to_float,
    vjp=(lambda g, out, x: g * (_slope_of_odd(_i0e(x), out, x) - sign(x) * out),),
    reference=_np_bessel(1, scaled=True), domain=(0.5, 3.0), tolerance=4.0,
)  # fmt: skip


def i0(input: Tensor) -> Tensor:
    """The modified Bessel function of the first kind, of order 0."""
    result: Tensor = _i0(input)
    return result


def i1(input: Tensor) -> Tensor:
    """The modified Bessel function of the first kind, of order 1."""
    result: Tensor = _i1(input)
    return result


def i0e(input: Tensor) -> Tensor:
    """`i0` times exp(-|input|)."""
    result: Tensor = _i0e(input)
    return result


def i1e(input: Tensor) -> Tensor:
    """`i1` times exp(-|input|)."""
    result: Tensor = _i1e(input)
    return result
