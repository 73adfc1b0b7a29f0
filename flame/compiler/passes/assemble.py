"""The gradients of slices become one joined tensor.

The gradient of a part of a tensor is `place`: the part amid zeros. Where a tensor was taken apart
(unbind, split, chunk, x[:, 1:]) its gradient is a sum of such, each of full size. If the parts are
boxes side by side in one dimension, one `cat` writes every element once.

If the sum is only read to be copied into another order of dimensions, it is written in that order.
"""

from __future__ import annotations

from dataclasses import dataclass

from flame.core.types import Shape, TensorType, contiguous_strides, tensor_type
from flame.graph import Graph, Node, Rewriter, Symbol, Uses, tensor_of
from flame.ops.conversion import copy
from flame.ops.joining import place
from flame.ops.op import OPS
from flame.ops.shapes import inverse


@dataclass(frozen=True)
class Part:
    """A box of the whole that holds ``source``, whose dimensions are taken in ``order``."""

    source: Symbol
    starts: Shape
    sizes: Shape
    order: tuple[int, ...]


def assemble(graph: Graph) -> Graph:
    uses = Uses.of(graph)
    sums = _sums(graph, uses)
    if not sums:
        return graph
    rewriter = Rewriter(graph)
    for node in graph.nodes:
        parts = sums.get(node.outputs[0])
        plan = None if parts is None else _in_a_row(parts, tensor_of(node.outputs[0]).shape)
        if plan is None:
            rewriter.keep(node)
        else:
            rewriter.replace(node.outputs[0], _joined(rewriter, uses, node, *plan))
    return rewriter.done()


def _sums(graph: Graph, uses: Uses) -> dict[Symbol, list[Part]]:
    """The parts of each `place`, and of sums of them, that is not just a term of another sum."""
    found: dict[Symbol, list[Part]] = {}
    for node in graph.nodes:
        if node.op is place:
            part = part_of(node)
            if part is not None:
                found[node.outputs[0]] = [part]
        elif node.op is OPS["add"] and all(x in found for x in node.inputs):
            first, second = node.symbols[0], node.symbols[-1]
            if first is not second and all(uses.only(s) is node for s in (first, second)):
                parts = found.pop(first)
                parts += found.pop(second)
                found[node.outputs[0]] = parts
    return found


def part_of(node: Node) -> Part | None:
    """The box that a `place` fills, or None for what is none."""
    source, offset = node.inputs
    if not isinstance(source, Symbol) or not isinstance(offset, int):
        return None
    shape: Shape = node.attributes["shape"]
    given = tensor_of(source)
    steps = contiguous_strides(shape)
    if not given.numel:
        return None
    starts = tuple([offset // step % size for step, size in zip(steps, shape, strict=True)])
    of_step = {step: d for d, (step, size) in enumerate(zip(steps, shape, strict=True)) if size > 1}
    sizes = [1] * len(shape)
    axes: dict[int, int] = {}  # dimension of the whole -> of the source
    for axis, (size, step) in enumerate(zip(given.shape, node.attributes["strides"], strict=True)):
        if size == 1:
            continue
        dim = of_step.get(step)
        if dim is None or dim in axes or starts[dim] + size > shape[dim]:
            return None
        axes[dim], sizes[dim] = axis, size
    order = [axes[d] for d in sorted(axes)]
    ones = [axis for axis in range(given.ndim) if axis not in axes.values()]
    order = sorted(order + ones) if order == sorted(order) else order + ones
    return Part(source, starts, tuple(sizes), tuple(order))


def _without(values: Shape, dim: int) -> Shape:
    return values[:dim] + values[dim + 1 :]


def _in_a_row(parts: list[Part], shape: Shape) -> tuple[tuple[Part, ...], int] | None:
    """The parts in order and their dimension, if they have the full size in all others."""
    for dim in range(len(shape)):
        full = _without(shape, dim)
        if all(_without(p.sizes, dim) == full for p in parts):
            row = tuple(sorted(parts, key=lambda p: p.starts[dim]))
            ends = [p.starts[dim] + p.sizes[dim] for p in row]
            if all(end <= p.starts[dim] for end, p in zip(ends, row[1:], strict=False)):
                return row, dim  # side by side
    return None


def _joined(rewriter: Rewriter, uses: Uses, node: Node, row: tuple[Part, ...], dim: int) -> Symbol:
    (whole,) = node.outputs
    type_ = tensor_of(whole)
    pieces: list[Symbol] = []
    at = 0
    for part in row:
        if part.starts[dim] > at:
            pieces.append(_zeros(rewriter, whole, dim, part.starts[dim] - at))
        pieces.append(_piece(rewriter, part))
        at = part.starts[dim] + part.sizes[dim]
    if at < type_.shape[dim]:
        pieces.append(_zeros(rewriter, whole, dim, type_.shape[dim] - at))
    types = (_wanted_layout(uses, whole),)
    if len(pieces) == 1:
        return rewriter.laid_out(pieces[0], types[0])
    return rewriter.emit(
        OPS["cat"], tuple(pieces), {"dim": dim}, like=whole, types=types, line=node.line
    )


def _piece(rewriter: Rewriter, part: Part) -> Symbol:
    """The source with the dimensions of the whole."""
    source = rewriter.now(part.source)
    assert isinstance(source, Symbol)
    if part.order != tuple(range(len(part.order))):
        source = rewriter.emit(OPS["permute"], (source,), {"dims": part.order}, like=source)
    if tensor_of(source).shape != part.sizes:
        source = rewriter.emit(OPS["view"], (source,), {"shape": part.sizes}, like=source)
    return source


def _zeros(rewriter: Rewriter, whole: Symbol, dim: int, size: int) -> Symbol:
    """A gap between parts: one zero, repeated."""
    type_ = tensor_of(whole)
    attributes = {"shape": (), "dtype": type_.dtype, "device": type_.device}
    zero = rewriter.emit(OPS["full"], (0,), attributes, like=whole)
    shape = (*type_.shape[:dim], size, *type_.shape[dim + 1 :])
    return rewriter.emit(OPS["expand"], (zero,), {"shape": shape}, like=whole)


def _wanted_layout(uses: Uses, symbol: Symbol) -> TensorType:
    """The layout in which the only reader of a permutation of ``symbol`` copies it, if so."""
    type_ = tensor_of(symbol)
    reader = uses.only(symbol)
    if reader is None or reader.op is not OPS["permute"]:
        return type_
    last = uses.only(reader.outputs[0])
    if last is None or last.op is not copy:
        return type_
    dims = inverse(reader.attributes["dims"])
    strides = tensor_of(last.outputs[0]).strides
    return tensor_type(type_.dtype, type_.shape, tuple([strides[d] for d in dims]), type_.device)
