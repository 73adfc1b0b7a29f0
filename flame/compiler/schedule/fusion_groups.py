"""Groups of nodes, and the order between them.

Invariants: rows ``before`` and ``after`` of a group are all groups, direct or not, that must run
before it and after it, a bit for each; groups never depend on each other in a cycle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flame.compiler.schedule.task import Task
from flame.graph import Node

Row = np.ndarray[Any, Any]  # of uint8: group n is bit n % 8 of byte n / 8


class Group:
    """Nodes, in the graph's order. open: others may be merged into it. task: makes the task of
    several nodes.
    """

    __slots__ = ("into", "last", "nodes", "number", "open", "task")

    def __init__(self, number: int, node: Node, last: int) -> None:
        self.number, self.last = number, last
        self.nodes: list[Node] = [node]
        self.open = True
        self.task: Callable[[], Task] | None = None
        self.into: Group | None = None


class Groups:
    """All groups of a graph of so many nodes."""

    def __init__(self, nodes: int) -> None:
        self.all: list[Group] = []
        self.of: dict[Node, Group] = {}
        self.before, self.after = (np.zeros((nodes, -(-nodes // 8)), np.uint8) for _ in range(2))

    @property
    def live(self) -> list[Group]:
        return [g for g in self.all if g.into is None]

    def current(self, group: Group) -> Group:
        """What a group was merged into."""
        while group.into is not None:
            group = group.into
        return group

    def add(self, node: Node, before: set[Group], position: int) -> Group:
        """A group of one node, which needs the groups ``before``."""
        group = Group(len(self.all), node, position)
        self.all.append(group)
        self.of[node] = group
        if before:
            mine = self.before[group.number]
            np.bitwise_or.reduce(self.before[[g.number for g in before]], axis=0, out=mine)
            for other in before:
                _add(mine, other.number)
            byte, bit = divmod(group.number, 8)
            self.after[_members(mine), byte] |= 1 << bit
        return group

    def may_merge(self, a: Group, b: Group) -> bool:
        """Whether no third group stands between the two."""
        return not (
            (self.after[a.number] & self.before[b.number]).any()
            or (self.after[b.number] & self.before[a.number]).any()
        )

    def merge(self, a: Group, b: Group, nodes: Sequence[Node]) -> Group:
        """Both as one group; ``nodes`` are theirs in order."""
        kept, gone = (a, b) if len(a.nodes) >= len(b.nodes) else (b, a)
        kept.nodes, kept.last = list(nodes), max(a.last, b.last)
        gone.into = kept
        for node in gone.nodes:
            self.of[node] = kept
        before, after = self.before[kept.number], self.after[kept.number]
        for row, other in ((before, self.before), (after, self.after)):
            row |= other[gone.number]
            for group in (a, b):
                _drop(row, group.number)
        # what stood on one side of either stands on that side of both, and of all behind them
        for seen, row, rows in ((after, before, self.after), (before, after, self.before)):
            beyond = seen.copy()
            _add(beyond, kept.number)
            found = _members(row)
            rows[found] |= beyond
            byte, bit = divmod(gone.number, 8)
            rows[found, byte] &= ~np.uint8(1 << bit)
        return kept


def _members(row: Row) -> Row:
    """The numbers of the groups in a row."""
    return np.flatnonzero(np.unpackbits(row, bitorder="little"))


def _add(row: Row, number: int) -> None:
    row[number // 8] |= 1 << number % 8


def _drop(row: Row, number: int) -> None:
    row[number // 8] &= ~np.uint8(1 << number % 8)
