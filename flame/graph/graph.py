"""Graph: operations in the order in which they run, over typed symbols.

Grammar:

    graph   ::= "graph" "(" symbol* ")" node* "return" symbol*
    node    ::= symbol+ "=" op "(" operand* ")" attributes
    operand ::= symbol | "none"
    symbol  ::= "%" name ":" type          type: a TensorType, or int, float, bool for a Python
    number

Invariants: a symbol is defined once, and before its first use; a node's results have the types
that its op infers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flame.core.errors import CompileError
from flame.core.types import TensorType
from flame.ops.op import Op, Types
from flame.ops.views import ViewOp


@dataclass(frozen=True, eq=False)
class Symbol:
    """A value in a graph: a tensor of a type, or a Python number known at the call."""

    name: str
    type: TensorType | type

    def __str__(self) -> str:
        kind = self.type.__name__ if isinstance(self.type, type) else str(self.type)
        return f"%{self.name}: {kind}"


@dataclass(frozen=True, eq=False)
class Node:
    """One operation. ``inputs`` holds None where an optional operand is left out."""

    op: Op
    inputs: tuple[Symbol | None, ...]
    outputs: tuple[Symbol, ...]
    attributes: Mapping[str, Any]

    @property
    def types(self) -> Types:
        return tuple(None if s is None else s.type for s in self.inputs)

    def __str__(self) -> str:
        results = ", ".join(map(str, self.outputs))
        operands = ", ".join("none" if s is None else f"%{s.name}" for s in self.inputs)
        attributes = ", ".join(f"{k}={v}" for k, v in self.attributes.items())
        return f"{results} = {self.op.name}({operands}) {{{attributes}}}".replace(" {}", "")


@dataclass(frozen=True, eq=False)
class Graph:
    """Inputs, nodes in order, and which symbols are the results."""

    inputs: tuple[Symbol, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Symbol, ...]

    def __str__(self) -> str:
        lines = [f"graph({', '.join(map(str, self.inputs))})"]
        lines += [f"  {node}" for node in self.nodes]
        lines.append(f"  return {', '.join(f'%{s.name}' for s in self.outputs)}")
        return "\n".join(lines)

    def verify(self) -> None:
        """Raise CompileError, with the text around the fault, where an invariant is broken."""
        known = set(self.inputs)
        if len(known) != len(self.inputs):
            raise CompileError(f"a graph input stands twice:\n{self}")
        for node in self.nodes:
            for symbol in node.inputs:
                if symbol is not None and symbol not in known:
                    raise CompileError(f"%{symbol.name} is used before it is defined:\n  {node}")
            inferred = infer(node.op, node.types, node.attributes)
            if tuple(s.type for s in node.outputs) != inferred:
                raise CompileError(
                    f"{node.op.name} gives {', '.join(map(str, inferred))}, its node says:\n"
                    f"  {node}"
                )
            for symbol in node.outputs:
                if symbol in known:
                    raise CompileError(f"%{symbol.name} is defined twice:\n  {node}")
                known.add(symbol)
        for symbol in self.outputs:
            if symbol not in known:
                raise CompileError(
                    f"the graph returns %{symbol.name}, which nothing defines:\n{self}"
                )


def infer(op: Op, types: Types, attributes: Mapping[str, Any]) -> tuple[TensorType, ...]:
    """The result types of an op. Raises ShapeError or DTypeError where it cannot take ``types``."""
    if isinstance(op, ViewOp):
        return (op.view(types, **attributes)[0],)
    made = op.infer(types, **attributes)
    return made if isinstance(made, tuple) else (made,)


def one_op(op: Op, types: Types, attributes: Mapping[str, Any]) -> Graph:
    """The graph of a single call, which is what eager execution runs."""
    inputs = tuple(None if t is None else Symbol(f"x{i}", t) for i, t in enumerate(types))
    results = tuple(Symbol(f"y{i}", t) for i, t in enumerate(infer(op, types, attributes)))
    node = Node(op, inputs, results, dict(attributes))
    return Graph(tuple(s for s in inputs if s is not None), (node,), results)
