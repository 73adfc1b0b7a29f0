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
from typing import Final

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
    """One call taken apart: entries, which may collide, in lines, which cannot.

    per_line: whether each line has indices of its own. first: the position of the source among the
    operands, which the indices follow.
    """

    source: TensorType
    out: TensorType
    indices: tuple[TensorType, ...]
    entry_dims: tuple[int, ...]
    line_dims: tuple[int, ...]
    per_line: bool
    direct: Shape
    axes: tuple[int, ...]
    first: int

    def over(self, dims: Sequence[int], *strides: Shape, prefix: str = "LINE") -> Lines:
        shape = tuple(self.source.shape[d] for d in dims)
        return Lines(shape, [tuple(s[d] for d in dims) for s in strides], prefix)

    @property
    def entries(self) -> int:
        return math.prod(self.source.shape[d] for d in self.entry_dims)

    @property
    def lines(self) -> int:
        return math.prod(self.source.shape[d] for d in self.line_dims)

    @property
    def indexed(self) -> int:
        """How many elements the index tensors have, repeated ones left out."""
        return self.entries * (self.lines if self.per_line else 1)


def _taken_apart(
    source: TensorType, out: TensorType, indices: tuple[TensorType, ...], axes: tuple[int, ...],
    first: int,
) -> _Write:  # fmt: skip
    rank = source.ndim
    lines = tuple(d for d in range(rank) if d in axes)
    entries = tuple(d for d in range(rank) if d not in axes)
    repeat = all(t.strides[d] == 0 or source.shape[d] == 1 for t in indices for d in lines)
    direct = direct_steps(out, rank, axes)
    return _Write(source, out, indices, entries, lines, not repeat, direct, axes, first)


def lower_put_cuda(
    types: Types, outputs: tuple[TensorType, ...], generic: Callable[[], Lowering],
    start: Callable[[], BoundKernel], *, axes: tuple[int, ...], combine: str, wrap: bool,
    first: int = 1,
) -> Lowering:  # fmt: skip
    """generic: the lowering in which one thread makes the colliding writes of its place; start:
    the kernel that makes the result a copy of x, or zeros; first: the position of the values among
    the operands, which the indices follow."""
    source, (out,) = types[first], outputs
    assert isinstance(source, TensorType)
    indices = tuple(t for t in types[first + 1 :] if isinstance(t, TensorType))
    independent = math.prod(source.shape[d] for d in range(source.ndim) if d in axes)
    colliding = source.numel // max(independent, 1)
    if colliding <= 1 or (colliding <= FEW and independent >= SIDE_BY_SIDE):
        return generic()
    write = _taken_apart(source, out, indices, axes, first)
    if write.entries >= LONGEST:
        raise UnsupportedError(
            f"{write.entries} indexed writes into {out} are too many for one call on a GPU; "
            "split the indices"
        )
    temporaries = Temporaries()
    key = dtypes.uint32 if out.span < LONGEST - 1 else dtypes.uint64
    pair = (
        temporaries.new(write.indexed * key.itemsize), temporaries.new(write.indexed * 4)
    )  # fmt: skip
    calls: list[Bound] = [start(), _targets(write, pair, C_TYPES[key.name], wrap=wrap)]
    keys = tensor_type(key, (write.indexed // write.entries, write.entries))
    sorted_calls, pair = Sorter(temporaries, keys, pair[0], 1, descending=False).sort_pairs(pair)
    calls += sorted_calls
    calls += _combining(write, pair, C_TYPES[key.name], combine, temporaries)
    return Lowering((), tuple(temporaries.sizes), calls=tuple(calls))


def _targets(write: _Write, pair: Pair, key: str, *, wrap: bool) -> Bound:
    """The launch that finds what the indices of each element give."""
    count = len(write.indices)
    steps = [t.strides for t in write.indices]
    dims = (*write.line_dims, *write.entry_dims) if write.per_line else write.entry_dims
    elements = write.over(dims, *steps, prefix="ENTRY")
    numbers = range(count)
    defines = {
        "KEY": key,
        "INDEX_POINTERS": "".join(
            f"const {C_TYPES[t.dtype.name]}* index{n}, " for n, t in enumerate(write.indices)
        ),
        "INDEX_SIZES": "".join(f", long long size{n}, long long jump{n}" for n in numbers),
        "TARGETS_OF_ENTRY": " ".join(f"TARGET({n})" for n in numbers),
    }
    sizes = [write.indexed, write.entries, int(wrap)]
    for d in indexed_dims(write.axes, count):
        sizes += [write.out.shape[d], write.out.strides[d]]
    operands = (*(Ref("input", write.first + 1 + n) for n in numbers), *pair, Ref("error", 0))
    return launch(
        "writes", "find_targets", defines, operands, sizes, elements,
        blocks=each(write.indexed, THREADS), threads=THREADS,
    )  # fmt: skip


def _combining(
    write: _Write, pair: Pair, key: str, combine: str, temporaries: Temporaries
) -> list[Bound]:
    """The launches that write what the sorted entries give."""
    strides = write.source.strides
    columns = write.over(write.line_dims, strides, write.direct)
    entries = write.over(write.entry_dims, strides, prefix="ENTRY")
    dtype = write.out.dtype
    wide = compute_dtype(dtype)
    if dtype.kind == "b":  # or, and
        combine = {"add": "max", "mul": "min"}.get(combine, combine)
    x, out = Ref("input", write.first), Ref("output", 0)
    count, width = write.entries, write.lines
    kinds = {"IN": dtype, "OUT": dtype}
    here = {"KEY": key, "PER_LINE": int(write.per_line)}
    if combine != "set" and (write.per_line or width < WIDE_ROWS):
        defines = scan_defines(SEGMENTS, wide, combine=combine, dtypes=kinds) | here
        number = len(temporaries.sizes)
        calls, nbytes = scan_calls(defines, (x, *pair), (out,), (), count, columns, entries, number)
        if nbytes:
            temporaries.new(nbytes)
        return calls
    code = {"set": 0, "add": 0, "mul": 1, "max": 2, "min": 3}[combine]
    defines = {**number_defines(WIDE=wide, **kinds), **here, "COMBINE": code}

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
    cut = (count, width, chunk, blocks)
    return [
        call("fold_rows", (x, *pair, out, heads, tails), cut, blocks * chunks),
        call("join_rows", (pair[0], out, heads, tails), cut, blocks * chunks),
    ]
