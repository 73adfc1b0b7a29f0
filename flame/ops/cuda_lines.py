"""Launches of hand-written kernels over strided lines.

A kernel of `flame.kernels` takes element ``line`` of operand n from offset LINEn(line), macros that
`Lines` writes; the sizes and strides behind them arrive as arguments, so one text serves all sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from flame.core.dtypes import DType
from flame.core.types import Shape
from flame.kernel.builder import BoundSource, Ref
from flame.kernels import source
from flame.ops.loops import coalesce

SMALL: Final = 1 << 31  # counters below it are divided in 32 bits

C_TYPES: Final = {
    "float64": "double", "float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16",
    "int64": "long long", "int32": "int", "int16": "short", "int8": "signed char",
    "uint8": "unsigned char", "bool": "unsigned char",
}  # fmt: skip
_BITS: Final = {8: "unsigned char", 16: "unsigned short", 32: "unsigned", 64: "unsigned long long"}
_SIGNED: Final = {8: "signed char", 16: "short", 32: "int", 64: "long long"}
_INFINITIES: Final = {
    "float64": "0x7ff0000000000000ull", "float32": "0x7f800000u", "float16": "0x7c00u",
    "bfloat16": "0x7f80u",
}  # fmt: skip


_NO_LINES: Final = {f"LINE{n}(i)": "(0ll)" for n in range(4)}


class Lines:
    """The places that a kernel visits: a shape, with the strides of several operands over it."""

    def __init__(self, shape: Shape, strides: Sequence[Shape]) -> None:
        nest = coalesce(shape, strides)
        rank = len(nest.sizes)
        self.count = 1
        for size in nest.sizes:
            self.count *= size
        names = [f"line_n{d}" for d in range(rank)]
        self.sizes: tuple[int, ...] = nest.sizes
        index = "unsigned" if self.count < SMALL else "unsigned long long"
        self.defines: dict[str, str] = {}
        for n, steps in enumerate(nest.strides):
            made = [f"line_s{n}_{d}" for d in range(rank)]
            names += made
            self.sizes += steps
            self.defines[f"LINE{n}(i)"] = _offset(index, rank, made)
        self.defines["LINE_PARAMS"] = "".join(f", long long {name}" for name in names)


def _offset(index: str, rank: int, steps: Sequence[str]) -> str:
    """The offset of line ``i`` as an expression."""
    if not rank:
        return "(0ll)"
    terms = []
    rest = f"({index})(i)"
    for d in reversed(range(1, rank)):
        size = f"({index})line_n{d}"
        terms.append(f"(long long)({rest} % {size}) * {steps[d]}")
        rest = f"({rest} / {size})"
    terms.append(f"(long long){rest} * {steps[0]}")
    return "(" + " + ".join(terms) + ")"


def key_defines(dtype: DType, *, descending: bool = False) -> dict[str, Any]:
    """What keys.cuh has to know of a dtype."""
    bits = max(dtype.bits, 8)
    kind = {"f": 2, "i": 1, "u": 0, "b": 0}[dtype.kind]
    return {
        "T": _SIGNED[bits] if kind == 1 else _BITS[bits],
        "KEY": _BITS[max(bits, 32)],
        "BITS": bits,
        "KIND": kind,
        "INFINITY_BITS": _INFINITIES.get(dtype.name, "0"),
        "DESCENDING": int(descending),
    }


def key_bytes(dtype: DType) -> int:
    return max(dtype.itemsize, 4)


def launch(
    file: str, symbol: str, defines: dict[str, Any], operands: Sequence[Ref], sizes: Sequence[int],
    lines: Lines, *, blocks: int, threads: int,
) -> BoundSource:  # fmt: skip
    """A call of kernel ``symbol`` of ``file``; the lines' sizes follow the given ones."""
    text = source(file, **{**defines, **_NO_LINES, **lines.defines})
    return BoundSource(
        symbol, text, symbol, tuple(operands), (*sizes, *lines.sizes), (max(blocks, 1), 1, 1),
        (threads, 1, 1), extent=blocks,
    )  # fmt: skip


def each(count: int, threads: int) -> int:
    """Blocks for ``count`` threads."""
    return -(-count // threads)
