"""Passes: which visits of a row compute what, where a row is reduced before it is used again.

Invariants: a value at the full level belongs to the first pass in which all that it depends on is
known; a reduction is complete after its pass. A later pass computes a cheap value again from
memory; it reads one that was stored anyway, and a dear one (`DEAR`) from the worker's scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from flame.compiler.lower.scalars import DEAR, inner_dtype, weight_of
from flame.compiler.lower.space import Access, Space
from flame.graph import Node, Symbol
from flame.ops.reductions import Reduction


@dataclass(frozen=True, eq=False)
class Passes:
    """first: the pass of every value at the full level; for one at the kept level, the pass after
    which it is known (-1: before any). stash: what is kept in scratch for later passes; reload:
    what they read from where it was stored. count: of passes.
    """

    space: Space
    first: dict[Symbol, int] = field(default_factory=dict)
    stash: dict[Symbol, None] = field(default_factory=dict)
    reload: dict[Symbol, Access] = field(default_factory=dict)
    count: int = 1

    def reductions(self, number: int) -> list[Node]:
        """The reductions that pass ``number`` folds."""
        return [
            node
            for node in self.space.nodes
            if self._folded_in(node, number) and node not in self.space.crossed
        ]

    def crossed(self, number: int) -> list[Node]:
        """The reductions over the kept loops that pass ``number`` adds to."""
        return [
            n for n in self.space.nodes if self._folded_in(n, number) and n in self.space.crossed
        ]

    def _folded_in(self, node: Node, number: int) -> bool:
        return isinstance(node.op, Reduction) and self.first[node.outputs[0]] == number

    def kept(self, number: int) -> list[Symbol]:
        """Values at the kept level that are known after pass ``number``."""
        return [
            symbol
            for node in self.space.nodes
            if node not in self.space.full
            for symbol in node.outputs
            if self.first[symbol] == number
        ]

    def stores(self, number: int) -> list[Access]:
        """Results at the full level that pass ``number`` writes."""
        return [
            s for s in self.space.stores if self.full(s.symbol) and self.first[s.symbol] == number
        ]

    def full(self, symbol: Symbol) -> bool:
        node = self.space.flow.producer[symbol]
        return node in self.space.full and not isinstance(node.op, Reduction)

    def roots(self, number: int) -> Iterator[Symbol]:
        """What pass ``number`` needs of the group."""
        for node in (*self.reductions(number), *self.crossed(number)):
            inside = self.space.inside(node.inputs[0])
            if inside is not None:
                yield inside
        for access in self.stores(number):
            yield access.symbol

    def reads(self) -> dict[Access, int]:
        """The last pass that reads each operand, reductions and kept values among the readers."""
        last: dict[Access, int] = {}
        for number in range(self.count):
            for node, position in self.visited(number):
                access = self.space.reads.get((node, position))
                if access is not None:
                    last[access] = number
        for (node, _), access in self.space.reads.items():
            if node not in self.space.full:
                last[access] = self.count
        return last

    def visited(self, number: int) -> Iterator[tuple[Node, int]]:
        """The operands that pass ``number`` evaluates."""
        for node in (*self.reductions(number), *self.crossed(number)):
            yield node, 0
        waiting, seen = list(self.roots(number)), set()
        while waiting:
            symbol = waiting.pop()
            kept = symbol in self.stash or symbol in self.reload
            kept_before = kept and self.first[symbol] < number
            if symbol in seen or kept_before or not self.full(symbol):
                continue
            seen.add(symbol)
            node = self.space.flow.producer[symbol]
            for position, operand in enumerate(node.inputs):
                yield node, position
                inside = self.space.inside(operand)
                if inside is not None:
                    waiting.append(inside)


def passes_of(space: Space) -> Passes:
    first: dict[Symbol, int] = {}
    weights: dict[Symbol, int] = {}
    for node in space.nodes:
        known = [s for s in map(space.inside, node.inputs) if s is not None]
        if isinstance(node.op, Reduction):
            first[node.outputs[0]] = max([0, *(first[s] for s in known)])
            continue
        full = node in space.full
        number = 0 if full else -1
        total = weight_of(node)
        for symbol in known:
            producer = space.flow.producer[symbol]
            below = producer in space.full and not isinstance(producer.op, Reduction)
            number = max(number, first[symbol] + (1 if full and not below else 0))
            total += weights.get(symbol, 0) if below else 0
        for symbol in node.outputs:
            first[symbol], weights[symbol] = number, total
    count = 1 + max([0, *(first[s] for s in first if space.flow.producer[s] in space.full)])
    stored = {
        s.symbol: s
        for s in space.stores
        if s.type.dtype is inner_dtype(s.symbol) and space.flow.producer[s.symbol] in space.full
    }
    reads = dict.fromkeys(space.nodes, 0)
    for node, _ in space.reads:
        reads[node] += 1
    reload = {
        symbol: access
        for symbol, access in stored.items()
        if not space.on_gpu  # which has the row in registers
        and symbol in weights
        and (weights[symbol] >= 4 or reads[space.flow.producer[symbol]] > 1)
    }
    made = Passes(space, first, {}, reload, count)
    for number in range(1, count):
        _keep(made, weights, number)
    return made


def _keep(passes: Passes, weights: dict[Symbol, int], number: int) -> None:
    """Stash the dear values of earlier passes that pass ``number`` uses."""
    waiting = list(passes.roots(number))
    while waiting:
        symbol = waiting.pop()
        if not passes.full(symbol):
            continue
        if passes.first[symbol] < number and symbol in passes.reload:
            continue
        if passes.first[symbol] < number and weights[symbol] >= DEAR:
            passes.stash[symbol] = None
            continue
        node = passes.space.flow.producer[symbol]
        waiting += [s for s in map(passes.space.inside, node.inputs) if s is not None]


def in_place_pairs(passes: Passes) -> frozenset[tuple[int, int]]:
    """(output, input) that may share memory: of one type and place, all reads before the write.

    Results at the kept level are written after all passes. An input of which the group reads
    another view is left out.
    """
    space, last = passes.space, passes.reads()
    flow, accesses = space.flow, space.accesses
    owners = [flow.owner(a.symbol) for a in accesses]
    pairs = set()
    for o, store in enumerate(space.stores):
        full = passes.full(store.symbol)
        written = passes.first[store.symbol] if full else passes.count
        for i, access in enumerate(accesses):
            same = access.type is store.type and access.steps == store.steps
            alone = owners.count(owners[i]) == 1
            if same and alone and last.get(access, -1) <= written:
                pairs.add((o, i))
    return frozenset(pairs)
