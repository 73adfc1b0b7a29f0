"""Arithmetic with broadcasting: add, sub, mul, div and their kin."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flame.ops.elementwise import Elementwise, elementwise, no_bool, scalar_binary, scalar_unary, to_float

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["add", "mul", "neg", "sub", "true_divide"]
METHODS = ("add", "sub", "mul", "neg")

Operand = Any  # a Tensor or a Python number

_add = elementwise(
    "add", scalar_binary("add"), inputs=("x", "y"),
    vjp=(lambda g: g, lambda g: g),
    reference=np.add,
)  # fmt: skip

_sub = elementwise(
    "sub", scalar_binary("sub"), inputs=("x", "y"), rule=no_bool,
    vjp=(lambda g: g, lambda g: -g),
    reference=np.subtract,
)  # fmt: skip

_mul = elementwise(
    "mul", scalar_binary("mul"), inputs=("x", "y"),
    vjp=(lambda g, y: g * y, lambda g, x: g * x),
    reference=np.multiply,
)  # fmt: skip

_div = elementwise(
    "div", scalar_binary("div"), inputs=("x", "y"), rule=to_float,
    vjp=(lambda g, y: g / y, lambda g, out, y: -g * out / y),
    reference=np.true_divide, domain=(0.5, 3.0),
)  # fmt: skip

neg = elementwise(
    "neg", scalar_unary("neg"), rule=no_bool,
    vjp=(lambda g: -g,),
    reference=np.negative,
)  # fmt: skip


def _scaled(other: Operand, alpha: Any) -> Operand:
    return other if alpha == 1 else _mul(other, alpha)


def add(input: Tensor, other: Operand, *, alpha: float = 1) -> Tensor:
    """input + alpha * other, broadcast. Raises ShapeError where the shapes do not fit."""
    result: Tensor = _add(input, other if alpha == 1 else _scaled(other, alpha))
    return result


def sub(input: Tensor, other: Operand, *, alpha: float = 1) -> Tensor:
    """input - alpha * other, broadcast."""
    result: Tensor = _sub(input, other if alpha == 1 else _scaled(other, alpha))
    return result


def mul(input: Tensor, other: Operand) -> Tensor:
    """input * other, broadcast."""
    result: Tensor = _mul(input, other)
    return result


def true_divide(input: Tensor, other: Operand) -> Tensor:
    """input / other, broadcast; integers give floats."""
    result: Tensor = _div(input, other)
    return result




def _in_place(op: Elementwise) -> Callable[..., Any]:
    def method(self: Tensor, other: Operand, *, alpha: float = 1) -> Tensor:
        op.into((self,), self, other if alpha == 1 else _scaled(other, alpha))
        return self

    return method


OPERATORS: Final[dict[str, Callable[..., Any]]] = {
    "__add__": lambda self, other: _add(self, other),
    "__radd__": lambda self, other: _add(other, self),
    "__sub__": lambda self, other: _sub(self, other),
    "__rsub__": lambda self, other: _sub(other, self),
    "__mul__": lambda self, other: _mul(self, other),
    "__rmul__": lambda self, other: _mul(other, self),
    "__truediv__": lambda self, other: _div(self, other),
    "__rtruediv__": lambda self, other: _div(other, self),
    "__neg__": lambda self: neg(self),
    "add_": _in_place(_add),
    "sub_": _in_place(_sub),
    "mul_": _in_place(_mul),
    "div_": _in_place(_div),
}
