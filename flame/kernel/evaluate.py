"""Scalar values computed by NumPy: what an expression means, as an oracle for kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from flame.core.errors import CompileError
from flame.kernel.values import Value, number_of

Array = np.ndarray[Any, Any]


def _by_element(function: Callable[[float], float]) -> Callable[[Any], Any]:
    return np.vectorize(function, otypes=[np.float64])


def _power(a: Array, b: Array) -> Any:
    if a.dtype.kind in "iu":  # a negative power of a whole number is 0 but for 1 and -1
        whole = np.power(a, np.maximum(b, 0))
        odd = np.where(b % 2 == 0, 1, a)
        return np.where(b >= 0, whole, np.where(a == 1, 1, np.where(a == -1, odd, 0)))
    return np.power(a, b)


def _high_product(a: Array, b: Array) -> Any:
    width = a.dtype.itemsize * 8
    product = a.astype(object) * b.astype(object)
    return np.asarray(product >> width).astype(a.dtype)


UNARY: Final[dict[str, Callable[[Any], Any]]] = {
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "floor": np.floor, "ceil": np.ceil,
    "trunc": np.trunc, "round": np.rint, "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1,
    "log": np.log, "log2": np.log2, "log10": np.log10, "log1p": np.log1p, "sin": np.sin,
    "cos": np.cos, "tan": np.tan, "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan,
    "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh, "erf": _by_element(math.erf),
    "reciprocal": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x), "is_nan": np.isnan,
    "not": np.invert,
}  # fmt: skip
BINARY: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.true_divide,
    "floordiv": np.floor_divide, "mod": np.mod, "max": np.maximum, "min": np.minimum,
    "pow": _power, "atan2": np.arctan2, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "shl": np.left_shift, "shr": np.right_shift, "mulhi": _high_product,
    "copysign": np.copysign, "udiv": np.floor_divide, "urem": np.mod, "lt": np.less,
    "le": np.less_equal, "eq": np.equal, "ne": np.not_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip


def evaluate(results: Sequence[Value], leaves: Mapping[Value, Any]) -> list[Any]:
    """The values for ``leaves``: numbers or arrays that broadcast, one for each parameter.

    Every instruction rounds to its dtype. Raises CompileError for a leaf that is not given, and
    for what only a kernel has: loops and memory.
    """
    known: dict[Value, Any] = {}
    for leaf, number in leaves.items():
        known[leaf] = np.asarray(number).astype(leaf.dtype.numpy)
    waiting = list(results)
    with np.errstate(all="ignore"):
        while waiting:
            value = waiting[-1]
            missing = [arg for arg in value.args if arg not in known]
            if value in known or missing:
                waiting += missing
                if value in known:
                    waiting.pop()
                continue
            waiting.pop()
            made = _compute(value, [known[arg] for arg in value.args])
            known[value] = np.asarray(made).astype(value.dtype.numpy)
    return [known[r] for r in results]


def _compute(value: Value, args: list[Any]) -> Any:
    op = value.op
    if op == "const":
        return number_of(value)
    if op in UNARY:
        return UNARY[op](*args)
    if op in BINARY:
        return BINARY[op](*args)
    if op == "select":
        return np.where(*args)
    if op == "fma":
        return args[0] * args[1] + args[2]
    if op == "cast":
        return args[0] != 0 if value.dtype.kind == "b" else args[0]
    if op == "bitcast":
        return args[0].view(value.dtype.numpy)
    if op == "libm":
        return np.where(args[1], UNARY[value.attr](args[0]), 0)
    raise CompileError(f"{value!r} has no value outside a kernel")
