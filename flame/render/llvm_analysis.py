"""What the renderer has to know of statements before it writes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.kernel.program import (
    Accumulate,
    Assign,
    Declare,
    Gemm,
    If,
    Loop,
    SplitProduct,
    Statement,
    Store,
    Target,
    Transpose,
)
from flame.kernel.values import Register, Value


def walk(body: Iterable[Statement]) -> Iterator[Statement]:
    for statement in body:
        yield statement
        if isinstance(statement, (Loop, If)):
            yield from walk(statement.body)


def stores(loop: Loop) -> Iterator[Target]:
    for statement in walk(loop.body):
        if isinstance(statement, Store):
            yield from statement.targets


def gemms(loop: Loop) -> Iterator[Gemm]:
    return (s for s in walk(loop.body) if isinstance(s, Gemm))


def transposes(loop: Loop) -> Iterator[Transpose]:
    return (s for s in walk(loop.body) if isinstance(s, Transpose))


def split_products(loop: Loop) -> Iterator[SplitProduct]:
    return (s for s in walk(loop.body) if isinstance(s, SplitProduct))


def written_registers(body: Iterable[Statement]) -> Iterator[Register]:
    for statement in walk(body):
        if isinstance(statement, (Assign, Accumulate)):
            yield statement.register


def combines(body: Iterable[Statement]) -> dict[Register, str]:
    """How each register that is only accumulated is combined."""
    ways: dict[Register, str] = {}
    assigned = {s.register for s in walk(body) if isinstance(s, Assign)}
    for statement in walk(body):
        if isinstance(statement, Accumulate) and statement.register not in assigned:
            ways[statement.register] = statement.combine
    return ways


def computed_dtypes(body: Iterable[Statement]) -> Iterator[DType]:
    """Dtypes of the numbers that a vector loop works on; int64 addresses do not count."""
    seen: set[Value] = set()

    def visit(value: Value) -> Iterator[DType]:
        if value in seen:
            return
        seen.add(value)
        if value.op == "load":
            yield value.dtype
            for arg in value.args[1:]:
                yield from visit(arg)
            return
        if value.dtype is not dtypes.int64 and value.op not in ("const", "param"):
            yield value.dtype
        for arg in value.args:
            yield from visit(arg)

    for statement in walk(body):
        match statement:
            case Store(targets):
                for t in targets:
                    yield t.buffer.dtype
                    yield from visit(t.value)
            case (
                Declare(register, value) | Assign(register, value) | Accumulate(register, _, value)
            ):
                yield register.dtype
                yield from visit(value)
