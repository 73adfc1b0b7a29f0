"""The basic instructions in LLVM IR, for a scalar (lanes 1) or a vector of lanes.

Invariants: bool is i1 in registers and i8 (0 or 1) in memory; float16 and bfloat16 exist in memory
and in casts only; max and min of floats propagate NaN; integer division never traps.
"""

from __future__ import annotations

import struct
from typing import Final, Protocol

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import CompileError
from flame.kernel import values
from flame.kernel.values import Value

LLVM_TYPE: Final = {
    dtypes.float64: "double",
    dtypes.float32: "float",
    dtypes.float16: "half",
    dtypes.bfloat16: "i16",
    dtypes.int64: "i64",
    dtypes.int32: "i32",
    dtypes.int16: "i16",
    dtypes.int8: "i8",
    dtypes.uint8: "i8",
    dtypes.uint32: "i32",
    dtypes.uint64: "i64",
    dtypes.bool_: "i1",
}

_COMPARE_FLOAT: Final = {
    "lt": "olt",
    "le": "ole",
    "eq": "oeq",
    "ne": "une",
    "gt": "ogt",
    "ge": "oge",
}
_FLOAT_BINARY: Final = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
_INTEGER_BINARY: Final = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "and": "and",
    "or": "or",
    "xor": "xor",
    "shl": "shl",
    "udiv": "udiv",
    "urem": "urem",
}
_FLOAT_CALLS: Final = {
    "sqrt": "sqrt",
    "floor": "floor",
    "ceil": "ceil",
    "trunc": "trunc",
    "round": "roundeven",
    "abs": "fabs",
    "max": "maximum",
    "min": "minimum",
    "copysign": "copysign",
    "fma": "fma",
}
_NATIVE: Final = frozenset(
    (
        "neg",
        "not",
        "is_nan",
        "floordiv",
        "mod",
        "shr",
        "mulhi",
        "select",
        "cast",
        "bitcast",
        "libm",
        *values.COMPARE,
        *_FLOAT_BINARY,
        *_INTEGER_BINARY,
        *_FLOAT_CALLS,
    )
)


class Emitter(Protocol):
    """What the instructions need of the renderer."""

    def emit(self, instruction: str, level: int | None = None) -> str: ...
    def emit_void(self, line: str, level: int | None = None) -> None: ...
    def declare(self, signature: str) -> None: ...
    def fresh(self, prefix: str = ...) -> str: ...


def native(value: Value) -> bool:
    """Whether the instruction has a direct form; the others are expanded into those that have."""
    return value.op in _NATIVE


def vector(type_: str, lanes: int) -> str:
    return type_ if lanes == 1 else f"<{lanes} x {type_}>"


def memory_type(dtype: DType) -> str:
    return "i8" if dtype is dtypes.bool_ else LLVM_TYPE[dtype]


def suffix(dtype: DType, lanes: int) -> str:
    """The overload suffix of an intrinsic."""
    kind = f"f{dtype.bits}" if dtype.kind == "f" else LLVM_TYPE[dtype]
    return kind if lanes == 1 else f"v{lanes}{kind}"


def constant(value: Value, lanes: int) -> str:
    text = _literal(values.number_of(value), value.dtype)
    return text if lanes == 1 else f"splat ({LLVM_TYPE[value.dtype]} {text})"


def _literal(number: values.Number, dtype: DType) -> str:
    if dtype is dtypes.bfloat16:
        return str(int(np.asarray(number, dtype.numpy).view(np.uint16)))
    if dtype is dtypes.float16:
        return f"0xH{int(np.asarray(number, np.float16).view(np.uint16)):04X}"
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            exact = float(number) if dtype is dtypes.float64 else float(np.float32(number))
        return f"0x{struct.unpack('>Q', struct.pack('>d', exact))[0]:016X}"
    if dtype.kind == "b":
        return "true" if number else "false"
    return str(number)


def splat(out: Emitter, type_: str, scalar: str, lanes: int, level: int | None) -> str:
    if lanes == 1:
        return scalar
    whole = f"<{lanes} x {type_}>"
    first = out.emit(f"insertelement {whole} poison, {type_} {scalar}, i64 0", level)
    return out.emit(
        f"shufflevector {whole} {first}, {whole} poison, <{lanes} x i32> zeroinitializer", level
    )


