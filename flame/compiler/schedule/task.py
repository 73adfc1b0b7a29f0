"""Task: nodes that run together, lowered to kernels. Schedule: all tasks of a graph, in order.

Grammar:

    schedule ::= task*
    task     ::= name ":" operand* "->" symbol*  kernels

Invariants: tasks stand in an order in which every operand is computed before it is read; a task
computes its outputs from its operands alone; views are no tasks: a view is its owner's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flame.core.errors import FlameError
from flame.core.types import TensorType
from flame.graph import Graph, Node, Operand, Symbol
from flame.kernel.builder import Lowering
from flame.ops.views import ViewOp


@dataclass(frozen=True, eq=False)
class Task:
    """One step of a schedule.

    inputs: what ``Ref("input", i)`` of its kernels means; outputs: what ``Ref("output", i)`` means.
    nodes: what it computes, for reports. in_place: pairs (output, input) of positions that may
    share their memory, as every element is read before it is written, by the same iteration.
    updating: output 0 starts as a copy of input 0, made by the first kernel, which is left out
    where they share their memory. failure: the error for a code that a kernel put into its error
    slot.
    """

    name: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Symbol, ...]
    lowering: Lowering
    nodes: tuple[Node, ...]
    in_place: frozenset[tuple[int, int]] = frozenset()
    updating: bool = False
    failure: Callable[[int], FlameError] | None = None

    def __str__(self) -> str:
        operands = ", ".join(
            f"%{x.name}" if isinstance(x, Symbol) else repr(x) for x in self.inputs
        )
        results = ", ".join(map(str, self.outputs))
        lines = [f"{self.name}: {operands} -> {results}"]
        lines += [f"    {node}" for node in self.nodes]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tasks in order, and the graph that they compute."""

    graph: Graph
    tasks: tuple[Task, ...]
    owners: dict[Symbol, tuple[Symbol, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join(map(str, self.tasks))

    def owner(self, symbol: Symbol) -> tuple[Symbol, int]:
        """Whose memory a symbol lies in, and at which element it starts."""
        return self.owners.get(symbol, (symbol, 0))


def owners_of(graph: Graph) -> dict[Symbol, tuple[Symbol, int]]:
    """(owner, offset in elements) of every view."""
    found: dict[Symbol, tuple[Symbol, int]] = {}
    for node in graph.nodes:
        if isinstance(node.op, ViewOp):
            (source,) = node.symbols
            assert isinstance(source.type, TensorType)
            owner, offset = found.get(source, (source, 0))
            attributes: dict[str, Any] = dict(node.attributes)
            shift = node.op.view(node.types, **attributes)[1]
            made = node.outputs[0].type
            assert isinstance(made, TensorType)
            if made.dtype is not source.type.dtype:  # the same bytes as another dtype
                offset = offset * source.type.dtype.itemsize // made.dtype.itemsize
            found[node.outputs[0]] = (owner, offset + shift)
    return found
