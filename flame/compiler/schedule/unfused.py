"""One task a node: the schedule without fusion, as eager execution runs it, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flame.compiler.schedule.task import Schedule, Task, owners_of
from flame.core.errors import FlameError
from flame.core.types import TensorType
from flame.graph import Graph, Node
from flame.ops.elementwise import Elementwise
from flame.ops.views import ViewOp


def one_task_a_node(graph: Graph) -> Schedule:
    """Every node but views as a task of its own. Operands must be readable, see `passes`."""
    tasks = tuple(task_of(node) for node in graph.nodes if not isinstance(node.op, ViewOp))
    return Schedule(graph, tasks, owners_of(graph))


def task_of(node: Node) -> Task:
    """A node by its own lowering."""
    op = node.op
    outputs = tuple(s.type for s in node.outputs if isinstance(s.type, TensorType))
    return Task(
        op.name,
        node.inputs,
        node.outputs,
        op.lowering(node.types, outputs, node.attributes),
        (node,),
        in_place_of(node),
        op.updates,
        failure_of(node),
    )


def failure_of(node: Node) -> Callable[[int], FlameError] | None:
    """What makes the error of a code that the node's kernels give."""
    return None if node.op.failure is None else partial(_failure, node)


def _failure(node: Node, code: int) -> FlameError:
    assert node.op.failure is not None
    return node.op.failure(code, node.types)


def in_place_of(node: Node) -> frozenset[tuple[int, int]]:
    """Elementwise results may lie over an operand of the same type."""
    pairs = {
        (o, i)
        for o, output in enumerate(node.outputs)
        for i, type_ in enumerate(node.types)
        if isinstance(node.op, Elementwise) and type_ is output.type
    }
    pairs |= {(0, i) for i in node.op.overlays if node.types[i] is node.outputs[0].type}
    if node.op.updates and node.types[0] is node.outputs[0].type:
        pairs.add((0, 0))
    return frozenset(pairs)
