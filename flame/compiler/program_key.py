"""The name of a whole program on disk: a digest of everything that decides what it is.

Invariant: two graphs with one key mean the same on one machine; what cannot be told by text (an
attribute that is an object, an op that is nowhere declared) has no key, and is never kept.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import FlameError
from flame.core.log import log
from flame.core.precision import get_float32_matmul_precision
from flame.core.types import TensorType
from flame.graph import Graph, Node, Symbol
from flame.kernel import values
from flame.kernel.values import Value
from flame.ops.elementwise import Elementwise, compute_dtype
from flame.ops.op import OPS, Op
from flame.runtime.cpu import amx
from flame.runtime.cpu.pool import get_num_threads

FORMAT: Final = 1
# Modules are read from the start of the process on; what changes since then is not what runs.
_IMPORTED: Final = time.time()
_SETTLED_SECONDS: Final = 5.0


class _NoTextError(Exception):
    """Something that no text stands for."""


def program_key(graph: Graph, *options: object) -> str | None:
    """The digest of a graph, of FLAME itself and of this machine; None where there is none.

    ``options``: plain values that decide how the graph is compiled.
    """
    from flame.runtime.cpu.jit import compiler

    try:
        lines = [*_graph_lines(graph), plain_text(options)]
    except _NoTextError as reason:
        log("cache", f"this program is not kept: {reason}")
        return None
    source = source_digest()
    if source is None:
        return None
    lines += [
        f"format {FORMAT}, threads {get_num_threads()}, {dtypes.get_default_dtype()}",
        f"products {get_float32_matmul_precision()}, amx {amx.status()}",
        source,
        compiler().identity,
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@cache
def source_digest() -> str | None:
    """A digest of FLAME's own text; None where it may not be the text that this process runs."""
    found = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        if path.stat().st_mtime > _IMPORTED - _SETTLED_SECONDS:
            log("cache", f"no program is kept or looked for: {path} has just been changed")
            return None
        found.update(f"{path.relative_to(root)}\n".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def _graph_lines(graph: Graph) -> Iterator[str]:
    """The graph with its symbols numbered, so that their names do not matter."""
    numbers: dict[Symbol, int] = {}

    def define(symbol: Symbol) -> str:
        numbers[symbol] = len(numbers)
        return f"{numbers[symbol]}:{plain_text(symbol.type)}"

    for symbol in graph.inputs:
        yield f"input {define(symbol)}"
    for symbol, array in graph.constants.items():
        yield f"constant {define(symbol)} {plain_text(np.asarray(array))}"
    for node in graph.nodes:
        operands = [
            f"%{numbers[x]}" if isinstance(x, Symbol) else plain_text(x) for x in node.inputs
        ]
        results = [define(s) for s in node.outputs]
        yield f"{results} = {op_text(node)}({', '.join(operands)}) {plain_text(node.attributes)}"
    for old, new in graph.updates:
        yield f"update {numbers[old]} {numbers[new]}"
    yield f"return {[numbers[s] for s in graph.outputs]}"


def declared_here(op: Op) -> bool:
    """Whether `source_digest` covers what an op does."""
    functions = [op.infer, op.lower, getattr(op, "scalar", None)]
    return all(_module(f).partition(".")[0] == "flame" for f in functions if f is not None)


def _module(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", ""))


def op_text(node: Node) -> str:
    """An op by its name, or, if it is declared nowhere, by what it computes."""
    op = node.op
    if OPS.get(op.name) is op and declared_here(op):
        return op.name
    if not isinstance(op, Elementwise):
        raise _NoTextError(f"{op!r} is declared nowhere")
    try:
        operands, results = op.rule(op.name, node.types)
        leaves = [values.param(f"x{i}", compute_dtype(d)) for i, d in enumerate(operands)]
        made = op.scalar(*leaves, **node.attributes)
        invalid = None if op.invalid is None else op.invalid(*leaves)
    except FlameError as error:
        raise _NoTextError(f"{op!r} cannot be written down: {error}") from error
    if op.failure is not None and getattr(OPS.get(op.name), "failure", None) is not op.failure:
        raise _NoTextError(f"{op!r} has errors of its own")
    made = [
        *(made if isinstance(made, tuple) else (made,)),
        *([] if invalid is None else [invalid]),
    ]
    return f"{op.name} {plain_text((tuple(operands), tuple(results)))} {_expression(made)}"


def _expression(results: list[Any]) -> str:
    """Values as a list of instructions, each once, as they share operands."""
    numbers: dict[Value, int] = {}
    lines: list[str] = []

    def visit(value: Value) -> int:
        if value not in numbers:
            operands = [visit(x) for x in value.args]
            attribute = values.number_of(value) if value.op == "const" else value.attr
            attribute = "" if attribute is None else plain_text(attribute)
            lines.append(f"{value.op}.{value.dtype.name}{operands}{attribute}")
            numbers[value] = len(numbers)
        return numbers[value]

    roots = [visit(r) if isinstance(r, Value) else plain_text(r) for r in results]
    return f"{lines} -> {roots}"


def plain_text(value: Any) -> str:
    """A text that only equal values have."""
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, DType):
        return value.name
    if isinstance(value, TensorType):
        return f"{value.dtype.name}{value.shape}{value.strides}@{value.device}"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(map(plain_text, value))})"
    if isinstance(value, Mapping):
        return str([(plain_text(k), plain_text(v)) for k, v in value.items()])
    if isinstance(value, slice):
        return f"slice{plain_text((value.start, value.stop, value.step))}"
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind != "O":
        array = np.ascontiguousarray(value)
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        return f"array {array.dtype}{array.shape} {digest}"
    if is_dataclass(value) and type(value).__module__.startswith("flame."):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
        return f"{plain_text(type(value))} {plain_text(parts)}"
    raise _NoTextError(f"{type(value).__name__} {value!r} has no text")
