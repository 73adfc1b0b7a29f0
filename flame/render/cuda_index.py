"""Which int64 values are indices, and how far they reach.

Invariant: an index is made of loop counters, sizes and small constants alone, so that its range
follows from the sizes of a call; everything that was loaded, or came as a number of the call, is
data and keeps its 64 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from flame.core import dtypes
from flame.core.errors import CompileError
from flame.kernel.builder import BoundKernel
from flame.kernel.program import (
    Accumulate,
    Assign,
    Declare,
    Gemm,
    If,
    Kernel,
    Loop,
    SplitProduct,
    Statement,
    Store,
    Transpose,
)
from flame.kernel.values import Register, Value, number_of

Interval = tuple[int, int]

# Loop counters run past their ends by at most the threads of a grid; see `cuda_geometry`.
SPARE: Final = 1 << 23
_NARROW: Final = (1 << 31) - SPARE
_BINARY: Final = ("add", "sub", "mul", "min", "max", "udiv", "urem", "floordiv", "mod")


class Indices:
    """Tells indices from data in one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self._sizes = {*kernel.sizes, kernel.body.extent}
        self._known: dict[Value, bool] = {}

    def __contains__(self, value: Value) -> bool:
        found = self._known.get(value)
        if found is None:
            found = self._known[value] = self._is_index(value)
        return found

    def _is_index(self, value: Value) -> bool:
        if value.dtype is not dtypes.int64:
            return False
        if value.op == "const":
            return abs(int(number_of(value))) < _NARROW
        if value.op == "var":
            return True
        if value.op == "param":
            return value in self._sizes
        if value.op == "select":
            return value.args[1] in self and value.args[2] in self
        if value.op == "neg" or value.op in _BINARY:
            return all(arg in self for arg in value.args)
        return False


class Bounds:
    """Ranges of indices, from the sizes of one call."""

    def __init__(self, bound: BoundKernel) -> None:
        kernel = bound.kernel
        self._known: dict[Value, Interval | None] = {}
        for size, number in zip(kernel.sizes, bound.sizes, strict=True):
            self._known[size] = (number, number)
        self._known[kernel.body.extent] = (bound.extent, bound.extent)
        self._counters: dict[str, Interval | None] = {}
        for loop in loops(kernel.body):
            extent = self.of(loop.extent)
            self._counters[loop.var] = None if extent is None else (0, max(extent[1] - 1, 0))

    def of(self, value: Value) -> Interval | None:
        """Smallest and largest value of an index; None where it is not known."""
        if value not in self._known:
            self._known[value] = self._range(value)
        return self._known[value]

    def _range(self, value: Value) -> Interval | None:
        if value.op == "const":
            return (int(number_of(value)), int(number_of(value)))
        if value.op == "var":
            return self._counters[value.attr]
        args = [self.of(arg) for arg in value.args[value.op == "select" :]]
        if value.dtype is not dtypes.int64 or not args or None in args:
            return None
        known = [arg for arg in args if arg is not None]
        if value.op == "select":
            return min(a[0] for a in known), max(a[1] for a in known)
        if value.op == "neg":
            return -known[0][1], -known[0][0]
        return _combined(value.op, *known) if value.op in _BINARY else None

    def fit(self, kernel: Kernel, indices: Indices) -> bool:
        """Whether all indices of the kernel fit 32 bits, steps in between too."""
        for value in every_value(kernel.body):
            if value in indices and value.op != "const":
                found = self.of(value)
                if found is None or not -_NARROW < found[0] <= found[1] < _NARROW:
                    return False
        return True


def _combined(op: str, a: Interval, b: Interval) -> Interval:
    if op == "add":
        return a[0] + b[0], a[1] + b[1]
    if op == "sub":
        return a[0] - b[1], a[1] - b[0]
    if op == "min":
        return min(a[0], b[0]), min(a[1], b[1])
    if op == "max":
        return max(a[0], b[0]), max(a[1], b[1])
    if op == "mul":
        corners = [x * y for x in a for y in b]
        return min(corners), max(corners)
    if op == "udiv":
        return 0, max(a[1], 0) // max(b[0], 1)
    if op == "urem":
        return 0, max(min(a[1], b[1] - 1), 0)
    largest = max(abs(a[0]), abs(a[1])) + 1 if op == "floordiv" else max(abs(b[0]), abs(b[1]))
    return -largest, largest


# --- what a kernel consists of --------------------------------------------------------------------


def walk(body: Iterable[Statement]) -> Iterator[Statement]:
    for statement in body:
        yield statement
        if isinstance(statement, (Loop, If)):
            yield from walk(statement.body)


def loops(outer: Loop) -> Iterator[Loop]:
    """``outer`` and the loops in it, each before those inside it."""
    yield outer
    yield from (s for s in walk(outer.body) if isinstance(s, Loop))


def carried(body: Iterable[Statement]) -> list[Register]:
    """Registers from outside that ``body`` writes, in order of first write."""
    inner = list(walk(body))
    own = {s.register for s in inner if isinstance(s, Declare)}
    written = [s.register for s in inner if isinstance(s, (Assign, Accumulate))]
    return [r for r in dict.fromkeys(written) if r not in own]


def operands(statement: Statement) -> list[Value]:
    """The values that a statement itself computes, in order."""
    match statement:
        case Loop(_, extent):
            return [extent]
        case If(condition):
            return [condition]
        case Declare(_, value) | Assign(_, value) | Accumulate(_, _, value):
            return [value]
        case Store(targets):
            return [v for t in targets for v in (t.index, t.value, t.where) if v is not None]
        case Transpose(rows, columns, source, target):
            places = [v for m in (source, target) for v in (m.offset, m.row_stride)]
            return [rows, columns, *places]
        case Gemm() | SplitProduct():
            raise CompileError(
                f"{type(statement).__name__} is a call of the processor's library; an op that "
                "needs one lowers differently for a GPU"
            )


def every_value(body: Statement) -> Iterator[Value]:
    """All values of a kernel, each once, operands before what is made of them."""
    seen: set[Value] = set()
    for statement in (body, *walk(body.body if isinstance(body, (Loop, If)) else ())):
        for root in operands(statement):
            waiting = [root]
            while waiting:
                value = waiting[-1]
                rest = [arg for arg in value.args if arg not in seen]
                if value in seen or not rest:
                    waiting.pop()
                    if value not in seen:
                        seen.add(value)
                        yield value
                    continue
                waiting += rest
