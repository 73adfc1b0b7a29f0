"""What every pass needs: a graph built anew from another one, and who reads and makes what.

Invariants of a Rewriter: every symbol of the old graph stands for one operand of the new one, of
the same shape and dtype (or a number); outputs and updates keep their exact types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flame.core.errors import CompileError, ShapeError
from flame.core.types import TensorType
from flame.graph.graph import Graph, Node, Number, Operand, Symbol, infer, tensor_of, type_of
from flame.ops.op import OPS, Op
from flame.ops.views import ViewOp


class Rewriter:
    """Nodes are kept, emitted, or replaced, in the order of the old graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.pinned = _pinned(graph)  # what must keep its layout: results, and what they view
        self.nodes: list[Node] = []
        self.constants: dict[Symbol, Any] = dict(graph.constants)
        self.makers: dict[Symbol, Node] = {}  # of the new graph
        self._stands: dict[Symbol, Operand] = {}
        self._names: set[str] | None = None

    def now(self, operand: Operand) -> Operand:
        """What an operand of the old graph is in the new one."""
        return self._stands.get(operand, operand) if isinstance(operand, Symbol) else operand

    def replace(self, old: Symbol, new: Operand) -> None:
        """``old`` is ``new`` (of the new graph) from here on."""
        if new is not old:
            self._stands[old] = new

    def renewed(self, node: Node) -> Node:
        """The node with its operands of the new graph; itself where none has changed."""
        if self._stands.keys().isdisjoint(node.symbols):
            return node
        inputs = tuple([self.now(x) for x in node.inputs])
        return Node(node.op, inputs, node.outputs, node.attributes, node.line)

    def keep(self, node: Node) -> None:
        """Take a node over. Where its operands have other layouts now, its results follow."""
        changed = self.renewed(node)
        if changed is not node and changed.types != node.types:
            if node.op.of_memory:
                changed = self._as_before(node, changed)
            elif isinstance(node.op, ViewOp):
                self.replace(node.outputs[0], self._view(node, changed))
                return
            else:
                changed = self._following(node, changed)
        self.append(changed)

    def _following(self, node: Node, changed: Node) -> Node:
        """A node whose results are laid out as its op infers, if they were so before."""
        before = infer(node.op, node.types, node.attributes)
        now = infer(node.op, changed.types, node.attributes)
        outputs = list(node.outputs)
        for i, symbol in enumerate(node.outputs):
            follows = symbol.type is before[i] and symbol not in self.pinned
            if follows and now[i] is not before[i] and now[i].dtype is before[i].dtype:
                outputs[i] = Symbol(self._name(symbol), now[i])
                self.replace(symbol, outputs[i])
        return Node(node.op, changed.inputs, tuple(outputs), node.attributes, node.line)

    def _as_before(self, node: Node, changed: Node) -> Node:
        """A node whose first operand is given the layout that it had."""
        first = self.laid_out(tensor_symbol(changed.inputs[0]), tensor_of(node.inputs[0]))
        inputs = (first, *changed.inputs[1:])
        return Node(node.op, inputs, node.outputs, node.attributes, node.line)

    def _view(self, node: Node, changed: Node) -> Symbol:
        (wanted,) = node.outputs
        try:
            return self.emit(node.op, changed.inputs, node.attributes, like=wanted)
        except ShapeError:  # a reshape that this layout does not allow without a copy
            before = self._as_before(node, changed)
            return self.emit(node.op, before.inputs, node.attributes, like=wanted)

    def laid_out(self, symbol: Symbol, type_: TensorType) -> Symbol:
        """A copy in the layout of ``type_``, where it has another one."""
        if symbol.type is type_:
            return symbol
        if not type_.dense:
            raise CompileError(f"{symbol} cannot be given the layout of {type_}, which has gaps")
        attributes = {} if tensor_of(symbol).dtype is type_.dtype else {"dtype": type_.dtype}
        return self.emit(OPS["copy"], (symbol,), attributes, like=symbol, types=(type_,))

    def append(self, node: Node) -> None:
        """Put a node of the new graph at its end."""
        self.nodes.append(node)
        for symbol in node.outputs:
            self.makers[symbol] = node

    def emit(
        self,
        op: Op,
        inputs: tuple[Operand, ...],
        attributes: Mapping[str, Any],
        *,
        like: Symbol,
        types: tuple[TensorType, ...] | None = None,
        line: str | None = None,
    ) -> Symbol:
        """A new node; gives its first result. ``like``: what it is named after.

        types: of the results, where they are laid out otherwise than the op infers.
        """
        given = tuple([type_of(x) for x in inputs])
        found = types or infer(op, given, attributes)
        outputs = tuple([Symbol(self._name(like), t) for t in found])
        maker = self.makers.get(like)
        line = line or (maker.line if maker is not None else None)
        self.append(Node(op, inputs, outputs, dict(attributes), line))
        return outputs[0]

    def full(self, number: Number, like: Symbol) -> Symbol:
        """A tensor of one number, with the type of ``like``."""
        type_ = tensor_of(like)
        attributes = {"shape": type_.shape, "dtype": type_.dtype, "device": type_.device}
        return self.emit(OPS["full"], (number,), attributes, like=like)

    def constant(self, array: Any, type_: TensorType, like: Symbol) -> Symbol:
        """A symbol whose numbers are known."""
        symbol = Symbol(self._name(like), type_)
        self.constants[symbol] = array
        return symbol

    def _name(self, like: Symbol) -> str:
        """A name that no symbol has, by which one sees what it came from."""
        if self._names is None:
            made = (s.name for node in self.graph.nodes for s in node.outputs)
            self._names = {*made, *(s.name for s in (*self.graph.inputs, *self.graph.constants))}
        stem = like.name.partition(".")[0]
        number = 1
        while f"{stem}.{number}" in self._names:
            number += 1
        name = f"{stem}.{number}"
        self._names.add(name)
        return name

    def done(self) -> Graph:
        """The new graph; its results have the types that they had."""
        graph = self.graph
        outputs = tuple([self._result(s) for s in graph.outputs])
        updates = tuple([(old, self._result(new)) for old, new in graph.updates])
        return Graph(graph.inputs, tuple(self.nodes), outputs, updates, self.constants)

    def _result(self, old: Symbol) -> Symbol:
        new = self.now(old)
        if not isinstance(new, Symbol):
            assert new is not None
            new = self.full(new, old)
        return self.laid_out(new, tensor_of(old))


