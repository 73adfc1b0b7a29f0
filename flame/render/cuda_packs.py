"""Which loads and stores of a vector loop move 16 bytes at a time.

Invariant: a packed loop does for each element what the plain loop does, all loads of a pack before
all of its stores; loops in which that order could matter are not packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.kernel import values
from flame.kernel.program import Accumulate, Assign, Declare, Loop, Store, Target
from flame.kernel.values import Buffer, Register, Value
from flame.render.cuda_index import operands

BYTES: Final = 16


@dataclass(frozen=True)
class Packs:
    """``width`` elements at a time: of these loads and targets, at the given offset plus the loop's
    counter."""

    width: int
    loads: dict[Value, Value]
    stores: dict[Target, Value]

    def places(self) -> Iterator[tuple[Buffer, Value]]:
        """Each place in memory that a loop starts from, once."""
        found = [(v.attr, rest) for v, rest in self.loads.items()]
        found += [(t.buffer, rest) for t, rest in self.stores.items()]
        yield from dict.fromkeys(found)


def item_bytes(dtype: DType) -> int:
    return 1 if dtype is dtypes.bool_ else dtype.itemsize


def packs_of(loop: Loop) -> Packs | None:
    """The packs of a vector loop; None where it has none."""
    flat = [s for s in loop.body if isinstance(s, (Declare, Assign, Accumulate, Store))]
    if len(flat) < len(loop.body):
        return None
    own: set[Register] = {s.register for s in flat if not isinstance(s, Store)}
    targets = [t for s in flat if isinstance(s, Store) for t in s.targets]
    stored = {t.buffer for t in targets}
    loads: dict[Value, Value] = {}
    done: dict[Buffer, Value] = {}  # buffers stored so far, and where
    for statement in flat:
        for value in _loads(statement):
            if value.attr in stored:
                index = [t.index for t in targets if t.buffer is value.attr]
                if len(index) > 1 or index[0] is not value.args[0] or value.attr in done:
                    return None  # the order of elements may matter
            rest = None if len(value.args) > 1 else _start(value.args[0], loop.var, own, stored)
            if rest is not None:
                loads[value] = rest
        if isinstance(statement, Store):
            done.update((t.buffer, t.index) for t in statement.targets)
    stores: dict[Target, Value] = {}
    for target in targets:
        alone = sum(t.buffer is target.buffer for t in targets) == 1
        rest = _start(target.index, loop.var, own, stored)
        if alone and target.where is None and rest is not None:
            stores[target] = rest
    sizes = [item_bytes(v.dtype) for v in loads] + [item_bytes(t.buffer.dtype) for t in stores]
    return Packs(BYTES // max(sizes), loads, stores) if sizes else None


def _loads(statement: Declare | Assign | Accumulate | Store) -> Iterator[Value]:
    seen: set[Value] = set()
    waiting = operands(statement)
    while waiting:
        value = waiting.pop()
        if value not in seen:
            seen.add(value)
            waiting += value.args
            if value.op == "load":
                yield value


def _start(index: Value, var: str, own: set[Register], stored: set[Buffer]) -> Value | None:
    """The index at the loop's start, if it counts up with the loop."""
    line = values.linear(index, var)
    if line is None or not values.is_const(line[0], 1):
        return None
    waiting = [line[1]]
    while waiting:
        value = waiting.pop()
        if (value.op == "read" and value.attr in own) or (
            value.op == "load" and value.attr in stored
        ):
            return None
        waiting += value.args
    return line[1]
