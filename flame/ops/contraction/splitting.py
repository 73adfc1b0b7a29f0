"""Numbers as sums of bfloat16 parts, packed for the processor's matrix unit.

A float32 x is hi + mid + lo exactly: hi is x rounded to the 8 digits of bfloat16, mid is x - hi
cut to as many, lo is the rest. Where a number is infinite, no number, or so large that hi is
infinite, what is left for lo is no number, so one sum of all rests tells whether a panel has such
numbers. Parts below 2**-126 count as 0, so numbers below 2**-102 lose digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flame.core import dtypes
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Operand
from flame.kernel.program import Matrix
from flame.kernel.values import Register, Value, bitcast, const, read
from flame.ops.contraction.factors import Reader, flat_of

SIDE = 32  # rows or columns of a panel, and the depth of a step
HALF = SIDE // 2
TILE = 256  # elements of 4 bytes
_UPPER = const(0xFFFF0000, dtypes.uint32)
_ROUND = const(0x8000, dtypes.uint32)
_HALF_BITS = const(16, dtypes.uint32)

Load = Callable[[Value, Value, Value], tuple[Value, Value]]  # t, line, lane -> a pair


def split(x: Value, parts: int) -> tuple[list[Value], Value]:
    """(the bits of the first parts, in the upper halves of float32; one of what is left of x)."""
    made = []
    for part in range(parts):
        bits = bitcast(x, dtypes.uint32)
        if part == 0 or parts < 3:
            bits = bits + _ROUND  # so that the parts that follow are small, of either sign
        upper = bits & _UPPER
        made.append(upper)
        if part < 2:
            x = x - bitcast(upper, dtypes.float32)
    return made, x


@dataclass(frozen=True)
class Depth:
    """A chunk of the depth: which, where it begins, its length, its steps."""

    chunk: Value
    begin: Value
    length: Value
    steps: Value


class Packer:
    """Packs panels of one factor: rows of the first one, columns of the second one."""

    def __init__(self, k: KernelBuilder, reader: Reader, parts: int, *, rows: bool, depth: int):
        self.k, self.reader, self.parts, self.rows = k, reader, parts, rows
        factor = reader.factor
        self.ragged = depth % SIDE != 0
        lines, across = factor.depth_axis, factor.width_axis
        if not rows:
            lines, across = across, lines
        self.direct = factor.side_by_side(lines)
        self.turned = not self.direct and factor.side_by_side(across)
        self.plain = factor.plain(dtypes.float32)
        if self.ragged or not self.direct:
            self.stage = k.local(dtypes.float32, (SIDE, SIDE))
        if self.turned and not self.plain:
            self.raw = k.local(dtypes.float32, (SIDE, SIDE))

    @property
    def step_size(self) -> int:
        """Elements of a panel's step."""
        return 2 * self.parts * TILE

    def pack(
        self, batch: Sequence[Value], depth: Depth, first: Value, target: Operand, at: Value
    ) -> Value:
        """Pack the panel from ``first`` on at offset ``at``; 0, or 1 where it is to be skipped."""
        k = self.k
        left = k.register(const(0, dtypes.float32))
        flat = flat_of(target)
        if self.direct:
            whole = values.binary("udiv", depth.length, const(SIDE))
            with k.vector(HALF) as v:
                total = k.register(const(0, dtypes.float32))
                # along the rows of memory
                extents = (2, HALF, whole) if self.rows else (whole, HALF, 2)
                with k.nest(extents) as (x, line, y):
                    t, s = (x, y) if self.rows else (y, x)
                    load = self._from_memory(batch, depth.begin + s * SIDE, first)
                    place = at + s * self.step_size
                    self._line(load(t, line, v), flat, place + self._place(t, line, v), total)
                k.accumulate(left, "add", read(total))
            if self.ragged:
                with k.when(whole < depth.steps):
                    self._staged(batch, depth, first, whole, flat, at, left)
        else:
            with k.loop(depth.steps) as s:
                self._staged(batch, depth, first, s, flat, at, left)
        infinity = const(float("inf"), dtypes.float32)
        one, zero = const(1, dtypes.float32), const(0, dtypes.float32)
        return values.select(abs(read(left)) < infinity, zero, one)

    def _place(self, t: Value, line: Value, v: Value) -> Value:
        """Where the first part of a pair stands in a step."""
        return t * (self.parts * TILE) + line * HALF + v

    def _line(
        self, pair: tuple[Value, Value], target: Operand, place: Value, total: Register
    ) -> None:
        """Pack a vector of pairs."""
        (low, low_left), (high, high_left) = (split(x, self.parts) for x in pair)
        for part, (a, b) in enumerate(zip(low, high, strict=True)):
            both = values.binary("shr", a, _HALF_BITS) | b
            self.k.store(target, (place + part * TILE,), both)
        self.k.assign(total, read(total) + (low_left + high_left))

    def _from_memory(self, batch: Sequence[Value], begin: Value, first: Value) -> Load:
        def load(t: Value, line: Value, v: Value) -> tuple[Value, Value]:
            if self.rows:
                row = first + t * HALF + line
                return (
                    self.reader.element(batch, begin + v, row),
                    self.reader.element(batch, begin + HALF + v, row),
                )
            column = first + t * HALF + v
            return (
                self.reader.element(batch, begin + line, column),
                self.reader.element(batch, begin + HALF + line, column),
            )

        return load

    def _from_stage(self, t: Value, line: Value, v: Value) -> tuple[Value, Value]:
        if self.rows:
            row = t * HALF + line
            return self.stage[row, v], self.stage[row, v + HALF]
        column = t * HALF + v
        return self.stage[line, column], self.stage[line + HALF, column]

    # --- steps that are gathered in a small array first -------------------------------------------

    def _staged(
        self, batch: Sequence[Value], depth: Depth, first: Value, s: Value, target: Operand,
        at: Value, left: Register,
    ) -> None:  # fmt: skip
        k = self.k
        begin = depth.begin + s * SIDE
        count: Value = const(SIDE)
        if self.ragged:
            count = values.binary("min", depth.length - s * SIDE, const(SIDE))
            with k.when(count < SIDE), k.loop(SIDE) as i, k.vector(SIDE, 2) as v:
                k.store(self.stage, (i, v), const(0, dtypes.float32))
        if self.turned:
            self._turn(batch, begin, first, count)
        else:
            rows, columns = (const(SIDE), count) if self.rows else (count, const(SIDE))
            with k.loop(rows) as i, k.vector(columns, 2) as v:
                k.store(self.stage, (i, v), self._element(batch, begin, first, i, v))
        with k.vector(HALF) as v:
            total = k.register(const(0, dtypes.float32))
            with k.nest((2, HALF)) as (t, line):
                place = at + s * self.step_size + self._place(t, line, v)
                self._line(self._from_stage(t, line, v), target, place, total)
            k.accumulate(left, "add", read(total))

    def _element(
        self, batch: Sequence[Value], begin: Value, first: Value, i: Value, j: Value
    ) -> Value:
        """What belongs at [i, j] of the stage."""
        depth, width = (j, i) if self.rows else (i, j)
        return self.reader.element(batch, begin + depth, first + width)

    def _turn(self, batch: Sequence[Value], begin: Value, first: Value, count: Value) -> None:
        """The stage from memory whose lines are the stage's columns."""
        k, reader = self.k, self.reader
        rows, columns = (count, const(SIDE)) if self.rows else (const(SIDE), count)
        if self.plain:
            assert reader.operand is not None
            factor = reader.factor
            across = factor.depth_axis if self.rows else factor.width_axis
            start = reader.operand.at(reader.index(batch, begin, first))
            source = Matrix(reader.operand.buffer, start, reader.operand.strides[across])
        else:
            with k.loop(rows) as i, k.vector(columns, 2) as v:
                k.store(self.raw, (i, v), self._element(batch, begin, first, v, i))
            source = Matrix(self.raw.buffer, const(0), const(SIDE))
        k.transpose(rows, columns, source, Matrix(self.stage.buffer, const(0), const(SIDE)))
