"""Equal nodes are computed once: the same op object, operands, attributes and result types.

Random draws are no exception: what they give follows from the numbers that they are handed. What is
to be computed again on purpose (activation checkpointing) starts from `again`, which is a new value
to this pass.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from flame.graph import Graph, Node, Operand, Rewriter, Symbol
from flame.ops.again import again

LARGE: Final = 1 << 20  # bytes of a constant that is not compared with others


def cse(graph: Graph) -> Graph:
    rewriter = Rewriter(graph)
    _merge_constants(rewriter)
    seen: dict[Any, Node] = {}
    for old in graph.nodes:
        node = rewriter.renewed(old)
        key = None if node.op is again else key_of(node)
        first = seen.get(key) if key is not None else None
        if first is None:
            if key is not None:
                seen[key] = node
            rewriter.keep(old)
            continue
        for symbol, equal in zip(old.outputs, first.outputs, strict=True):
            rewriter.replace(symbol, equal)
    return rewriter.done()


def _merge_constants(rewriter: Rewriter) -> None:
    seen: dict[Any, Symbol] = {}
    for symbol, numbers in list(rewriter.constants.items()):
        array = np.asarray(numbers)
        if array.nbytes > LARGE:
            continue
        key = (symbol.type, array.tobytes())
        first = seen.setdefault(key, symbol)
        if first is not symbol and symbol not in rewriter.pinned:
            rewriter.replace(symbol, first)
            del rewriter.constants[symbol]


def key_of(node: Node) -> Any:
    """What two nodes that compute the same have in common; None where it cannot be told."""
    inputs = tuple([operand_key(x) for x in node.inputs])
    types = tuple([s.type for s in node.outputs])
    key = (node.op, inputs, tuple(sorted(node.attributes.items())), types)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def operand_key(operand: Operand) -> Any:
    """A symbol by identity; a number by kind and bits, as True is not 1, nor 0.0 -0.0."""
    if operand is None or isinstance(operand, Symbol):
        return operand
    exact = operand.hex() if isinstance(operand, float) else operand
    return type(operand), exact
