"""fuse: Graph -> Schedule of few tasks, by merging nodes into groups that share their loops.

The partition is greedy, in the graph's order: each node is merged with the groups of its producers,
and with groups that read the same operand, the youngest first, where
 - no path leads from one through a third group to the other;
 - both have one space of loops (`compiler.lower.space`) and kernels that gain (`lower.group`).
Elementwise nodes, copies and reductions are merged with each other. Any other node is the head of a
group, which elementwise nodes that follow may join (`lower.epilogue`); but what only a reduction
needs waits for the reduction, which then needs no memory for it. A group of one node is a task by
its op's own lowering. Nodes that no result needs are left out.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from flame.compiler.lower.atoms import Mismatch
from flame.compiler.lower.epilogue import can_be_head, head_inputs, lower_head
from flame.compiler.lower.flow import Flow
from flame.compiler.lower.group import POINTWISE, Kind, kind_of, pairs_of
from flame.compiler.lower.operands import kernel_name, task_inputs
from flame.compiler.lower.space import Space, space_of
from flame.compiler.schedule.fusion_groups import Group, Groups
from flame.compiler.schedule.task import Schedule, Task
from flame.compiler.schedule.unfused import failure_of, task_of
from flame.core.types import TensorType
from flame.graph import Graph, Node, Symbol, tensor_of
from flame.kernel.builder import Lowering
from flame.ops.conversion import copy
from flame.ops.elementwise import Elementwise
from flame.ops.reductions import Reduction
from flame.ops.views import ViewOp

MAX_NODES = 64
TRIES = 6  # groups that a node is tried with
SIBLING = 64  # nodes between two readers of an operand that may be merged


def fuse(graph: Graph) -> Schedule:
    """The tasks of a graph, fused; the same results as `one_task_a_node`."""
    flow = Flow(graph)
    groups = _partition(flow)
    tasks = tuple(_task(group) for group in _in_order(flow, groups))
    return Schedule(graph, tasks, flow.owners)


def fusable(node: Node) -> bool:
    """Whether a node can be part of a group of several nodes."""
    if isinstance(node.op, Elementwise):
        able = node.op.invalid is None
    elif isinstance(node.op, Reduction):
        x = tensor_of(node.inputs[0])
        able = any(x.shape[d] != 1 for d in node.attributes["dims"])
    else:
        able = node.op is copy
    types = [s.type for s in (*node.symbols, *node.outputs)]
    return able and all(t.numel for t in types if isinstance(t, TensorType))


def _partition(flow: Flow) -> Groups:
    nodes = _final_last(flow)
    groups = Groups(len(nodes))
    bound = _bound(flow)
    readers: dict[Symbol, list[Group]] = {}
    for node in nodes:
        before = {groups.of[producer] for producer in _producers(flow, node)}
        mine = groups.add(node, before, flow.position[node])
        mine.open = fusable(node) or can_be_head(node)
        if fusable(node):
            for other in _candidates(flow, groups, node, readers):
                if node in bound and not fusable(other.nodes[0]):
                    continue
                merged = _merge(flow, groups, mine, other)
                mine = mine if merged is None else merged
            for symbol in _tensors(node):
                readers.setdefault(symbol, []).append(mine)
    return groups


def _final_last(flow: Flow) -> list[Node]:
    """The nodes that are to run; those that only make results come after all others.

    So an optimizer's update takes a sum of gradients that has found its group, not the other way.
    """
    nodes = [n for n in flow.graph.nodes if n in flow.live and not isinstance(n.op, ViewOp)]
    final = {n for n in nodes if not any(True for s in n.outputs for _ in flow.users(s))}
    return [n for n in nodes if n not in final] + [n for n in nodes if n in final]


def _bound(flow: Flow) -> set[Node]:
    """Elementwise nodes of which a result is needed by reductions alone, or by other such nodes."""
    found: set[Node] = set()
    for node in reversed(flow.graph.nodes):
        if node not in flow.live or isinstance(node.op, (Reduction, ViewOp)) or not fusable(node):
            continue
        for symbol in node.outputs:
            users = list(flow.users(symbol))
            inner = all(isinstance(n.op, Reduction) or n in found for n in users)
            if users and inner and not flow.leaves(symbol, users):
                found.add(node)
    return found


def _producers(flow: Flow, node: Node) -> Iterator[Node]:
    """The nodes that compute what a node reads, views or not."""
    for symbol in _tensors(node):
        producer = flow.producer.get(flow.owner(symbol))
        if producer is not None:
            yield producer


def _tensors(node: Node) -> Iterator[Symbol]:
    return (s for s in dict.fromkeys(node.symbols) if isinstance(s.type, TensorType))


def _candidates(
    flow: Flow, groups: Groups, node: Node, readers: dict[Symbol, list[Group]]
) -> list[Group]:
    """Groups that a node may join: its producers', and those that read what it reads."""
    found: dict[Group, None] = {}
    position = flow.position[node]
    for symbol in _tensors(node):
        producer = flow.producer.get(flow.origin(symbol))
        if producer is not None and producer in groups.of:
            found[groups.of[producer]] = None
    close = sorted(found, key=lambda g: -g.last)
    for symbol in _tensors(node):
        for reader in reversed(readers.get(symbol, [])[-TRIES:]):
            other = groups.current(reader)
            if other not in found and position - other.last <= SIBLING:
                found[other] = None
                close.append(other)
    return [g for g in close if g.open][:TRIES]