def lane_numbers(type_: str, lanes: int) -> str:
    return "<" + ", ".join(f"{type_} {i}" for i in range(lanes)) + ">"


def call(
    out: Emitter, name: str, dtype: DType, args: list[str], lanes: int, level: int | None
) -> str:
    """Call an LLVM intrinsic whose operands and result are all of ``dtype``."""
    type_ = vector(LLVM_TYPE[dtype], lanes)
    full = f"@llvm.{name}.{suffix(dtype, lanes)}"
    out.declare(f"{type_} {full}({', '.join([type_] * len(args))})")
    return out.emit(f"call {type_} {full}({', '.join(f'{type_} {a}' for a in args)})", level)


def instruction(out: Emitter, value: Value, args: list[str], lanes: int, level: int | None) -> str:
    """Emit one basic instruction on the names of its operands."""
    op, dtype = value.op, value.dtype
    operand = value.args[0].dtype
    if op in ("cast", "bitcast"):
        return (cast if op == "cast" else _bitcast)(out, operand, dtype, args[0], lanes, level)
    if op != "select" and (operand.bits == 16 and operand.kind == "f"):
        raise CompileError(f"{op} computes in {operand.name}; kernels cast to float32 first")
    if op in values.COMPARE:
        return _compare(out, op, operand, args[0], args[1], lanes, level)
    type_ = vector(LLVM_TYPE[dtype], lanes)
    if op == "select":
        return out.emit(
            f"select {vector('i1', lanes)} {args[0]}, {type_} {args[1]}, {type_} {args[2]}", level
        )
    if op == "libm":
        return _libm(out, value.attr, dtype, args[0], args[1], lanes, level)
    if op == "fma":
        return call(out, "fma", dtype, args, lanes, level)
    if len(args) == 2:
        return binary(out, op, dtype, args[0], args[1], lanes, level)
    return _unary(out, op, operand, args[0], lanes, level)


def _unary(out: Emitter, op: str, dtype: DType, x: str, lanes: int, level: int | None) -> str:
    type_ = vector(LLVM_TYPE[dtype], lanes)
    floating = dtype.kind == "f"
    if op == "neg":
        if floating:
            return out.emit(f"fneg {type_} {x}", level)
        return out.emit(f"sub {type_} {_zero(lanes)}, {x}", level)
    if op == "not":
        ones = "true" if dtype.kind == "b" else "-1"
        ones = ones if lanes == 1 else f"splat ({LLVM_TYPE[dtype]} {ones})"
        return out.emit(f"xor {type_} {x}, {ones}", level)
    if op == "is_nan":
        return out.emit(f"fcmp uno {type_} {x}, {x}", level)
    if op == "abs" and not floating:
        if dtype.kind == "u":
            return x
        negative = out.emit(f"sub {type_} {_zero(lanes)}, {x}", level)
        return call(out, "smax", dtype, [x, negative], lanes, level)
    return call(out, _FLOAT_CALLS[op], dtype, [x], lanes, level)


def _zero(lanes: int) -> str:
    return "0" if lanes == 1 else "zeroinitializer"


def binary(
    out: Emitter, op: str, dtype: DType, a: str, b: str, lanes: int, level: int | None
) -> str:
    type_ = vector(LLVM_TYPE[dtype], lanes)
    if dtype.kind == "f":
        if op in _FLOAT_BINARY:
            return out.emit(f"{_FLOAT_BINARY[op]} {type_} {a}, {b}", level)
        return call(out, _FLOAT_CALLS[op], dtype, [a, b], lanes, level)
    if dtype.kind == "b":
        op = {"add": "or", "mul": "and", "max": "or", "min": "and"}.get(op, op)
        return out.emit(f"{op} {type_} {a}, {b}", level)
    signed = dtype.kind == "i"
    if op in _INTEGER_BINARY:
        return out.emit(f"{_INTEGER_BINARY[op]} {type_} {a}, {b}", level)
    if op in ("max", "min"):
        return call(out, ("s" if signed else "u") + op, dtype, [a, b], lanes, level)
    if op == "shr":
        return out.emit(f"{'ashr' if signed else 'lshr'} {type_} {a}, {b}", level)
    if op == "mulhi":
        return _mulhi(out, dtype, a, b, lanes, level)
    return _floor_division(out, op, dtype, a, b, lanes, level)


