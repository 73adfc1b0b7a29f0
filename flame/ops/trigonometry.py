"""Trigonometric and hyperbolic functions, and their inverses.

Integers and bool are taken as the default floating dtype.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from flame.kernel import values
from flame.kernel.values import Value, compare, const, select, unary
from flame.ops.comparison import where
from flame.ops.mathematics import FLOAT_DOC, LN2, Function, floats, in_place, public, rsqrt

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "acos",
    "acosh",
    "arccos",
    "arccosh",
    "arcsin",
    "arcsinh",
    "arctan",
    "arctanh",
    "asin",
    "asinh",
    "atan",
    "atanh",
    "cos",
    "cosh",
    "deg2rad",
    "rad2deg",
    "sin",
    "sinc",
    "sinh",
    "tan",
]
_sin = floats("sin", lambda g, x: g * cos(x), reference=np.sin)
_cos = floats("cos", lambda g, x: -g * sin(x), reference=np.cos)
_tan = floats(
    "tan",
    lambda g, out: g * (1 + out * out),
    reference=np.tan,
    domain=(-1.2, 1.2),
    autocast="float32",
)
_asin = floats(
    "asin",
    lambda g, x: g * rsqrt(1 - x * x),
    reference=np.arcsin,
    domain=(-0.9, 0.9),
    autocast="float32",
)
_acos = floats(
    "acos",
    lambda g, x: -g * rsqrt(1 - x * x),
    reference=np.arccos,
    domain=(-0.9, 0.9),
    autocast="float32",
)
_atan = floats("atan", lambda g, x: g / (x * x + 1), reference=np.arctan)
_sinh = floats("sinh", lambda g, x: g * cosh(x), reference=np.sinh, autocast="float32")
_cosh = floats("cosh", lambda g, x: g * sinh(x), reference=np.cosh, autocast="float32")


def _asinh_scalar(x: Value) -> Value:
    """log1p(|x| + x² / (1 + sqrt(x² + 1))) with x's sign; log |x| + log 2 where x² overflows."""
    size = abs(x)
    bounded = values.binary("min", size, const(1e18 if x.dtype.bits == 32 else 1e150, x.dtype))
    square = bounded * bounded
    small = unary("log1p", bounded + square / (unary("sqrt", square + 1.0) + 1.0))
    large = unary("log", size) + LN2
    return values.binary("copysign", select(compare("eq", size, bounded), small, large), x)


def _acosh_scalar(x: Value) -> Value:
    """log1p(t + sqrt(t² + 2t)) with t = x - 1; log x + log 2 where x² overflows."""
    limit = const(1e18 if x.dtype.bits == 32 else 1e150, x.dtype)
    t = values.binary("min", x, limit) - 1.0
    small = unary("log1p", t + unary("sqrt", t * (t + 2.0)))
    found = select(compare("gt", x, limit), unary("log", x) + LN2, small)
    return select(compare("lt", x, const(1, x.dtype)), const(math.nan, x.dtype), found)


_asinh = floats("asinh", lambda g, x: g * rsqrt(x * x + 1), scalar=_asinh_scalar,
                 reference=np.arcsinh)  # fmt: skip
_acosh = floats("acosh", lambda g, x: g * rsqrt((x - 1) * (x + 1)), scalar=_acosh_scalar,
                 reference=np.arccosh, domain=(1.2, 4.0))  # fmt: skip
_atanh = floats(
    "atanh", lambda g, x: g / (1 - x * x),
    scalar=lambda x: (unary("log1p", x) - unary("log1p", -x)) * 0.5,
    reference=np.arctanh, domain=(-0.9, 0.9),
)  # fmt: skip

_sinc = floats(
    "sinc",
    lambda g, x: where(
        x == 0, 0, g * (cos(x * math.pi) * (x * math.pi) - sin(x * math.pi)) / (x * x * math.pi)
    ),
    scalar=lambda x: select(
        compare("eq", x, const(0, x.dtype)), const(1, x.dtype),
        unary("sin", x * math.pi) / (x * math.pi),
    ),
    reference=np.sinc, avoid=(0.0,),
)  # fmt: skip


# --- public functions -----------------------------------------------------------------------------

sin: Function = public(_sin, "sin", f"The sine. {FLOAT_DOC}")
cos: Function = public(_cos, "cos", f"The cosine. {FLOAT_DOC}")
tan: Function = public(_tan, "tan", f"The tangent. {FLOAT_DOC}")
asin: Function = public(_asin, "asin", f"The inverse sine; NaN outside [-1, 1]. {FLOAT_DOC}")
acos: Function = public(_acos, "acos", f"The inverse cosine; NaN outside [-1, 1]. {FLOAT_DOC}")
atan: Function = public(_atan, "atan", f"The inverse tangent. {FLOAT_DOC}")
sinh: Function = public(_sinh, "sinh", f"The hyperbolic sine. {FLOAT_DOC}")
cosh: Function = public(_cosh, "cosh", f"The hyperbolic cosine. {FLOAT_DOC}")
asinh: Function = public(_asinh, "asinh", f"The inverse hyperbolic sine. {FLOAT_DOC}")
acosh: Function = public(
    _acosh, "acosh", f"The inverse hyperbolic cosine; NaN below 1. {FLOAT_DOC}"
)
atanh: Function = public(_atanh, "atanh", f"The inverse hyperbolic tangent. {FLOAT_DOC}")
sinc: Function = public(_sinc, "sinc", f"sin(pi input) / (pi input), 1 at 0. {FLOAT_DOC}")

arcsin, arccos, arctan = asin, acos, atan
arcsinh, arccosh, arctanh = asinh, acosh, atanh


def deg2rad(input: Tensor) -> Tensor:
    """Degrees in radians."""
    result: Tensor = input * (math.pi / 180)
    return result


def rad2deg(input: Tensor) -> Tensor:
    """Radians in degrees."""
    result: Tensor = input * (180 / math.pi)
    return result


METHODS = tuple(__all__)
IN_PLACE = ("deg2rad", "rad2deg")
OPERATORS = in_place({n: f for n, f in globals().items() if n in __all__})
