"""Sorting on a GPU: argsort, topk and what is read off sorted lines, as launches of sort.cu,
select.cu and order.cu.

Invariant: every result is a function of the operands alone; no result depends on how threads run.
"""

from __future__ import annotations

from typing import Any, Final

from flame.core.errors import UnsupportedError
from flame.core.types import TensorType
from flame.kernel.builder import Bound, BoundFill, Lowering, Ref
from flame.ops.cuda_lines import Lines, each, key_bytes, key_defines, launch
from flame.ops.op import Types

THREADS: Final = 256
TILE: Final = 2048  # elements that a block sorts, as in sort.cu
MINIMUM: Final = 8  # the shortest segment of a tile: the elements of a thread
SELECT_THREADS: Final = 512
CHUNK: Final = 8192  # the least part of a line that one block selects from
BUSY: Final = 64  # lines that keep enough blocks busy without cutting them
LONGEST: Final = 1 << 32  # elements of a line: places in it have 32 bits


class Temporaries:
    """Collects the bytes of a lowering's temporaries."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def new(self, nbytes: int) -> Ref:
        self.sizes.append(nbytes)
        return Ref("temporary", len(self.sizes) - 1)


Pair = tuple[Ref, Ref]  # keys, and places in their lines


def _without(t: TensorType, dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of the lines along ``dim``."""
    return (*t.shape[:dim], *t.shape[dim + 1 :]), (*t.strides[:dim], *t.strides[dim + 1 :])


def _check_length(name: str, length: int, x: TensorType) -> None:
    if length >= LONGEST:
        raise UnsupportedError(
            f"{name}: a dimension of {length} elements of {x} is too long to be sorted on a GPU; "
            "split it"
        )


def _pair(temporaries: Temporaries, count: int, width: int) -> Pair:
    return temporaries.new(count * width), temporaries.new(count * 4)


