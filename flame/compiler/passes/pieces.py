"""On a GPU, what is joined at once is computed where it is joined.

    a, b = attention_backward(...); cat(a, b)       a and b are laid out as the parts of the result

The schedule then gives them that memory (`schedule.pieces`), and the `cat` has nothing left to do:
the gradients of queries, keys and values that one product made, or of both halves of a gated unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from flame.core.types import TensorType, tensor_type
from flame.graph import Graph, Node, Rewriter, Symbol, Uses, tensor_of
from flame.ops.attention.operation import attention_backward
from flame.ops.elementwise import Elementwise
from flame.ops.joining import pieces_of
from flame.ops.op import OPS
from flame.ops.shapes import inverse, view_strides

LEAST: Final = 1 << 18  # elements of a result from which it pays
PACK: Final = 16  # bytes: parts begin, and their rows lie, where threads move so many at once


def pieces(graph: Graph) -> Graph:
    uses = Uses.of(graph)
    wanted: dict[Symbol, TensorType] = {}
    for node in graph.nodes:
        if node.op is OPS["cat"]:
            wanted.update(_wanted(node, uses))
    if not wanted:
        return graph
    rewriter = Rewriter(graph)
    for node in graph.nodes:
        if node.op is OPS["cat"]:  # its result stays as it is laid out
            rewriter.append(rewriter.renewed(node))
        elif any(s in wanted for s in node.outputs):
            _laid_out(node, wanted, rewriter)
        else:
            rewriter.keep(node)
    return rewriter.done()


def _wanted(node: Node, uses: Uses) -> dict[Symbol, TensorType]:
    """The layouts in which all operands of a `cat` are to be computed; none where one cannot."""
    out = tensor_of(node.outputs[0])
    if out.device == "cpu" or out.numel < LEAST:
        return {}
    found: dict[Symbol, TensorType] = {}
    parts = pieces_of(node.types, out, node.attributes["dim"])
    for symbol, (piece, start) in zip(node.symbols, parts, strict=True):
        root = _root(symbol, piece, node, uses)
        if root is None or root[0] in found or not _aligned(root[1], start):
            return {}
        found[root[0]] = root[1]
    return found


def _aligned(type_: TensorType, start: int) -> bool:
    steps = [s for n, s in zip(type_.shape, type_.strides, strict=True) if n > 1 and s > 1]
    return all(n * type_.dtype.itemsize % PACK == 0 for n in (start, *steps))


def _root(
    symbol: Symbol, type_: TensorType, reader: Node, uses: Uses
) -> tuple[Symbol, TensorType] | None:
    """What a symbol is a view of, and how that is laid out if the symbol is so."""
    while True:
        maker = uses.makers.get(symbol)
        if maker is None or uses.only(symbol) is not reader:
            return None
        if not isinstance(maker.op, Elementwise) and maker.op is not attention_backward:
            before = _before(maker, type_)
            if before is None:
                return None
            symbol, type_, reader = maker.symbols[0], before, maker
            continue
        able = tensor_of(symbol).dtype is type_.dtype and symbol not in uses.results
        return (symbol, type_) if able else None


def _before(view: Node, type_: TensorType) -> TensorType | None:
    """The layout of a view's source, where the view has the layout ``type_``."""
    source = tensor_of(view.inputs[0])
    if view.op is OPS["permute"]:
        dims = inverse(view.attributes["dims"])
        strides = tuple(type_.strides[d] for d in dims)
    elif view.op is OPS["view"]:
        found = view_strides(type_, source.shape)
        if found is None:
            return None
        strides = found
    else:
        return None
    return tensor_type(type_.dtype, source.shape, strides, type_.device)


def _laid_out(node: Node, wanted: dict[Symbol, TensorType], rewriter: Rewriter) -> None:
    outputs = tuple(_renamed(node.outputs, wanted))
    for old, new in zip(node.outputs, outputs, strict=True):
        rewriter.replace(old, new)
    inputs = rewriter.renewed(node).inputs
    rewriter.append(Node(node.op, inputs, outputs, node.attributes, node.line))


def _renamed(symbols: tuple[Symbol, ...], wanted: dict[Symbol, TensorType]) -> Iterator[Symbol]:
    for symbol in symbols:
        type_ = wanted.get(symbol)
        yield symbol if type_ is None else Symbol(f"{symbol.name}_piece", type_)
