"""What a thread keeps of a row in registers, from one vector loop over the row to the next.

Two things are *held*: what several loops read at the same place of a row, which is then read from
memory once, with what the later ones of these loops read; and ``local`` buffers that loops visit at
their own counter alone. A held loop gives the same elements to a thread each time: packs in turn,
at most `Geometry.held` of them.

Invariant: a kernel does the same with and without; nothing it stores is held as a read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Final

from flame.kernel import values
from flame.kernel.program import (
    Accumulate,
    Assign,
    Declare,
    If,
    Kernel,
    Loop,
    LoopKind,
    Statement,
    Store,
)
from flame.kernel.values import Buffer, Value
from flame.render.cuda_index import Bounds, operands, walk
from flame.render.cuda_packs import BYTES, MOST, Simple, item_bytes, loads_of

WORDS: Final = 80  # registers of a thread that hold a row, at most
TURNS: Final = 4  # packs of a row that a thread takes, at most
LINE: Final = 8  # threads of a team whose packs fill a line of memory
LARGEST: Final = 1024
WASTED: Final = 0.9  # of the registers, from which on narrower packs are not worth it

Key = tuple[Buffer, Value]  # an operand, and where in it a row starts


@dataclass(frozen=True)
class Held:
    """width: elements of a pack. loops: the held ones. keys: by loop, the loads that are held.
    first: the loop that reads a held operand from memory: the first one of those in line, so that
    all that is held is on its way at once. local: the buffers in registers."""

    width: int
    loops: frozenset[Loop]
    keys: dict[Loop, dict[Value, Key]]
    first: dict[Key, Loop]
    local: frozenset[Buffer]

    @property
    def words(self) -> int:
        """Registers for a pack of each."""
        sizes = [item_bytes(b.dtype) for b, _ in self.first]
        sizes += [max(item_bytes(b.dtype), 4) for b in self.local]
        return max(1, -(-sum(sizes) * self.width // 4))


def held_of(kernel: Kernel) -> Held | None:
    """What can be held in a kernel; None where there is nothing."""
    everything = [*walk(kernel.body.body)]
    stored = {t.buffer for s in everything if isinstance(s, Store) for t in s.targets}
    local = frozenset(b for b, _ in kernel.local if _is_own(b, kernel))
    keys: dict[Loop, dict[Value, Key]] = {}
    first: dict[Key, Loop] = {}
    for loops in _siblings(kernel.body.body):
        found = {loop: _keys(loop, stored) for loop in loops}
        readers: dict[Key, list[Loop]] = defaultdict(list)
        for loop, mine in found.items():
            for key in dict.fromkeys(mine.values()):
                readers[key].append(loop)
        several = dict.fromkeys(key for key, by in readers.items() if len(by) > 1)
        begin = next((by[0] for key, by in readers.items() if key in several), None)
        if begin is None:
            continue
        # later loops wait for sums of the first one: what they read comes along with the rest
        several |= dict.fromkeys(key for key, by in readers.items() if by[0] is not begin)
        for loop, mine in found.items():
            kept = {value: key for value, key in mine.items() if key in several}
            if kept:
                keys[loop] = kept
        first |= dict.fromkeys(several, begin)
    touched = {loop for loop in _flat_loops(everything) if not local.isdisjoint(_buffers(loop))}
    if not keys and not touched:
        return None
    held = frozenset((*keys, *touched))
    sizes = [item_bytes(b.dtype) for b, _ in first]
    if not sizes:
        sizes = [item_bytes(v.dtype) for loop in held for v in _keys(loop, stored)] or [4]
    width = max(1, min(MOST, BYTES // min(sizes)))
    return Held(width, held, keys, first, local)


def team_of(held: Held, bounds: Bounds, rows: int, threads: int) -> tuple[int, int, int] | None:
    """(threads of a team, packs that each holds, elements of a pack) for so many rows; None where
    rows are too long.

    threads: how many keep the device busy. Packs are narrower where that leaves fewer registers
    without an element, as long as the largest operand is still read 16 bytes at a time.
    """
    longest = 1
    for loop in held.loops:
        extent = bounds.of(loop.extent)
        if extent is None:
            return None
        longest = max(longest, extent[1])
    found = _team_of(held, longest, rows, threads)
    least = BYTES // max((item_bytes(b.dtype) for b, _ in held.first), default=BYTES)
    if found is None or held.width // 2 < max(least, 1):
        return found
    narrow = _team_of(replace(held, width=held.width // 2), longest, rows, threads)
    return narrow if narrow and prod(narrow) < WASTED * prod(found) else found


def _team_of(held: Held, longest: int, rows: int, threads: int) -> tuple[int, int, int] | None:
    packs = -(-longest // held.width)
    most = max(1, min(TURNS, WORDS // held.words))
    team = min(LINE, 1 << (packs - 1).bit_length())
    while team * most < packs or (team < packs and rows * team < threads):
        team *= 2
    return (team, -(-packs // team), held.width) if team <= LARGEST else None


# --- reading kernels ------------------------------------------------------------------------------


def _siblings(body: Sequence[Statement]) -> Iterator[list[Loop]]:
    """Vector loops of one extent that follow each other in one body, in order."""
    groups: dict[Value, list[Loop]] = defaultdict(list)
    for statement in body:
        if isinstance(statement, Loop) and statement.kind is LoopKind.VECTOR:
            if _is_flat(statement):
                groups[statement.extent].append(statement)
        elif isinstance(statement, (Loop, If)):
            yield from _siblings(statement.body)
    yield from groups.values()


def _flat_loops(everything: Iterable[Statement]) -> Iterator[Loop]:
    for statement in everything:
        if isinstance(statement, Loop) and _is_flat(statement):
            yield statement


def _is_flat(loop: Loop) -> bool:
    simple_kinds = (Declare, Assign, Accumulate, Store)
    return loop.kind is LoopKind.VECTOR and all(isinstance(s, simple_kinds) for s in loop.body)


def simple(loop: Loop) -> list[Simple]:
    return [s for s in loop.body if isinstance(s, (Declare, Assign, Accumulate, Store))]


def _keys(loop: Loop, stored: set[Buffer]) -> dict[Value, Key]:
    """Loads of a row: at the loop's counter, from where the row starts, which differs by row."""
    found: dict[Value, Key] = {}
    for value in (v for s in simple(loop) for v in loads_of(s)):
        line = None if len(value.args) > 1 else values.linear(value.args[0], loop.var)
        if value.attr in stored or line is None or not values.is_const(line[0], 1):
            continue
        if _by_row(line[1]):
            found[value] = (value.attr, line[1])
    return found