def _merge(flow: Flow, groups: Groups, mine: Group, other: Group) -> Group | None:
    other = groups.current(other)
    if other is mine or len(mine.nodes) + len(other.nodes) > MAX_NODES:
        return None
    if not groups.may_merge(mine, other):
        return None
    nodes = sorted([*mine.nodes, *other.nodes], key=flow.position.__getitem__)
    try:
        task = _plan(flow, nodes)
    except Mismatch:
        return None
    merged = groups.merge(mine, other, nodes)
    merged.task = task
    return merged


def _plan(flow: Flow, nodes: list[Node]) -> Callable[[], Task]:
    """What makes the task of several nodes. Raises Mismatch where they are better apart."""
    heads = [node for node in nodes if not fusable(node)]
    if not heads:
        space = space_of(flow, nodes)
        return partial(_fused_task, space, kind_of(space))
    (head, *more), members = heads, set(nodes)
    if more or not members.isdisjoint(_producers(flow, head)):
        raise Mismatch
    space = space_of(flow, [node for node in nodes if node is not head], head)
    if kind_of(space) is not POINTWISE:
        raise Mismatch
    return partial(_headed_task, head, space, *lower_head(head, space))


def _in_order(flow: Flow, groups: Groups) -> list[Group]:
    """Groups so that each stands after all that it needs, else by their last node, or where another
    group needs one before that (as an update in it may come late), by the other's."""
    needs: dict[Group, set[Group]] = {}
    users: dict[Group, list[Group]] = {}
    for group in groups.live:
        found = {groups.of[p] for node in group.nodes for p in _producers(flow, node)} - {group}
        needs[group] = found
        for other in found:
            users.setdefault(other, []).append(group)
    wanted = {group: group.last for group in groups.live}
    for group in reversed(_sorted(needs, users, wanted)):
        wanted[group] = min([group.last, *(wanted[user] for user in users.get(group, ()))])
    return _sorted(needs, users, wanted)


def _sorted(
    needs: Mapping[Group, set[Group]],
    users: Mapping[Group, Sequence[Group]],
    wanted: Mapping[Group, int],
) -> list[Group]:
    """Each group after those that it needs, else by where it is wanted."""
    waits = {group: len(found) for group, found in needs.items()}
    ready = [(wanted[g], g.number, g) for g, count in waits.items() if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        *_, group = heapq.heappop(ready)
        order.append(group)
        for user in users.get(group, ()):
            waits[user] -= 1
            if not waits[user]:
                heapq.heappush(ready, (wanted[user], user.number, user))
    return order


def _task(group: Group) -> Task:
    return task_of(group.nodes[0]) if group.task is None else group.task()


def _fused_task(space: Space, kind: Kind) -> Task:
    return Task(
        kernel_name(space),
        task_inputs(space),
        tuple(a.symbol for a in space.stores),
        kind.lower(space),
        space.nodes,
        pairs_of(space),
    )


def _headed_task(
    head: Node, space: Space, lowering: Lowering, in_place: frozenset[tuple[int, int]]
) -> Task:
    return Task(
        f"{head.op.name}_{kernel_name(space)}",
        head_inputs(head, space),
        (*head.outputs[1:], *(a.symbol for a in space.stores)),
        lowering,
        (head, *space.nodes),
        in_place,
        failure=failure_of(head),
    )
