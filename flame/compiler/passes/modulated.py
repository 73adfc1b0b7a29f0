"""Layer normalizations that a condition of each sample scales and shifts become one node.

    layer_norm(x) * scale + shift       modulated_norm(x, scale, shift)
    its gradients                       modulated_norm_backward

x is (N, ..., C), scale and shift are (N, 1, ..., C). The normalized rows, and the gradient through
the scale, are no tensors any more; the sums over the rows of a sample come from the visit that
gives the gradient of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from flame.graph import Graph, Node, Rewriter, Symbol, Uses, tensor_of
from flame.ops.modulated_norms import modulated_norm, modulated_norm_backward, of_samples
from flame.ops.norm_ops import layer_norm_backward, layer_norm_op
from flame.ops.op import OPS

CASTS: Final = ("copy", "add_backward")  # with one operand and one result


@dataclass(frozen=True, eq=False)
class _Forward:
    """A norm, and what is made of it by this scale and shift."""

    norm: Node
    scale: Symbol
    shift: Symbol
    made: Symbol


@dataclass(frozen=True, eq=False)
class _Backward:
    """The gradient of what was made, and those of x, of the scale, and of the shift if it has one.

    first: the earliest node that gives one of them.
    """

    forward: _Forward
    grad: Symbol
    gradients: tuple[Symbol, Symbol, Symbol | None]
    first: Node


def modulated(graph: Graph) -> Graph:
    finder = _Finder(graph)
    if not finder.forward:
        return graph
    rewriter = Rewriter(graph)
    for node in graph.nodes:
        if node in finder.backward:
            _put_backward(finder.backward[node], rewriter)
        if node.outputs[0] in finder.forward:
            _put_forward(finder.forward[node.outputs[0]], rewriter)
        elif node.outputs[0] not in finder.given:
            rewriter.keep(node)
    return rewriter.done()


class _Finder:
    """forward: by what is made. backward: by the node before which it is to stand. given: results
    of what needs no node of its own any more."""

    def __init__(self, graph: Graph) -> None:
        self.uses = Uses.of(graph)
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.forward: dict[Symbol, _Forward] = {}
        self.backward: dict[Node, _Backward] = {}
        self.given: set[Symbol] = set()
        for node in graph.nodes:
            found = self._forward(node)
            if found is None:
                continue
            readers = self.uses.of_symbol(node.outputs[0])
            backward = [b for n in readers if (b := self._backward(found, n)) is not None]
            if node.outputs[0] in self.uses.results or len(readers) != 1 + len(backward):
                continue  # the normalized rows are needed anyway
            self.forward[found.made] = found
            for each in backward:
                self.backward[each.first] = each
                self.given.update(s for s in each.gradients if s is not None)

    def _forward(self, norm: Node) -> _Forward | None:
        if norm.op is not layer_norm_op or norm.attributes["rows"] != 1:
            return None
        if norm.inputs[1] is not None or norm.inputs[2] is not None:
            return None
        x, normal = tensor_of(norm.outputs[0]), norm.outputs[0]
        for mul in self.uses.of_symbol(normal):
            scale = _other(mul, normal, "mul")
            if scale is None or not of_samples(x, tensor_of(scale)):
                continue
            add = self.uses.only(mul.outputs[0])
            shift = None if add is None else _other(add, mul.outputs[0], "add")
            if add is None or shift is None or not of_samples(x, tensor_of(shift)):
                continue
            if all(tensor_of(n.outputs[0]).dtype is x.dtype for n in (mul, add)):
                return _Forward(norm, scale, shift, add.outputs[0])
        return None

    def _backward(self, forward: _Forward, mul: Node) -> _Backward | None:
        """The gradients that come out of the derivative ``mul`` of the product."""
        normal = forward.norm.outputs[0]
        if mul.op.name != "mul_backward" or len(mul.outputs) != 2 or len(mul.symbols) != 3:
            return None
        grad, *factors = mul.symbols
        if set(factors) != {normal, forward.scale} or grad in factors:
            return None
        # each result is the gradient times the other factor, the second of which comes first
        through, slope = mul.outputs if factors[1] is normal else mul.outputs[::-1]
        last = self.uses.only(through)
        d_scale = self._sum_of(slope)
        if last is None or d_scale is None or last.op is not layer_norm_backward:
            return None
        x, eps = forward.norm.inputs[0], forward.norm.inputs[3]
        if last.inputs != (through, x, None, eps) or len(self.uses.of_symbol(slope)) != 1:
            return None
        if tensor_of(d_scale).dtype is not tensor_of(forward.scale).dtype:
            return None
        d_shift = self._shift_gradient(grad, forward)
        gradients = (last.outputs[0], d_scale, d_shift)
        nodes = [self.uses.makers[s] for s in gradients if s is not None]
        return _Backward(forward, grad, gradients, min(nodes, key=self.position.__getitem__))

    def _sum_of(self, symbol: Symbol) -> Symbol | None:
        """What sums a tensor over the rows of each sample."""
        for node in self.uses.of_symbol(symbol):
            rows = tuple(range(1, tensor_of(symbol).ndim - 1))
            attributes = {"dims": rows, "keepdim": True}
            if node.op is OPS["sum"] and node.attributes == attributes:
                return node.outputs[0]
        return None

    def _shift_gradient(self, grad: Symbol, forward: _Forward) -> Symbol | None:
        casts = [n for n in self.uses.of_symbol(grad) if n.op.name in CASTS and len(n.outputs) == 1]
        for symbol in (grad, *(n.outputs[0] for n in casts)):
            found = self._sum_of(symbol)
            if found is not None and tensor_of(found).dtype is tensor_of(forward.scale).dtype:
                return found
        return None


def _other(node: Node, symbol: Symbol, op: str) -> Symbol | None:
    """The other operand, if a node is this operation of two tensors."""
    if node.op is not OPS[op] or len(node.symbols) != 2 or len(node.inputs) != 2:
        return None
    first, second = node.symbols
    return second if first is symbol and second is not symbol else first


def _put_forward(forward: _Forward, rewriter: Rewriter) -> None:
    x, _, _, eps = rewriter.renewed(forward.norm).inputs
    inputs = (x, rewriter.now(forward.scale), rewriter.now(forward.shift), eps)
    made = rewriter.emit(modulated_norm, inputs, {}, like=forward.made, line=forward.norm.line)
    rewriter.replace(forward.made, made)


def _put_backward(backward: _Backward, rewriter: Rewriter) -> None:
    norm = backward.forward.norm
    x, _, _, eps = rewriter.renewed(norm).inputs
    inputs = (rewriter.now(backward.grad), x, rewriter.now(backward.forward.scale), eps)
    like = backward.gradients[0]
    rewriter.emit(modulated_norm_backward, inputs, {}, like=like, line=norm.line)
    for old, new in zip(backward.gradients, rewriter.nodes[-1].outputs, strict=True):
        if old is not None:
            rewriter.replace(old, new)