def _by_row(start: Value) -> bool:
    """Whether an index is made of counters of loops, and of sizes."""
    waiting, counters = [start], False
    while waiting:
        value = waiting.pop()
        if value.op in ("read", "load"):
            return False
        counters = counters or value.op == "var"
        waiting += value.args
    return counters


def _is_own(buffer: Buffer, kernel: Kernel) -> bool:
    """Whether a buffer is visited in flat vector loops alone, each time at the loop's counter."""
    inside: set[Statement] = set()
    for loop in _flat_loops(walk(kernel.body.body)):
        inside.update(loop.body)
        counter = values.var(loop.var)
        for statement in simple(loop):
            for value in loads_of(statement):
                if value.attr is buffer and value.args != (counter,):
                    return False
            if isinstance(statement, Store):
                for target in statement.targets:
                    if target.buffer is buffer and (
                        target.index is not counter or target.where is not None
                    ):
                        return False
    return not any(s not in inside and buffer in _touches(s) for s in walk(kernel.body.body))


def _buffers(loop: Loop) -> set[Buffer]:
    return {b for s in loop.body for b in _touches(s)}


def _touches(statement: Statement) -> set[Buffer]:
    """Buffers that a statement itself reads or stores."""
    found = {t.buffer for t in statement.targets} if isinstance(statement, Store) else set()
    waiting, seen = operands(statement), set()
    while waiting:
        value = waiting.pop()
        if value not in seen:
            seen.add(value)
            waiting += value.args
            if value.op == "load":
                found.add(value.attr)
    return found
