"""On a GPU, the gradient of an activation becomes a part of that of the normalization before it.

Both kernels of a norm's gradient read its operand anyway; they compute what the activation was
taken of again from it. So no gradient is written and read in between, and what the norm gave, which
is in float32 where group norms stand in mixed precision, is not kept. For channels-last images.
"""

from __future__ import annotations

from typing import Final

from flame.core.types import TensorType
from flame.graph import Graph, Node, Rewriter, Symbol, Uses, tensor_of
from flame.ops import activated_norms
from flame.ops.norm_ops import (
    batch_norm_backward,
    batch_norm_op,
    group_norm_backward,
    group_norm_op,
)
from flame.ops.op import Op

# backward op -> (forward op, the op of both, positions of x, weight and eps in the backward op)
NORMS: Final[dict[Op, tuple[Op, Op, tuple[int, int, int]]]] = {
    batch_norm_backward: (
        batch_norm_op, activated_norms.batch_norm_activated_backward, (1, 4, 5),
    ),
    group_norm_backward: (
        group_norm_op, activated_norms.group_norm_activated_backward, (1, 2, 3),
    ),
}  # fmt: skip
BACKWARD: Final = {f"{name}_backward": name for name in activated_norms.ACTIVATIONS}


def activated(graph: Graph) -> Graph:
    if not any(node.op in NORMS and _on_gpu(node) for node in graph.nodes):
        return graph
    uses, rewriter = Uses.of(graph), Rewriter(graph)
    for node in graph.nodes:
        if node.op not in NORMS or not _joined(node, uses, rewriter):
            rewriter.keep(node)
    return rewriter.done()


def _on_gpu(node: Node) -> bool:
    return tensor_of(node.outputs[0]).device != "cpu"


def _joined(node: Node, uses: Uses, rewriter: Rewriter) -> bool:
    """Whether a norm's gradient was put together with that of the activation behind it."""
    forward, both, positions = NORMS[node.op]
    slope = uses.makers.get(node.symbols[0])
    if slope is None or slope.op.name not in BACKWARD or len(slope.symbols) != 2:
        return False
    grad, kept = slope.symbols
    norm = _before(kept, BACKWARD[slope.op.name], forward, uses)
    x = node.inputs[1]
    fits = (
        norm is not None
        and uses.only(slope.outputs[0]) is node
        and (norm.inputs[0], norm.inputs[1], norm.inputs[3])
        == tuple(node.inputs[i] for i in positions)
        and norm.attributes.get("rows") == node.attributes.get("rows")
        and isinstance(x, Symbol)
        and activated_norms.fits(tensor_of(grad), tensor_of(x))
        and activated_norms.fits(tensor_of(node.outputs[0]), tensor_of(x))
        and tensor_of(grad).dtype is tensor_of(slope.outputs[0]).dtype
    )
    if not fits or norm is None:
        return False
    inputs = (rewriter.now(grad), *rewriter.renewed(node).inputs[1:], rewriter.now(norm.inputs[2]))
    attributes = {**node.attributes, "activation": BACKWARD[slope.op.name]}
    rewriter.append(Node(both, inputs, node.outputs, attributes, node.line))
    return True


def _before(kept: Symbol, activation: str, forward: Op, uses: Uses) -> Node | None:
    """The norm whose result, or the activation of it, a gradient asks for."""
    maker = uses.makers.get(kept)
    if maker is not None and maker.op.name == activation:
        maker = uses.makers.get(maker.symbols[0])
        kept = maker.outputs[0] if maker is not None else kept
    found = maker is not None and maker.op is forward and maker.outputs[0] is kept
    return maker if found and isinstance(kept.type, TensorType) else None
