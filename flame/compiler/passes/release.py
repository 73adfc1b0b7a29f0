"""`again` has kept two equal computations apart (see `flame.ops.again`); now it is its operand.

Runs after the last pass that merges equal nodes.
"""

from __future__ import annotations

from flame.graph import Graph, Node, Rewriter, tensor_of
from flame.ops.again import again
from flame.ops.conversion import copy


def release(graph: Graph) -> Graph:
    if all(node.op is not again for node in graph.nodes):
        return graph
    rewriter = Rewriter(graph)
    for old in graph.nodes:
        if old.op is not again:
            rewriter.keep(old)
            continue
        node = rewriter.renewed(old)
        if tensor_of(node.inputs[0]) is tensor_of(old.outputs[0]):
            rewriter.replace(old.outputs[0], node.inputs[0])
        else:
            rewriter.append(Node(copy, node.inputs, old.outputs, {}, old.line))
    return rewriter.done()
