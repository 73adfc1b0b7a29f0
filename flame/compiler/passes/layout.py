"""layout: convolutional networks run channels-last, from the first convolution to the last.

A convolution reads and writes the channels of a position side by side, whatever order its tensors
have in memory; with channels-last memory it needs no turning. So the images that enter are turned
once, and every op follows the layout of its operands, as its `infer` says. What depends on memory
order (results, updates, `as_strided`) is given the layout that it had.
"""

from __future__ import annotations

from flame.core.errors import ShapeError
from flame.core.types import Shape, TensorType, contiguous_strides, tensor_type
from flame.graph import Graph, Node, Symbol, infer
from flame.graph.rewriter import Rewriter, Uses, tensor_symbol
from flame.ops.elementwise import Elementwise
from flame.ops.views import ViewOp


def layout(graph: Graph) -> Graph:
    """The graph with activations of convolutions in channels-last memory."""
    if not any(_turns(node) for node in graph.nodes):
        return graph
    return _Layout(graph).run()


def channels_last(type_: TensorType) -> TensorType:
    """The type (N, C, H, W) with C innermost in memory."""
    n, c, h, w = type_.shape
    steps = contiguous_strides((n, h, w, c))
    strides: Shape = (steps[0], steps[3], steps[1], steps[2])
    return tensor_type(type_.dtype, type_.shape, strides, type_.device)


def _is_channels_last(type_: object) -> bool:
    """Whether images lie channels-last and not row-major as well."""
    if not isinstance(type_, TensorType) or type_.ndim != 4:
        return False
    return type_ is channels_last(type_) and not type_.contiguous


def _turns(node: Node) -> bool:
    """Whether a node is a convolution of images that gains by channels-last memory."""
    types = [node.types[i] for i in node.op.images]
    # depthwise kernels have an order of their own
    return (
        node.attributes.get("groups", 1) == 1
        and any(types)
        and all(isinstance(t, TensorType) and t.ndim == 4 for t in types)
    )


class _Layout:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.uses = graph, Uses.of(graph)
        self.rewriter = Rewriter(graph)

    def run(self) -> Graph:
        for node in self.graph.nodes:
            self._node(node)
        return self.rewriter.done()

    def _node(self, node: Node) -> None:
        rewriter = self.rewriter
        if _turns(node):
            self._turn(node, node.op.images)
        elif isinstance(node.op, ViewOp) or node.op.of_memory:
            rewriter.keep(node)
        elif self._needless(node):
            rewriter.replace(node.outputs[0], rewriter.now(node.inputs[0]))
        elif isinstance(node.op, Elementwise):
            self._turn(node, self._beside(node))
        else:
            self._turn(node, ())

    def _turn(self, node: Node, positions: tuple[int, ...]) -> None:
        """A node with these operands channels-last, and results in the layout that follows."""
        rewriter = self.rewriter
        changed = rewriter.renewed(node)
        inputs = list(changed.inputs)
        for i in positions:
            symbol = tensor_symbol(inputs[i])
            assert isinstance(symbol.type, TensorType)
            inputs[i] = rewriter.laid_out(symbol, channels_last(symbol.type))
        changed = Node(node.op, tuple(inputs), node.outputs, node.attributes, node.line)
        as_inferred = tuple(s.type for s in node.outputs) == infer(
            node.op, node.types, node.attributes
        )
        if changed.types == node.types or not as_inferred:
            rewriter.append(changed)
            return
        types = infer(node.op, changed.types, node.attributes)
        if node.op.any_layout and any(_is_channels_last(t) for t in changed.types):
            types = tuple([channels_last(t) if t.ndim == 4 else t for t in types])
        rewriter.emit(
            node.op,
            changed.inputs,
            node.attributes,
            like=node.outputs[0],
            types=types,
            line=node.line,
        )
        made = rewriter.nodes[-1].outputs
        for old, new in zip(node.outputs, made, strict=True):
            rewriter.replace(old, new)

    def _beside(self, node: Node) -> tuple[int, ...]:
        """Row-major operands of an elementwise op that stand beside channels-last ones."""
        types = [t for t in self.rewriter.renewed(node).types if isinstance(t, TensorType)]
        shape = node.outputs[0].type.shape if isinstance(node.outputs[0].type, TensorType) else ()
        if len(shape) != 4:
            return ()
        images = [t for t in types if t.shape == shape]
        if not any(_is_channels_last(t) for t in images):
            return ()
        return tuple(
            i
            for i, t in enumerate(self.rewriter.renewed(node).types)
            if isinstance(t, TensorType) and t.shape == shape and t.contiguous and t.dense
        )

    def _needless(self, node: Node) -> bool:
        """A copy into row-major memory for reshapes that give channels-last images without it."""
        source = self.rewriter.now(node.inputs[0])
        if node.op.name != "copy" or not isinstance(source, Symbol):
            return False
        (made,) = node.outputs
        before, after = source.type, made.type
        if not isinstance(before, TensorType) or not isinstance(after, TensorType):
            return False
        if before.dtype is not after.dtype or not before.dense or made in self.uses.results:
            return False
        readers = self.uses.of_symbol(made)
        return bool(readers) and all(_seen_channels_last(r, before) for r in readers)


def _seen_channels_last(reader: Node, type_: TensorType) -> bool:
    if reader.op.name != "view" or not isinstance(reader.op, ViewOp):
        return False
    try:
        (made,) = infer(reader.op, (type_,), reader.attributes)
    except ShapeError:
        return False
    return made.ndim == 4 and made is channels_last(made)
