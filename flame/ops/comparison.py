"""Comparisons, selection by a condition, and the larger or smaller of two.

Where two operands tie, gradients are PyTorch's: `maximum` and `minimum` share them equally, `clamp`
passes them at its bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError
from flame.core.types import TensorType
from flame.kernel import values
from flame.kernel.values import Value
from flame.ops.elementwise import (
    Elementwise,
    common_dtype,
    elementwise,
    scalar_binary,
    scalar_compare,
    to_bool,
)  # fmt: skip
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Sample, Types

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "clamp", "clamp_max", "clamp_min", "clip", "eq", "fmax", "fmin", "ge", "greater",
    "greater_equal", "gt", "le", "less", "less_equal", "lt", "maximum", "minimum", "ne",
    "not_equal", "where",
]  # fmt: skip
METHODS = (
    "clamp", "clamp_max", "clamp_min", "clip", "eq", "fmax", "fmin", "ge", "greater",
    "greater_equal", "gt", "le", "less", "less_equal", "lt", "maximum", "minimum", "ne",
    "not_equal",
)  # fmt: skip
IN_PLACE = (
    "eq", "ge", "greater", "greater_equal", "gt", "le", "less", "less_equal", "lt", "ne",
    "not_equal",
)  # fmt: skip

Operand = Any  # a Tensor, or a Python number


def _comparison(name: str, reference: Callable[..., Any]) -> Elementwise:
    return elementwise(
        name, scalar_compare(name), inputs=("x", "y"), rule=to_bool, vjp=NOT_DIFFERENTIABLE,
        reference=reference,
    )  # fmt: skip


_eq = _comparison("eq", np.equal)
_ne = _comparison("ne", np.not_equal)
_lt = _comparison("lt", np.less)
_le = _comparison("le", np.less_equal)
_gt = _comparison("gt", np.greater)
_ge = _comparison("ge", np.greater_equal)


def eq(input: Tensor, other: Operand) -> Tensor:
    """input == other, broadcast; a bool tensor."""
    result: Tensor = _eq(input, other)
    return result


def ne(input: Tensor, other: Operand) -> Tensor:
    """input != other, broadcast; a bool tensor."""
    result: Tensor = _ne(input, other)
    return result


def lt(input: Tensor, other: Operand) -> Tensor:
    """input < other, broadcast; a bool tensor."""
    result: Tensor = _lt(input, other)
    return result


def le(input: Tensor, other: Operand) -> Tensor:
    """input <= other, broadcast; a bool tensor."""
    result: Tensor = _le(input, other)
    return result


def gt(input: Tensor, other: Operand) -> Tensor:
    """input > other, broadcast; a bool tensor."""
    result: Tensor = _gt(input, other)
    return result


def ge(input: Tensor, other: Operand) -> Tensor:
    """input >= other, broadcast; a bool tensor."""
    result: Tensor = _ge(input, other)
    return result


not_equal, less, less_equal, greater, greater_equal = ne, lt, le, gt, ge


# --- selection ------------------------------------------------------------------------------------


def _where_rule(name: str, types: Types) -> tuple[list[DType], list[DType]]:
    condition = types[0]
    if isinstance(condition, TensorType) and condition.dtype is not dtypes.bool_:
        raise DTypeError(
            f"{name}: the condition must be a bool tensor, got {condition.dtype.name}; "
            "compare it, as in `x != 0`"
        )
    common = common_dtype(types[1:])
    return [dtypes.bool_, common, common], [common]


def _where_samples() -> list[Sample]:
    def sample(*shapes: tuple[int, ...]) -> Sample:
        return Sample((Arg(shapes[0], kind="bool"), *(Arg(s) for s in shapes[1:])))

    return [sample((5, 7), (5, 7), (5, 7)), sample((), (), ()), sample((0, 3), (0, 3), (0, 3)),
            sample((3, 1, 5), (4, 1), (1,)), sample((2, 6), (), (6,))]  # fmt: skip


_where = elementwise(
    "where", values.select, inputs=("condition", "x", "y"), rule=_where_rule,
    vjp=(
        None,
        lambda g, condition: where(condition, g, 0),
        lambda g, condition: where(condition, 0, g),
    ),
    reference=np.where, samples=_where_samples(),
)  # fmt: skip


def where(condition: Tensor, input: Operand = None, other: Operand = None) -> Any:
    """``input`` where ``condition`` else ``other``, broadcast; tensors or numbers.

    condition: a bool tensor. Without ``input`` and ``other``: the indices of its true elements, one
    tensor for each dimension. Raises DTypeError for another condition.
    """
    if input is None and other is None:
        return condition.nonzero(as_tuple=True)
    if input is None or other is None:
        raise ArgumentError("where takes a condition alone, or a condition and two operands")
    return _where(condition, input, other)


_maximum = elementwise(
    "maximum", scalar_binary("max"), inputs=("x", "y"),
    vjp=(
        lambda g, x, y: where(x == y, g * 0.5, where(x < y, 0, g)),
        lambda g, x, y: where(x == y, g * 0.5, where(x > y, 0, g)),
    ),
    reference=np.maximum,
)  # fmt: skip

_minimum = elementwise(
    "minimum", scalar_binary("min"), inputs=("x", "y"),
    vjp=(
        lambda g, x, y: where(x == y, g * 0.5, where(x > y, 0, g)),
        lambda g, x, y: where(x == y, g * 0.5, where(x < y, 0, g)),
    ),
    reference=np.minimum,
)  # fmt: skip


def maximum(input: Tensor, other: Operand) -> Tensor:
    """The larger of two, broadcast; NaN where one of them is NaN."""
    result: Tensor = _maximum(input, other)
    return result


def minimum(input: Tensor, other: Operand) -> Tensor:
    """The smaller of two, broadcast; NaN where one of them is NaN."""
    result: Tensor = _minimum(input, other)
    return result


def _ignoring_nan(op: str) -> Callable[[Value, Value], Value]:
    def scalar(x: Value, y: Value) -> Value:
        chosen = values.binary(op, x, y)
        if x.dtype.kind != "f":
            return chosen
        chosen = values.select(values.unary("is_nan", y), x, chosen)
        return values.select(values.unary("is_nan", x), y, chosen)

    return scalar


# x != x holds for NaN alone
_fmax = elementwise(
    "fmax", _ignoring_nan("max"), inputs=("x", "y"),
    vjp=(
        lambda g, x, y: where((x >= y) | (y != y), g, 0),
        lambda g, x, y: where((x >= y) | (y != y), 0, g),
    ),
    reference=np.fmax,
)  # fmt: skip

_fmin = elementwise(
    "fmin", _ignoring_nan("min"), inputs=("x", "y"),
    vjp=(
        lambda g, x, y: where((x <= y) | (y != y), g, 0),
        lambda g, x, y: where((x <= y) | (y != y), 0, g),
    ),
    reference=np.fmin,
)  # fmt: skip


def fmax(input: Tensor, other: Operand) -> Tensor:
    """As `maximum`, but a number beats NaN."""
    result: Tensor = _fmax(input, other)
    return result


def fmin(input: Tensor, other: Operand) -> Tensor:
    """As `minimum`, but a number beats NaN."""
    result: Tensor = _fmin(input, other)
    return result


# --- clamp ----------------------------------------------------------------------------------------

_clamp = elementwise(
    "clamp",
    lambda x, low, high: values.binary("min", values.binary("max", x, low), high),
    inputs=("x", "low", "high"),
    vjp=(
        lambda g, x, low, high: where((x >= low) & (x <= high), g, 0),
        lambda g, x, low, high: where((low < high) & (x < low), g, 0),
        lambda g, x, low, high: where((low > high) | (x > high), g, 0),
    ),
    reference=lambda x, low, high: np.minimum(np.maximum(x, low), high),
)  # fmt: skip

_clamp_min = elementwise(
    "clamp_min", scalar_binary("max"), inputs=("x", "low"),
    vjp=(lambda g, x, low: where(x >= low, g, 0), lambda g, x, low: where(x < low, g, 0)),
    reference=np.maximum,
)  # fmt: skip

_clamp_max = elementwise(
    "clamp_max", scalar_binary("min"), inputs=("x", "high"),
    vjp=(lambda g, x, high: where(x <= high, g, 0), lambda g, x, high: where(x > high, g, 0)),
    reference=np.minimum,
)  # fmt: skip


def _bounded(input: Tensor, min: Operand, max: Operand) -> tuple[Elementwise, tuple[Operand, ...]]:
    """The op for the bounds that are given, and its operands."""
    if min is not None and max is not None:
        return _clamp, (input, min, max)
    if min is None and max is None:
        raise ArgumentError("clamp: give at least one of min and max")
    return (_clamp_max, (input, max)) if min is None else (_clamp_min, (input, min))


def clamp(input: Tensor, min: Operand = None, max: Operand = None) -> Tensor:
    """``input``, but at least ``min`` and at most ``max``; numbers or tensors, None for no bound.

    Where min > max the result is max. Raises ArgumentError where both bounds are missing.
    """
    op, operands = _bounded(input, min, max)
    result: Tensor = op(*operands)
    return result


clip = clamp


def clamp_min(input: Tensor, min: Operand) -> Tensor:
    """``input``, but at least ``min``."""
    return clamp(input, min)


def clamp_max(input: Tensor, max: Operand) -> Tensor:
    """``input``, but at most ``max``."""
    return clamp(input, None, max)


def _clamp_in_place(self: Tensor, min: Operand = None, max: Operand = None) -> Tensor:
    op, operands = _bounded(self, min, max)
    op.into((self,), *operands)
    return self


OPERATORS: Final[dict[str, Callable[..., Any]]] = {
    "clamp_": _clamp_in_place,
    "clip_": _clamp_in_place,
    "clamp_min_": lambda self, min: _clamp_in_place(self, min),
    "clamp_max_": lambda self, max: _clamp_in_place(self, None, max),
    "where": lambda self, condition, other: where(condition, self, other),
    "__eq__": lambda self, other: NotImplemented if other is None else _eq(self, other),
    "__ne__": lambda self, other: NotImplemented if other is None else _ne(self, other),
    "__lt__": lambda self, other: _lt(self, other),
    "__le__": lambda self, other: _le(self, other),
    "__gt__": lambda self, other: _gt(self, other),
    "__ge__": lambda self, other: _ge(self, other),
}
