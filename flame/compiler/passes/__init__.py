"""Graph -> Graph: each pass a file, in the order in which they run, with the reason for its place."""

from __future__ import annotations

from flame.graph import Graph


def optimize(graph: Graph) -> Graph:
    """The graph after all passes."""
    return graph
