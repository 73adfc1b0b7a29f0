"""Cheap values are computed again in the backward pass instead of being kept for it.

Only at the place where most memory is in use, only elementwise results of few instructions (no exp,
no tanh), and only from operands that stay alive until then anyway. Where the late readers are
elementwise too, the second computation is part of their kernel and costs nothing.
"""

from __future__ import annotations

from typing import Final

from flame.compiler.lower.scalars import weight_of
from flame.core.types import TensorType
from flame.graph import Graph, Node, Operand, Symbol, Uses
from flame.graph.liveness import Liveness
from flame.ops.elementwise import Elementwise
from flame.ops.views import ViewOp

CHEAP: Final = 12  # instructions for an element
LEAST: Final = 1 << 16  # bytes that are worth it
ROUNDS: Final = 8  # after each, the most memory is in use elsewhere


def recompute(graph: Graph) -> Graph:
    for _ in range(ROUNDS):
        memory = Liveness(graph)
        profile = memory.profile()
        if not profile:
            return graph
        peak = profile.index(max(profile))
        chosen = _choose(graph, memory, peak)
        if not chosen:
            return graph
        made = _again(graph, chosen, peak)
        if Liveness(made).peak() >= profile[peak]:
            return graph
        graph = made
    return graph


def _choose(graph: Graph, memory: Liveness, peak: int) -> set[Symbol]:
    """What is kept over ``peak`` for later, and may be computed again."""
    reads = _reads(memory)
    until = dict(memory.last)  # how long a memory lives, with what is computed again
    found: set[Symbol] = set()
    for node in graph.nodes[:peak]:
        symbol = node.outputs[0]
        if memory.last.get(symbol, 0) <= peak or not _cheap(node, memory):
            continue
        late = next((place for place in reads.get(symbol, ()) if place > peak), None)
        if late is None or memory.last[symbol] == len(graph.nodes):
            continue
        operands = [memory.owner(s) for s in node.symbols if isinstance(s.type, TensorType)]
        if all(_alive(graph, memory, until, s, late) for s in operands):
            found.add(symbol)
            until[symbol] = peak
    return found


def _reads(memory: Liveness) -> dict[Symbol, list[int]]:
    """Where each memory is read, by other nodes than views."""
    found: dict[Symbol, list[int]] = {}
    for position, node in enumerate(memory.nodes):
        if not isinstance(node.op, ViewOp):
            for symbol in node.symbols:
                found.setdefault(memory.owner(symbol), []).append(position)
    return found


def _cheap(node: Node, memory: Liveness) -> bool:
    op = node.op
    if not isinstance(op, Elementwise) or op.failure is not None or len(node.outputs) != 1:
        return False
    return memory.bytes_of(node.outputs[0]) >= LEAST and weight_of(node) <= CHEAP


def _alive(
    graph: Graph, memory: Liveness, until: dict[Symbol, int], owner: Symbol, place: int
) -> bool:
    """Whether an operand is there at ``place`` without being kept for it."""
    if owner in graph.inputs:  # unless an update replaces it before
        return all(
            memory.first.get(memory.owner(new), place) >= place
            for old, new in graph.updates if old is owner
        )  # fmt: skip
    return owner in graph.constants or until.get(owner, -1) >= place


def _again(graph: Graph, chosen: set[Symbol], peak: int) -> Graph:
    """What is chosen stands once more before its first reader after the peak, and so do views."""
    uses = Uses.of(graph)
    second: dict[Symbol, Symbol] = {}
    nodes: list[Node] = list(graph.nodes[: peak + 1])

    def now(operand: Operand) -> Operand:
        if not isinstance(operand, Symbol):
            return operand
        found = second.get(operand)
        if found is None:
            maker = uses.makers.get(operand)
            found = operand
            if maker is not None and (operand in chosen or isinstance(maker.op, ViewOp)):
                inputs = tuple([x if operand in chosen else now(x) for x in maker.inputs])
                if operand in chosen or inputs != maker.inputs:
                    found = Symbol(f"{operand.name}_again", operand.type)
                    nodes.append(Node(maker.op, inputs, (found,), maker.attributes, maker.line))
            second[operand] = found
        return found

    for node in graph.nodes[peak + 1 :]:
        if isinstance(node.op, ViewOp):  # made where it is read
            nodes.append(node)
            continue
        inputs = tuple([now(x) for x in node.inputs])
        nodes.append(Node(node.op, inputs, node.outputs, node.attributes, node.line))
    return Graph(graph.inputs, tuple(nodes), graph.outputs, graph.updates, graph.constants)
