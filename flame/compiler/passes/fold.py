"""What is known before the step runs is computed here, by the references of the ops.

 - A tensor of one number (full, ones, zeros, views and elementwise results of such) becomes a
   number operand of the elementwise ops that read it, where that leaves all dtypes as they are.
 - A node of known operands becomes a constant, if its result is small.

The seed gradient of a loss, learning-rate tables, positions and frequencies go this way.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from flame.core.dtypes import DType
from flame.core.errors import FlameError
from flame.core.types import TensorType
from flame.graph import Graph, Node, Number, Operand, Rewriter, Symbol, tensor_of, type_of
from flame.ops.conversion import copy
from flame.ops.elementwise import Elementwise, compute_dtype
from flame.ops.op import OPS
from flame.ops.slicing import view_bits
from flame.ops.views import ViewOp

SMALL: Final = 1 << 16  # bytes of a result that is kept as a constant


def fold(graph: Graph) -> Graph:
    folding = _Folding(graph)
    for node in graph.nodes:
        folding.visit(node)
    return folding.rewriter.done() if folding.changed else graph


class _Folding:
    """uniform: the number that every element of a symbol is (of the new graph)."""

    def __init__(self, graph: Graph) -> None:
        self.rewriter = Rewriter(graph)
        self.changed = False
        self.uniform: dict[Symbol, Number] = {}
        for symbol, numbers in graph.constants.items():
            self._note_constant(symbol, np.asarray(numbers))

    def visit(self, old: Node) -> None:
        node = self.rewriter.renewed(old)
        number = self._uniform_result(node)
        if number is not None:
            self._note(old, node, number)
        elif self._known(node):
            self._constant(old, node)
        elif isinstance(node.op, Elementwise):
            self._with_numbers(old, node)
        else:
            self.rewriter.keep(old)

    def _note(self, old: Node, node: Node, number: Number) -> None:
        """All elements are one number: what remains is at most a full."""
        (symbol,) = old.outputs
        if node.op is OPS["full"] and self._known(node):
            self._constant(old, node)
        elif isinstance(node.op, ViewOp) or node.op is OPS["full"]:
            self.rewriter.keep(old)
        else:
            self.changed = True
            self.rewriter.replace(symbol, self.rewriter.full(number, symbol))
        now = self.rewriter.now(symbol)
        assert isinstance(now, Symbol)
        self.uniform[now] = number

    def _note_constant(self, symbol: Symbol, array: Any) -> None:
        if array.size and array.nbytes <= SMALL and (array == array.flat[0]).all():
            self.uniform[symbol] = plain(array.flat[0], tensor_of(symbol).dtype)

    def _uniform_result(self, node: Node) -> Number | None:
        """The number that all elements of the only result are, if that is known."""
        if len(node.outputs) != 1 or node.op is view_bits:
            return None
        made = tensor_of(node.outputs[0])
        if node.op is OPS["full"] and not isinstance(node.inputs[0], Symbol):
            return plain(node.inputs[0], made.dtype)
        if isinstance(node.op, (ViewOp, Elementwise)) or node.op is copy:
            numbers = [self._number(x) for x in node.inputs]
            if node.op is OPS["as_strided"] and not tensor_of(node.inputs[0]).dense:
                return None
            if made.numel and None not in numbers and getattr(node.op, "failure", None) is None:
                return self._computed(node, numbers, made.dtype)
        return None

    def _computed(self, node: Node, numbers: list[Any], dtype: DType) -> Number:
        if isinstance(node.op, ViewOp):
            return plain(numbers[0], dtype)
        if node.op is copy:
            source = tensor_of(node.inputs[0]).dtype
            return plain(np.asarray(numbers[0], source.numpy), dtype)
        operands = [
            np.asarray(n, _wide(t.dtype)) if isinstance(t, TensorType) else n
            for n, t in zip(numbers, node.types, strict=True)
        ]
        assert isinstance(node.op, Elementwise)
        with np.errstate(all="ignore"):
            return plain(node.op.evaluate(*operands, **node.attributes), dtype)

    def _number(self, operand: Operand) -> Number | None:
        return self.uniform.get(operand) if isinstance(operand, Symbol) else operand

    def _with_numbers(self, old: Node, node: Node) -> None:
        """Number operands in place of tensors of one number."""
        inputs = list(node.inputs)
        for position, operand in enumerate(inputs):
            number = self.uniform.get(operand) if isinstance(operand, Symbol) else None
            if number is None:
                continue
            changed = [*inputs[:position], number, *inputs[position + 1 :]]
            if _fits(node, tuple(inputs), tuple(changed), position):
                inputs = changed
        if all(a is b for a, b in zip(inputs, node.inputs, strict=True)):
            self.rewriter.keep(old)
            return
        self.changed = True
        self.rewriter.append(Node(node.op, tuple(inputs), old.outputs, old.attributes, old.line))

    def _known(self, node: Node) -> bool:
        """Whether a node can be computed now, and is worth keeping as a constant."""
        known = self.rewriter.constants
        types = [s.type for s in (*node.symbols, *node.outputs)]
        small = all(
            isinstance(t, TensorType) and t.numel * t.dtype.itemsize <= SMALL for t in types
        )
        if not small or node.op.failure is not None:
            return False
        if not all(t.contiguous for t in types if isinstance(t, TensorType)):
            return False
        return all(not isinstance(x, Symbol) or x in known for x in node.inputs)

    def _constant(self, old: Node, node: Node) -> None:
        arrays = [
            _widened(self.rewriter.constants[x]) if isinstance(x, Symbol) else x
            for x in node.inputs
        ]
        try:
            with np.errstate(all="ignore"):
                made = node.op.reference(*arrays, **node.attributes)
        except FlameError:  # what it says is for the step to say
            self.rewriter.keep(old)
            return
        self.changed = True
        results = made if isinstance(made, tuple) else (made,)
        for symbol, result in zip(old.outputs, results, strict=True):
            type_ = tensor_of(symbol)
            array = np.array(result).astype(type_.dtype.numpy).reshape(type_.shape)
            constant = self.rewriter.constant(array, type_, symbol)
            self.rewriter.replace(symbol, constant)
            self._note_constant(constant, array)


def plain(number: Any, dtype: DType) -> Number:
    """A number as Python's, after it was stored in ``dtype``."""
    with np.errstate(all="ignore"):
        stored = np.asarray(number).astype(dtype.numpy)
    if dtype.kind == "f":
        return float(stored)
    return bool(stored) if dtype.kind == "b" else int(stored)


def _wide(dtype: DType) -> Any:
    return compute_dtype(dtype).numpy


def _widened(array: Any) -> Any:
    """Half-width floats as float32, which is what kernels compute in."""
    half = array.dtype.kind not in "biu" and array.dtype.itemsize == 2
    return array.astype(np.float32) if half else array


def _fits(
    node: Node, before: tuple[Operand, ...], after: tuple[Operand, ...], position: int
) -> bool:
    """Whether an elementwise node computes the same in the same dtypes, one operand a number."""
    op = node.op
    assert isinstance(op, Elementwise)
    old, new = (tuple([type_of(x) for x in inputs]) for inputs in (before, after))
    if not any(isinstance(t, TensorType) for t in new):
        return False
    try:
        made = op.infer(new, **node.attributes)
        rules = [op.rule(op.name, types) for types in (old, new)]
    except FlameError:  # an operand that must be a tensor
        return False
    shapes = {t.shape for t in (made if isinstance(made, tuple) else (made,))}
    stays = rules[0][0][position] is tensor_of(before[position]).dtype  # it is not rounded
    same = list(rules[0][0]) == list(rules[1][0]) and list(rules[0][1]) == list(rules[1][1])
    return stays and same and shapes == {tensor_of(s).shape for s in node.outputs}
