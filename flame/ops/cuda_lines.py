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


def number_defines(**dtypes: DType) -> dict[str, Any]:
    """C types by macro name, and the headers that they need."""
    names = {t.name for t in dtypes.values()}
    used = {
        "USES_HALF": int("float16" in names),
        "USES_BFLOAT16": int("bfloat16" in names),
    }
    return used | {name: C_TYPES[t.name] for name, t in dtypes.items()}


C_TYPES: Final = {
    "float64": "double", "float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16",
    "int64": "long long", "int32": "int", "int16": "short", "int8": "signed char",
    "uint8": "unsigned char", "bool": "unsigned char", "uint32": "unsigned",
    "uint64": "unsigned long long",
}  # fmt: skip
_BITS: Final = {8: "unsigned char", 16: "unsigned short", 32: "unsigned", 64: "unsigned long long"}
_SIGNED: Final = {8: "signed char", 16: "short", 32: "int", 64: "long long"}
_INFINITIES: Final = {
    "float64": "0x7ff0000000000000ull", "float32": "0x7f800000u", "float16": "0x7c00u",
    "bfloat16": "0x7f80u",
}  # fmt: skip


_NO_LINES: Final = {"LINE_PARAMS": "", "ENTRY_PARAMS": "", "ENTRY0(i)": "(0ll)"} | {
    f"LINE{n}(i)": "(0ll)" for n in range(4)
}


class Lines:
    """The places that a kernel visits: a shape, with the strides of several operands over it.

    prefix: of the macros' names, where a kernel has two sets of places.
    """

    def __init__(self, shape: Shape, strides: Sequence[Shape], prefix: str = "LINE") -> None:
        nest = coalesce(shape, strides)
        rank = len(nest.sizes)
        self.count = 1
        for size in nest.sizes:
            self.count *= size
        small = prefix.lower()
        names = [f"{small}_n{d}" for d in range(rank)]
        self.sizes: tuple[int, ...] = nest.sizes
        index = "unsigned" if self.count < SMALL else "unsigned long long"
        self.defines: dict[str, str] = {}
        for n, steps in enumerate(nest.strides):
            made = [f"{small}_s{n}_{d}" for d in range(rank)]
            names += made
            self.sizes += steps
            self.defines[f"{prefix}{n}(i)"] = _offset(
                index, [f"{small}_n{d}" for d in range(rank)], made
            )
        self.defines[f"{prefix}_PARAMS"] = "".join(f", long long {name}" for name in names)


def _offset(index: str, sizes: Sequence[str], steps: Sequence[str]) -> str:
    """The offset of line ``i`` as an expression."""
    if not sizes:
        return "(0ll)"
    terms = []
    rest = f"({index})(i)"
    for size, step in zip(reversed(sizes[1:]), reversed(steps[1:]), strict=True):
        terms.append(f"(long long)({rest} % ({index}){size}) * {step}")
        rest = f"({rest} / ({index}){size})"
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
    *lines: Lines, blocks: int, threads: int,
) -> BoundSource:  # fmt: skip
    """A call of kernel ``symbol`` of ``file``; the lines' sizes follow the given ones."""
    defines = {**_NO_LINES, **defines}
    for given in lines:
        defines |= given.defines
        sizes = (*sizes, *given.sizes)
    text = source(file, **defines)
    return BoundSource(
        symbol, text, symbol, tuple(operands), tuple(sizes), (max(blocks, 1), 1, 1),
        (threads, 1, 1), extent=blocks,
    )  # fmt: skip


def each(count: int, threads: int) -> int:
    """Blocks for ``count`` threads."""
    return -(-count // threads)
