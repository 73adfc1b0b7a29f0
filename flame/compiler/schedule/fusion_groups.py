"""Groups of nodes, and the order between them.

Invariants: ``before`` and ``after`` of a group are all groups, direct or not, that must run before
it and after it, as sets of bits; groups never depend on each other in a cycle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from flame.compiler.schedule.task import Task
from flame.graph import Node


class Group:
    """Nodes, in the graph's order. open: others may be merged into it. task: makes the task of
    several nodes.
    """

    __slots__ = ("after", "before", "into", "last", "nodes", "number", "open", "task")

    def __init__(self, number: int, node: Node, last: int) -> None:
        self.number, self.last = number, last
        self.nodes: list[Node] = [node]
        self.before = self.after = 0
        self.open = True
        self.task: Callable[[], Task] | None = None
        self.into: Group | None = None


class Groups:
    """All groups of a graph."""

    def __init__(self) -> None:
        self.all: list[Group] = []
        self.of: dict[Node, Group] = {}

    @property
    def live(self) -> list[Group]:
        return [g for g in self.all if g.into is None]

    def current(self, group: Group) -> Group:
        """What a group was merged into."""
        while group.into is not None:
            group = group.into
        return group

    def members(self, bits: int) -> Iterator[Group]:
        while bits:
            low = bits & -bits
            yield self.all[low.bit_length() - 1]
            bits ^= low

    def add(self, node: Node, before: set[Group], position: int) -> Group:
        """A group of one node, which needs the groups ``before``."""
        group = Group(len(self.all), node, position)
        self.all.append(group)
        self.of[node] = group
        for other in before:
            group.before |= other.before | 1 << other.number
        for other in self.members(group.before):
            other.after |= 1 << group.number
        return group

    def may_merge(self, a: Group, b: Group) -> bool:
        """Whether no third group stands between the two."""
        return not (a.after & b.before or b.after & a.before)

    def merge(self, a: Group, b: Group, nodes: Sequence[Node]) -> Group:
        """Both as one group; ``nodes`` are theirs in order."""
        kept, gone = (a, b) if len(a.nodes) >= len(b.nodes) else (b, a)
        both = 1 << kept.number | 1 << gone.number
        kept.before = (kept.before | gone.before) & ~both
        kept.after = (kept.after | gone.after) & ~both
        kept.nodes, kept.last = list(nodes), max(a.last, b.last)
        gone.into = kept
        for node in gone.nodes:
            self.of[node] = kept
        mine = 1 << kept.number
        for other in self.members(kept.before):
            other.after = (other.after | mine | kept.after) & ~(1 << gone.number)
        for other in self.members(kept.after):
            other.before = (other.before | mine | kept.before) & ~(1 << gone.number)
        return kept