def _mulhi(out: Emitter, dtype: DType, a: str, b: str, lanes: int, level: int | None) -> str:
    """The upper half of the double-width product."""
    narrow, wide = vector(f"i{dtype.bits}", lanes), vector(f"i{2 * dtype.bits}", lanes)
    extend = "sext" if dtype.kind == "i" else "zext"
    x, y = (out.emit(f"{extend} {narrow} {v} to {wide}", level) for v in (a, b))
    product = out.emit(f"mul {wide} {x}, {y}", level)
    amount = str(dtype.bits) if lanes == 1 else f"splat (i{2 * dtype.bits} {dtype.bits})"
    high = out.emit(f"lshr {wide} {product}, {amount}", level)
    return out.emit(f"trunc {wide} {high} to {narrow}", level)


def _floor_division(
    out: Emitter, op: str, dtype: DType, a: str, b: str, lanes: int, level: int | None
) -> str:
    """Quotient rounded down and the remainder with the divisor's sign, 0 for a divisor of 0.

    Division by -1 is a negation, as the smallest number over -1 would trap.
    """
    type_, bits = vector(LLVM_TYPE[dtype], lanes), vector("i1", lanes)

    def whole(number: int) -> str:
        return str(number) if lanes == 1 else f"splat ({LLVM_TYPE[dtype]} {number})"

    unsafe = out.emit(f"icmp eq {type_} {b}, {whole(0)}", level)
    if dtype.kind == "u":
        divisor = out.emit(f"select {bits} {unsafe}, {type_} {whole(1)}, {type_} {b}", level)
        result = out.emit(f"{'udiv' if op == 'floordiv' else 'urem'} {type_} {a}, {divisor}", level)
    else:
        minus = out.emit(f"icmp eq {type_} {b}, {whole(-1)}", level)
        either = out.emit(f"or {bits} {unsafe}, {minus}", level)
        divisor = out.emit(f"select {bits} {either}, {type_} {whole(1)}, {type_} {b}", level)
        quotient = out.emit(f"sdiv {type_} {a}, {divisor}", level)
        remainder = out.emit(f"srem {type_} {a}, {divisor}", level)
        nonzero = out.emit(f"icmp ne {type_} {remainder}, {whole(0)}", level)
        mixed = out.emit(f"xor {type_} {remainder}, {divisor}", level)
        opposite = out.emit(f"icmp slt {type_} {mixed}, {whole(0)}", level)
        adjust = out.emit(f"and {bits} {nonzero}, {opposite}", level)
        if op == "floordiv":
            one = out.emit(f"sext {bits} {adjust} to {type_}", level)
            floored = out.emit(f"add {type_} {quotient}, {one}", level)
            negated = out.emit(f"sub {type_} {whole(0)}, {a}", level)
            result = out.emit(f"select {bits} {minus}, {type_} {negated}, {type_} {floored}", level)
        else:
            shifted = out.emit(f"add {type_} {remainder}, {divisor}", level)
            fixed = out.emit(
                f"select {bits} {adjust}, {type_} {shifted}, {type_} {remainder}", level
            )
            result = out.emit(f"select {bits} {minus}, {type_} {whole(0)}, {type_} {fixed}", level)
    return out.emit(f"select {bits} {unsafe}, {type_} {whole(0)}, {type_} {result}", level)


def _compare(
    out: Emitter, op: str, dtype: DType, a: str, b: str, lanes: int, level: int | None
) -> str:
    type_ = vector(LLVM_TYPE[dtype], lanes)
    if dtype.kind == "f":
        return out.emit(f"fcmp {_COMPARE_FLOAT[op]} {type_} {a}, {b}", level)
    sign = "s" if dtype.kind == "i" else "u"
    word = op if op in ("eq", "ne") else sign + op
    return out.emit(f"icmp {word} {type_} {a}, {b}", level)


# --- conversions ----------------------------------------------------------------------------------


