"""The order of nodes, for the least memory: what frees memory, and what only ends, runs early.

An optimizer's update runs as soon as the gradient is complete: the gradient is still warm in the
cache and its memory is free from there on, where nothing (clipping, say) needs all gradients first.
An update stands after all that reads the old value, so it can be written in its place.

Runs last: a schedule keeps this order, as far as it has a choice.
"""

from __future__ import annotations

import heapq

from flame.graph import Graph, Node, Symbol
from flame.graph.liveness import Liveness
from flame.ops.views import ViewOp


def order(graph: Graph) -> Graph:
    nodes = _Ordering(graph).run()
    before, after = Liveness(graph).peak(), Liveness(graph, nodes).peak()
    if after > before or nodes == graph.nodes:
        return graph
    return Graph(graph.inputs, nodes, graph.outputs, graph.updates, graph.constants)


class _Ordering:
    """A list of nodes that could run next, the most pressing first.

    pressing: nodes that nobody waits for (updates), and those after which less memory is in use;
    then all others, as they stood.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.memory = Liveness(graph)
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.makers = {s: node for node in graph.nodes for s in node.outputs}
        self.readers: dict[Symbol, list[Node]] = {}  # of a memory, views left out
        self.users: dict[Node, list[Node]] = {node: [] for node in graph.nodes}
        self.waits: dict[Node, int] = dict.fromkeys(graph.nodes, 0)
        self.kept = {self.memory.owner(s) for s in graph.results}
        for node in graph.nodes:
            for symbol in dict.fromkeys(node.symbols):
                if symbol in self.makers:
                    self._depend(node, self.makers[symbol])
            if not isinstance(node.op, ViewOp):
                for owner in self._read(node):
                    self.readers.setdefault(owner, []).append(node)
        self._updates_after_reads()
        self.left = {owner: len(nodes) for owner, nodes in self.readers.items()}

    def _read(self, node: Node) -> list[Symbol]:
        """The memories that a node reads."""
        return list(dict.fromkeys(self.memory.owner(s) for s in node.symbols))

    def _depend(self, later: Node, earlier: Node) -> None:
        self.users[earlier].append(later)
        self.waits[later] += 1

    def _updates_after_reads(self) -> None:
        """A new value is computed after all that reads the old one, if that stood so before."""
        for old, new in self.graph.updates:
            maker = self.makers.get(self.memory.owner(new))
            if maker is None:
                continue
            for reader in self.readers.get(old, ()):
                if reader is not maker and self.position[reader] < self.position[maker]:
                    self._depend(maker, reader)

    def run(self) -> tuple[Node, ...]:
        ready = [(self.position[n], False) for n, count in self.waits.items() if not count]
        heapq.heapify(ready)
        pressing: list[int] = []
        nodes, made, done = self.graph.nodes, [], set[int]()
        while ready or pressing:
            place = heapq.heappop(pressing) if pressing else heapq.heappop(ready)[0]
            if place in done:
                continue
            done.add(place)
            node = nodes[place]
            made.append(node)
            for owner in self._finish(node):
                for reader in self.readers[owner]:  # the last reader may free it now
                    at = self.position[reader]
                    if at not in done and not self.waits[reader] and self._presses(reader):
                        heapq.heappush(pressing, at)
            for user in self.users[node]:
                self.waits[user] -= 1
                if not self.waits[user]:
                    at = self.position[user]
                    if self._presses(user):
                        heapq.heappush(pressing, at)
                    else:
                        heapq.heappush(ready, (at, False))
        return tuple(made)

    def _finish(self, node: Node) -> list[Symbol]:
        """Count a node's reads as done; gives the memories that one reader is left of."""
        if isinstance(node.op, ViewOp):
            return []
        single = []
        for owner in self._read(node):
            self.left[owner] -= 1
            if self.left[owner] == 1:
                single.append(owner)
        return single

    def _presses(self, node: Node) -> bool:
        if isinstance(node.op, ViewOp):
            return False
        if not self.users[node]:
            return True
        takes = sum(self.memory.bytes_of(s) for s in node.outputs)
        frees = sum(
            self.memory.bytes_of(owner)
            for owner in self._read(node)
            if self.left[owner] == 1 and owner in self.makers and owner not in self.kept
        )
        return takes < frees
