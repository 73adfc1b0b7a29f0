"""Kernels: structured loops over scalar values.

Grammar:

    kernel    ::= operands scratch sizes parallel-loop
    statement ::= loop(var, extent, kind) { statement* }        kind: parallel | serial | vector
                | declare(register, value) | assign(register, value)
                | accumulate(register, combine, value)          the only write that may cross a
                vector loop | store((buffer, index, value [, where])*)      all values are read
                before any is written | if(condition) { statement* } | gemm(...)
                   one matrix product by the vendor's library | transpose(...)
                          one matrix turned, elements of 4 or 8 bytes
                | split_product(...)
                          products of packed panels by the processor's matrix unit

Invariant: the one parallel loop is the outermost statement; its iterations touch disjoint memory,
so they may run in any order and on any thread.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.kernel.values import Buffer, Number, Register, Value, const, integer_range

COMBINE: Final = ("add", "mul", "max", "min", "and", "or")


def identity(combine: str, dtype: DType) -> Number:
    """The number that changes nothing under ``combine``."""
    if combine in ("add", "or"):
        return False if dtype.kind == "b" else 0
    if combine in ("mul", "and"):
        if dtype.kind == "b":
            return True
        return 1 if combine == "mul" else -1
    if dtype.kind == "b":
        return combine == "min"
    if dtype.kind == "f":
        return float("-inf") if combine == "max" else float("inf")
    low, high = integer_range(dtype)
    return low if combine == "max" else high


class LoopKind(enum.Enum):
    PARALLEL = "parallel"
    SERIAL = "serial"
    VECTOR = "vector"


@dataclass(frozen=True, eq=False)
class Loop:
    var: str
    extent: Value
    kind: LoopKind
    body: tuple[Statement, ...]
    unroll: int = 1  # vector loops: native vectors handled together


@dataclass(frozen=True, eq=False)
class Declare:
    register: Register
    value: Value


@dataclass(frozen=True, eq=False)
class Assign:
    register: Register
    value: Value


@dataclass(frozen=True, eq=False)
class Accumulate:
    register: Register
    combine: str
    value: Value


@dataclass(frozen=True, eq=False)
class Target:
    buffer: Buffer
    index: Value
    value: Value
    where: Value | None = None


@dataclass(frozen=True, eq=False)
class Store:
    targets: tuple[Target, ...]


@dataclass(frozen=True, eq=False)
class If:
    condition: Value
    body: tuple[Statement, ...]


@dataclass(frozen=True, eq=False)
class Matrix:
    """A row-major matrix: its buffer, the offset of its first element, elements between rows."""

    buffer: Buffer
    offset: Value
    row_stride: Value
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class Gemm:
    """c (m, n) = a (m, k) @ b (k, n) + beta * c, in ``c``'s dtype (float32 or float64)."""

    m: Value
    n: Value
    k: Value
    a: Matrix
    b: Matrix
    c: Matrix
    beta: Value


@dataclass(frozen=True, eq=False)
class Transpose:
    """target[j, i] = source[i, j] for i < rows, j < columns; not of each other's memory."""

    rows: Value
    columns: Value
    source: Matrix
    target: Matrix


SPLIT_PARTS: Final = {6: 3, 3: 2, 1: 1}  # products of parts -> parts of a number


@dataclass(frozen=True, eq=False)
class SplitProduct:
    """c (32, 32) = a @ b, or c += a @ b, of float32; by the processor's matrix unit.

    Numbers stand as sums of `SPLIT_PARTS`[products] bfloat16 parts, the largest first; ``products``
    of parts count, those of the largest ones: 6 of 3 parts are as exact as float32.

    ``a``, ``b`` (uint32): panels (steps, 2, parts, 16, 16) of 32 rows or columns. A step is 32
    elements of the depth; an element of it holds those of depth j (low half) and 16 + j (high
    half), as a[s, t, part, row, j] for row 16 t + row, as b[s, t, part, j, column] for column
    16 t + column. The unit has to be ready: it is, from a statement that says to ``open`` it up
    to one that says to ``close`` it; a statement with no steps does nothing else.
    """

    steps: Value
    a: Matrix
    b: Matrix
    c: Matrix
    add: Value  # bool
    open: Value  # bool
    close: Value  # bool
    products: int