def cast(out: Emitter, source: DType, target: DType, x: str, lanes: int, level: int | None) -> str:
    """Conversion by value. Half-width floats go through float32."""
    if source is target:
        return x
    if source is dtypes.bfloat16:
        return cast(
            out, dtypes.float32, target, _widen_bfloat16(out, x, lanes, level), lanes, level
        )
    if source is dtypes.float16 and target is not dtypes.float32:
        wide = cast(out, source, dtypes.float32, x, lanes, level)
        return cast(out, dtypes.float32, target, wide, lanes, level)
    if target is dtypes.bfloat16:
        single = cast(out, source, dtypes.float32, x, lanes, level)
        return _narrow_bfloat16(out, single, lanes, level)
    if target is dtypes.float16 and source is not dtypes.float32:
        single = cast(out, source, dtypes.float32, x, lanes, level)
        return cast(out, dtypes.float32, target, single, lanes, level)
    a, b = vector(LLVM_TYPE[source], lanes), vector(LLVM_TYPE[target], lanes)
    if target.kind == "b":
        if source.kind == "f":
            zero = "0.0" if lanes == 1 else "zeroinitializer"
            return out.emit(f"fcmp une {a} {x}, {zero}", level)
        return out.emit(f"icmp ne {a} {x}, {_zero(lanes)}", level)
    if source.kind == "f" and target.kind == "f":
        return out.emit(
            f"{'fpext' if target.bits > source.bits else 'fptrunc'} {a} {x} to {b}", level
        )
    if source.kind == "f":
        return _float_to_integer(out, source, target, x, lanes, level)
    if target.kind == "f":
        word = "sitofp" if source.kind == "i" else "uitofp"
        return out.emit(f"{word} {a} {x} to {b}", level)
    if source.bits == target.bits and source.kind != "b":
        return x
    if source.kind != "b" and target.bits < source.bits:
        return out.emit(f"trunc {a} {x} to {b}", level)
    return out.emit(f"{'sext' if source.kind == 'i' else 'zext'} {a} {x} to {b}", level)


def _float_to_integer(
    out: Emitter, source: DType, target: DType, x: str, lanes: int, level: int | None
) -> str:
    """Truncation; numbers out of range wrap through a wider integer, as a C cast on x86 does."""
    a = vector(LLVM_TYPE[source], lanes)
    if target.bits == 64 or target is dtypes.uint32:
        name, wide = "llvm.fptosi.sat", vector("i64", lanes)
        result = dtypes.int64
    else:
        name, wide = "llvm.fptosi.sat", vector("i32", lanes)
        result = dtypes.int32
    full = f"@{name}.{suffix(result, lanes)}.{suffix(source, lanes)}"
    out.declare(f"{wide} {full}({a})")
    whole = out.emit(f"call {wide} {full}({a} {x})", level)
    if target.bits == result.bits:
        return whole
    return out.emit(f"trunc {wide} {whole} to {vector(LLVM_TYPE[target], lanes)}", level)


def _splat_text(type_: str, number: int, lanes: int) -> str:
    return str(number) if lanes == 1 else f"splat ({type_} {number})"


def _widen_bfloat16(out: Emitter, x: str, lanes: int, level: int | None) -> str:
    i16, i32, f32 = (vector(t, lanes) for t in ("i16", "i32", "float"))
    wide = out.emit(f"zext {i16} {x} to {i32}", level)
    high = out.emit(f"shl {i32} {wide}, {_splat_text('i32', 16, lanes)}", level)
    return out.emit(f"bitcast {i32} {high} to {f32}", level)


def _narrow_bfloat16(out: Emitter, x: str, lanes: int, level: int | None) -> str:
    """Round to nearest even on the bits; NaN stays a (quiet) NaN."""
    i16, i32, f32, i1 = (vector(t, lanes) for t in ("i16", "i32", "float", "i1"))
    bits = out.emit(f"bitcast {f32} {x} to {i32}", level)
    shifted = out.emit(f"lshr {i32} {bits}, {_splat_text('i32', 16, lanes)}", level)
    odd = out.emit(f"and {i32} {shifted}, {_splat_text('i32', 1, lanes)}", level)
    bias = out.emit(f"add {i32} {odd}, {_splat_text('i32', 0x7FFF, lanes)}", level)
    rounded = out.emit(f"add {i32} {bits}, {bias}", level)
    high = out.emit(f"lshr {i32} {rounded}, {_splat_text('i32', 16, lanes)}", level)
    quiet = out.emit(f"or {i32} {shifted}, {_splat_text('i32', 64, lanes)}", level)
    nan = out.emit(f"fcmp uno {f32} {x}, {x}", level)
    chosen = out.emit(f"select {i1} {nan}, {i32} {quiet}, {i32} {high}", level)
    return out.emit(f"trunc {i32} {chosen} to {i16}", level)


