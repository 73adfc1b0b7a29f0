"""Logic on truth values, and operations on the bits of integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import DTypeError
from flame.kernel import values
from flame.kernel.values import Value, compare, const, select
from flame.ops.elementwise import (
    Elementwise,
    common_dtype,
    elementwise,
    integral,
    scalar_binary,
    scalar_unary,
)  # fmt: skip
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Sample, Types

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "bitwise_and", "bitwise_left_shift", "bitwise_not", "bitwise_or", "bitwise_right_shift",
    "bitwise_xor", "logical_and", "logical_not", "logical_or", "logical_xor",
]  # fmt: skip
METHODS = tuple(__all__)
IN_PLACE = tuple(__all__)

Operand = Any  # a Tensor or a Python number


def _truth(name: str, types: Types) -> tuple[list[DType], list[DType]]:
    return [dtypes.bool_] * len(types), [dtypes.bool_]


def _any_samples(count: int) -> list[Sample]:
    shapes: list[list[tuple[int, ...]]] = [[(5, 7)] * count, [()] * count, [(0, 3)] * count,
                                           [(3, 1, 5), (4, 1)][:count]]  # fmt: skip
    return [Sample(tuple(Arg(s, kind="any") for s in each)) for each in shapes]


def _logical(name: str, op: str, reference: Callable[..., Any]) -> Elementwise:
    return elementwise(
        name, scalar_binary(op), inputs=("x", "y"), rule=_truth, vjp=NOT_DIFFERENTIABLE,
        reference=reference, samples=_any_samples(2),
    )  # fmt: skip


_logical_and = _logical("logical_and", "and", np.logical_and)
_logical_or = _logical("logical_or", "or", np.logical_or)
_logical_xor = _logical("logical_xor", "xor", np.logical_xor)
_logical_not = elementwise(
    "logical_not", scalar_unary("not"), rule=_truth, vjp=NOT_DIFFERENTIABLE,
    reference=np.logical_not, samples=_any_samples(1),
)  # fmt: skip


def _bitwise(name: str, op: str, reference: Callable[..., Any]) -> Elementwise:
    return elementwise(
        name, scalar_binary(op), inputs=("x", "y"), rule=integral, vjp=NOT_DIFFERENTIABLE,
        reference=reference,
    )  # fmt: skip


_bitwise_and = _bitwise("bitwise_and", "and", np.bitwise_and)
_bitwise_or = _bitwise("bitwise_or", "or", np.bitwise_or)
_bitwise_xor = _bitwise("bitwise_xor", "xor", np.bitwise_xor)
_bitwise_not = elementwise(
    "bitwise_not", scalar_unary("not"), rule=integral, vjp=NOT_DIFFERENTIABLE,
    reference=np.bitwise_not,
)  # fmt: skip


def _shift_rule(name: str, types: Types) -> tuple[list[DType], list[DType]]:
    common = common_dtype(types)
    if common.kind not in "iu":
        raise DTypeError(f"{name} takes integer tensors, got {common.name}")
    return [common] * 2, [common]


def _outside(amount: Value) -> Value:
    """Whether a shift by ``amount`` moves every bit out."""
    beyond = amount >= amount.dtype.bits
    return beyond if amount.dtype.kind == "u" else (amount < 0) | beyond


def _left(x: Value, amount: Value) -> Value:
    outside, zero = _outside(amount), const(0, x.dtype)
    return select(outside, zero, values.binary("shl", x, select(outside, zero, amount)))


def _right(x: Value, amount: Value) -> Value:
    outside, zero = _outside(amount), const(0, x.dtype)
    shifted = values.binary("shr", x, select(outside, zero, amount))
    emptied = (
        select(compare("lt", x, zero), const(-1, x.dtype), zero) if x.dtype.kind == "i" else zero
    )
    return select(outside, emptied, shifted)


def _shift_samples() -> list[Sample]:
    shapes: list[list[tuple[int, ...]]] = [
        [(5, 7)] * 2,
        [()] * 2,
        [(0, 3)] * 2,
        [(3, 1, 5), (4, 1)],
    ]
    return [Sample((Arg(a, 0, 9, kind="int"), Arg(b, 0, 4, kind="int"))) for a, b in shapes]


_left_shift = elementwise(
    "bitwise_left_shift", _left, inputs=("x", "amount"), rule=_shift_rule, vjp=NOT_DIFFERENTIABLE,
    reference=np.left_shift, samples=_shift_samples(),
)  # fmt: skip
_right_shift = elementwise(
    "bitwise_right_shift", _right, inputs=("x", "amount"), rule=_shift_rule, vjp=NOT_DIFFERENTIABLE,
    reference=np.right_shift, samples=_shift_samples(),
)  # fmt: skip


def logical_and(input: Tensor, other: Operand) -> Tensor:
    """Whether both are not 0, broadcast; a bool tensor."""
    result: Tensor = _logical_and(input, other)
    return result


def logical_or(input: Tensor, other: Operand) -> Tensor:
    """Whether one of them is not 0, broadcast; a bool tensor."""
    result: Tensor = _logical_or(input, other)
    return result


def logical_xor(input: Tensor, other: Operand) -> Tensor:
    """Whether exactly one of them is not 0, broadcast; a bool tensor."""
    result: Tensor = _logical_xor(input, other)
    return result


def logical_not(input: Tensor) -> Tensor:
    """Whether an element is 0; a bool tensor."""
    result: Tensor = _logical_not(input)
    return result


def bitwise_and(input: Operand, other: Operand) -> Tensor:
    """The bits set in both, broadcast. Integers and bool only."""
    result: Tensor = _bitwise_and(input, other)
    return result


def bitwise_or(input: Operand, other: Operand) -> Tensor:
    """The bits set in one of them, broadcast. Integers and bool only."""
    result: Tensor = _bitwise_or(input, other)
    return result


def bitwise_xor(input: Operand, other: Operand) -> Tensor:
    """The bits set in exactly one of them, broadcast. Integers and bool only."""
    result: Tensor = _bitwise_xor(input, other)
    return result


def bitwise_not(input: Tensor) -> Tensor:
    """Every bit flipped. Integers and bool only."""
    result: Tensor = _bitwise_not(input)
    return result


def bitwise_left_shift(input: Operand, other: Operand) -> Tensor:
    """input * 2**other in the dtype's bits; 0 where all bits move out. Integers only."""
    result: Tensor = _left_shift(input, other)
    return result


