"""One form for what can be written in several: nodes that give back an operand go, numbers stand
last, chains of conversions and negations become short.

What an elementwise node does is read off its scalar function, with the numbers among its operands
put in: x + 0, x * 1, where(True, x, y) and the first result of add's gradient are all "operand 0".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from flame.core.dtypes import DType
from flame.core.errors import ShapeError
from flame.core.types import TensorType
from flame.graph import Graph, Node, Operand, Rewriter, Symbol, tensor_of, type_of
from flame.kernel import values
from flame.kernel.values import Value, number_of
from flame.ops.conversion import copy
from flame.ops.elementwise import Elementwise, compute_dtype
from flame.ops.op import OPS, Types
from flame.ops.views import ViewOp

COMMUTATIVE: Final = ("add", "mul", "maximum", "minimum")


def canonicalize(graph: Graph) -> Graph:
    rewriter = Rewriter(graph)
    for old in graph.nodes:
        node = rewriter.renewed(old)
        if not any(rule(rewriter, old, node) for rule in RULES):
            rewriter.keep(old)
    return rewriter.done()


Rule = Callable[[Rewriter, Node, Node], bool]  # (rewriter, old node, node with its new operands)


def _view_of_all(rewriter: Rewriter, old: Node, node: Node) -> bool:
    """A view that gives back the memory that some view in its chain began with."""
    if not isinstance(node.op, ViewOp):
        return False
    made, offset = node.op.view(node.types, **node.attributes)
    (source,) = node.symbols
    while True:
        if source.type is made and not offset:
            rewriter.replace(old.outputs[0], source)
            return True
        maker = rewriter.makers.get(source)
        if maker is None or not isinstance(maker.op, ViewOp):
            return False
        if tensor_of(maker.inputs[0]).dtype is not made.dtype:
            return False
        offset += maker.op.view(maker.types, **maker.attributes)[1]
        (source,) = maker.symbols


def _view_of_view(rewriter: Rewriter, old: Node, node: Node) -> bool:
    """Two reshapes are one, and so are two permutations."""
    maker = rewriter.makers.get(node.symbols[0]) if isinstance(node.op, ViewOp) else None
    if maker is None or maker.op is not node.op:
        return False
    if node.op is OPS["view"]:
        attributes = node.attributes
    elif node.op is OPS["permute"]:
        attributes = {"dims": tuple([maker.attributes["dims"][d] for d in node.attributes["dims"]])}
    else:
        return False
    assert isinstance(node.op, ViewOp)
    try:
        made, _ = node.op.view(maker.types, **attributes)
    except ShapeError:
        return False
    if made is not old.outputs[0].type:  # strides of dimensions of size 1 may differ
        return False
    rewriter.append(Node(node.op, maker.inputs, old.outputs, attributes, old.line))
    return True


def _copy(rewriter: Rewriter, old: Node, node: Node) -> bool:
    """A copy to the type that the operand has; a conversion of a conversion."""
    if node.op is not copy:
        return False
    (source,), (made,) = node.symbols, old.outputs
    if source.type is made.type:
        rewriter.replace(made, source)
        return True
    maker = rewriter.makers.get(source)
    if maker is None or maker.op is not copy:
        return False
    first = maker.symbols[0]
    if not _holds(tensor_of(first).dtype, tensor_of(source).dtype):
        return False
    if first.type is made.type:
        rewriter.replace(made, first)
    else:
        attributes = {"dtype": tensor_of(made).dtype}
        rewriter.append(Node(copy, (first,), old.outputs, attributes, old.line))
    return True


def _holds(small: DType, large: DType) -> bool:
    """Whether every number of the first dtype is one of the second."""
    if small is large:
        return True
    if small.kind == large.kind:
        return small.bits < large.bits
    if small.kind == "b":
        return large.kind in "iuf"
    return small.kind == "u" and large.kind == "i" and large.bits > small.bits


def _number_last(rewriter: Rewriter, old: Node, node: Node) -> bool:
    if node.op.name not in COMMUTATIVE or not isinstance(node.op, Elementwise):
        return False
    first, second = node.inputs
    if _is_tensor(first) or not _is_tensor(second):
        return False
    rewriter.append(Node(node.op, (second, first), old.outputs, node.attributes, old.line))
    return True


def _is_tensor(operand: Operand) -> bool:
    return isinstance(type_of(operand), TensorType)


def _division(rewriter: Rewriter, old: Node, node: Node) -> bool:
    """By a power of two: a product with its inverse is exact."""
    if node.op is not OPS["div"] or not isinstance(node.inputs[1], (int, float)):
        return False
    number = float(node.inputs[1])
    if not _is_tensor(node.inputs[0]) or tensor_of(node.inputs[0]).dtype.kind != "f":
        return False
    power = math.isfinite(number) and abs(math.frexp(number)[0]) == 0.5
    if not power or not 2.0**-14 <= abs(number) <= 2.0**14:
        return False
    factor = (node.inputs[0], 1.0 / number)
    rewriter.append(Node(OPS["mul"], factor, old.outputs, {}, old.line))
    return True


def _double_negation(rewriter: Rewriter, old: Node, node: Node) -> bool:
    maker = rewriter.makers.get(node.symbols[0]) if node.op is OPS["neg"] else None
    if maker is None or maker.op is not OPS["neg"]:
        return False
    (made,), (first,) = old.outputs, maker.symbols
    if first.type is not made.type:
        return False
    rewriter.replace(made, first)
    return True


def _identity(rewriter: Rewriter, old: Node, node: Node) -> bool:
    """Results that are an operand, a number, or an earlier result."""
    if not isinstance(node.op, Elementwise) or node.op.failure is not None:
        return False
    plan = meaning(node)
    if plan is None:
        return False
    found = [_stand_in(node, old, i, what) for i, what in enumerate(plan)]
    if all(operand is None for operand in found):
        return False
    if None in found:
        rewriter.keep(old)
    for symbol, operand in zip(old.outputs, found, strict=True):
        if operand is None:
            continue
        same = operand if isinstance(operand, Symbol) else rewriter.full(operand, symbol)
        rewriter.replace(symbol, rewriter.laid_out(same, tensor_of(symbol)))
    return True


def _stand_in(node: Node, old: Node, position: int, what: Value | int | None) -> Operand:
    """What output ``position`` is: a symbol of the new graph, a number, or None for neither."""
    made = tensor_of(old.outputs[position])
    if isinstance(what, Value):
        number = number_of(what)
        return number if made.numel and made.dtype.kind == "f" else None
    if what is None:
        return None
    operand = node.inputs[what]
    if isinstance(operand, Symbol) and isinstance(operand.type, TensorType):
        same = operand.type.shape == made.shape and made.dense
        return operand if same else None
    return None


_meanings: dict[Any, tuple[Value | int | None, ...] | None] = {}
MAX_MEANINGS: Final = 10_000


def meaning(node: Node) -> tuple[Value | int | None, ...] | None:
    """For each result of an elementwise node: the operand that it is, or its constant; or None."""
    numbers = tuple(
        [None if isinstance(x, Symbol) or x is None else (type(x), x) for x in node.inputs]
    )
    key = (node.op, node.types, numbers, tuple(node.attributes.items()))
    try:
        if key not in _meanings:
            if len(_meanings) >= MAX_MEANINGS:
                _meanings.clear()
            _meanings[key] = _meaning(node)
        return _meanings[key]
    except TypeError:  # an attribute that cannot be hashed
        return _meaning(node)


def _meaning(node: Node) -> tuple[Value | int | None, ...] | None:
    op = node.op
    assert isinstance(op, Elementwise)
    operand_dtypes, result_dtypes = op.rule(op.name, node.types)
    leaves = []
    for position, (x, dtype) in enumerate(zip(node.inputs, operand_dtypes, strict=True)):
        inside = compute_dtype(dtype)
        if isinstance(x, Symbol) or x is None or x != x:
            leaves.append(values.param(f"x{position}", inside))
        else:
            leaves.append(values.const(x, inside))
    made = op.scalar(*leaves, **node.attributes)
    results = made if isinstance(made, tuple) else (made,)
    found = [
        _which(result, leaves, node.types, operand_dtypes, dtype)
        for result, dtype in zip(results, result_dtypes, strict=True)
    ]
    return tuple(found) if any(f is not None for f in found) else None


def _which(
    result: Any, leaves: list[Value], types: Types, operand_dtypes: Any, made: DType
) -> Value | int | None:
    if not isinstance(result, Value):
        return None
    if result.op == "const":
        return result
    for position, leaf in enumerate(leaves):
        type_ = types[position]
        if leaf is result and isinstance(type_, TensorType):
            through = operand_dtypes[position]
            return position if type_.dtype is through is made else None
    return None


RULES: Final[tuple[Rule, ...]] = (
    _view_of_all,
    _view_of_view,
    _copy,
    _number_last,
    _double_negation,
    _identity,
    _division,
)