def _bitcast(
    out: Emitter, source: DType, target: DType, x: str, lanes: int, level: int | None
) -> str:
    a, b = vector(LLVM_TYPE[source], lanes), vector(LLVM_TYPE[target], lanes)
    return x if a == b else out.emit(f"bitcast {a} {x} to {b}", level)


def from_memory(out: Emitter, dtype: DType, raw: str, lanes: int, level: int | None) -> str:
    """What a load gives, as it stands in registers."""
    if dtype is not dtypes.bool_:
        return raw
    return out.emit(f"icmp ne {vector('i8', lanes)} {raw}, {_zero(lanes)}", level)


def to_memory(out: Emitter, dtype: DType, name: str, lanes: int, level: int | None) -> str:
    """A register as it is stored."""
    if dtype is not dtypes.bool_:
        return name
    return out.emit(f"zext {vector('i1', lanes)} {name} to {vector('i8', lanes)}", level)


# --- vectors as wholes ----------------------------------------------------------------------------


def reduce_vector(out: Emitter, combine: str, dtype: DType, name: str, lanes: int) -> str:
    """All lanes combined into a scalar, as a balanced tree."""
    type_, scalar = vector(LLVM_TYPE[dtype], lanes), LLVM_TYPE[dtype]
    if dtype.kind == "f" and combine in ("add", "mul"):
        start = _literal(0.0 if combine == "add" else 1.0, dtype)
        start = _literal(-0.0, dtype) if combine == "add" else start
        full = f"@llvm.vector.reduce.f{combine}.{suffix(dtype, lanes)}"
        out.declare(f"{scalar} {full}({scalar}, {type_})")
        return out.emit(f"call reassoc {scalar} {full}({scalar} {start}, {type_} {name})")
    word = combine
    if dtype.kind == "f":
        word = {"max": "fmaximum", "min": "fminimum"}[combine]
    elif dtype.kind == "b":
        word = {"add": "or", "mul": "and", "max": "or", "min": "and"}.get(combine, combine)
    elif combine in ("max", "min"):
        word = ("s" if dtype.kind == "i" else "u") + combine
    full = f"@llvm.vector.reduce.{word}.{suffix(dtype, lanes)}"
    out.declare(f"{scalar} {full}({type_})")
    return out.emit(f"call {scalar} {full}({type_} {name})")


def _libm(
    out: Emitter, name: str, dtype: DType, x: str, mask: str, lanes: int, level: int | None
) -> str:
    """The C library's function for the lanes of ``mask``, behind one branch that is rarely
    taken.
    """
    scalar = LLVM_TYPE[dtype]
    function = name if dtype is dtypes.float64 else f"{name}f"
    out.declare(f"{scalar} @{function}({scalar})")
    type_ = vector(scalar, lanes)
    zero = "0.0" if lanes == 1 else "zeroinitializer"
    label = out.fresh("rare")
    taken = mask
    if lanes > 1:
        full = f"@llvm.vector.reduce.or.v{lanes}i1"
        out.declare(f"i1 {full}(<{lanes} x i1>)")
        taken = out.emit(f"call i1 {full}(<{lanes} x i1> {mask})", level)
    out.emit_void(f"br label %{label}.pre", level)
    out.emit_void(f"{label}.pre:", level)
    out.emit_void(f"br i1 {taken}, label %{label}.then, label %{label}.join", level)
    out.emit_void(f"{label}.then:", level)
    if lanes == 1:
        result = out.emit(f"call {scalar} @{function}({scalar} {x})", level)
    else:
        result = zero
        for lane in range(lanes):
            wanted = out.emit(f"extractelement <{lanes} x i1> {mask}, i64 {lane}", level)
            item = out.emit(f"extractelement {type_} {x}, i64 {lane}", level)
            safe = out.emit(f"select i1 {wanted}, {scalar} {item}, {scalar} 0.0", level)
            made = out.emit(f"call {scalar} @{function}({scalar} {safe})", level)
            kept = out.emit(f"select i1 {wanted}, {scalar} {made}, {scalar} 0.0", level)
            result = out.emit(f"insertelement {type_} {result}, {scalar} {kept}, i64 {lane}", level)
    out.emit_void(f"br label %{label}.last", level)
    out.emit_void(f"{label}.last:", level)
    out.emit_void(f"br label %{label}.join", level)
    out.emit_void(f"{label}.join:", level)
    return out.emit(f"phi {type_} [ {zero}, %{label}.pre ], [ {result}, %{label}.last ]", level)
