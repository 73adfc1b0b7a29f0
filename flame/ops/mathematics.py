"""Functions of one real number: roots, exponentials, logarithms, signs, rounding, tests.

Integers and bool are taken as the default floating dtype where the result is no whole number.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import DTypeError
from flame.kernel import values
from flame.kernel.values import Value, cast, compare, const, select, unary
from flame.ops.comparison import clamp, where
from flame.ops.complementary_error import erfc as erfc_scalar
from flame.ops.creation import zeros_like
from flame.ops.elementwise import (
    Elementwise,
    common_dtype,
    elementwise,
    scalar_unary,
    to_bool,
    to_float,
)  # fmt: skip
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Sample, Types

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "abs",
    "absolute",
    "ceil",
    "erf",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "fix",
    "floor",
    "frac",
    "isfinite",
    "isinf",
    "isnan",
    "isneginf",
    "isposinf",
    "log",
    "log1p",
    "log2",
    "log10",
    "logit",
    "nan_to_num",
    "positive",
    "reciprocal",
    "round",
    "rsqrt",
    "sgn",
    "sigmoid",
    "sign",
    "signbit",
    "sqrt",
    "square",
    "tanh",
    "trunc",
]  # fmt: skip


Function = Callable[..., Any]


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


def floats(
    name: str,
    *formulas: Callable[..., Any],
    reference: Callable[..., Any],
    scalar: Callable[..., Any] | None = None,
    **options: Any,
) -> Elementwise:
    """A function whose result is a float."""
    return elementwise(
        name,
        scalar or scalar_unary(name),
        rule=to_float,
        vjp=formulas,
        reference=reference,
        **options,
    )


# --- roots and powers -----------------------------------------------------------------------------

_sqrt = floats("sqrt", lambda g, out: g / (2 * out), reference=np.sqrt, domain=(0.2, 4.0))
_rsqrt = floats(
    "rsqrt", lambda g, out: g * (out * out * out) * -0.5,
    reference=lambda x: 1 / np.sqrt(x), domain=(0.3, 4.0), autocast="float32",
)  # fmt: skip
_reciprocal = floats(
    "reciprocal",
    lambda g, out: -g * (out * out),
    reference=lambda x: 1 / x,
    domain=(0.4, 4.0),
    autocast="float32",
)


def _square_scalar(x: Value) -> Value:
    if x.dtype.kind == "b":
        x = cast(x, dtypes.int64)
    return x * x


def _square_rule(name: str, types: Types) -> tuple[list[DType], list[DType]]:
    common = common_dtype(types)
    return [common], [dtypes.int64 if common.kind == "b" else common]


_square = elementwise(
    "square",
    _square_scalar,
    rule=_square_rule,
    vjp=(lambda g, x: 2 * g * x,),
    reference=np.square,
    autocast="float32",
)

# --- exponentials and logarithms ------------------------------------------------------------------

LN2: Final = math.log(2.0)
_LN10: Final = math.log(10.0)

_exp = floats("exp", lambda g, out: g * out, reference=np.exp, autocast="float32")
_exp2 = floats("exp2", lambda g, out: g * out * LN2, reference=np.exp2)
_expm1 = floats("expm1", lambda g, out: g * (out + 1), reference=np.expm1, autocast="float32")
_log = floats("log", lambda g, x: g / x, reference=np.log, domain=(0.3, 4.0), autocast="float32")
_log2 = floats(
    "log2", lambda g, x: g / (x * LN2), reference=np.log2, domain=(0.3, 4.0), autocast="float32"
)
_log10 = floats(
    "log10", lambda g, x: g / (x * _LN10), reference=np.log10, domain=(0.3, 4.0), autocast="float32"
)
_log1p = floats(
    "log1p", lambda g, x: g / (x + 1), reference=np.log1p, domain=(-0.7, 3.0), autocast="float32"
)

# --- tanh, erf and sigmoid ------------------------------------------------------------------------

_tanh = floats("tanh", lambda g, out: g * (1 - out * out), reference=np.tanh)
_erf = floats(
    "erf", lambda g, x: g * exp(-x * x) * (2 / math.sqrt(math.pi)),
    reference=np.vectorize(math.erf, otypes=[float]),
)  # fmt: skip


_erfc = floats(
    "erfc",
    lambda g, x: g * exp(-x * x) * (-2 / math.sqrt(math.pi)),
    scalar=erfc_scalar,
    reference=np.vectorize(math.erfc, otypes=[float]),
)
_sigmoid = floats(
    "sigmoid", lambda g, out: g * (1 - out) * out,
    scalar=lambda x: 1.0 / (unary("exp", -x) + 1.0),
    reference=lambda x: 1 / (1 + np.exp(-x)),
)  # fmt: skip


_logit = floats(
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
_sign = elementwise("sign", _sign_scalar, vjp=(without_slope,), reference=np.sign, avoid=(0.0,))


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


def _test(
    name: str, scalar: Callable[[Value], Value], reference: Callable[..., Any]
) -> Elementwise:
    def of_floats(x: Value) -> Value:
        return scalar(x) if x.dtype.kind == "f" else const(name == "isfinite", dtypes.bool_)

    return elementwise(name, of_floats, rule=to_bool, vjp=NOT_DIFFERENTIABLE, reference=reference)


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


LARGEST: Final = {
    "float16": 65504.0, "bfloat16": (2 - 2**-7) * 2.0**127,
    "float32": (2 - 2**-23) * 2.0**127, "float64": (2 - 2**-52) * 2.0**1023,
}  # fmt: skip

_nan_to_num = elementwise(
    "nan_to_num", _replaced, inputs=("x", "nan", "high", "low"), rule=_as_first,
    vjp=(lambda g, x: where(isfinite(x), g, 0), None, None, None),
    reference=lambda x, nan, high, low: np.nan_to_num(x, nan=nan, posinf=high, neginf=low),
    samples=[Sample((Arg((4, 5)), 0.0, 3.0, -3.0)), Sample((Arg(()), 1.0, 3.0, -3.0)),
             Sample((Arg((0, 2)), 1.0, 3.0, -3.0))],
)  # fmt: skip


# --- public functions -----------------------------------------------------------------------------


_in_place: Final[dict[Function, Function]] = {}


def public(op: Elementwise, name: str, text: str) -> Function:
    """The public function of an op with one operand; `in_place` finds its form that overwrites."""

    def function(input: Tensor) -> Tensor:
        result: Tensor = op(input)
        return result

    def overwriting(input: Tensor) -> Tensor:
        op.into((input,), input)
        return input

    function.__name__ = function.__qualname__ = name
    overwriting.__name__ = overwriting.__qualname__ = f"{name}_"
    function.__doc__, overwriting.__doc__ = text, f"In place: {text}"
    _in_place[function] = overwriting
    return function


def in_place(functions: Mapping[str, Any]) -> dict[str, Function]:
    """The methods ``name_`` for those of ``functions`` that `public` has made."""
    return {f"{n}_": _in_place[f] for n, f in functions.items() if callable(f) and f in _in_place}


FLOAT_DOC: Final = "Integers give floats of the default dtype."

sqrt: Function = public(_sqrt, "sqrt", f"The square root; NaN below 0. {FLOAT_DOC}")
rsqrt: Function = public(_rsqrt, "rsqrt", f"1 / sqrt(input). {FLOAT_DOC}")
reciprocal: Function = public(_reciprocal, "reciprocal", f"1 / input. {FLOAT_DOC}")
square: Function = public(_square, "square", "input * input.")
exp: Function = public(_exp, "exp", f"e to the power of input. {FLOAT_DOC}")
exp2: Function = public(_exp2, "exp2", f"2 to the power of input. {FLOAT_DOC}")
expm1: Function = public(_expm1, "expm1", f"exp(input) - 1, exact near 0. {FLOAT_DOC}")
log: Function = public(_log, "log", f"The natural logarithm; NaN below 0. {FLOAT_DOC}")
log2: Function = public(_log2, "log2", f"The logarithm to base 2; NaN below 0. {FLOAT_DOC}")
log10: Function = public(_log10, "log10", f"The logarithm to base 10; NaN below 0. {FLOAT_DOC}")
log1p: Function = public(_log1p, "log1p", f"log(1 + input), exact near 0. {FLOAT_DOC}")
tanh: Function = public(_tanh, "tanh", f"The hyperbolic tangent. {FLOAT_DOC}")
erf: Function = public(_erf, "erf", f"The error function. {FLOAT_DOC}")
erfc: Function = public(_erfc, "erfc", f"1 - erf(input), precise for large input. {FLOAT_DOC}")
sigmoid: Function = public(_sigmoid, "sigmoid", f"1 / (1 + exp(-input)). {FLOAT_DOC}")
abs: Function = public(_abs, "abs", "The absolute value; its gradient at 0 is 0.")
sign: Function = public(_sign, "sign", "-1, 0 or 1 by the sign; 0 for NaN.")
floor: Function = public(_floor, "floor", "The largest whole number that is not above input.")
ceil: Function = public(_ceil, "ceil", "The smallest whole number that is not below input.")
trunc: Function = public(_trunc, "trunc", "input without its fraction.")
frac: Function = public(_frac, "frac", "The fraction of input, with its sign. Floats only.")
isnan: Function = public(_isnan, "isnan", "Whether an element is NaN.")
isinf: Function = public(_isinf, "isinf", "Whether an element is infinite.")
isfinite: Function = public(
    _isfinite, "isfinite", "Whether an element is neither infinite nor NaN."
)
isposinf: Function = public(_isposinf, "isposinf", "Whether an element is +inf.")
isneginf: Function = public(_isneginf, "isneginf", "Whether an element is -inf.")
signbit: Function = public(_signbit, "signbit", "Whether the sign bit is set; true for -0.0.")

absolute, sgn, fix = abs, sign, trunc


def round(input: Tensor, *, decimals: int = 0) -> Tensor:
    """The nearest whole number, ties to even; with ``decimals``, that many digits are kept."""
    result: Tensor
    if decimals == 0 or input.dtype.kind != "f":
        result = _round(input)
        return result
    scale = 10.0 ** builtins.abs(decimals)
    result = _round(input * scale) / scale if decimals > 0 else _round(input / scale) * scale
    return result


def positive(input: Tensor) -> Tensor:
    """``input`` itself. Raises DTypeError for bool."""
    if input.dtype.kind == "b":
        raise DTypeError("positive is not defined for bool tensors; convert them first")
    return input


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
    largest = LARGEST[input.dtype.name]
    high = largest if posinf is None else float(posinf)
    low = -largest if neginf is None else float(neginf)
    result: Tensor = _nan_to_num(input, 0.0 if nan is None else float(nan), high, low)
    return result


METHODS = tuple(__all__)
IN_PLACE = ("logit", "nan_to_num", "round")
OPERATORS: Final[dict[str, Callable[..., Any]]] = {
    "__abs__": abs,
    **in_place({n: f for n, f in globals().items() if n in __all__ and not n.startswith("is")}),
}
