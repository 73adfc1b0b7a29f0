"""Scalars: the value of any symbol of a group at one point of its loops.

Invariant: half-width floats are float32 inside a group; only what is stored is rounded to them.
Every other dtype has the values that it has when each node runs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flame.compiler.lower.space import Access, Space
from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.types import TensorType
from flame.graph import Node, Symbol, tensor_of
from flame.kernel import values
from flame.kernel.values import Value, cast, const
from flame.ops.conversion import converted, copy
from flame.ops.elementwise import Elementwise, compute_dtype, weight

DEAR = 16  # the weight from which a value is kept rather than computed again


class Scalars:
    """``known``: values at this point; what is computed is added to them.

    load(access): an element from memory, in the dtype that it has there.
    """

    def __init__(
        self,
        space: Space,
        numbers: Mapping[Symbol, Value],
        load: Callable[[Access], Value],
        known: dict[Symbol, Value],
    ) -> None:
        self.space, self.numbers, self.load, self.known = space, numbers, load, known

    def of(self, symbol: Symbol) -> Value:
        """The value of a symbol that a node of the group computes, in its compute dtype."""
        found = self.known.get(symbol)
        if found is None:
            self._compute(self.space.flow.producer[symbol])
            found = self.known[symbol]
        return found

    def operand(self, node: Node, position: int) -> Value:
        """An operand of a node, in the dtype that it has in memory or, computed, inside a group."""
        x = node.inputs[position]
        if not isinstance(x, Symbol):
            assert x is not None
            return const(x, dtypes.float64 if isinstance(x, float) else dtypes.int64)
        inside = self.space.inside(x)
        if inside is not None:
            return self.of(inside)
        if isinstance(x.type, TensorType):
            return self.load(self.space.reads[node, position])
        return self.numbers[x]

    def _compute(self, node: Node) -> None:
        given = [self.operand(node, i) for i in range(len(node.inputs))]
        made = compute(node, given)
        for symbol, value in zip(node.outputs, made, strict=True):
            self.known[symbol] = cast(value, inner_dtype(symbol))


def inner_dtype(symbol: Symbol) -> DType:
    """What a symbol's value is inside a group."""
    return compute_dtype(tensor_of(symbol).dtype)


def compute(node: Node, given: list[Value]) -> tuple[Value, ...]:
    """The results of an elementwise node on scalar values."""
    if node.op is copy:
        source = compute_dtype(tensor_of(node.inputs[0]).dtype)
        made = converted(cast(given[0], source), source, inner_dtype(node.outputs[0]))
    else:
        assert isinstance(node.op, Elementwise)
        operand_dtypes, _ = node.op.rule(node.op.name, node.types)
        operands = [cast(x, compute_dtype(d)) for x, d in zip(given, operand_dtypes, strict=True)]
        made = node.op.scalar(*operands, **node.attributes)
    return made if isinstance(made, tuple) else (made,)


def weight_of(node: Node) -> int:
    """About how many instructions an elementwise node is."""
    leaves = []
    for i, x in enumerate(node.inputs):
        if isinstance(x, Symbol):
            dtype = x.type.dtype if isinstance(x.type, TensorType) else dtypes.float64
            leaves.append(values.param(f"x{i}", compute_dtype(dtype)))
        else:
            assert x is not None
            leaves.append(const(x, dtypes.float64 if isinstance(x, float) else dtypes.int64))
    return weight(compute(node, leaves))
