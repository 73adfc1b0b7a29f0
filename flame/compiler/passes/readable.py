"""Every operand is one that its op's kernels can read: others are copied to row-major memory.

Runs after all passes that change layouts. One copy serves all readers.
"""

from __future__ import annotations

from flame.core.types import TensorType
from flame.graph import Graph, Node, Rewriter, Symbol
from flame.ops.conversion import copy


def readable(graph: Graph) -> Graph:
    rewriter = Rewriter(graph)
    copies: dict[Symbol, Symbol] = {}
    for node in graph.nodes:
        rewriter.append(_readable(rewriter, node, copies))
    return rewriter.done() if copies else graph


def _readable(rewriter: Rewriter, node: Node, copies: dict[Symbol, Symbol]) -> Node:
    reads = node.op.reads
    if reads is None:
        return node
    inputs = list(node.inputs)
    for position, x in enumerate(inputs):
        if isinstance(x, Symbol) and isinstance(x.type, TensorType) and not reads(x.type):
            if x not in copies:
                copies[x] = rewriter.emit(copy, (x,), {"contiguous": True}, like=x, line=node.line)
            inputs[position] = copies[x]
    if all(a is b for a, b in zip(inputs, node.inputs, strict=True)):
        return node
    return Node(node.op, tuple(inputs), node.outputs, node.attributes, node.line)
