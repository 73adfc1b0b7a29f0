"""Where the threads of a team must wait for each other.

A *step* is a statement outside of vector loops: what all threads compute alike, what thread 0
stores, or a whole vector loop. Threads may be in different steps at a time. So a barrier stands in
front of a step that writes what an unfinished step may read or write, or that reads what one may
write.

Invariants: iterations of the parallel loop touch disjoint memory, but for scratch, which a team
uses again. An output may be the memory of an input (in-place operation), so these conflict as one
buffer does with itself. Iterations of a serial loop write different elements of a buffer that the
kernel never reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flame.kernel.program import If, Kernel, Loop, LoopKind, Statement, Store, Transpose
from flame.kernel.values import Buffer, Value
from flame.render.cuda_index import carried, operands, walk


@dataclass(frozen=True)
class _Access:
    """A step touches a buffer. shared: by several threads."""

    buffer: Buffer
    step: Statement
    writes: bool
    shared: bool


_Accesses = frozenset[_Access]


def barriers(
    kernel: Kernel, *, folds: bool, own: frozenset[Buffer] = frozenset()
) -> set[Statement]:
    """The steps in front of which a barrier stands.

    folds: whether threads wait for each other where a vector loop's sums are folded. own: buffers
    of which every thread has its part to itself.
    """
    return _Plan(kernel, folds, own).found


def writes_of(statement: Statement) -> Iterator[Buffer]:
    """Buffers that a statement itself writes."""
    if isinstance(statement, Store):
        yield from (t.buffer for t in statement.targets)
    elif isinstance(statement, Transpose):
        yield statement.target.buffer


def reads_of(statement: Statement) -> set[Buffer]:
    """Buffers that a statement itself reads."""
    found: set[Buffer] = set()
    seen: set[Value] = set()
    waiting = operands(statement)
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        waiting += value.args
        if value.op == "load":
            found.add(value.attr)
    if isinstance(statement, Transpose):
        found.add(statement.source.buffer)
    return found


class _Plan:
    def __init__(self, kernel: Kernel, folds: bool, own: frozenset[Buffer]) -> None:
        self.folds, self.own = folds, own
        self.private = {b for b, _ in (*kernel.scratch, *kernel.local)}
        self.found: set[Statement] = set()
        everything = [kernel.body, *walk(kernel.body.body)]
        self.read = {b for s in everything for b in reads_of(s)}
        kept = {a for a in self._after(kernel.body.body, frozenset()) if a.buffer in self.private}
        self._after(kernel.body.body, frozenset(kept))

    def _after(self, body: Iterable[Statement], pending: _Accesses) -> _Accesses:
        """What is unfinished after ``body``, if ``pending`` is before it."""
        for statement in body:
            if isinstance(statement, Loop) and statement.kind is not LoopKind.VECTOR:
                pending = self._step(statement, self._own(statement, statement), pending)
                around = pending | self._after(statement.body, pending)
                pending = around | self._after(statement.body, around)
            elif isinstance(statement, If):
                pending = self._step(statement, self._own(statement, statement), pending)
                pending = pending | self._after(statement.body, pending)
            else:
                pending = self._step(statement, self._whole(statement), pending)
                if self.folds and isinstance(statement, Loop) and carried(statement.body):
                    pending = frozenset()
        return pending

    def _step(self, step: Statement, accesses: set[_Access], pending: _Accesses) -> _Accesses:
        if any(self._conflict(a, b) for a in accesses for b in pending):
            self.found.add(step)
            pending = frozenset()
        return pending | accesses

    def _own(self, statement: Statement, step: Statement) -> set[_Access]:
        """What a statement itself touches; loads outside of vector loops are done by all."""
        many = isinstance(step, (Loop, Transpose))
        found = {_Access(b, step, False, True) for b in reads_of(statement)}
        found |= {_Access(b, step, True, many) for b in writes_of(statement)}
        return {access for access in found if access.buffer not in self.own}

    def _whole(self, statement: Statement) -> set[_Access]:
        inner = walk(statement.body) if isinstance(statement, Loop) else ()
        return {a for s in (statement, *inner) for a in self._own(s, statement)}

    def _conflict(self, a: _Access, b: _Access) -> bool:
        if not (a.writes or b.writes) or not (a.shared or b.shared):
            return False
        if a.buffer is b.buffer:
            # a step beside itself, in the next iteration of a loop
            return a.step is not b.step or a.buffer in self.read
        operands = not {a.buffer, b.buffer} & self.private
        return operands and a.writes != b.writes and a.step is not b.step