class Sorter:
    """Launches that sort the lines of one operand along a dimension."""

    def __init__(
        self, temporaries: Temporaries, x: TensorType, ref: Ref, dim: int, *, descending: bool
    ) -> None:
        self.temporaries = temporaries
        self.x, self.ref, self.dim = x, ref, dim
        self.width = key_bytes(x.dtype)
        self.defines = key_defines(x.dtype, descending=descending)
        self.shape, self.strides = _without(x, dim)
        self.length, self.step = x.shape[dim], x.strides[dim]

    def to_pairs(self) -> tuple[list[Bound], Pair]:
        """Sorted keys and places, line after line, in temporaries."""
        lines = Lines(self.shape, (self.strides,))
        calls, last = self._runs(self.ref, lines, pairs=False, final=None)
        assert last is not None
        return calls, last

    def to_places(self, out: TensorType, limit: int) -> list[Bound]:
        """The places of the first ``limit`` elements into output 0."""
        lines = Lines(self.shape, (self.strides, _without(out, self.dim)[1]))
        return self._runs(self.ref, lines, pairs=False, final=(out.strides[self.dim], limit))[0]

    def sort_pairs(self, given: Pair) -> tuple[list[Bound], Pair]:
        """Given keys and places, line after line, sorted."""
        calls, last = self._runs(given, Lines(self.shape, ()), pairs=True, final=None)
        assert last is not None
        return calls, last

    def pairs_to_places(self, given: Pair, count: int, out: TensorType) -> list[Bound]:
        """As `to_places`, of ``count`` chosen pairs of each line."""
        lines = Lines(self.shape, (self.strides, _without(out, self.dim)[1]))
        self.length = count
        return self._runs(given, lines, pairs=True, final=(out.strides[self.dim], count))[0]

    def _runs(
        self, given: Ref | Pair, lines: Lines, *, pairs: bool, final: tuple[int, int] | None
    ) -> tuple[list[Bound], Pair | None]:
        length, count = self.length, lines.count
        tiles = each(length, TILE)
        segment = TILE
        if tiles == 1:
            segment = max(MINIMUM, 1 << (length - 1).bit_length())
        blocks = count * tiles if tiles > 1 else each(count, TILE // segment)
        out_step, limit = final or (0, length)
        at_end = tiles == 1 and final is not None
        made = None if at_end else _pair(self.temporaries, count * length, self.width)
        inputs = given if isinstance(given, tuple) else (given,)
        calls: list[Bound] = [
            launch(
                "sort", "sort_tiles", {**self.defines, "PAIRS": int(pairs), "FINAL": int(at_end)},
                (*inputs, *(made or (Ref("output", 0),))),
                (count, length, segment, tiles, self.step, out_step, limit),
                lines, blocks=blocks, threads=THREADS,
            )
        ]  # fmt: skip
        run, spare = TILE, None
        while run < length:
            assert made is not None
            at_end = final is not None and 2 * run >= length
            if not at_end and spare is None:
                spare = _pair(self.temporaries, count * length, self.width)
            targets = (Ref("output", 0),) if at_end else spare
            assert targets is not None
            calls.append(
                launch(
                    "sort", "merge_runs", {**self.defines, "PAIRS": 0, "FINAL": int(at_end)},
                    (*made, *targets), (length, run, tiles, out_step, limit if at_end else length),
                    lines, blocks=blocks, threads=THREADS,
                )
            )  # fmt: skip
            if not at_end:
                assert spare is not None
                made, spare = spare, made
            run *= 2
        return calls, made


def _nothing(outputs: tuple[TensorType, ...]) -> bool:
    return not outputs[0].numel


def lower_argsort(
    types: Types, outputs: tuple[TensorType, ...], *, dim: int, descending: bool, stable: bool
) -> Lowering:
    """One launch where a line fits a tile, else one more for each doubling beyond it."""
    x = _tensor(types[0])
    _check_length("argsort", x.shape[dim], x)
    if _nothing(outputs):
        return Lowering(())
    temporaries = Temporaries()
    sorter = Sorter(temporaries, x, Ref("input", 0), dim, descending=descending)
    calls = sorter.to_places(outputs[0], x.shape[dim])
    return Lowering((), tuple(temporaries.sizes), calls=tuple(calls))


def _tensor(t: Any) -> TensorType:
    assert isinstance(t, TensorType)
    return t


def lower_topk(
    types: Types, outputs: tuple[TensorType, ...], *, k: int, dim: int, largest: bool, ordered: bool
) -> Lowering:
    """The k best of each chunk of a line, of those of the chunks' best, and so on; then sorted.

    Where k is no small part of a line, the whole line is sorted. Of equal elements the first ones
    are taken.
    """
    x = _tensor(types[0])
    length = x.shape[dim]
    _check_length("topk", length, x)
    if _nothing(outputs):
        return Lowering(())
    temporaries = Temporaries()
    sorter = Sorter(temporaries, x, Ref("input", 0), dim, descending=largest)
    if k > TILE or length <= TILE or k * 4 > length:
        calls = sorter.to_places(outputs[0], k)
        return Lowering((), tuple(temporaries.sizes), calls=tuple(calls))
    calls = []
    lines = Lines(sorter.shape, (sorter.strides,))
    given: Ref | Pair = Ref("input", 0)
    while True:
        chunk = max(CHUNK, 4 * k) if lines.count < BUSY else length
        chunks = each(length, chunk)
        made = _pair(temporaries, lines.count * chunks * k, sorter.width)
        pairs = isinstance(given, tuple)
        inputs = given if isinstance(given, tuple) else (given,)
        calls.append(
            launch(
                "select", "select_smallest", {**sorter.defines, "PAIRS": int(pairs)},
                (*inputs, *made), (length, chunk, chunks, k, sorter.step),
                lines, blocks=lines.count * chunks, threads=SELECT_THREADS,
            )
        )  # fmt: skip
        given, length = made, chunks * k
        if chunks == 1:
            break
    calls += sorter.pairs_to_places(made, k, outputs[0])
    return Lowering((), tuple(temporaries.sizes), calls=tuple(calls))


def lower_median(
    types: Types, outputs: tuple[TensorType, ...], *, dim: int, skip_nan: bool
) -> Lowering:
    """The lines sorted, then one place read of each."""
    x, out = _tensor(types[0]), outputs[0]
    _check_length("median", x.shape[dim], x)
    if _nothing(outputs):
        return Lowering(())
    temporaries = Temporaries()
    sorter = Sorter(temporaries, x, Ref("input", 0), dim, descending=False)
    calls, pair = sorter.to_pairs()
    lines = Lines(sorter.shape, (_without(out, dim)[1],))
    calls.append(
        launch(
            "order", "pick_median", {**sorter.defines, "SKIP_NAN": int(skip_nan)},
            (*pair, Ref("output", 0)), (lines.count, sorter.length),
            lines, blocks=each(lines.count, THREADS), threads=THREADS,
        )
    )  # fmt: skip
    return Lowering((), tuple(temporaries.sizes), calls=tuple(calls))


def lower_mode(types: Types, outputs: tuple[TensorType, ...], *, dim: int) -> Lowering:
    """The lines sorted, then the longest run of equal elements, of several the smallest."""
    x, out = _tensor(types[0]), outputs[0]
    _check_length("mode", x.shape[dim], x)
    if _nothing(outputs):
        return Lowering(())
    temporaries = Temporaries()
    sorter = Sorter(temporaries, x, Ref("input", 0), dim, descending=False)
    calls, (keys, index) = sorter.to_pairs()
    lines = Lines(sorter.shape, (_without(out, dim)[1],))
    best = temporaries.new(lines.count * 8)
    defines = {**sorter.defines, "SKIP_NAN": 0}
    calls += [
        BoundFill((best,), lines.count * 8),
        launch(
            "order", "longest_run", defines, (keys, best), (lines.count, sorter.length),
            lines, blocks=each(x.numel, THREADS), threads=THREADS,
        ),
        launch(
            "order", "pick_mode", defines, (best, index, Ref("output", 0)),
            (lines.count, sorter.length),
            lines, blocks=each(lines.count, THREADS), threads=THREADS,
        ),
    ]  # fmt: skip
    return Lowering((), tuple(temporaries.sizes), calls=tuple(calls))


def lower_isin(types: Types, outputs: tuple[TensorType, ...], *, invert: bool) -> Lowering:
    """The tests sorted, then every element searched for."""
    x, tests, out = _tensor(types[0]), _tensor(types[1]), outputs[0]
    _check_length("isin", tests.numel, tests)
    if _nothing(outputs):
        return Lowering(())
    temporaries = Temporaries()
    sorter = Sorter(temporaries, tests, Ref("input", 1), 0, descending=False)
    calls, (keys, _) = sorter.to_pairs() if tests.numel else ([], (Ref("input", 1), None))
    lines = Lines(x.shape, (x.strides, out.strides))
    calls.append(
        launch(
            "order", "find_members", {**sorter.defines, "SKIP_NAN": 0},
            (Ref("input", 0), keys, Ref("output", 0)),
            (x.numel, tests.numel, int(invert)),
            lines, blocks=each(x.numel, THREADS), threads=THREADS,
        )
    )  # fmt: skip
    return Lowering((), tuple(temporaries.sizes), calls=tuple(calls))


def lower_search(types: Types, outputs: tuple[TensorType, ...], *, right: bool) -> Lowering:
    """A binary search for each value."""
    edges, x, out = _tensor(types[0]), _tensor(types[1]), outputs[0]
    if _nothing(outputs):
        return Lowering(())
    before = (0,) * x.ndim if edges.ndim == 1 else (*edges.strides[:-1], 0)
    lines = Lines(x.shape, (before, x.strides, out.strides))
    call = launch(
        "order", "find_places", {**key_defines(x.dtype), "SKIP_NAN": 0},
        (Ref("input", 0), Ref("input", 1), Ref("output", 0)),
        (x.numel, edges.shape[-1], edges.strides[-1], int(right)),
        lines, blocks=each(x.numel, THREADS), threads=THREADS,
    )  # fmt: skip
    return Lowering((), calls=(call,))
