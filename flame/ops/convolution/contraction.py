"""The kernel of a convolution and of its input gradient: sums over taps in register tiles.

A tile holds a few positions times a few vectors of channels. For each tap and each channel summed
over, the tile's vectors of weights are loaded once and multiplied with one value of each position;
the positions may lie anywhere, as each has the offset of its first source element in a table.
Weights are walked in chunks that stay in the first-level cache while all tiles of a block pass,
and a block's sums lie in a worker's scratch memory between chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flame.core.dtypes import DType
from flame.core.types import TensorType
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Operand, Ref
from flame.kernel.program import Matrix
from flame.kernel.values import Value, cast, const, fma, read
from flame.ops.convolution.blocking import Tile
from flame.ops.convolution.geometry import Phase
from flame.ops.convolution.packing import flat, table_type, turnable

CAPACITY = 512  # positions of a block, at most
CHUNK_BYTES = 36864  # of weights that pass over a block's tiles together
LEAST_ITEMS = 32  # blocks wanted, to keep threads evenly busy


@dataclass(frozen=True)
class Operands:
    """What stands behind a contraction: packed source and weights, bias or None."""

    source: Ref
    source_type: TensorType  # (N, groups, D, H, W, channels summed over)
    weight: Ref
    weight_type: TensorType  # (groups, blocks, taps, channels summed over, lanes)
    bias: Ref | None
    bias_type: TensorType | None


@dataclass(frozen=True)
class Target:
    """Where sums go: (N, groups * channels, D, H, W) from element ``base``.

    Positions stand side by side, or channels do: there are no other layouts of results.
    """

    ref: Ref
    type: TensorType
    base: int = 0


def contract(
    operands: Operands, out: Target, phase: Phase, tile: Tile, dtype: DType, table: int
) -> BoundKernel:
    """Write the sums of a phase, which are of ``dtype``; temporary ``table`` has the positions."""
    return _Contraction(operands, out, phase, tile, dtype, table).kernel()


class _Contraction:
    def __init__(
        self, operands: Operands, out: Target, phase: Phase, tile: Tile, dtype: DType, table: int
    ) -> None:
        self.tile, self.phase, self.dtype = tile, phase, dtype
        self.out_type, self.base = out.type, out.base
        self.k = k = KernelBuilder("contract")
        source, weight = operands.source_type, operands.weight_type
        self.source = k.tensor(operands.source.role, operands.source.position, source)
        self.weight = k.tensor(operands.weight.role, operands.weight.position, weight)
        self.bias: Operand | None = None
        if operands.bias is not None and operands.bias_type is not None:
            self.bias = k.tensor(operands.bias.role, operands.bias.position, operands.bias_type)
        self.out = flat(k, out.ref.role, out.ref.position, out.type)
        self.images, self.groups, self.summed = source.shape[0], source.shape[1], source.shape[5]
        self.blocks = weight.shape[1]
        self.channels = out.type.shape[1] // self.groups
        extent = self.phase.extent
        self.pixels = extent[0] * extent[1] * extent[2]
        self.part = self._block_size()
        self._runs(source)
        self.begins = k.tensor("temporary", table, table_type(self.images, phase))
        self.sums = k.scratch(dtype, (_round(CAPACITY, tile.positions), tile.lanes))

    def _block_size(self) -> int:
        """Positions that one iteration takes."""
        total = self.images * self.pixels
        limit = CAPACITY
        while limit > 64 and self.groups * self.blocks * -(-total // limit) < LEAST_ITEMS:
            limit //= 2
        return _round(-(-total // -(-total // limit)), self.tile.positions) if total else 1

    def _runs(self, source: TensorType) -> None:
        """Neighbouring taps along the last dimension are one run where they lie side by side."""
        taps = list(self.phase.axes)
        last = taps[2]
        run = self.summed
        self.merged = last.taps > 0 and last.dilation == 1 and source.strides[4] == self.summed
        self.tap_counts = [a.taps for a in taps]
        if self.merged:
            run *= last.taps
            self.tap_counts[2] = 1 if last.taps else 0
        self.run = run
        chunk = max(16, CHUNK_BYTES // (self.tile.lanes * self.dtype.itemsize))
        pieces = max(1, -(-run // chunk))
        self.chunk = -(-run // pieces)

    # --- the kernel -------------------------------------------------------------------------------

    def kernel(self) -> BoundKernel:
        k = self.k
        taps = self.phase.taps
        products = taps[0] * taps[1] * taps[2] * self.summed
        work = self.part * self.tile.vectors * (products + 4)
        total = self.images * self.pixels
        parts = -(-total // self.part)
        with k.parallel(self.groups, self.blocks, parts, work=work) as (g, b, p):
            begin = p * k.size(self.part)
            length = values.binary("min", k.size(total) - begin, k.size(self.part))
            tiles = values.binary(
                "udiv", length + (self.tile.positions - 1), const(self.tile.positions)
            )
            self._start(tiles, g, b)
            self._sum(begin, tiles, g, b)
            self._finish(begin, length, g, b)
        return k.bind()

    def _start(self, tiles: Value, g: Value, b: Value) -> None:
        """All sums at the bias, or 0."""
        k, lanes = self.k, self.tile.lanes
        with k.vector(lanes, self.tile.vectors) as v:
            channel = b * lanes + v
            value = const(0, self.dtype)
            if self.bias is not None:
                own = k.size(self.channels)
                inside = channel < own
                index = g * own + values.binary("min", channel, own - 1)
                value = values.select(inside, cast(self.bias[index], self.dtype), value)
            start = k.register(value)
            with k.loop(tiles * self.tile.positions) as q:
                k.store(self.sums, (q, v), read(start))

    def _sum(self, start: Value, tiles: Value, g: Value, b: Value) -> None:
        k, lanes = self.k, self.tile.lanes
        if not all(self.tap_counts):
            return
        strides = [
            s * _step(k, a.dilation)
            for s, a in zip(self.source.strides[2:5], self.phase.axes, strict=True)
        ]
        counts = [k.size(c) for c in self.tap_counts]
        run, chunk = k.size(self.run), k.size(self.chunk)
        weights = self.weight.at((g, b, const(0), const(0), const(0)))
        group = self.source.strides[1] * g

        def place(t: Sequence[Value]) -> tuple[Value, Value]:
            """(offset into the source, number) of a tap."""
            offset = sum((i * s for i, s in zip(t, strides, strict=True)), const(0))
            return offset, (t[0] * counts[1] + t[1]) * counts[2] + t[2]

        if self._fits():
            with k.loop(tiles) as tile:
                self._tile(start, tile, group, weights, counts, place)
            return
        with k.nest(counts) as t:
            offset, tap = place(t)
            pieces = -(-self.run // self.chunk)
            with k.loop(k.size(pieces)) as piece:
                begin = piece * chunk
                length = values.binary("min", run - begin, chunk)
                base = weights + (tap * run + begin) * lanes
                with k.loop(tiles) as tile:
                    self._tile(start, tile, group + offset + begin, base, (length,), None)

    def _fits(self) -> bool:
        """Whether all weights of a block stay in the first-level cache."""
        taps = self.tap_counts[0] * self.tap_counts[1] * self.tap_counts[2]
        nbytes = taps * self.run * self.tile.lanes * self.dtype.itemsize
        return taps > 1 and nbytes <= CHUNK_BYTES

    def _tile(
        self,
        start: Value,
        tile: Value,
        offset: Value,
        weights: Value,
        extents: Sequence[Value],
        place: Callable[[Sequence[Value]], tuple[Value, Value]] | None,
    ) -> None:
        """One register tile over one chunk of weights, or over the runs of all taps."""
        k, count, lanes = self.k, self.tile.positions, self.tile.lanes
        q = tile * count
        begins = [k.register(self.begins[start + q + i] + offset) for i in range(count)]
        with k.vector(lanes, self.tile.vectors) as v:
            sums = [k.register(self.sums[q + i, v]) for i in range(count)]

            def run(length: Value, source: Value, base: Value) -> None:
                with k.loop(length) as c:
                    weight = values.load(self.weight.buffer, base + c * lanes + v)
                    for total, begin in zip(sums, begins, strict=True):
                        value = values.load(self.source.buffer, read(begin) + source + c)
                        k.assign(total, product_sum(value, weight, read(total)))

            if place is None:
                run(extents[0], const(0), weights)
            else:
                with k.nest(extents) as t:
                    source, tap = place(t)
                    length = k.size(self.run)
                    run(length, source, weights + tap * length * lanes)
            for i, total in enumerate(sums):
                k.store(self.sums, (q + i, v), read(total))

    def _finish(self, begin: Value, length: Value, g: Value, b: Value) -> None:
        """The sums to their places, image by image."""
        k, lanes = self.k, self.tile.lanes
        own = k.size(self.channels)
        steps = [k.size(s) for s in self.out_type.strides]
        channels = values.binary("min", own - b * lanes, const(lanes))
        base = (g * own + b * lanes) * steps[1] + k.size(self.base)
        pixels = k.size(self.pixels)
        end = begin + length
        first = values.binary("udiv", begin, pixels)
        count = values.binary("udiv", end - 1, pixels) - first + 1
        with k.loop(count) as i:
            image = first + i
            low = values.binary("max", begin, image * pixels)
            high = values.binary("min", end, (image + 1) * pixels)
            place = base + image * steps[0] + (low - image * pixels) * steps[4]
            row = low - begin
            if self.out_type.strides[1] == 1 and self.out_type.shape[1] > 1:
                with k.loop(high - low) as j, k.vector(channels, self.tile.vectors) as v:
                    k.store(self.out, (place + j * steps[4] + v,), self.sums[row + j, v])
            elif turnable(self.dtype, self.out_type.dtype):
                k.transpose(
                    high - low, channels, Matrix(self.sums.buffer, row * lanes, const(lanes)),
                    Matrix(self.out.buffer, place, steps[1]),
                )  # fmt: skip
            else:
                with k.loop(channels) as c, k.vector(high - low, 1) as j:
                    k.store(self.out, (place + c * steps[1] + j,), self.sums[row + j, c])


def product_sum(a: Value, b: Value, c: Value) -> Value:
    """a * b + c."""
    return fma(a, b, c) if a.dtype.kind == "f" else a * b + c


def _step(k: KernelBuilder, number: int) -> Value:
    return const(number) if number in (0, 1) else k.size(number)


def _round(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
