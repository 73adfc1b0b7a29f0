"""How much memory a graph needs while its nodes run in order: an estimate for passes.

Invariants: views take none; inputs and constants are there anyway; a result stays to the end; an
update takes none where nothing reads the old value later, as it is then written in its place.
"""

from __future__ import annotations

from collections.abc import Sequence

from flame.core.types import TensorType
from flame.graph.graph import Graph, Node, Symbol
from flame.ops.views import ViewOp


class Liveness:
    """owner: whose memory a view is. last: the position of the last node that reads a memory, or
    the number of nodes for what is a result. first: where it is made. bytes_of: its size.
    """

    def __init__(self, graph: Graph, nodes: Sequence[Node] | None = None) -> None:
        self.graph = graph
        self.nodes = graph.nodes if nodes is None else tuple(nodes)
        self.owners: dict[Symbol, Symbol] = {}
        self.first: dict[Symbol, int] = {}
        self.last: dict[Symbol, int] = {}
        for position, node in enumerate(self.nodes):
            for symbol in node.symbols:
                self.last[self.owner(symbol)] = position
            if isinstance(node.op, ViewOp):
                self.owners[node.outputs[0]] = self.owner(node.symbols[0])
                continue
            for symbol in node.outputs:
                self.first[symbol] = self.last[symbol] = position
        self._in_place = {
            new for old, new in graph.updates
            if self.last.get(old, -1) <= self.first.get(self.owner(new), -1)
        }  # fmt: skip
        for symbol in graph.results:
            self.last[self.owner(symbol)] = len(self.nodes)

    def owner(self, symbol: Symbol) -> Symbol:
        return self.owners.get(symbol, symbol)

    def bytes_of(self, symbol: Symbol) -> int:
        """What making a symbol takes."""
        if symbol in self._in_place or not isinstance(symbol.type, TensorType):
            return 0
        return symbol.type.span * symbol.type.dtype.itemsize

    def profile(self) -> list[int]:
        """The bytes in use while each node runs."""
        change = [0] * (len(self.nodes) + 2)
        for symbol, position in self.first.items():
            size = self.bytes_of(symbol)
            change[position] += size
            change[self.last[symbol] + 1] -= size
        found, total = [], 0
        for step in change[: len(self.nodes)]:
            total += step
            found.append(total)
        return found

    def peak(self) -> int:
        return max(self.profile(), default=0)
