"""fuse: Graph -> Schedule of few tasks, by merging nodes into groups that share their loops.

The partition is greedy, in the graph's order: each node is merged with the groups of its producers,
and with groups that read the same operand, the youngest first, where
 - no path leads from one through a third group to the other;
 - both have one space of loops (`compiler.lower.space`) and kernels that gain (`lower.group`).
Elementwise nodes, copies and reductions are merged; every other node is a task of its own, by its
op's own lowering, and so is a group of one node.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from flame.compiler.lower.atoms import Mismatch
from flame.compiler.lower.flow import Flow, tensor_of
from flame.compiler.lower.group import Kind, kind_of, pairs_of
from flame.compiler.lower.operands import kernel_name, task_inputs
from flame.compiler.lower.space import Space, space_of
from flame.compiler.schedule.fusion_groups import Group, Groups
from flame.compiler.schedule.task import Schedule, Task
from flame.compiler.schedule.unfused import task_of
from flame.core.types import TensorType
from flame.graph import Graph, Node, Symbol
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
    tasks = tuple(_task(flow, group) for group in _in_order(flow, groups))
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
    groups = Groups()
    readers: dict[Symbol, list[Group]] = {}
    for node in flow.graph.nodes:
        if isinstance(node.op, ViewOp):
            continue
        before = {groups.of[producer] for producer in _producers(flow, node)}
        mine = groups.add(node, before, flow.position[node])
        mine.open = fusable(node)
        if mine.open:
            for other in _candidates(flow, groups, node, readers):
                merged = _merge(flow, groups, mine, other)
                mine = mine if merged is None else merged
            for symbol in _tensors(node):
                readers.setdefault(symbol, []).append(mine)
    return groups


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
        kind_of(space_of(flow, nodes))
    except Mismatch:
        return None
    return groups.merge(mine, other, nodes)


def _in_order(flow: Flow, groups: Groups) -> list[Group]:
    """Groups so that each stands after all that it needs, else by their last node."""
    needs: dict[Group, set[Group]] = {}
    users: dict[Group, list[Group]] = {}
    for group in groups.live:
        found = {groups.of[p] for node in group.nodes for p in _producers(flow, node)} - {group}
        needs[group] = found
        for other in found:
            users.setdefault(other, []).append(group)
    ready = [(g.last, g.number) for g, found in needs.items() if not found]
    heapq.heapify(ready)
    order = []
    while ready:
        group = groups.all[heapq.heappop(ready)[1]]
        order.append(group)
        for user in users.get(group, ()):
            needs[user].discard(group)
            if not needs[user]:
                heapq.heappush(ready, (user.last, user.number))
    return order


def _task(flow: Flow, group: Group) -> Task:
    if len(group.nodes) == 1:
        return task_of(group.nodes[0])
    space = space_of(flow, group.nodes)
    kind: Kind = kind_of(space)
    return _fused_task(space, kind)


def _fused_task(space: Space, kind: Kind) -> Task:
    return Task(
        kernel_name(space),
        task_inputs(space),
        tuple(a.symbol for a in space.stores),
        kind.lower(space),
        space.nodes,
        pairs_of(space),
    )
