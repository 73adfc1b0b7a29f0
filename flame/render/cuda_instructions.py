"""The scalar instructions in CUDA C++.

Invariants: float16 and bfloat16 are formats of memory, computed on in float; max and min of floats
propagate NaN; integers wrap, and dividing them never traps; products of floats are never contracted
into fused multiply-adds, so that a value does not depend on what it stands beside (only the ``fma``
instruction is one); no function is of the fast, inexact kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Final

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import CompileError
from flame.kernel import values
from flame.kernel.values import Value
from flame.render.cuda_helpers import Helpers

C_TYPE: Final = {
    dtypes.float64: "double",
    dtypes.float32: "float",
    dtypes.float16: "__half",
    dtypes.bfloat16: "__nv_bfloat16",
    dtypes.int64: "long long",
    dtypes.int32: "int",
    dtypes.int16: "short",
    dtypes.int8: "signed char",
    dtypes.uint8: "unsigned char",
    dtypes.uint32: "unsigned",
    dtypes.uint64: "unsigned long long",
    dtypes.bool_: "bool",
}
HALF_WIDTH: Final = (dtypes.float16, dtypes.bfloat16)

_UNSIGNED: Final = {
    dtypes.int64: "unsigned long long",
    dtypes.uint64: "unsigned long long",
    dtypes.int32: "unsigned",
    dtypes.uint32: "unsigned",
}
_FLOAT_FUNCTIONS: Final = {
    "sqrt": "sqrt", "floor": "floor", "ceil": "ceil", "trunc": "trunc", "round": "rint",
    "abs": "fabs", "exp": "exp", "exp2": "exp2", "expm1": "expm1", "log": "log", "log2": "log2",
    "log10": "log10", "log1p": "log1p", "sin": "sin", "cos": "cos", "tan": "tan", "asin": "asin",
    "acos": "acos", "atan": "atan", "sinh": "sinh", "cosh": "cosh", "tanh": "tanh", "erf": "erf",
    "pow": "pow", "atan2": "atan2", "copysign": "copysign", "fma": "fma",
}  # fmt: skip
_COMPARE: Final = {"lt": "<", "le": "<=", "eq": "==", "ne": "!=", "gt": ">", "ge": ">="}
_FLOAT_SIGNS: Final = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_INTEGER_SIGNS: Final = {
    "add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^", "shl": "<<",
    "udiv": "/", "urem": "%",
}  # fmt: skip
_BOOL_SIGNS: Final = {"add": "|", "or": "|", "max": "|", "mul": "&", "and": "&", "min": "&"}
_HIGH_PRODUCTS: Final = {
    dtypes.int32: "__mulhi",
    dtypes.int64: "__mul64hi",
    dtypes.uint64: "__umul64hi",
}
_SAME_BITS: Final = {
    ("float32", "int32"): "__float_as_int({0})",
    ("float32", "uint32"): "__float_as_uint({0})",
    ("int32", "float32"): "__int_as_float({0})",
    ("uint32", "float32"): "__uint_as_float({0})",
    ("float64", "int64"): "__double_as_longlong({0})",
    ("float64", "uint64"): "(unsigned long long)__double_as_longlong({0})",
    ("int64", "float64"): "__longlong_as_double({0})",
    ("uint64", "float64"): "__longlong_as_double((long long){0})",
    ("float16", "int16"): "__half_as_short({0})",
    ("int16", "float16"): "__short_as_half({0})",
    ("bfloat16", "int16"): "__bfloat16_as_short({0})",
    ("int16", "bfloat16"): "__short_as_bfloat16({0})",
    ("float16", "bfloat16"): "__short_as_bfloat16(__half_as_short({0}))",
    ("bfloat16", "float16"): "__short_as_half(__bfloat16_as_short({0}))",
}


def memory_type(dtype: DType) -> str:
    return "unsigned char" if dtype is dtypes.bool_ else C_TYPE[dtype]


def literal(number: values.Number, dtype: DType) -> str:
    """A constant of ``dtype``."""
    if dtype.kind == "f":
        return _floating_literal(float(number), dtype)
    if dtype.kind == "b":
        return "true" if number else "false"
    suffix = {dtypes.int64: "LL", dtypes.uint64: "ULL", dtypes.uint32: "u"}.get(dtype, "")
    if dtype.kind == "i" and number == values.integer_range(dtype)[0] and dtype.bits >= 32:
        return f"({int(number) + 1}{suffix} - 1)"
    return f"{int(number)}{suffix}"


def _floating_literal(number: float, dtype: DType) -> str:
    if dtype in HALF_WIDTH:
        exact = float(np.asarray(number).astype(dtype.numpy))
        return narrowed(_floating_literal(exact, dtypes.float32), dtype)
    if dtype is dtypes.float64:
        if math.isfinite(number):
            return repr(number)
        bits = int(np.float64(number).view(np.uint64))
        return f"__longlong_as_double((long long)0x{bits:016x}ULL)"
    with np.errstate(over="ignore"):
        single = np.float32(number)
    if np.isfinite(single):
        return f"{single!s}f"
    return f"__uint_as_float(0x{int(single.view(np.uint32)):08x}u)"


def widened(x: str, dtype: DType) -> str:
    """A half-width float as float."""
    return f"__half2float({x})" if dtype is dtypes.float16 else f"__bfloat162float({x})"


def narrowed(x: str, dtype: DType) -> str:
    """A float rounded to a half-width dtype, to nearest even."""
    name = "__float2half_rn" if dtype is dtypes.float16 else "__float2bfloat16_rn"
    return f"{name}({bare(x)})"


def from_memory(x: str, dtype: DType) -> str:
    return f"({x} != 0)" if dtype is dtypes.bool_ else x


def instruction(helpers: Helpers, value: Value, args: Sequence[str], *, exact: bool) -> str:
    """The expression of an instruction on those of its operands.

    exact: whether a product must be kept from contraction, as a sum is taken of it.
    """
    op, dtype, operand = value.op, value.dtype, value.args[0].dtype
    if op == "cast":
        return cast(helpers, operand, dtype, args[0])
    if op == "bitcast":
        return _bitcast(operand, dtype, args[0])
    if op == "select":
        return f"{args[0]} ? {args[1]} : {args[2]}"
    if operand in HALF_WIDTH:
        wide = [widened(x, operand) for x in args]
        made = _of_float(helpers, op, value, dtypes.float32, wide, exact)
        return narrowed(made, dtype) if dtype in HALF_WIDTH else made
    if op == "libm":
        name = value.attr if dtype is dtypes.float64 else f"{value.attr}f"
        return f"{args[1]} ? {name}({bare(args[0])}) : {literal(0, dtype)}"
    if operand.kind == "f":
        return _of_float(helpers, op, value, operand, args, exact)
    if op in _COMPARE:
        return f"{args[0]} {_COMPARE[op]} {args[1]}"
    if len(args) == 1:
        return _integer_unary(op, operand, args[0])
    return binary(helpers, op, operand, args[0], args[1])


def _of_float(
    helpers: Helpers, op: str, value: Value, dtype: DType, args: Sequence[str], exact: bool
) -> str:
    double = dtype is dtypes.float64
    suffix = "" if double else "f"
    if op in _COMPARE:
        return f"{args[0]} {_COMPARE[op]} {args[1]}"
    if op == "is_nan":
        return f"{args[0]} != {args[0]}"
    if op == "neg":
        return f"-{_signless(args[0])}"
    if op == "reciprocal":
        return f"{literal(1, dtype)} / {args[0]}"
    if op == "rsqrt":
        return f"{literal(1, dtype)} / sqrt{suffix}({bare(args[0])})"
    if op == "mul" and exact:
        return product(dtype, *args)
    if len(args) == 2:
        short = _constant_power(value, args) if op == "pow" else None
        return short or binary(helpers, op, dtype, args[0], args[1])
    return f"{_FLOAT_FUNCTIONS[op]}{suffix}({', '.join(map(bare, args))})"


def product(dtype: DType, a: str, b: str) -> str:
    """A product of floats that no sum is joined with."""
    name = "__dmul_rn" if dtype is dtypes.float64 else "__fmul_rn"
    return f"{name}({bare(a)}, {bare(b)})"


def _constant_power(value: Value, args: Sequence[str]) -> str | None:
    """Exponents for which multiplications are exact enough, and much faster."""
    base, exponent = value.args
    if exponent.op != "const" or base.dtype in HALF_WIDTH:
        return None
    x, suffix = args[0], "" if base.dtype is dtypes.float64 else "f"
    square = product(base.dtype, x, x)
    return {
        0.0: literal(1, base.dtype),
        1.0: x,
        2.0: square,
        3.0: product(base.dtype, square, x),
        -1.0: f"{literal(1, base.dtype)} / {x}",
        -2.0: f"{literal(1, base.dtype)} / {square}",
        -0.5: f"{literal(1, base.dtype)} / sqrt{suffix}({bare(x)})",
    }.get(float(values.number_of(exponent)))


def _integer_unary(op: str, dtype: DType, x: str) -> str:
    if op == "not":
        return f"!{x}" if dtype.kind == "b" else _converted(dtype, f"~{x}")
    if op == "neg":
        return _wrapping(dtype, "-", "0", x)
    if op == "abs":
        return x if dtype.kind == "u" else f"{x} < 0 ? {_wrapping(dtype, '-', '0', x)} : {x}"
    raise CompileError(f"{op} of {dtype.name} has no form in CUDA C++")


def binary(helpers: Helpers, op: str, dtype: DType, a: str, b: str) -> str:
    """A two-operand instruction on values of float32, float64, an integer dtype, or bool."""
    if dtype.kind == "f":
        if op in _FLOAT_SIGNS:
            return f"{a} {_FLOAT_SIGNS[op]} {b}"
        if op in ("max", "min"):
            return f"{helpers.extreme(op, C_TYPE[dtype])}({bare(a)}, {bare(b)})"
        suffix = "" if dtype is dtypes.float64 else "f"
        return f"{_FLOAT_FUNCTIONS[op]}{suffix}({bare(a)}, {bare(b)})"
    if dtype.kind == "b":
        return f"{a} != {b}" if op == "xor" else f"{a} {_BOOL_SIGNS[op]} {b}"
    type_ = C_TYPE[dtype]
    if dtype is dtypes.uint32 and op in ("mul", "mulhi"):
        return f"{helpers.product_half(high=op == 'mulhi')}({bare(a)}, {bare(b)})"
    if op in _INTEGER_SIGNS:
        return _wrapping(dtype, _INTEGER_SIGNS[op], a, b)
    if op in ("max", "min"):
        return f"{a} {'>' if op == 'max' else '<'} {b} ? {a} : {b}"
    if op == "shr":
        return _converted(dtype, f"({a} >> {b})" if dtype.bits < 32 else f"{a} >> {b}")
    if op == "mulhi":
        return _high_product(dtype, a, b)
    if op == "pow":
        return f"{helpers.power(type_, signed=dtype.kind == 'i')}({bare(a)}, {bare(b)})"
    if op in ("floordiv", "mod"):
        return f"{helpers.division(op, type_, signed=dtype.kind == 'i')}({bare(a)}, {bare(b)})"
    raise CompileError(f"{op} of {dtype.name} has no form in CUDA C++")


def _wrapping(dtype: DType, sign: str, a: str, b: str) -> str:
    """Unsigned arithmetic, converted back: signed overflow has no meaning in C++."""
    unsigned = _UNSIGNED.get(dtype)
    if unsigned is None:  # narrow ones are computed as int
        if sign in ("/", "%"):
            narrow = C_TYPE[dtype].replace("signed ", "").replace("un", "")
            a, b = f"(unsigned {narrow}){a}", f"(unsigned {narrow}){b}"
        return _converted(dtype, f"({a} {sign} {b})")
    if dtype.kind == "u":
        return f"{a} {sign} {b}"
    return f"({C_TYPE[dtype]})(({unsigned}){a} {sign} ({unsigned}){b})"


def _converted(dtype: DType, x: str) -> str:
    """``x``, computed as int or wider, as ``dtype``."""
    return x if dtype.bits >= 32 else f"({C_TYPE[dtype]}){x}"


def _high_product(dtype: DType, a: str, b: str) -> str:
    name = _HIGH_PRODUCTS.get(dtype)
    if name is not None:
        return f"{name}({bare(a)}, {bare(b)})"
    return f"({C_TYPE[dtype]})(({a} * {b}) >> {dtype.bits})"


def cast(helpers: Helpers, source: DType, target: DType, x: str) -> str:
    """Conversion by value, as `flame.kernel.values.cast` says; half-width floats through float."""
    if source is target:
        return x
    if source in HALF_WIDTH:
        return cast(helpers, dtypes.float32, target, widened(bare(x), source))
    if target in HALF_WIDTH:
        return narrowed(cast(helpers, source, dtypes.float32, x), target)
    if target.kind == "b":
        return f"{x} != {literal(0, source)}" if source.kind == "f" else f"{x} != 0"
    if source.kind == "f" and target.kind != "f":
        wide = target.bits == 64 or target is dtypes.uint32
        whole = f"{helpers.truncation(C_TYPE[source], wide=wide)}({bare(x)})"
        return whole if target in (dtypes.int32, dtypes.int64) else f"({C_TYPE[target]}){whole}"
    return f"({C_TYPE[target]}){x}"


def _bitcast(source: DType, target: DType, x: str) -> str:
    pattern = _SAME_BITS.get((source.name, target.name))
    if pattern is not None:
        return pattern.format(bare(x))
    if "f" in (source.kind, target.kind):
        raise CompileError(f"bitcast from {source.name} to {target.name} has no form in CUDA C++")
    return f"({C_TYPE[target]}){x}"


def _signless(x: str) -> str:
    return f"({x})" if x.startswith("-") else x


def bare(x: str) -> str:
    """An expression without the parentheses around all of it."""
    if not (x.startswith("(") and x.endswith(")")):
        return x
    depth = 0
    for at, character in enumerate(x):
        depth += (character == "(") - (character == ")")
        if depth == 0 and at < len(x) - 1:
            return x
    return x[1:-1]


def is_atom(x: str) -> bool:
    """Whether an expression needs no parentheses inside another one: a name, a call, a cast."""
    return re.fullmatch(r"[\w.]+(\(.*\))?", x) is not None and _closes_last(x)


def _closes_last(x: str) -> bool:
    """Whether the first parenthesis is closed by the last character."""
    return "(" not in x or bare(x[x.index("(") :]) != x[x.index("(") :]
