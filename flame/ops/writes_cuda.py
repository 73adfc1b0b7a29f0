"""Writing by index tensors on a GPU: put_at and combine_at, as launches of writes.cu, rows.cu and
scan.cu.

Invariants: writes that can collide are sorted by their target, stably, and combined in that order,
so the result is the same on every run and needs no atomic operations; of several values set at one
place the last one in row-major order of the indices stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flame.core import dtypes
from flame.core.errors import UnsupportedError
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel.builder import Bound, BoundKernel, Lowering, Ref
from flame.ops.cuda_lines import C_TYPES, Lines, each, launch, number_defines
from flame.ops.elementwise import compute_dtype
from flame.ops.indexed import direct_steps, indexed_dims
from flame.ops.op import Types
from flame.ops.scans_cuda import SEGMENTS, scan_calls, scan_defines
from flame.ops.sorting_cuda import LONGEST, Pair, Sorter, Temporaries

THREADS: Final = 256
ROW_THREADS: Final = 128
WIDE_ROWS: Final = 32  # columns from which on threads go along them
SIDE_BY_SIDE: Final = 8192  # independent places that keep a GPU busy with one thread each
FEW: Final = 64  # colliding writes that one thread makes one after the other


@dataclass(frozen=True)
class _Write:
    """One call taken apart: entries, which may collide, and columns, which cannot."""

    source: TensorType
    out: TensorType
    indices: tuple[TensorType, ...]
    entry_dims: tuple[int, ...]
    column_dims: tuple[int, ...]
    direct: Shape
    axes: tuple[int, ...]

    def over(self, dims: Sequence[int], *strides: Shape, prefix: str = "LINE") -> Lines:
        shape = tuple(self.source.shape[d] for d in dims)
        return Lines(shape, [tuple(s[d] for d in dims) for s in strides], prefix)

    @property
    def entries(self) -> int:
        return math.prod(self.source.shape[d] for d in self.entry_dims)

    @property
    def columns(self) -> int:
        return math.prod(self.source.shape[d] for d in self.column_dims)


def _taken_apart(
    source: TensorType, out: TensorType, indices: tuple[TensorType, ...], axes: tuple[int, ...]
) -> _Write:
    """Where indices repeat along the dimensions that cannot collide, these are columns; else every
    element is an entry."""
    rank = source.ndim
    outer = [d for d in range(rank) if d in axes]
    repeat = all(t.strides[d] == 0 or source.shape[d] == 1 for t in indices for d in outer)
    columns = tuple(outer) if repeat else ()
    entries = tuple(d for d in range(rank) if d not in columns)
    return _Write(source, out, indices, entries, columns, direct_steps(out, rank, axes), axes)


def lower_put_cuda(
    types: Types, outputs: tuple[TensorType, ...], generic: Callable[[], Lowering],
    start: Callable[[], BoundKernel], *, axes: tuple[int, ...], combine: str, wrap: bool,
) -> Lowering:  # fmt: skip
    """generic: the lowering in which one thread makes the colliding writes of its place; start:
    the kernel that makes the result a copy of x, or zeros."""
    source, (out,) = types[1], outputs
    assert isinstance(source, TensorType)
    indices = tuple(t for t in types[2:] if isinstance(t, TensorType))
    independent = math.prod(source.shape[d] for d in range(source.ndim) if d in axes)
    colliding = source.numel // max(independent, 1)
    if colliding <= 1 or (colliding <= FEW and independent >= SIDE_BY_SIDE):
        return generic()
    write = _taken_apart(source, out, indices, axes)
    if write.entries >= LONGEST:
        raise UnsupportedError(
            f"{write.entries} indexed writes into {out} are too many for one call on a GPU; "
            "split the indices"
        )
    temporaries = Temporaries()
    key = dtypes.uint32 if out.span < LONGEST - 1 else dtypes.uint64
    pair = (
        temporaries.new(write.entries * key.itemsize), temporaries.new(write.entries * 4)
    )  # fmt: skip
    calls: list[Bound] = [start(), _targets(write, pair, C_TYPES[key.name], wrap=wrap)]
    keys = tensor_type(key, (write.entries,))
    sorted_calls, pair = Sorter(temporaries, keys, pair[0], 0, descending=False).sort_pairs(pair)
    calls += sorted_calls
    calls += _combining(write, pair, C_TYPES[key.name], combine, temporaries)
    return Lowering((), tuple(temporaries.sizes), calls=tuple(calls))


def _targets(write: _Write, pair: Pair, key: str, *, wrap: bool) -> Bound:
    """The launch that finds the offset of each entry's target."""
    count = len(write.indices)
    steps = [t.strides for t in write.indices]
    entries = write.over(write.entry_dims, *steps, write.direct, prefix="ENTRY")
    numbers = range(count)
    dims = indexed_dims(write.axes, count)
    defines = {
        "KEY": key,
        "INDEX_POINTERS": "".join(
            f"const {C_TYPES[t.dtype.name]}* index{n}, " for n, t in enumerate(write.indices)
        ),
        "INDEX_SIZES": "".join(f", long long size{n}, long long jump{n}" for n in numbers),
        "TARGETS_OF_ENTRY": " ".join(f"TARGET({n})" for n in numbers),
        "DIRECT(e)": f"ENTRY{count}(e)",
    }
    sizes = [write.entries, int(wrap)]
    for d in dims:
        sizes += [write.out.shape[d], write.out.strides[d]]
    operands = (*(Ref("input", n + 2) for n in numbers), *pair, Ref("error", 0))
    return launch(
        "writes", "find_targets", defines, operands, sizes, entries,
        blocks=each(write.entries, THREADS), threads=THREADS,
    )  # fmt: skip