def bitwise_right_shift(input: Operand, other: Operand) -> Tensor:
    """input / 2**other, rounded down. Integers only."""
    result: Tensor = _right_shift(input, other)
    return result


def _in_place(op: Elementwise) -> Callable[..., Any]:
    def method(self: Tensor, other: Operand) -> Tensor:
        op.into((self,), self, other)
        return self

    return method


OPERATORS: Final[dict[str, Callable[..., Any]]] = {
    "__and__": lambda self, other: _bitwise_and(self, other),
    "__rand__": lambda self, other: _bitwise_and(other, self),
    "__or__": lambda self, other: _bitwise_or(self, other),
    "__ror__": lambda self, other: _bitwise_or(other, self),
    "__xor__": lambda self, other: _bitwise_xor(self, other),
    "__rxor__": lambda self, other: _bitwise_xor(other, self),
    "__invert__": lambda self: _bitwise_not(self),
    "__lshift__": lambda self, other: _left_shift(self, other),
    "__rlshift__": lambda self, other: _left_shift(other, self),
    "__rshift__": lambda self, other: _right_shift(self, other),
    "__rrshift__": lambda self, other: _right_shift(other, self),
    "__iand__": _in_place(_bitwise_and),
    "__ior__": _in_place(_bitwise_or),
    "__ixor__": _in_place(_bitwise_xor),
    "__ilshift__": _in_place(_left_shift),
    "__irshift__": _in_place(_right_shift),
}
