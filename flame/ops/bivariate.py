"""Functions of two real numbers, and whether tensors are close or equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError
from flame.kernel import values
from flame.kernel.values import Value, compare, const, select, unary
from flame.ops.comparison import where
from flame.ops.elementwise import common_dtype, elementwise, scalar_binary, to_float
from flame.ops.mathematics import exp, log1p
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Sample, Types
from flame.ops.powers import logarithm

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "allclose", "arctan2", "atan2", "copysign", "equal", "hypot", "isclose", "logaddexp",
    "logaddexp2", "xlogy",
]  # fmt: skip
METHODS = tuple(__all__)
IN_PLACE = ("arctan2", "atan2", "copysign", "hypot", "xlogy")

Operand = Any  # a Tensor or a Python number


def _over_square(g: Any, factor: Any, x: Any, y: Any) -> Any:
    """g * factor / (x² + y²), 0 at the origin."""
    total = x * x + y * y
    return where(total == 0, 0, g * (factor / total))


_atan2 = elementwise(
    "atan2", scalar_binary("atan2"), inputs=("y", "x"), rule=to_float,
    vjp=(lambda g, x, y: _over_square(g, x, x, y), lambda g, x, y: _over_square(g, -y, x, y)),
    reference=np.arctan2, domain=(0.3, 3.0),
)  # fmt: skip


def _hypot_scalar(x: Value, y: Value) -> Value:
    """max * sqrt(1 + (min / max)²), so that no square overflows."""
    x, y = abs(x), abs(y)
    large, small = values.binary("max", x, y), values.binary("min", x, y)
    zero, infinite = const(0, x.dtype), const(math.inf, x.dtype)
    ratio = select(compare("eq", large, zero), zero, small / large)
    found = large * unary("sqrt", ratio * ratio + 1.0)
    unbounded = compare("eq", x, infinite) | compare("eq", y, infinite)
    return select(unbounded, infinite, found)


_hypot = elementwise(
    "hypot", _hypot_scalar, inputs=("x", "y"), rule=to_float,
    vjp=(lambda g, out, x: g * (x / out), lambda g, out, y: g * (y / out)),
    reference=np.hypot, domain=(0.3, 3.0),
)  # fmt: skip


def _log_sum(base: float) -> Any:
    """The logarithm of base**x + base**y: the larger one plus log(1 + base**-|x - y|)."""
    factor = math.log(base)

    def scalar(x: Value, y: Value) -> Value:
        same = compare("eq", x, y)  # of infinities the difference would be NaN
        rest = unary("log1p", unary("exp", abs(x - y) * -factor)) * (1 / factor)
        return select(same, x + math.log(2) / factor, values.binary("max", x, y) + rest)

    return scalar


_logaddexp = elementwise(
    "logaddexp", _log_sum(math.e), inputs=("x", "y"), rule=to_float,
    vjp=(lambda g, x, y: g / (1 + exp(y - x)), lambda g, x, y: g / (1 + exp(x - y))),
    reference=np.logaddexp,
)  # fmt: skip

_logaddexp2 = elementwise(
    "logaddexp2", _log_sum(2.0), inputs=("x", "y"), rule=to_float,
    vjp=(
        lambda g, x, y: g / (1 + exp((y - x) * math.log(2))),
        lambda g, x, y: g / (1 + exp((x - y) * math.log(2))),
    ),
    reference=np.logaddexp2,
)  # fmt: skip


def _nothing_of(function: str) -> Callable[[Value, Value], Value]:
    """x * function(y); 0 where x is 0 and y is no NaN."""

    def scalar(x: Value, y: Value) -> Value:
        zero = const(0, x.dtype)
        made = select(compare("eq", x, zero), zero, x * unary(function, y))
        return select(unary("is_nan", y), y, made)

    return scalar


_xlogy = elementwise(
    "xlogy", _nothing_of("log"), inputs=("x", "y"), rule=to_float,
    vjp=(
        lambda g, x, y: where((x == 0) & (y <= 0), 0, g * logarithm(y)),
        lambda g, x, y: g * x / y,
    ),
    reference=lambda x, y: x * np.log(y), domain=(0.3, 3.0),
)  # fmt: skip

_xlog1py = elementwise(
    "xlog1py", _nothing_of("log1p"), inputs=("x", "y"), rule=to_float,
    vjp=(
        lambda g, x, y: where((x == 0) & (y <= -1), 0, g * log1p(y)),
        lambda g, x, y: g * x / (y + 1),
    ),
    reference=lambda x, y: x * np.log1p(y), domain=(-0.7, 3.0),
)  # fmt: skip

_copysign = elementwise(
    "copysign", scalar_binary("copysign"), inputs=("x", "y"), rule=to_float,
    vjp=(lambda g, out, x: where(x == 0, 0, g * (out / x)), lambda g: g * 0),
    reference=np.copysign, domain=(0.3, 3.0),
)  # fmt: skip


def _close_rule(name: str, types: Types) -> tuple[list[DType], list[DType]]:
    common = common_dtype(types[:2])
    if common.kind != "f":
        common = dtypes.float64
    return [common] * 4, [dtypes.bool_]


def _close(x: Value, y: Value, relative: Value, absolute: Value, *, equal_nan: bool) -> Value:
    distance = abs(x - y)
    near = compare("le", distance, absolute + abs(relative * y))
    near = near & compare("lt", distance, const(math.inf, x.dtype))
    found = compare("eq", x, y) | near
    return found | (unary("is_nan", x) & unary("is_nan", y)) if equal_nan else found


_isclose = elementwise(
    "isclose", _close, inputs=("x", "y", "relative", "absolute"), rule=_close_rule,
    vjp=NOT_DIFFERENTIABLE,
    reference=lambda x, y, relative, absolute, equal_nan: np.isclose(
        x, y, relative, absolute, equal_nan
    ),
    samples=[Sample((Arg((5, 7)), Arg((7,)), 0.5, 0.1), {"equal_nan": True}),
             Sample((Arg(()), Arg(()), 0.0, 1.0), {"equal_nan": False}),
             Sample((Arg((0, 2)), Arg((2,)), 0.0, 1.0), {"equal_nan": False})],
)  # fmt: skip


def isclose(
    input: Tensor, other: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> Tensor:
    """Whether |input - other| <= atol + rtol * |other|, broadcast; a bool tensor.

    Infinities are close to themselves only, NaN to NaN if ``equal_nan``. Raises ArgumentError for
    negative tolerances and DTypeError for tensors of different dtypes.
    """
    if rtol < 0 or atol < 0:
        raise ArgumentError(
            f"isclose: tolerances must not be negative, got rtol={rtol}, atol={atol}"
        )
    if input.dtype is not other.dtype:
        raise DTypeError(
            f"isclose compares tensors of one dtype, got {input.dtype.name} and {other.dtype.name}"
        )
    result: Tensor = _isclose(input, other, float(rtol), float(atol), equal_nan=bool(equal_nan))
    return result


def allclose(
    input: Tensor, other: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> bool:
    """Whether all elements are close, see `isclose`; a Python bool."""
    return bool(isclose(input, other, rtol, atol, equal_nan).all().item())


def equal(input: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and elements; a Python bool."""
    if input.shape != other.shape:
        return False
    return bool((input == other).all().item())


