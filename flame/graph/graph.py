"""Graph: operations in the order in which they run, over typed symbols.

Grammar:

    graph    ::= "graph" "(" symbol* ")" constant* node* update* "return" symbol*
    constant ::= symbol "=" "constant" type          its numbers stand in `Graph.constants`
    node     ::= symbol+ "=" op "(" operand* ")" attributes
    operand  ::= symbol | number | "none"
    update   ::= "update" symbol "<-" symbol     an input that holds the other one at the end
    symbol   ::= "%" name ":" type    type: a TensorType, or int, float, bool for a number

Invariants: a symbol is defined once, and before its first use; nodes are pure: a change in place is
a new symbol, and an update at the end; a node's results have the shapes that its op infers (dtype
and strides may be others that its lowering stores into).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flame.core.errors import CompileError
from flame.core.types import TensorType, on_device
from flame.ops.op import Op, Types
from flame.ops.views import ViewOp

Number = bool | int | float


@dataclass(frozen=True, eq=False)
class Symbol:
    """A value in a graph: a tensor of a type, or a Python number known at the call."""

    name: str
    type: TensorType | type

    def __str__(self) -> str:
        kind = self.type.__name__ if isinstance(self.type, type) else str(self.type)
        return f"%{self.name}: {kind}"


Operand = Symbol | Number | None


@dataclass(frozen=True, eq=False)
class Node:
    """One operation. ``inputs`` holds None where an optional operand is left out.

    ``line``: where the user's code called it, for errors and reports.
    """

    op: Op
    inputs: tuple[Operand, ...]
    outputs: tuple[Symbol, ...]
    attributes: Mapping[str, Any]
    line: str | None = None

    @cached_property
    def types(self) -> Types:
        return tuple([type_of(x) for x in self.inputs])

    @cached_property
    def symbols(self) -> tuple[Symbol, ...]:
        """The operands that are symbols."""
        return tuple([x for x in self.inputs if isinstance(x, Symbol)])

    def __str__(self) -> str:
        results = ", ".join(map(str, self.outputs))
        operands = ", ".join(map(operand_text, self.inputs))
        attributes = ", ".join(f"{k}={v}" for k, v in self.attributes.items())
        return f"{results} = {self.op.name}({operands}) {{{attributes}}}".replace(" {}", "")


def type_of(operand: Operand) -> TensorType | type | None:
    """What an op is told of an operand."""
    if operand is None:
        return None
    return operand.type if isinstance(operand, Symbol) else type(operand)


def tensor_of(operand: Operand) -> TensorType:
    """The type of what is known to be a tensor symbol."""
    assert isinstance(operand, Symbol)
    assert isinstance(operand.type, TensorType)
    return operand.type


def operand_text(operand: Operand) -> str:
    if operand is None:
        return "none"
    return f"%{operand.name}" if isinstance(operand, Symbol) else repr(operand)


@dataclass(frozen=True, eq=False)
class Graph:
    """Inputs, nodes in order, and which symbols are the results.

    ``updates``: pairs (input, symbol of the same type), written back at the end. ``constants``:
    symbols whose numbers are known, as NumPy arrays.
    """

    inputs: tuple[Symbol, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Symbol, ...]
    updates: tuple[tuple[Symbol, Symbol], ...] = ()
    constants: Mapping[Symbol, Any] = field(default_factory=dict)

    @property
    def results(self) -> tuple[Symbol, ...]:
        """All that must be computed: the outputs, then the new values of what is updated."""
        return (*self.outputs, *(new for _, new in self.updates))

    def __str__(self) -> str:
        lines = [f"graph({', '.join(map(str, self.inputs))})"]
        lines += [f"  {symbol} = constant" for symbol in self.constants]
        lines += [f"  {node}" for node in self.nodes]
        lines += [f"  update %{old.name} <- %{new.name}" for old, new in self.updates]
        lines.append(f"  return {', '.join(f'%{s.name}' for s in self.outputs)}")
        return "\n".join(lines)

    def verify(self) -> None:
        """Raise CompileError, with the text around the fault, where an invariant is broken."""
        known = {*self.inputs, *self.constants}
        if len(known) != len(self.inputs) + len(self.constants):
            raise CompileError(f"a graph input stands twice:\n{self}")
        for node in self.nodes:
            for symbol in node.symbols:
                if symbol not in known:
                    raise CompileError(f"%{symbol.name} is used before it is defined:\n  {node}")
            _verify_types(node)
            for symbol in node.outputs:
                if symbol in known:
                    raise CompileError(f"%{symbol.name} is defined twice:\n  {node}")
                known.add(symbol)
        for symbol in self.results:
            if symbol not in known:
                raise CompileError(
                    f"the graph returns %{symbol.name}, which nothing defines:\n{self}"
                )
        for old, new in self.updates:
            if old not in self.inputs or old.type is not new.type:
                raise CompileError(f"update {old} <- {new} is of no input, or of another type")


def _verify_types(node: Node) -> None:
    inferred = infer(node.op, node.types, node.attributes)
    found = [s.type for s in node.outputs]
    exact = isinstance(node.op, ViewOp)
    fits = len(found) == len(inferred) and all(
        a is b or (not exact and isinstance(a, TensorType) and a.shape == b.shape)
        for a, b in zip(found, inferred, strict=True)
    )
    if not fits:
        raise CompileError(
            f"{node.op.name} gives {', '.join(map(str, inferred))}, its node says:\n  {node}"
        )


def infer(op: Op, types: Types, attributes: Mapping[str, Any]) -> tuple[TensorType, ...]:
    """The result types of an op. Raises ShapeError or DTypeError where it cannot take ``types``."""
    found = op.infer(types, **attributes)
    made: tuple[TensorType, ...] = found if isinstance(found, tuple) else (found,)
    device = None if op.moves else device_of(types)
    return made if device is None else tuple([on_device(t, device) for t in made])


def device_of(types: Types) -> str | None:
    """Where the operands are, and so the results; None where there is no tensor among them."""
    return next((t.device for t in types if isinstance(t, TensorType)), None)


def one_op(op: Op, types: Types, attributes: Mapping[str, Any]) -> Graph:
    """The graph of a single call, which is what eager execution runs."""
    inputs = tuple(None if t is None else Symbol(f"x{i}", t) for i, t in enumerate(types))
    results = tuple(Symbol(f"y{i}", t) for i, t in enumerate(infer(op, types, attributes)))
    node = Node(op, inputs, results, dict(attributes))
    return Graph(tuple(s for s in inputs if s is not None), (node,), results)
