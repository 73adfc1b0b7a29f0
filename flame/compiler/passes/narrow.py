"""Kernels that compute half-width floats in float32 read them as they are, not as widened copies.

Mixed precision converts operands of norms, softmax and losses to float32, as PyTorch does. Their
kernels widen every element that they load anyway (`Op.widens`), so the copy would be memory traffic
alone. Results keep their dtype. Runs after the passes that ask ops for the types of results.
"""

from __future__ import annotations

from flame.core.errors import FlameError
from flame.core.types import TensorType
from flame.graph import Graph, Node, Operand, Symbol, infer, tensor_of, type_of
from flame.ops.conversion import copy
from flame.ops.elementwise import compute_dtype


def narrow(graph: Graph) -> Graph:
    makers = {s: node for node in graph.nodes if node.op is copy for s in node.outputs}
    changed = False
    nodes: list[Node] = []
    for node in graph.nodes:
        made = _narrowed(node, makers) if node.op.widens else node
        changed = changed or made is not node
        nodes.append(made)
    if not changed:
        return graph
    return Graph(graph.inputs, tuple(nodes), graph.outputs, graph.updates, graph.constants)


def _narrowed(node: Node, makers: dict[Symbol, Node]) -> Node:
    inputs: list[Operand] = [_source(x, makers) for x in node.inputs]
    if all(a is b for a, b in zip(inputs, node.inputs, strict=True)):
        return node
    try:
        infer(node.op, tuple(map(type_of, inputs)), node.attributes)
    except FlameError:  # operands that must be of one dtype
        return node
    return Node(node.op, tuple(inputs), node.outputs, node.attributes, node.line)


def _source(operand: Operand, makers: dict[Symbol, Node]) -> Operand:
    """What a widening copy in the same layout was made from; else the operand."""
    if not isinstance(operand, Symbol) or operand not in makers:
        return operand
    (source,) = makers[operand].symbols
    before, after = tensor_of(source), operand.type
    assert isinstance(after, TensorType)
    halves = before.dtype.kind == "f" and before.dtype.bits == 16
    widened = halves and compute_dtype(before.dtype) is after.dtype
    return source if widened and before.strides == after.strides else operand
