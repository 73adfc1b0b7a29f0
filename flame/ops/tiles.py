"""Channels-last images on a GPU, cut into runs of positions for the threads of a block.

A tile is what a block moves at once: `TILE` bytes that lie side by side, of one position or of
several. A run is some tiles, one after the other: each thread meets the same channels in every
tile, so what it keeps of them stays in registers. What runs found is then folded run by run.

Invariant: runs depend on sizes alone, and sums are folded in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from flame.core.dtypes import DType
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Operand, Role
from flame.kernel.values import Value, const

PACK: Final = 16  # bytes that a thread moves at once
TILE: Final = 256 * PACK
BLOCKS: Final = 132 * 4  # runs of all images together: blocks that are resident at a time
FEWEST: Final = 16  # positions of a run, at least: its sums are written, and read again
SHORTEST: Final = 8  # tiles of a run, at least
TOGETHER: Final = 8  # channels whose runs are folded by one block: a sector of memory
FOLDERS: Final = 32  # threads for each of them


@dataclass(frozen=True)
class Tiles:
    """Images (batch, positions, channels), row-major and dense; ``rows`` positions of a tile.

    elements: the most that a tile has. part: channels of a tile, all of them unless they are many.
    step: positions of a run.
    """

    batch: int
    positions: int
    channels: int
    elements: int
    rows: int
    part: int
    step: int

    @property
    def runs(self) -> int:
        """Runs of one image."""
        return -(-self.positions // self.step)

    @property
    def parts(self) -> int:
        return -(-self.channels // self.part)

    def sums(self, compute: DType) -> TensorType:
        """One number for each run and channel."""
        return tensor_type(compute, (self.batch * self.runs, self.channels))

    def constants(self, compute: DType) -> TensorType:
        """A number for each image and element of a tile: those of its channels, row after row, so
        that threads read theirs as they read a tile."""
        return tensor_type(compute, (self.batch, self.rows * self.channels))

    def image(self, k: KernelBuilder, role: Role, position: int, dtype: DType) -> Operand:
        """An operand indexed by the offset of an element."""
        count = self.batch * self.positions * self.channels
        return k.tensor(role, position, tensor_type(dtype, (count,)))


def tiles_of(shape: Shape, itemsize: int, *, blocks: int = 0, shortest: int = 0) -> Tiles:
    """For images of this (batch, positions, channels); itemsize: the largest one of an element.

    blocks: about how many runs and parts there are to be, by default as many as for sums;
    shortest: tiles of a run, at least.
    """
    batch, positions, channels = shape
    elements = TILE // itemsize
    part = min(channels, elements)
    rows = 1
    if part < elements:
        unit = math.lcm(channels, PACK // itemsize) // channels  # rows that are whole packs
        rows = max(elements // channels // unit * unit, 1)
    parts = -(-channels // part)
    least = shortest * rows if shortest else max(FEWEST, SHORTEST * rows)
    wanted = max(1, min((blocks or BLOCKS) // (batch * parts), positions // least))
    tiles = -(-positions // rows)
    step = -(-tiles // wanted) * rows
    return Tiles(batch, positions, channels, elements, rows, part, step)


def image_shape(x: TensorType) -> Shape | None:
    """(batch, positions, channels) of a tensor (N, C, ...) that is dense and channels-last."""
    if x.ndim < 3 or not x.numel:
        return None
    batch, channels, *sizes = x.shape
    wanted = 1
    for dim in (1, *range(x.ndim - 1, 1, -1), 0):
        if x.shape[dim] != 1 and x.strides[dim] != wanted:
            return None
        wanted *= x.shape[dim]
    return batch, math.prod(sizes), channels


class Lane:
    """An element of a tile, inside of a kernel's loops: what one thread meets again in each."""

    def __init__(self, run: Run, lane: Value) -> None:
        several = run.tiles.rows > 1
        self.run, self.lane = run, lane
        self.channel = values.binary("urem", lane, run.size) if several else run.first + lane
        self.constant = (run.sample, run.first + lane)  # where constants of it stand

    def visit(self, body: Callable[[Value, Value | None], None]) -> None:
        """``body(place, where)`` for the element of each tile; where: whether it is one of the run,
        None for always."""
        run, k, tiles = self.run, self.run.k, self.run.tiles
        rows, start = tiles.rows, run.base + run.first
        whole = run.count if rows == 1 else values.binary("udiv", run.count, k.size(rows))
        step = run.size if rows == 1 else k.size(rows * tiles.channels)
        with k.loop(whole) as i:
            body(start + i * step + self.lane, None)
        if tiles.positions % rows:
            rest = run.count * run.size - whole * step
            body(start + whole * step + self.lane, self.lane < rest)


class Run:
    """The run at hand, inside of a kernel's parallel loop.

    sample: its image; number: which one of all runs; count: its positions; first: the first channel
    at hand; base: the offset of its first element.
    """

    def __init__(
        self, k: KernelBuilder, tiles: Tiles, counters: tuple[Value, ...], *, backwards: bool
    ) -> None:
        self.k, self.tiles = k, tiles
        self.sample, run, part = counters
        self.size, runs = k.size(tiles.channels), k.size(tiles.runs)
        if backwards:
            self.sample, run = k.size(tiles.batch) - 1 - self.sample, runs - 1 - run
        step, positions, self.first = k.size(tiles.step), k.size(tiles.positions), part
        begin = run * step
        self.number = self.sample * runs + run
        self.count = values.binary("min", positions - begin, step)
        self.base = (self.sample * positions + begin) * self.size
        if tiles.parts > 1:
            self.first = part * tiles.part
        else:
            self.first = const(0)

    @contextmanager
    def lanes(self) -> Iterator[Lane]:
        """The loop over the elements of a tile."""
        t, k = self.tiles, self.k
        extent = k.size(t.rows * t.part)
        if t.parts > 1:
            extent = values.binary("min", self.size - self.first, extent)
        with k.vector(extent) as lane:
            yield Lane(self, lane)


