"""Functions of one real number: roots, exponentials, logarithms, trigonometry, rounding, tests.

Integers and bool are taken as the default floating dtype where the result is no whole number.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import DTypeError
from flame.kernel import values
from flame.kernel.values import Value, cast, compare, const, select, unary
from flame.ops.comparison import clamp, where
from flame.ops.creation import zeros_like
from flame.ops.elementwise import (
    Elementwise, common_dtype, elementwise, scalar_unary, to_bool, to_float,
)  # fmt: skip
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Sample, Types

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "abs", "absolute", "acos", "acosh", "arccos", "arccosh", "arcsin", "arcsinh", "arctan",
    "arctanh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "erf", "exp",
    "exp2", "expm1", "fix", "floor", "frac", "isfinite", "isinf", "isnan", "isneginf", "isposinf",
    "log", "log10", "log1p", "log2", "nan_to_num", "reciprocal", "round", "rsqrt", "sgn",
    "sigmoid", "sign", "signbit", "sin", "sinc", "sinh", "sqrt", "square", "tan", "tanh", "trunc",
    "deg2rad", "rad2deg", "positive", "logit",
]  # fmt: skip


def _numeric(name: str, types: Types) -> tuple[list[DType], list[DType]]:
    common = common_dtype(types)
    if common.kind == "b":
        raise DTypeError(f"{name} is not defined for bool tensors; convert them first")
    return [common], [common]


def _float_only(name: str, types: Types) -> tuple[list[DType], list[DType]]:
    common = common_dtype(types)
    if common.kind != "f":
        raise DTypeError(f"{name} takes floating tensors, got {common.name}; convert them first")
    return [common] * len(types), [common]


def _as_first(name: str, types: Types) -> tuple[list[DType], list[DType]]:
    first = common_dtype(types[:1])
    return [first] * len(types), [first]


def without_slope(g: Any) -> Any:
    """The gradient of what is constant between its jumps."""
    return 0 if isinstance(g, Value) else zeros_like(g)


def _floats(
    name: str,
    *formulas: Callable[..., Any],
    reference: Callable[..., Any],
    scalar: Callable[..., Any] | None = None,
    **options: Any,
) -> Elementwise:
    """A function whose result is a float."""
    return elementwise(
        name, scalar or scalar_unary(name), rule=to_float, vjp=formulas, reference=reference, **options
    )


# --- roots and powers -----------------------------------------------------------------------------

_sqrt = _floats("sqrt", lambda g, out: g / (2 * out), reference=np.sqrt, domain=(0.2, 4.0))
_rsqrt = _floats(
    "rsqrt", lambda g, out: g * (out * out * out) * -0.5,
    reference=lambda x: 1 / np.sqrt(x), domain=(0.3, 4.0),
)  # fmt: skip
_reciprocal = _floats(
    "reciprocal", lambda g, out: -g * (out * out), reference=lambda x: 1 / x, domain=(0.4, 4.0)
)


def _square_scalar(x: Value) -> Value:
    if x.dtype.kind == "b":
        x = cast(x, dtypes.int64)
    return x * x


def _square_rule(name: str, types: Types) -> tuple[list[DType], list[DType]]:
    common = common_dtype(types)
    return [common], [dtypes.int64 if common.kind == "b" else common]


_square = elementwise(
    "square", _square_scalar, rule=_square_rule, vjp=(lambda g, x: 2 * g * x,), reference=np.square
)

# --- exponentials and logarithms ------------------------------------------------------------------

_LN2: Final = math.log(2.0)
_LN10: Final = math.log(10.0)

_exp = _floats("exp", lambda g, out: g * out, reference=np.exp)
_exp2 = _floats("exp2", lambda g, out: g * out * _LN2, reference=np.exp2)
_expm1 = _floats("expm1", lambda g, out: g * (out + 1), reference=np.expm1)
_log = _floats("log", lambda g, x: g / x, reference=np.log, domain=(0.3, 4.0))
_log2 = _floats("log2", lambda g, x: g / (x * _LN2), reference=np.log2, domain=(0.3, 4.0))
_log10 = _floats("log10", lambda g, x: g / (x * _LN10), reference=np.log10, domain=(0.3, 4.0))
_log1p = _floats("log1p", lambda g, x: g / (x + 1), reference=np.log1p, domain=(-0.7, 3.0))

# --- trigonometry ---------------------------------------------------------------------------------

_sin = _floats("sin", lambda g, x: g * cos(x), reference=np.sin)
_cos = _floats("cos", lambda g, x: -g * sin(x), reference=np.cos)
_tan = _floats("tan", lambda g, out: g * (1 + out * out), reference=np.tan, domain=(-1.2, 1.2))
_asin = _floats("asin", lambda g, x: g * rsqrt(1 - x * x), reference=np.arcsin, domain=(-0.9, 0.9))
_acos = _floats("acos", lambda g, x: -g * rsqrt(1 - x * x), reference=np.arccos, domain=(-0.9, 0.9))
_atan = _floats("atan", lambda g, x: g / (x * x + 1), reference=np.arctan)
_sinh = _floats("sinh", lambda g, x: g * cosh(x), reference=np.sinh)
_cosh = _floats("cosh", lambda g, x: g * sinh(x), reference=np.cosh)
_tanh = _floats("tanh", lambda g, out: g * (1 - out * out), reference=np.tanh)


def _asinh_scalar(x: Value) -> Value:
    """log1p(|x| + x² / (1 + sqrt(x² + 1))) with the sign of x; log |x| + log 2 where x² overflows."""
    size = abs(x)
    bounded = values.binary("min", size, const(1e18 if x.dtype.bits == 32 else 1e150, x.dtype))
    square = bounded * bounded
    small = unary("log1p", bounded + square / (unary("sqrt", square + 1.0) + 1.0))
    large = unary("log", size) + _LN2
    return values.binary("copysign", select(compare("eq", size, bounded), small, large), x)


def _acosh_scalar(x: Value) -> Value:
    """log1p(t + sqrt(t² + 2t)) with t = x - 1; log x + log 2 where x² overflows."""
    limit = const(1e18 if x.dtype.bits == 32 else 1e150, x.dtype)
    t = values.binary("min", x, limit) - 1.0
    small = unary("log1p", t + unary("sqrt", t * (t + 2.0)))
    return select(compare("gt", x, limit), unary("log", x) + _LN2, small)


_asinh = _floats("asinh", lambda g, x: g * rsqrt(x * x + 1), scalar=_asinh_scalar,
                 reference=np.arcsinh)  # fmt: skip
_acosh = _floats("acosh", lambda g, x: g * rsqrt((x - 1) * (x + 1)), scalar=_acosh_scalar,
                 reference=np.arccosh, domain=(1.2, 4.0))  # fmt: skip
_atanh = _floats(
    "atanh", lambda g, x: g / (1 - x * x),
    scalar=lambda x: (unary("log1p", x) - unary("log1p", -x)) * 0.5,
    reference=np.arctanh, domain=(-0.9, 0.9),
)  # fmt: skip

_sinc = _floats(
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

# --- erf and sigmoid ------------------------------------------------------------------------------

_erf = _floats(
    "erf", lambda g, x: g * exp(-x * x) * (2 / math.sqrt(math.pi)),
    reference=np.vectorize(math.erf, otypes=[float]),
)  # fmt: skip


_sigmoid = _floats(
    "sigmoid", lambda g, out: g * (1 - out) * out,
    scalar=lambda x: 1.0 / (unary("exp", -x) + 1.0),
    reference=lambda x: 1 / (1 + np.exp(-x)),
)  # fmt: skip


_logit = _floats(
    "logit", lambda g, x: where((x < 0) | (x > 1), math.nan, g / (x * (1 - x))),
    scalar=lambda x: unary("log", x / (1.0 - x)),
    reference=lambda x: np.log(x / (1 - x)), domain=(0.1, 0.9),
)  # fmt: skip


# --- sign and rounding ----------------------------------------------------------------------------


def _sign_scalar(x: Value) -> Value:
    if x.dtype.kind == "b":
        return x
    one, zero = const(1, x.dtype), const(0, x.dtype)
    up = select(compare("gt", x, zero), one, zero)
    return up if x.dtype.kind == "u" else select(compare("lt", x, zero), const(-1, x.dtype), up)


_abs = elementwise(
    "abs", scalar_unary("abs"), rule=_numeric, vjp=(lambda g, x: g * sign(x),),
    reference=np.abs, avoid=(0.0,),
)  # fmt: skip
_sign = elementwise(
    "sign", _sign_scalar, vjp=(without_slope,), reference=np.sign, avoid=(0.0,)
)


def _rounding(name: str, reference: Callable[..., Any]) -> Elementwise:
    def scalar(x: Value) -> Value:
        return unary(name, x) if x.dtype.kind == "f" else x

    return elementwise(
        name, scalar, rule=_numeric, vjp=(without_slope,), reference=reference,
        avoid=tuple(n / 2 for n in range(-8, 9)),
    )  # fmt: skip


_floor = _rounding("floor", np.floor)
_ceil = _rounding("ceil", np.ceil)
_trunc = _rounding("trunc", np.trunc)
_round = _rounding("round", np.round)
_frac = elementwise(
    "frac", lambda x: x - unary("trunc", x), rule=_float_only, vjp=(lambda g: g,),
    reference=lambda x: x - np.trunc(x), avoid=tuple(range(-4, 5)),
)  # fmt: skip


# --- tests ----------------------------------------------------------------------------------------


def _test(name: str, scalar: Callable[[Value], Value], reference: Callable[..., Any]) -> Elementwise:
    def of_floats(x: Value) -> Value:
        return scalar(x) if x.dtype.kind == "f" else const(name == "isfinite", dtypes.bool_)

    return elementwise(
        name, of_floats, rule=to_bool, vjp=NOT_DIFFERENTIABLE, reference=reference
    )


def _equals(x: Value, number: float) -> Value:
    return compare("eq", x, const(number, x.dtype))


_isnan = _test("isnan", scalar_unary("is_nan"), np.isnan)
_isinf = _test("isinf", lambda x: _equals(abs(x), math.inf), np.isinf)
_isfinite = _test(
    "isfinite", lambda x: compare("lt", abs(x), const(math.inf, x.dtype)), np.isfinite
)
_isposinf = _test("isposinf", lambda x: _equals(x, math.inf), np.isposinf)
_isneginf = _test("isneginf", lambda x: _equals(x, -math.inf), np.isneginf)


def _signbit_scalar(x: Value) -> Value:
    if x.dtype.kind in "ub":
        return const(False, dtypes.bool_)
    one = values.binary("copysign", const(1, x.dtype), x) if x.dtype.kind == "f" else x
    return compare("lt", one, const(0, x.dtype))


_signbit = elementwise(
    "signbit", _signbit_scalar, rule=to_bool, vjp=NOT_DIFFERENTIABLE, reference=np.signbit
)


def _replaced(x: Value, nan: Value, high: Value, low: Value) -> Value:
    if x.dtype.kind != "f":
        return x
    kept = select(_equals(x, math.inf), high, select(_equals(x, -math.inf), low, x))
    return select(unary("is_nan", x), nan, kept)


_nan_to_num = elementwise(
    "nan_to_num", _replaced, inputs=("x", "nan", "high", "low"), rule=_as_first,
    vjp=(lambda g, x: where(isfinite(x), g, 0), None, None, None),
    reference=lambda x, nan, high, low: np.nan_to_num(x, nan=nan, posinf=high, neginf=low),
    samples=[Sample((Arg((4, 5)), 0.0, 3.0, -3.0)), Sample((Arg(()), 1.0, 3.0, -3.0)),
             Sample((Arg((0, 2)), 1.0, 3.0, -3.0))],
)  # fmt: skip


# --- public functions -----------------------------------------------------------------------------


def _public(op: Elementwise, name: str, text: str) -> Callable[..., Any]:
    def function(input: Tensor) -> Tensor:
        result: Tensor = op(input)
        return result

    function.__name__ = function.__qualname__ = name
    function.__doc__ = text
    return function


_FLOAT_DOC: Final = "Integers give floats of the default dtype."

sqrt = _public(_sqrt, "sqrt", f"The square root; NaN below 0. {_FLOAT_DOC}")
rsqrt = _public(_rsqrt, "rsqrt", f"1 / sqrt(input). {_FLOAT_DOC}")
reciprocal = _public(_reciprocal, "reciprocal", f"1 / input. {_FLOAT_DOC}")
square = _public(_square, "square", "input * input.")
exp = _public(_exp, "exp", f"e to the power of input. {_FLOAT_DOC}")
exp2 = _public(_exp2, "exp2", f"2 to the power of input. {_FLOAT_DOC}")
expm1 = _public(_expm1, "expm1", f"exp(input) - 1, exact near 0. {_FLOAT_DOC}")
log = _public(_log, "log", f"The natural logarithm; NaN below 0. {_FLOAT_DOC}")
log2 = _public(_log2, "log2", f"The logarithm to base 2; NaN below 0. {_FLOAT_DOC}")
log10 = _public(_log10, "log10", f"The logarithm to base 10; NaN below 0. {_FLOAT_DOC}")
log1p = _public(_log1p, "log1p", f"log(1 + input), exact near 0. {_FLOAT_DOC}")
sin = _public(_sin, "sin", f"The sine. {_FLOAT_DOC}")
cos = _public(_cos, "cos", f"The cosine. {_FLOAT_DOC}")
tan = _public(_tan, "tan", f"The tangent. {_FLOAT_DOC}")
asin = _public(_asin, "asin", f"The inverse sine; NaN outside [-1, 1]. {_FLOAT_DOC}")
acos = _public(_acos, "acos", f"The inverse cosine; NaN outside [-1, 1]. {_FLOAT_DOC}")
atan = _public(_atan, "atan", f"The inverse tangent. {_FLOAT_DOC}")
sinh = _public(_sinh, "sinh", f"The hyperbolic sine. {_FLOAT_DOC}")
cosh = _public(_cosh, "cosh", f"The hyperbolic cosine. {_FLOAT_DOC}")
tanh = _public(_tanh, "tanh", f"The hyperbolic tangent. {_FLOAT_DOC}")
asinh = _public(_asinh, "asinh", f"The inverse hyperbolic sine. {_FLOAT_DOC}")
acosh = _public(_acosh, "acosh", f"The inverse hyperbolic cosine; NaN below 1. {_FLOAT_DOC}")
atanh = _public(_atanh, "atanh", f"The inverse hyperbolic tangent. {_FLOAT_DOC}")
sinc = _public(_sinc, "sinc", f"sin(pi input) / (pi input), 1 at 0. {_FLOAT_DOC}")
erf = _public(_erf, "erf", f"The error function. {_FLOAT_DOC}")
sigmoid = _public(_sigmoid, "sigmoid", f"1 / (1 + exp(-input)). {_FLOAT_DOC}")
abs = _public(_abs, "abs", "The absolute value; its gradient at 0 is 0.")
sign = _public(_sign, "sign", "-1, 0 or 1 by the sign; 0 for NaN.")
floor = _public(_floor, "floor", "The largest whole number that is not above input.")
ceil = _public(_ceil, "ceil", "The smallest whole number that is not below input.")
trunc = _public(_trunc, "trunc", "input without its fraction.")
frac = _public(_frac, "frac", "The fraction of input, with its sign. Floats only.")
isnan = _public(_isnan, "isnan", "Whether an element is NaN.")
isinf = _public(_isinf, "isinf", "Whether an element is infinite.")
isfinite = _public(_isfinite, "isfinite", "Whether an element is neither infinite nor NaN.")
isposinf = _public(_isposinf, "isposinf", "Whether an element is +inf.")
isneginf = _public(_isneginf, "isneginf", "Whether an element is -inf.")
signbit = _public(_signbit, "signbit", "Whether the sign bit is set; true for -0.0.")

absolute, sgn, fix = abs, sign, trunc
arcsin, arccos, arctan = asin, acos, atan
arcsinh, arccosh, arctanh = asinh, acosh, atanh


def round(input: Tensor, *, decimals: int = 0) -> Tensor:
    """The nearest whole number, ties to even; with ``decimals``, that many digits are kept."""
    if decimals == 0 or input.dtype.kind != "f":
        result: Tensor = _round(input)
        return result
    scale = 10.0 ** builtins.abs(decimals)
    if decimals > 0:
        rounded: Tensor = _round(input * scale) / scale
        return rounded
    rounded = _round(input / scale) * scale
    return rounded


def positive(input: Tensor) -> Tensor:
    """``input`` itself. Raises DTypeError for bool."""
    if input.dtype.kind == "b":
        raise DTypeError("positive is not defined for bool tensors; convert them first")
    return input


def deg2rad(input: Tensor) -> Tensor:
    """Degrees in radians."""
    result: Tensor = input * (math.pi / 180)
    return result


def rad2deg(input: Tensor) -> Tensor:
    """Radians in degrees."""
    result: Tensor = input * (180 / math.pi)
    return result


def logit(input: Tensor, eps: float | None = None) -> Tensor:
    """log(input / (1 - input)), the inverse of sigmoid; ``eps`` clamps input to [eps, 1 - eps]."""
    result: Tensor = _logit(input if eps is None else clamp(input, eps, 1 - eps))
    return result


def nan_to_num(
    input: Tensor, nan: float | None = 0.0, posinf: float | None = None, neginf: float | None = None
) -> Tensor:
    """NaN replaced by ``nan``, infinities by ``posinf`` and ``neginf``.

    The latter default to the largest and smallest finite numbers of the dtype.
    """
    if input.dtype.kind != "f":
        return input.clone()
    limits = ml_dtypes.finfo(input.dtype.numpy)
    high = float(limits.max) if posinf is None else float(posinf)
    low = float(limits.min) if neginf is None else float(neginf)
    result: Tensor = _nan_to_num(input, 0.0 if nan is None else float(nan), high, low)
    return result


METHODS = tuple(__all__)
IN_PLACE = tuple(n for n in __all__ if not n.startswith("is") and n not in ("signbit", "positive"))
OPERATORS: Final[dict[str, Callable[..., Any]]] = {"__abs__": abs}
