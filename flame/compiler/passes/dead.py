"""What no result needs goes: nodes, and constants. Outputs of a node stay as long as one is
needed, but elementwise ops lose the outputs that nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flame.graph import Graph, Node, Symbol
from flame.ops.elementwise import Elementwise
from flame.ops.op import NOT_DIFFERENTIABLE

_narrowed: dict[tuple[Elementwise, tuple[int, ...]], Elementwise] = {}


def dead(graph: Graph) -> Graph:
    needed: set[Symbol] = set(graph.results)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        wanted = [i for i, symbol in enumerate(node.outputs) if symbol in needed]
        if not wanted:
            continue
        needed.update(node.symbols)
        kept.append(_narrow(node, tuple(wanted)))
    constants = {s: numbers for s, numbers in graph.constants.items() if s in needed}
    if tuple(reversed(kept)) == graph.nodes and len(constants) == len(graph.constants):
        return graph
    return Graph(graph.inputs, tuple(reversed(kept)), graph.outputs, graph.updates, constants)


def _narrow(node: Node, wanted: tuple[int, ...]) -> Node:
    if len(wanted) == len(node.outputs) or not isinstance(node.op, Elementwise):
        return node
    outputs = tuple([node.outputs[i] for i in wanted])
    return Node(narrowed(node.op, wanted), node.inputs, outputs, node.attributes, node.line)


def narrowed(op: Elementwise, wanted: tuple[int, ...]) -> Elementwise:
    """The op that gives the outputs ``wanted`` alone."""
    found = _narrowed.get((op, wanted))
    if found is not None:
        return found

    def scalar(*operands: Any, **attributes: Any) -> tuple[Any, ...]:
        made = op.scalar(*operands, **attributes)
        return tuple([made[i] for i in wanted])

    def rule(name: str, types: Any) -> Any:
        operands, results = op.rule(op.name, types)
        return operands, [results[i] for i in wanted]

    made = _narrowed[op, wanted] = Elementwise(
        op.name, _single(scalar) if len(wanted) == 1 else scalar, inputs=op.inputs, rule=rule,
        vjp=NOT_DIFFERENTIABLE, reference=None, register=False, invalid=op.invalid,
        failure=op.failure,
    )  # fmt: skip
    return made


def _single(scalar: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    return lambda *operands, **attributes: scalar(*operands, **attributes)[0]
