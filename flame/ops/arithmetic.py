"""Arithmetic with broadcasting: add, sub, mul, div and their kin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flame.kernel import values
from flame.ops.elementwise import elementwise, no_bool, scalar_binary, scalar_unary, to_float

if TYPE_CHECKING:
    from flame.tensor import Tensor

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


