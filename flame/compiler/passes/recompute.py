"""Cheap values are computed again in the backward pass instead of being kept for it.

Only at the place where most memory is in use, only elementwise results, and only from operands that
are there anyway. On a CPU they are of few instructions (no exp, no tanh); on a GPU instructions
are cheap beside memory, and gelu within a product counts as the elementwise node that it is. Where
the late readers are elementwise too, the second computation is part of their kernel, and saves
reading; where they are products, it costs a pass over its operands.
"""

from __future__ import annotations

from typing import Final

from flame.compiler.lower.scalars import weight_of
from flame.compiler.passes.dead import dead
from flame.core.types import TensorType
from flame.graph import Graph, Node, Operand, Symbol, Uses, tensor_of
from flame.graph.liveness import Liveness
from flame.ops.affine import linear_gelu
from flame.ops.elementwise import Elementwise
from flame.ops.op import OPS
from flame.ops.views import ViewOp

CHEAP: Final = {"cpu": 12, "cuda": 96}  # instructions for an element
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
        made = dead(_again(graph, chosen, peak))  # views that nobody reads any more
        if Liveness(made).peak() >= profile[peak]:
            return graph
        graph = made
    return graph


def _choose(graph: Graph, memory: Liveness, peak: int) -> dict[Symbol, Node]:
    """What is kept over ``peak`` for later and may be computed again, and by which node."""
    reads = _reads(memory)
    until = dict(memory.last)  # how long a memory lives, with what is computed again
    found: dict[Symbol, Node] = {}
    for made in graph.nodes[:peak]:
        symbol = made.outputs[0]
        if memory.last.get(symbol, 0) <= peak or memory.last[symbol] == len(graph.nodes):
            continue
        node = _elementwise(made)
        late = next((place for place in reads.get(symbol, ()) if place > peak), None)
        if node is None or late is None or not _cheap(node, memory):
            continue
        read = {memory.owner(s) for s in node.symbols if isinstance(s.type, TensorType)}
        operands = read - found.keys()  # others are computed again, too
        longer = [s for s in operands if not _alive(graph, memory, until, s, late)]
        # What lives longer for it must not take more than it frees.
        lent = sum(memory.bytes_of(s) for s in longer)
        if all(until.get(s, -1) > peak for s in longer) and lent <= memory.bytes_of(symbol):
            found[symbol] = node
            until[symbol] = peak
            until.update(dict.fromkeys(longer, late))
    return found


def _elementwise(node: Node) -> Node | None:
    """The elementwise node that gives a node's first output."""
    if node.op is linear_gelu:
        return Node(OPS["gelu_tanh"], node.outputs[1:], node.outputs[:1], {}, node.line)
    return node if isinstance(node.op, Elementwise) else None


def _reads(memory: Liveness) -> dict[Symbol, list[int]]:
    """Where each memory is read, by other nodes than views."""
    found: dict[Symbol, list[int]] = {}
    for position, node in enumerate(memory.nodes):
        if not isinstance(node.op, ViewOp):
            for symbol in node.symbols:
                found.setdefault(memory.owner(symbol), []).append(position)
    return found


def _cheap(node: Node, memory: Liveness) -> bool:
    if node.op.failure is not None or len(node.outputs) != 1:
        return False
    (made,) = node.outputs
    if memory.bytes_of(made) < LEAST:
        return False
    return weight_of(node) <= CHEAP["cpu" if tensor_of(made).device == "cpu" else "cuda"]


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


def _again(graph: Graph, chosen: dict[Symbol, Node], peak: int) -> Graph:
    """What is chosen stands once more before its first reader after the peak, and so do views."""
    uses = Uses.of(graph)
    second: dict[Symbol, Symbol] = {}
    nodes: list[Node] = list(graph.nodes[: peak + 1])

    def now(operand: Operand) -> Operand:
        if not isinstance(operand, Symbol):
            return operand
        found = second.get(operand)
        if found is None:
            maker = chosen.get(operand, uses.makers.get(operand))
            found = operand
            if maker is not None and (operand in chosen or isinstance(maker.op, ViewOp)):
                inputs = tuple([now(x) for x in maker.inputs])
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
