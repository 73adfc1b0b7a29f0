"""Algebra that saves work or memory, where it is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from flame.graph import Graph, Node, Rewriter, Uses, tensor_of
from flame.ops.op import OPS
from flame.ops.products import _matmul as matmul
from flame.ops.reductions import Reduction

Rule = Callable[[Rewriter, Uses, Node, Node], bool]  # (.., old node, with its new operands)


def simplify(graph: Graph) -> Graph:
    rewriter, uses = Rewriter(graph), Uses.of(graph)
    for old in graph.nodes:
        node = rewriter.renewed(old)
        if not any(rule(rewriter, uses, old, node) for rule in RULES):
            rewriter.keep(old)
    return rewriter.done()


def _turned_product(rewriter: Rewriter, uses: Uses, old: Node, node: Node) -> bool:
    """(a b)ᵀ = bᵀ aᵀ: operands are read in either order, so the result can be row-major."""
    if node.op is not OPS["permute"] or old.outputs[0] in rewriter.pinned:
        return False
    product = rewriter.makers.get(node.symbols[0])
    if product is None or product.op is not matmul or uses.only(old.symbols[0]) is not old:
        return False
    a, b = product.symbols if len(product.symbols) == 2 else product.symbols * 2
    rank = tensor_of(a).ndim
    turn = (*range(rank - 2), rank - 1, rank - 2)
    if rank != tensor_of(b).ndim or node.attributes["dims"] != turn:
        return False
    left, right = (
        rewriter.emit(OPS["permute"], (x,), {"dims": turn}, like=x, line=node.line) for x in (b, a)
    )
    made = rewriter.emit(matmul, (left, right), {}, like=old.outputs[0], line=node.line)
    rewriter.replace(old.outputs[0], made)
    return True


def _reduction_of_one(rewriter: Rewriter, uses: Uses, old: Node, node: Node) -> bool:
    """Over dimensions of size 1 there is nothing to combine."""
    if not isinstance(node.op, Reduction) or node.op.name not in ("sum", "mean", "amax", "amin"):
        return False
    (x,), (made,) = node.symbols, old.outputs
    before, after = tensor_of(x), tensor_of(made)
    if any(before.shape[d] != 1 for d in node.attributes["dims"]) or before.dtype != after.dtype:
        return False
    if not after.contiguous or not before.contiguous:
        return False
    seen = rewriter.emit(OPS["view"], (x,), {"shape": after.shape}, like=made, line=node.line)
    rewriter.replace(made, rewriter.laid_out(seen, after))
    return True


RULES: Final[tuple[Rule, ...]] = (_turned_product, _reduction_of_one)
