"""A sum of products is one product.

Where a weight is used many times (each step of a recurrent network), its gradient is a sum of
small products, each of the size of the weight: a₁b₁ + a₂b₂ + ... = [a₁ a₂ ...] [b₁; b₂; ...]. The
joined factors are small, as the dimension that is summed over is short in each term.
"""

from __future__ import annotations

from typing import Final

from flame.core.types import tensor_type
from flame.graph import Graph, Node, Rewriter, Symbol, Uses, tensor_of
from flame.ops.op import OPS
from flame.ops.products import _matmul as matmul

LEAST: Final = 4  # terms


def products(graph: Graph) -> Graph:
    sums = _sums(Uses.of(graph))
    if not sums:
        return graph
    rewriter = Rewriter(graph)
    for node in graph.nodes:
        terms = sums.get(node.outputs[0])
        if terms is None:
            rewriter.keep(node)
        else:
            rewriter.replace(node.outputs[0], _joined(rewriter, node, terms))
    return rewriter.done()


def _sums(uses: Uses) -> dict[Symbol, list[Node]]:
    """The products that each sum adds up, where that is all it does and it pays."""
    found: dict[Symbol, list[Node]] = {}
    for node in uses.graph.nodes:
        if node.op is matmul and tensor_of(node.outputs[0]).ndim == 2:
            found[node.outputs[0]] = [node]
        elif node.op is OPS["add"] and all(x in found for x in node.inputs):
            first, second = node.symbols[0], node.symbols[-1]
            same = tensor_of(first).shape == tensor_of(second).shape
            if same and first is not second and all(uses.only(s) is node for s in (first, second)):
                terms = found.pop(first)
                terms += found.pop(second)
                found[node.outputs[0]] = terms
    return {symbol: terms for symbol, terms in found.items() if _pays(terms)}


def _pays(terms: list[Node]) -> bool:
    """Whether joining the factors moves less than adding the products."""
    if len(terms) < LEAST:
        return False
    factors = sum(tensor_of(x).numel for node in terms for x in node.inputs)
    return factors <= sum(tensor_of(node.outputs[0]).numel for node in terms)


def _joined(rewriter: Rewriter, node: Node, terms: list[Node]) -> Symbol:
    (total,) = node.outputs
    lefts, rights = (
        [_symbol(rewriter.now(term.inputs[side])) for term in terms] for side in (0, 1)
    )
    left = _cat(rewriter, lefts, 1, total)
    right = _cat(rewriter, rights, 0, total)
    made = rewriter.emit(matmul, (left, right), {}, like=total, line=node.line)
    return rewriter.laid_out(made, tensor_of(total)) if total in rewriter.pinned else made


def _symbol(operand: object) -> Symbol:
    assert isinstance(operand, Symbol)
    return operand


def _cat(rewriter: Rewriter, pieces: list[Symbol], dim: int, like: Symbol) -> Symbol:
    """Joined along ``dim``, in the order of memory that the pieces have."""
    first = tensor_of(pieces[0])
    shape = list(first.shape)
    shape[dim] = sum(tensor_of(p).shape[dim] for p in pieces)
    turned = first.strides[0] == 1 and first.strides[1] != 1
    strides = (1, shape[0]) if turned else (shape[1], 1)
    type_ = tensor_type(first.dtype, tuple(shape), strides, first.device)
    return rewriter.emit(OPS["cat"], tuple(pieces), {"dim": dim}, like=like, types=(type_,))
