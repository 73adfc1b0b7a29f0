"""On a GPU, activations become a part of the vendor's products where that pays.

    linear -> gelu (tanh form)          linear_gelu, which also keeps what gelu was taken of
    product -> gelu's derivative        matmul_gelu_backward

Measured on Hopper, in bfloat16: the first saves the reading of what was just written, the second
the whole pass over it. Relu and the gradients of biases stay kernels of their own, as they cost
more as epilogues than they save there. Reshapes may stand between the nodes.
"""

from __future__ import annotations

from typing import Final

from flame.core.types import TensorType
from flame.graph import Graph, Node, Rewriter, Symbol, Uses, tensor_of
from flame.ops.affine import linear_gelu, matmul_gelu_backward
from flame.ops.op import OPS

LEAST: Final = 1 << 20  # elements of a product from which an epilogue pays


def epilogues(graph: Graph) -> Graph:
    if not any(_large(node) for node in graph.nodes):
        return graph
    return _Epilogues(graph).run()


def _large(node: Node) -> bool:
    """Whether a node is a product on a GPU that is worth it."""
    if node.op.name not in ("linear", "matmul"):
        return False
    made = tensor_of(node.outputs[0])
    wide = made.dtype.bits == 16 and made.ndim == 2 and made.contiguous
    return made.device != "cpu" and wide and made.numel >= LEAST


class _Epilogues:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.uses = graph, Uses.of(graph)
        self.rewriter = Rewriter(graph)
        self.activated: dict[Symbol, Symbol] = {}  # result of a linear -> of its gelu

    def run(self) -> Graph:
        for node in self.graph.nodes:
            if not (self._forward(node) or self._activation(node) or self._backward(node)):
                self.rewriter.keep(node)
        return self.rewriter.done()

    def _origin(self, symbol: Symbol) -> Symbol:
        """What a symbol is a reshape of."""
        maker = self.uses.makers.get(symbol)
        while maker is not None and maker.op is OPS["view"] and tensor_of(symbol).contiguous:
            (symbol,) = maker.symbols
            maker = self.uses.makers.get(symbol)
        return symbol

    def _readers(self, symbol: Symbol) -> list[Node]:
        """Who reads a symbol, through reshapes too."""
        found: list[Node] = []
        for node in self.uses.of_symbol(symbol):
            if node.op is OPS["view"] and tensor_of(node.outputs[0]).contiguous:
                found += self._readers(node.outputs[0])
            else:
                found.append(node)
        return found

    def _forward(self, node: Node) -> bool:
        (made, *_) = node.outputs
        if node.op.name != "linear" or not _large(node):
            return False
        gelus = [n for n in self._readers(made) if n.op is OPS["gelu_tanh"]]
        if len(gelus) != 1:
            return False
        rewriter = self.rewriter
        inputs = rewriter.renewed(node).inputs
        type_ = tensor_of(made)
        self.activated[made] = rewriter.emit(
            linear_gelu, inputs, {}, like=gelus[0].outputs[0], types=(type_, type_), line=node.line
        )
        rewriter.replace(made, rewriter.nodes[-1].outputs[1])
        return True

    def _activation(self, node: Node) -> bool:
        if node.op is not OPS["gelu_tanh"] or not isinstance(node.inputs[0], Symbol):
            return False
        made = self.activated.get(self._origin(node.inputs[0]))
        if made is None:
            return False
        self._put(node, made)
        return True

    def _put(self, node: Node, made: Symbol) -> None:
        """Let ``made``, reshaped, be the result of a node."""
        (result,) = node.outputs
        shape = tensor_of(result).shape
        if tensor_of(made).shape != shape:
            made = self.rewriter.emit(OPS["view"], (made,), {"shape": shape}, like=result)
        self.rewriter.replace(result, made)

    def _backward(self, node: Node) -> bool:
        if node.op.name != "gelu_tanh_backward" or len(node.symbols) != 2:
            return False
        g, x = node.symbols
        product = self.uses.makers.get(self._origin(g))
        if product is None or product.op.name != "matmul" or not _large(product):
            return False
        alone = len(self._readers(product.outputs[0])) == 1
        z, (result,) = self._origin(x), node.outputs
        fits = (
            alone
            and product.outputs[0] not in self.uses.results
            and isinstance(result.type, TensorType)
            and result.type.contiguous
            and tensor_of(z).shape == tensor_of(product.outputs[0]).shape
            and tensor_of(z).contiguous
            and tensor_of(z).dtype is result.type.dtype
            and all(tensor_of(s).ndim == 2 for s in product.symbols)
        )
        if not fits:
            return False
        rewriter = self.rewriter
        inputs = rewriter.renewed(product).inputs
        kept = rewriter.now(z)
        made = rewriter.emit(
            matmul_gelu_backward, (*inputs, kept), {}, like=result, line=product.line
        )
        self._put(node, made)
        return True
