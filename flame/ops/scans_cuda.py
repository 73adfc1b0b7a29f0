"""Scans on a GPU, as launches of scan.cu.

Invariant: how a line is cut into chunks depends on the sizes alone, so a scan gives the same bits
on every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from flame.core.dtypes import DType, int64
from flame.core.types import TensorType
from flame.kernel.builder import Bound, Lowering, Ref
from flame.kernel.geometry import WARP
from flame.ops.cuda_lines import C_TYPES, SMALL, Lines, each, launch, number_defines
from flame.ops.elementwise import compute_dtype
from flame.ops.op import Types

EACH: Final = 8  # elements of a thread in a tile, as in scan.cu
BLOCK: Final = 128  # threads of a block where a warp takes a line
THREADS: Final = (WARP, 64, 128, 256)  # that a line has: the fewest that take it in one tile
TILE: Final = THREADS[-1] * EACH  # of longer lines
PACK_BYTES: Final = 16  # the longest access of a GPU
BLOCKS: Final = 1024  # about as many as long lines are cut into
SIDE_BY_SIDE: Final = 16384  # lines that keep a GPU busy with one thread each
SHORT: Final = 64  # elements that one thread scans by itself

ADD, MULTIPLY, LOG_ADD_EXP, LAST_EXTREME, RECURRENCE, SEGMENTS = range(6)
STATE_BYTES: Final = 16  # the largest of what scan.cu folds
_COMBINES: Final = {"add": 0, "mul": 1, "max": 2, "min": 3}


def scan_defines(
    operation: int, wide: DType, *, dtypes: Mapping[str, DType], reverse: bool = False,
    largest: bool = False, combine: str = "add",
) -> dict[str, Any]:  # fmt: skip
    """What scan.cu has to know of numbers; ``dtypes``: IN, OUT, and FACTOR of a recurrence."""
    widest = max(t.itemsize for t in dtypes.values())
    if operation == LAST_EXTREME:
        widest = max(widest, int64.itemsize)  # the places
    return {
        **number_defines(WIDE=wide, **dtypes),
        "OPERATION": operation,
        "IS_DOUBLE": int(wide.name == "float64"),
        "REVERSE": int(reverse),
        "LARGEST": int(largest),
        "COMBINE": _COMBINES[combine],
        "PACK": 4 if operation == SEGMENTS else min(PACK_BYTES // widest, EACH),
    }


def scan_calls(
    defines: dict[str, Any], sources: Sequence[Ref], targets: Sequence[Ref], steps: Sequence[int],
    length: int, lines: Lines, entries: Lines | None, temporary: int,
) -> tuple[list[Bound], int]:  # fmt: skip
    """(launches, bytes of their temporary, which has number ``temporary``; 0 where there is none).

    length: elements of a line. steps: what scan.cu calls so, of this operation.
    """
    count = lines.count
    threads = next((n for n in THREADS if length <= n * EACH), THREADS[-1])
    wanted = max(1, min(BLOCKS // count, each(length, TILE)))
    chunk = each(each(length, wanted), TILE) * TILE
    chunks = each(length, chunk)
    parts = count * chunks
    dense = bool(steps) and all(step == 1 for step in steps)
    defines = {**defines, "THREADS": threads, "DENSE": int(dense)}
    if defines["OPERATION"] == LAST_EXTREME:
        defines["AT"] = C_TYPES["int32" if length < SMALL else "int64"]
    places = (lines,) if entries is None else (lines, entries)
    sizes = (*steps, length, chunk, chunks, parts)
    block = BLOCK if threads == WARP else threads

    def over_parts(symbol: str, *operands: Ref) -> Bound:
        return launch(
            "scan", symbol, defines, operands, sizes, *places,
            blocks=each(parts, block // threads), threads=block,
        )  # fmt: skip

    if chunks == 1:
        return [over_parts("scan_chunks", *sources, *targets, sources[0])], 0
    totals = Ref("temporary", temporary)
    calls: list[Bound] = [
        over_parts("fold_chunks", *sources, totals),
        launch("scan", "scan_totals", defines, (totals,), (chunks,), *places,
               blocks=count, threads=threads),
        over_parts("scan_chunks", *sources, *targets, totals),
    ]  # fmt: skip
    return calls, parts * STATE_BYTES


def lower_scan(
    operation: int, types: Types, outputs: tuple[TensorType, ...], dim: int,
    generic: Callable[[], Lowering], *, reverse: bool = False, largest: bool = False,
) -> Lowering:  # fmt: skip
    """Every line by a block, or by several; many short or interleaved lines by a thread each.

    generic: the lowering with one thread a line.
    """
    given = [t for t in types if isinstance(t, TensorType)]
    x, length = given[0], given[0].shape[dim]
    if not x.numel:
        return Lowering(())
    count = x.numel // length
    if count >= SIDE_BY_SIDE and (x.strides[dim] != 1 or length <= SHORT):
        return generic()
    operands = [*given, *outputs]
    shape = (*x.shape[:dim], *x.shape[dim + 1 :])
    lines = Lines(shape, [(*t.strides[:dim], *t.strides[dim + 1 :]) for t in operands])
    kinds = {"IN": x.dtype, "OUT": outputs[0].dtype}
    if operation == RECURRENCE:
        kinds["FACTOR"] = given[1].dtype
    defines = scan_defines(
        operation, compute_dtype(outputs[0].dtype), reverse=reverse, largest=largest, dtypes=kinds
    )
    sources = [Ref("input", i) for i in range(len(given))]
    targets = [Ref("output", i) for i in range(len(outputs))]
    steps = [t.strides[dim] for t in operands]
    calls, nbytes = scan_calls(defines, sources, targets, steps, length, lines, None, 0)
    return Lowering((), (nbytes,) if nbytes else (), calls=tuple(calls))