def _combining(
    write: _Write, pair: Pair, key: str, combine: str, temporaries: Temporaries
) -> list[Bound]:
    """The launches that write what the sorted entries give."""
    strides = write.source.strides
    columns = write.over(write.column_dims, strides, write.direct)
    entries = write.over(write.entry_dims, strides, prefix="ENTRY")
    dtype = write.out.dtype
    wide = compute_dtype(dtype)
    if dtype.kind == "b":  # or, and
        combine = {"add": "max", "mul": "min"}.get(combine, combine)
    x, out = Ref("input", 1), Ref("output", 0)
    count, width = write.entries, write.columns
    kinds = {"IN": dtype, "OUT": dtype}
    if combine != "set" and width < WIDE_ROWS:
        defines = scan_defines(SEGMENTS, wide, combine=combine, **kinds) | {"KEY": key}
        number = len(temporaries.sizes)
        calls, nbytes = scan_calls(
            defines, (x, *pair), (out,), (), count, columns, entries, number
        )
        if nbytes:
            temporaries.new(nbytes)
        return calls
    code = {"set": 0, "add": 0, "mul": 1, "max": 2, "min": 3}[combine]
    defines = {**number_defines(WIDE=wide, **kinds), "KEY": key, "COMBINE": code}

    def call(symbol: str, operands: tuple[Ref, ...], sizes: tuple[int, ...], blocks: int) -> Bound:
        return launch(
            "rows", symbol, defines, operands, sizes, columns, entries,
            blocks=blocks, threads=ROW_THREADS,
        )  # fmt: skip

    if combine == "set":
        sizes = (count, width)
        return [call("set_rows", (x, *pair, out), sizes, each(count * width, ROW_THREADS))]
    chunk = min(max(16, 1 << (math.isqrt(count).bit_length() - 1)), 1024)
    blocks, chunks = each(width, ROW_THREADS), each(count, chunk)
    heads, tails = (temporaries.new(chunks * width * wide.itemsize) for _ in range(2))
    sizes = (count, width, chunk, blocks)
    return [
        call("fold_rows", (x, *pair, out, heads, tails), sizes, blocks * chunks),
        call("join_rows", (pair[0], out, heads, tails), sizes, blocks * chunks),
    ]