@contextmanager
def runs(k: KernelBuilder, tiles: Tiles, *, backwards: bool = False) -> Iterator[Run]:
    """The parallel loop over runs.

    backwards: from the last one to the first, as the cache may still hold the end of the images.
    """
    t = tiles
    with k.parallel(t.batch, t.runs, t.parts, work=t.step * t.part) as counters:
        yield Run(k, t, counters, backwards=backwards)


def sum_runs(
    k: KernelBuilder, tiles: Tiles, compute: DType, count: int,
    terms: Callable[[Lane], Callable[[Value, Value | None], Sequence[Value]]],
    finished: Callable[[Run, Value, list[Value]], None],
) -> None:  # fmt: skip
    """The loops of a kernel that sums over the positions of each run.

    terms(lane) gives terms(place, where): ``count`` numbers, 0 where ``where`` does not hold.
    finished(run, channel, sums) stores what comes of them.
    """
    several = tiles.rows > 1
    kept = [k.scratch(compute, (tiles.elements,)) for _ in range(count)] if several else []
    with runs(k, tiles) as run:
        with run.lanes() as lane:
            of = terms(lane)
            totals = [k.register(0.0, compute) for _ in range(count)]

            def add(place: Value, where: Value | None) -> None:
                for total, term in zip(totals, of(place, where), strict=True):
                    k.accumulate(total, "add", term)

            lane.visit(add)
            found = [values.read(total) for total in totals]
            if several:
                k.store_all([(t, (lane.lane,), v) for t, v in zip(kept, found, strict=True)])
            else:
                finished(run, lane.channel, found)
        if several:
            with k.vector(run.size) as channel:
                totals = [k.register(0.0, compute) for _ in range(count)]
                with k.loop(k.size(tiles.rows)) as row:
                    for total, source in zip(totals, kept, strict=True):
                        k.accumulate(total, "add", source[row * run.size + channel])
                finished(run, channel, [values.read(total) for total in totals])


def fold_runs(
    k: KernelBuilder, runs: int, channels: int, compute: DType, count: int,
    terms: Callable[[Value, Value], Sequence[Value]],
    finished: Callable[[Value, Value, list[Value]], Sequence[Value]],
    constants: Sequence[Operand], rows: int,
) -> None:  # fmt: skip
    """The loops of a kernel that sums ``count`` terms(run, channel) over all runs of one image.

    A block takes `TOGETHER` channels. finished(channel, exists, sums) stores what comes of them and
    gives what ``constants``, for tiles of so many rows, say of the channel.
    """
    size = k.size(channels)
    with k.parallel(-(-channels // TOGETHER), work=runs * TOGETHER * count) as (block,):
        first = block * TOGETHER
        kept = [k.scratch(compute, (FOLDERS, TOGETHER)) for _ in range(count)]
        made = [k.scratch(compute, (TOGETHER,)) for _ in constants]
        with k.vector(const(FOLDERS * TOGETHER)) as lane:
            start, beside = _apart(lane, const(TOGETHER))
            channel = values.binary("min", first + beside, size - 1)
            totals = [k.register(0.0, compute) for _ in range(count)]
            mine = values.binary("udiv", k.size(runs) + (FOLDERS - 1) - start, const(FOLDERS))
            with k.loop(mine) as i:
                found = terms(i * FOLDERS + start, channel)
                for total, term in zip(totals, found, strict=True):
                    k.accumulate(total, "add", term)
            k.store_all(
                [(t, (start, beside), values.read(v)) for t, v in zip(kept, totals, strict=True)]
            )
        with k.vector(const(TOGETHER)) as beside:
            sums = [k.register(0.0, compute) for _ in range(count)]
            with k.loop(FOLDERS) as i:
                for total, source in zip(sums, kept, strict=True):
                    k.accumulate(total, "add", source[i, beside])
            channel = first + beside
            found = finished(channel, channel < size, [values.read(total) for total in sums])
            k.store_all([(t, (beside,), v) for t, v in zip(made, found, strict=True)])
        with k.vector(k.size(rows) * TOGETHER) as lane:
            row, beside = _apart(lane, const(TOGETHER))
            channel = first + beside
            index = (const(0), row * size + channel)
            k.store_all(
                [(t, index, v[beside]) for t, v in zip(constants, made, strict=True)],
                channel < size,
            )


def _apart(number: Value, size: Value) -> tuple[Value, Value]:
    """Quotient and remainder."""
    return values.binary("udiv", number, size), values.binary("urem", number, size)


@contextmanager
def each_constant(
    k: KernelBuilder, tiles: Tiles, first: Value, width: Value
) -> Iterator[tuple[Value, Value]]:
    """The loop over (channel, place in an image's constants) of ``width`` channels."""
    with k.vector(k.size(tiles.rows) * width) as lane:
        row, beside = _apart(lane, width)
        yield first + beside, row * k.size(tiles.channels) + first + beside