Statement = Loop | Declare | Assign | Accumulate | Store | If | Gemm | Transpose | SplitProduct


@dataclass(frozen=True, eq=False)
class Kernel:
    """A function of its arguments, run for a range of its parallel loop.

    Its arguments in order: ``operands`` (pointers, and numbers as params), one base pointer for
    each ``scratch`` buffer (a worker uses its own part of the given number of elements),
    ``sizes``. ``local`` buffers stand on the stack of the thread, 64-byte aligned.
    """

    name: str
    operands: tuple[Buffer | Value, ...]
    scratch: tuple[tuple[Buffer, int], ...]
    sizes: tuple[Value, ...]
    body: Loop
    local: tuple[tuple[Buffer, int], ...] = ()

    def __str__(self) -> str:
        heads = [
            *(_head(operand) for operand in self.operands),
            *(f"scratch {b.name}: {b.dtype.name}[{n}]" for b, n in self.scratch),
            *(f"local {b.name}: {b.dtype.name}[{n}]" for b, n in self.local),
            *(f"{p.attr}" for p in self.sizes),
        ]
        return f"kernel {self.name}({', '.join(heads)})\n" + "\n".join(_lines(self.body, "  "))


def _head(operand: Buffer | Value) -> str:
    if isinstance(operand, Buffer):
        return f"{'out' if operand.written else 'in'} {operand.name}: {operand.dtype.name}"
    return f"{operand.attr}: {operand.dtype.name}"


def _lines(statement: Statement, pad: str) -> Iterator[str]:
    match statement:
        case Loop(var, extent, kind, body):
            yield f"{pad}{kind.value} {var} < {extent!r}:"
            for inner in body:
                yield from _lines(inner, pad + "  ")
        case If(condition, body):
            yield f"{pad}if {condition!r}:"
            for inner in body:
                yield from _lines(inner, pad + "  ")
        case Declare(register, value):
            yield f"{pad}%{register.name}: {register.dtype.name} = {value!r}"
        case Assign(register, value):
            yield f"{pad}%{register.name} = {value!r}"
        case Accumulate(register, combine, value):
            yield f"{pad}%{register.name} {combine}= {value!r}"
        case Store(targets):
            for t in targets:
                where = "" if t.where is None else f" where {t.where!r}"
                yield f"{pad}{t.buffer.name}[{t.index!r}] = {t.value!r}{where}"
        case Gemm(m, n, k, a, b, c, beta):
            operand = [
                f"{x.buffer.name}[{x.offset!r}; {x.row_stride!r}{'; T' if x.transposed else ''}]"
                for x in (c, a, b)
            ]
            product = f"{operand[1]} @ {operand[2]} + {beta!r} * {operand[0]}"
            yield f"{pad}gemm ({m!r}, {n!r}, {k!r}) {operand[0]} = {product}"
        case Transpose(rows, columns, source, target):
            operand = [f"{x.buffer.name}[{x.offset!r}; {x.row_stride!r}]" for x in (target, source)]
            yield f"{pad}transpose ({rows!r}, {columns!r}) {operand[0]} = {operand[1]}"
        case SplitProduct(steps, a, b, c, add, opens, closes, products):
            operand = [f"{x.buffer.name}[{x.offset!r}]" for x in (c, a, b)]
            yield (
                f"{pad}split_product {products} ({steps!r}, {opens!r}, {closes!r}) {operand[0]} = "
                f"{operand[1]} @ {operand[2]} + {add!r} * {operand[0]}"
            )


ZERO: Final = const(0)
ONE: Final = const(1)
INDEX: Final = dtypes.int64
