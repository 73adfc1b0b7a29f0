"""Flow: where the values of a graph come from and go to, as the fusion asks for it.

Invariant: a view that only regroups, reorders or repeats the elements of its source is seen
through; any other view reads its source from memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator

from flame.compiler.schedule.task import owners_of
from flame.core.types import tensor_type
from flame.graph import Graph, Node, Symbol, tensor_of
from flame.ops.views import ViewOp


class Flow:
    """Producers, consumers and owners of the symbols of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.owners = owners_of(graph)
        self.producer: dict[Symbol, Node] = {}
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.consumers: dict[Symbol, list[Node]] = defaultdict(list)
        self.regrouped: dict[Node, tuple[int, ...]] = {}
        for node in graph.nodes:
            for symbol in node.outputs:
                self.producer[symbol] = node
            for symbol in dict.fromkeys(node.symbols):
                self.consumers[symbol].append(node)
            if isinstance(node.op, ViewOp):
                order = regrouping(node)
                if order is not None:
                    self.regrouped[node] = order
        self.results = set(graph.results)
        self.updated = {new for _, new in graph.updates}
        self.live = self._live()

    def _live(self) -> set[Node]:
        """The nodes that the results need."""
        found: set[Node] = set()
        wanted = set(self.results)
        for node in reversed(self.graph.nodes):
            if not wanted.isdisjoint(node.outputs):
                found.add(node)
                wanted.update(node.symbols)
        return found

    def owner(self, symbol: Symbol) -> Symbol:
        """Whose memory a symbol lies in."""
        return self.owners.get(symbol, (symbol, 0))[0]

    def origin(self, symbol: Symbol) -> Symbol:
        """What ``symbol`` is a regrouped view of."""
        node = self.producer.get(symbol)
        while node is not None and node in self.regrouped:
            (symbol,) = node.symbols
            node = self.producer.get(symbol)
        return symbol

    def users(self, symbol: Symbol) -> Iterator[Node]:
        """The nodes that need a value, by itself or by views that are seen through."""
        waiting = [symbol]
        while waiting:
            for node in self.consumers[waiting.pop()]:
                if node not in self.live:
                    continue
                if node in self.regrouped:
                    waiting.append(node.outputs[0])
                else:
                    yield node

    def leaves(self, symbol: Symbol, inside: Collection[Node]) -> bool:
        """Whether a value, or a view of it, is needed by more than the nodes ``inside``."""
        waiting = [symbol]
        while waiting:
            one = waiting.pop()
            if one in self.results:
                return True
            for node in self.consumers[one]:
                if node not in self.live:
                    continue
                if node in self.regrouped:
                    waiting.append(node.outputs[0])
                elif node not in inside:
                    return True
        return False


def regrouping(node: Node) -> tuple[int, ...] | None:
    """The dimensions of a view that hold its source's elements in row-major order, or None.

    The view's other dimensions repeat.
    """
    if node.op.of_memory:
        return None
    assert isinstance(node.op, ViewOp)
    source, made = tensor_of(node.symbols[0]), tensor_of(node.outputs[0])
    if not source.numel or not made.numel:
        return None
    plain = tensor_type(source.dtype, source.shape, None, source.device)
    seen, offset = node.op.view((plain,), **node.attributes)
    axes = [
        a for a, (n, s) in enumerate(zip(seen.shape, seen.strides, strict=True)) if n != 1 and s
    ]
    axes.sort(key=lambda a: -seen.strides[a])
    step = 1
    for axis in reversed(axes):
        if seen.strides[axis] != step:
            return None
        step *= seen.shape[axis]
    return tuple(axes) if not offset and step == source.numel else None