def atan2(input: Tensor, other: Operand) -> Tensor:
    """The angle of the point (other, input), in (-pi, pi], broadcast."""
    result: Tensor = _atan2(input, other)
    return result


arctan2 = atan2


def hypot(input: Tensor, other: Operand) -> Tensor:
    """sqrt(input² + other²) without overflow, broadcast."""
    result: Tensor = _hypot(input, other)
    return result


def logaddexp(input: Tensor, other: Tensor) -> Tensor:
    """log(exp(input) + exp(other)) without overflow, broadcast."""
    result: Tensor = _logaddexp(input, other)
    return result


def logaddexp2(input: Tensor, other: Tensor) -> Tensor:
    """log2(2**input + 2**other) without overflow, broadcast."""
    result: Tensor = _logaddexp2(input, other)
    return result


def xlogy(input: Operand, other: Operand) -> Tensor:
    """input * log(other), 0 where input is 0 (NaN where other is NaN), broadcast."""
    result: Tensor = _xlogy(input, other)
    return result


def xlog1py(input: Operand, other: Operand) -> Tensor:
    """input * log(1 + other), 0 where input is 0 (NaN where other is NaN), broadcast."""
    result: Tensor = _xlog1py(input, other)
    return result


def copysign(input: Tensor, other: Operand) -> Tensor:
    """|input| with the sign of ``other``, broadcast."""
    result: Tensor = _copysign(input, other)
    return result