def _pinned(graph: Graph) -> frozenset[Symbol]:
    found = set(graph.results)
    for node in reversed(graph.nodes):
        if isinstance(node.op, ViewOp) and node.outputs[0] in found:
            found.update(node.symbols)
    return frozenset(found)


def tensor_symbol(operand: Operand) -> Symbol:
    """An operand that is known to be a symbol."""
    assert isinstance(operand, Symbol)
    return operand


@dataclass(frozen=True)
class Uses:
    """Who makes and who reads each symbol of a graph."""

    graph: Graph
    makers: dict[Symbol, Node] = field(default_factory=dict)
    readers: dict[Symbol, list[Node]] = field(default_factory=dict)
    results: frozenset[Symbol] = frozenset()

    @classmethod
    def of(cls, graph: Graph) -> Uses:
        makers: dict[Symbol, Node] = {}
        readers: dict[Symbol, list[Node]] = {}
        for node in graph.nodes:
            for symbol in dict.fromkeys(node.symbols):
                readers.setdefault(symbol, []).append(node)
            for symbol in node.outputs:
                makers[symbol] = node
        return cls(graph, makers, readers, frozenset(graph.results))

    def of_symbol(self, symbol: Symbol) -> list[Node]:
        """The nodes that read a symbol, in order."""
        return self.readers.get(symbol, [])

    def only(self, symbol: Symbol) -> Node | None:
        """The one node that reads a symbol; None where several do, or where it is a result."""
        found = self.of_symbol(symbol)
        return found[0] if len(found) == 1 and symbol not in self.results else None
