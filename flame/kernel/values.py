"""Scalar values: the closed set of instructions that a renderer must know.

Grammar (every value has a dtype; index arithmetic is int64 values like any other):

    value ::= const(number) | param(name) | var(name) | read(register) | load(buffer, index [,
    where])
            | unary(value) | binary(value, value) | ternary(value, value, value) | cast(value)

Invariant: values are immutable and interned while alive, so common subexpressions are one object;
the smart constructors below fold constants and identities, so no renderer needs to.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import CompileError

Number = bool | int | float

# name -> kinds of operand accepted: f floating, i signed or unsigned integer, b bool
UNARY: Final = {
    "neg": "fi",
    "abs": "fi",
    "not": "bi",
    "sqrt": "f",
    "floor": "f",
    "ceil": "f",
    "trunc": "f",
    "round": "f",
    "exp": "f",
    "exp2": "f",
    "expm1": "f",
    "log": "f",
    "log2": "f",
    "log10": "f",
    "log1p": "f",
    "sin": "f",
    "cos": "f",
    "tan": "f",
    "asin": "f",
    "acos": "f",
    "atan": "f",
    "sinh": "f",
    "cosh": "f",
    "tanh": "f",
    "erf": "f",
    "reciprocal": "f",
    "rsqrt": "f",
    "is_nan": "f",
}
BINARY: Final = {
    "add": "fi",
    "sub": "fi",
    "mul": "fi",
    "div": "f",
    "floordiv": "i",
    "mod": "i",
    "max": "fib",
    "min": "fib",
    "pow": "fi",
    "atan2": "f",
    "and": "bi",
    "or": "bi",
    "xor": "bi",
    "shl": "i",
    "shr": "i",
    "mulhi": "i",
    "copysign": "f",
    "udiv": "i",
    "urem": "i",  # of numbers known not to be negative; the divisor not 0
}
COMPARE: Final = ("lt", "le", "eq", "ne", "gt", "ge")
TERNARY: Final = ("select", "fma")
LEAVES: Final = ("const", "param", "var", "read", "load")


@dataclass(frozen=True, eq=False)
class Buffer:
    """A memory operand of a kernel; addressed in elements of ``dtype`` from its base pointer."""

    name: str
    dtype: DType
    written: bool = False


@dataclass(frozen=True, eq=False)
class Register:
    """A mutable scalar: what a loop carries from one iteration to the next."""

    name: str
    dtype: DType


class Value:
    """One scalar instruction and its operands; arithmetic operators build new values."""

    __slots__ = ("__weakref__", "args", "attr", "dtype", "op")

    op: str
    dtype: DType
    args: tuple[Value, ...]
    attr: Any

    def __repr__(self) -> str:
        return render(self)

    def __bool__(self) -> bool:
        raise CompileError(
            "a scalar value inside a kernel has no truth value; use where(condition, a, b)"
        )

    # Operators accept Python numbers, taken in the dtype of the value beside them.
    def __add__(self, other: Any) -> Value:
        return binary("add", *promoted(self, other))

    def __radd__(self, other: Any) -> Value:
        return binary("add", *promoted(other, self))

    def __sub__(self, other: Any) -> Value:
        return binary("sub", *promoted(self, other))

    def __rsub__(self, other: Any) -> Value:
        return binary("sub", *promoted(other, self))

    def __mul__(self, other: Any) -> Value:
        return binary("mul", *promoted(self, other))

    def __rmul__(self, other: Any) -> Value:
        return binary("mul", *promoted(other, self))

    def __truediv__(self, other: Any) -> Value:
        return binary("div", *floated(*promoted(self, other)))

    def __rtruediv__(self, other: Any) -> Value:
        return binary("div", *floated(*promoted(other, self)))

    def __floordiv__(self, other: Any) -> Value:
        return binary("floordiv", *promoted(self, other))

    def __mod__(self, other: Any) -> Value:
        return binary("mod", *promoted(self, other))

    def __pow__(self, other: Any) -> Value:
        return binary("pow", *promoted(self, other))

    def __rpow__(self, other: Any) -> Value:
        return binary("pow", *promoted(other, self))

    def __and__(self, other: Any) -> Value:
        return binary("and", *promoted(self, other))

    def __or__(self, other: Any) -> Value:
        return binary("or", *promoted(self, other))

    def __xor__(self, other: Any) -> Value:
        return binary("xor", *promoted(self, other))

    def __lshift__(self, other: Any) -> Value:
        return binary("shl", *promoted(self, other))

    def __rshift__(self, other: Any) -> Value:
        return binary("shr", *promoted(self, other))

    def __neg__(self) -> Value:
        return unary("neg", self)

    def __abs__(self) -> Value:
        return unary("abs", self)

    def __invert__(self) -> Value:
        return unary("not", self)

    def __lt__(self, other: Any) -> Value:
        return compare("lt", *promoted(self, other))

    def __le__(self, other: Any) -> Value:
        return compare("le", *promoted(self, other))

    def __gt__(self, other: Any) -> Value:
        return compare("gt", *promoted(self, other))

    def __ge__(self, other: Any) -> Value:
        return compare("ge", *promoted(self, other))

    def __eq__(self, other: Any) -> Any:
        return compare("eq", *promoted(self, other))

    def __ne__(self, other: Any) -> Any:
        return compare("ne", *promoted(self, other))

    __hash__ = object.__hash__  # by identity: equal values are one object


_interned: weakref.WeakValueDictionary[Any, Value] = weakref.WeakValueDictionary()


def _make(op: str, dtype: DType, args: tuple[Value, ...] = (), attr: Any = None) -> Value:
    key = (op, dtype, tuple(map(id, args)), attr)
    found = _interned.get(key)
    if found is not None:
        return found
    value = Value.__new__(Value)
    value.op, value.dtype, value.args, value.attr = op, dtype, args, attr
    _interned[key] = value
    return value


# --- leaves ---------------------------------------------------------------------------------------


def const(number: Number, dtype: DType = dtypes.int64) -> Value:
    """A literal of ``dtype``."""
    if dtype.kind == "f":
        exact = float(number)
        # the key is by bits: -0.0 is not 0.0, and NaN equals itself
        return _make("const", dtype, attr=_Literal(exact))
    if dtype.kind == "b":
        return _make("const", dtype, attr=_Literal(bool(number)))
    low, high = integer_range(dtype)
    whole = int(number)
    if not low <= whole <= high:
        whole = (whole - low) % (high - low + 1) + low
    return _make("const", dtype, attr=_Literal(whole))


class _Literal:
    """A number that compares by type and bits."""

    __slots__ = ("key", "number")

    def __init__(self, number: Number) -> None:
        self.number = number
        self.key = (type(number), number.hex() if isinstance(number, float) else number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Literal) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def integer_range(dtype: DType) -> tuple[int, int]:
    """Smallest and largest value of an integer dtype."""
    if dtype.kind == "u":
        return 0, (1 << dtype.bits) - 1
    return -(1 << (dtype.bits - 1)), (1 << (dtype.bits - 1)) - 1


def param(name: str, dtype: DType = dtypes.int64) -> Value:
    """A scalar argument of the kernel: int64, or float64 (numbers travel as doubles)."""
    return _make("param", dtype, attr=name)


def var(name: str) -> Value:
    """The counter of the loop of this name."""
    return _make("var", dtypes.int64, attr=name)


def read(register: Register) -> Value:
    return _make("read", register.dtype, attr=register)


def load(
    buffer: Buffer, index: Value, where: Value | None = None, otherwise: Value | None = None
) -> Value:
    """``buffer[index]``; where ``where`` is false, nothing is touched and ``otherwise`` (0) is
    given.
    """
    if where is None or is_const(where, True):
        return _make("load", buffer.dtype, (index,), buffer)
    if otherwise is None:
        otherwise = const(0, buffer.dtype)
    return _make("load", buffer.dtype, (index, where, otherwise), buffer)


# --- instructions ---------------------------------------------------------------------------------


def is_const(value: Value, number: Number | None = None) -> bool:
    if value.op != "const":
        return False
    return number is None or bool(value.attr.number == number)


def number_of(value: Value) -> Number:
    """The number of a constant."""
    found: Number = value.attr.number
    return found


def promoted(a: Any, b: Any) -> tuple[Value, Value]:
    """Both as values of one dtype; a Python number takes the dtype of the value beside it."""
    if not isinstance(a, Value):
        a = const(a, _dtype_beside(a, b))
    elif not isinstance(b, Value):
        b = const(b, _dtype_beside(b, a))
    common = dtypes.promote_types(a.dtype, b.dtype)
    return cast(a, common), cast(b, common)


def _dtype_beside(number: Number, value: Value) -> DType:
    if isinstance(number, float) and value.dtype.kind != "f":
        return dtypes.float32
    if isinstance(number, int) and not isinstance(number, bool) and value.dtype.kind == "b":
        return dtypes.int64
    return value.dtype


def floated(*args: Value) -> tuple[Value, ...]:
    """Integers as float32, the rest unchanged."""
    return tuple(a if a.dtype.kind == "f" else cast(a, dtypes.float32) for a in args)


def _check(op: str, kinds: str, *args: Value) -> None:
    first = args[0].dtype
    for arg in args:
        kind = "i" if arg.dtype.kind == "u" else arg.dtype.kind
        if arg.dtype is not first or kind not in kinds:
            raise CompileError(f"{op} cannot take ({', '.join(a.dtype.name for a in args)})")


def unary(op: str, x: Value) -> Value:
    _check(op, UNARY[op], x)
    if op == "is_nan":
        return _make(op, dtypes.bool_, (x,))
    if x.op == "const":
        folded = _fold_unary(op, number_of(x))
        if folded is not None:
            return const(folded, x.dtype)
    if op in ("neg", "not") and x.op == op:
        return x.args[0]
    return _make(op, x.dtype, (x,))


_FOLD_UNARY: Final[dict[str, Callable[[Any], Number]]] = {
    "neg": lambda x: -x,
    "abs": abs,
    "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan,
}


def _fold_unary(op: str, number: Number) -> Number | None:
    if op == "not":
        return (not number) if isinstance(number, bool) else ~int(number)
    fold = _FOLD_UNARY.get(op)
    return None if fold is None else fold(number)


def binary(op: str, a: Value, b: Value) -> Value:
    _check(op, BINARY[op], a, b)
    simpler = _simplify_binary(op, a, b)
    return _make(op, a.dtype, (a, b)) if simpler is None else simpler


_FOLD_INTEGER: Final[dict[str, Callable[[Any, Any], Number]]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "max": max,
    "min": min,
}
_IDENTITY: Final = {
    "add": 0,
    "sub": 0,
    "mul": 1,
    "div": 1,
    "floordiv": 1,
    "udiv": 1,
    "shl": 0,
    "shr": 0,
}


def _simplify_binary(op: str, a: Value, b: Value) -> Value | None:
    whole = a.dtype.kind in "iu"
    if a.op == "const" and b.op == "const" and op in _FOLD_INTEGER:
        result = _FOLD_INTEGER[op](number_of(a), number_of(b))
        if whole or (math.isfinite(result) and op in ("add", "sub", "mul") and a.dtype.bits == 64):
            return const(result, a.dtype)
    # x + 0 keeps x for floats too, but for x = -0.0, which no caller of an index or a sum can tell
    if b.op == "const" and op in _IDENTITY and number_of(b) == _IDENTITY[op]:
        return a
    if a.op == "const" and op in ("add", "mul") and number_of(a) == _IDENTITY[op]:
        return b
    if whole and op == "mul" and (is_const(a, 0) or is_const(b, 0)):
        return const(0, a.dtype)
    if whole and op in ("mod", "urem") and is_const(b, 1):
        return const(0, a.dtype)
    if op == "and" and a.dtype.kind == "b":
        if is_const(a, True) or is_const(b, False):
            return b
        if is_const(b, True) or is_const(a, False):
            return a
    return None


def compare(op: str, a: Value, b: Value) -> Value:
    _check(op, "fib", a, b)
    return _make(op, dtypes.bool_, (a, b))


def select(condition: Value, a: Any, b: Any) -> Value:
    """``a`` where ``condition`` else ``b``."""
    first, second = promoted(a, b)
    if condition.dtype is not dtypes.bool_:
        condition = compare("ne", *promoted(condition, 0))
    if condition.op == "const":
        return first if number_of(condition) else second
    if first is second:
        return first
    return _make("select", first.dtype, (condition, first, second))


def fma(a: Value, b: Value, c: Value) -> Value:
    """a * b + c with one rounding."""
    _check("fma", "f", a, b, c)
    return _make("fma", a.dtype, (a, b, c))


def cast(value: Value, dtype: DType) -> Value:
    """Conversion by value: floats to integers truncate, anything to bool tests for non-zero."""
    if value.dtype is dtype:
        return value
    if value.op == "const":
        number = number_of(value)
        if dtype.kind in "fb" or math.isfinite(number):
            if dtype.kind == "f" and value.dtype.kind == "f" and dtype.bits < value.dtype.bits:
                number = float(np.asarray(number).astype(dtype.numpy))
            return const(number, dtype)
    return _make("cast", dtype, (value,))


def bitcast(value: Value, dtype: DType) -> Value:
    """The same bits seen as another dtype of equal width."""
    if value.dtype is dtype:
        return value
    if value.dtype.bits != dtype.bits:
        raise CompileError(f"bitcast from {value.dtype} to {dtype} changes the width")
    return _make("bitcast", dtype, (value,))


def libm(name: str, x: Value, where: Value) -> Value:
    """The C library's ``name`` of x in the lanes where ``where`` holds, 0 elsewhere: a rare, slow
    branch.
    """
    return _make("libm", x.dtype, (x, where), name)


# --- reading values -------------------------------------------------------------------------------


def render(value: Value) -> str:
    """Readable text of a value."""
    if value.op == "const":
        return repr(number_of(value))
    if value.op in ("param", "var"):
        return str(value.attr)
    if value.op == "read":
        return f"%{value.attr.name}"
    if value.op == "load":
        mask = f" where {value.args[1]!r} else {value.args[2]!r}" if len(value.args) > 1 else ""
        return f"{value.attr.name}[{value.args[0]!r}{mask}]"
    name = f"{value.op}.{value.dtype.name}" if value.op in ("cast", "bitcast") else value.op
    name = f"libm.{value.attr}" if value.op == "libm" else name
    return f"{name}({', '.join(map(repr, value.args))})"


def linear(value: Value, name: str) -> tuple[Value, Value] | None:
    """(slope, rest) with value = slope * var(name) + rest, neither depending on the var; None if
    not linear.
    """
    if not depends(value, name):
        return const(0), value
    if value.op == "var":
        return const(1), const(0)
    if value.op in ("add", "sub", "mul") and value.dtype is dtypes.int64:
        left, right = linear(value.args[0], name), linear(value.args[1], name)
        if left is None or right is None:
            return None
        if value.op == "add":
            return left[0] + right[0], left[1] + right[1]
        if value.op == "sub":
            return left[0] - right[0], left[1] - right[1]
        if is_const(left[0], 0):
            return left[1] * right[0], left[1] * right[1]
        if is_const(right[0], 0):
            return left[0] * right[1], left[1] * right[1]
    return None


def depends(value: Value, name: str) -> bool:
    """Whether a value mentions the loop counter ``name``."""
    if value.op == "var":
        return bool(value.attr == name)
    return any(depends(arg, name) for arg in value.args)
