"""Space: the loops that the nodes of a group share, and every operand's steps in them.

Invariants: the loops of a group are its *kept* and its *reduced* atoms. A node stands at the full
level (one value for each point of all loops) or at the kept level (one value for each point of the
kept loops: what a reduction gives, and what is computed from that). All reductions of a group
reduce the same loops, but for *crossed* ones, which fold exactly the kept loops, and whose results
nothing in the group uses. A group that breaks this has no space: `space_of` raises Mismatch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flame.compiler.lower.atoms import Atom, Atoms, Dims, Mismatch, flat, fresh, joined, unify
from flame.compiler.lower.flow import Flow
from flame.core.types import Shape, TensorType, element_count
from flame.graph import Node, Symbol, tensor_of
from flame.ops.reductions import Reduction


@dataclass(frozen=True, eq=False)
class Access:
    """A symbol in memory, and the elements between neighbours in each loop (0: it repeats)."""

    symbol: Symbol
    steps: Mapping[Atom, int]

    @property
    def type(self) -> TensorType:
        return tensor_of(self.symbol)

    def strides(self, loops: Sequence[Atom]) -> Shape:
        return tuple(self.steps.get(atom, 0) for atom in loops)


@dataclass(frozen=True, eq=False)
class Space:
    """loops: kept and reduced ones, from the largest step in memory to the smallest.

    head: a node with a kernel of its own, whose first output the group takes at the full level; not
    among ``nodes``. full: the nodes at the full level, and reductions. reads: what operand ``i`` of
    a node reads from memory. stores: the results that are needed outside. dims: of the symbols
    inside.
    """

    flow: Flow
    nodes: tuple[Node, ...]
    loops: tuple[Atom, ...]
    reduced: frozenset[Atom]
    full: frozenset[Node]
    reads: Mapping[tuple[Node, int], Access]
    stores: tuple[Access, ...]
    dims: Mapping[Symbol, Dims]
    crossed: frozenset[Node] = frozenset()
    head: Node | None = None

    @property
    def sizes(self) -> Shape:
        return tuple(atom.size for atom in self.loops)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def device(self) -> str:
        return tensor_of(self.nodes[0].outputs[0]).device

    @property
    def kept(self) -> tuple[Atom, ...]:
        return tuple(a for a in self.loops if a not in self.reduced)

    @property
    def accesses(self) -> tuple[Access, ...]:
        return tuple(dict.fromkeys(self.reads.values()))

    @property
    def numbers(self) -> tuple[Symbol, ...]:
        """Numbers that are known at the call."""
        return tuple(
            dict.fromkeys(s for n in self.nodes for s in n.symbols if isinstance(s.type, type))
        )

    def covers(self, access: Access) -> bool:
        """Whether an operand has an element for each point of all loops."""
        return all(access.steps.get(atom) for atom in self.loops)

    def inside(self, operand: object) -> Symbol | None:
        """The symbol computed by the group that an operand is, or is a view of."""
        if isinstance(operand, Symbol) and operand in self.dims:
            return self.flow.origin(operand)
        return None


class _Builder:
    def __init__(self, flow: Flow, nodes: Sequence[Node], head: Node | None) -> None:
        self.flow, self.nodes, self.head = flow, tuple(nodes), head
        self.members = {*nodes} if head is None else {*nodes, head}
        self.dims: dict[Symbol, Dims] = {}
        self.reads: list[tuple[Node, int, Symbol, Dims]] = []
        self.iterated: dict[Node, Dims] = {}
        self.folded: dict[Node, Atoms] = {}

    def dims_of(self, symbol: Symbol) -> Dims | None:
        """The loops of a value of the group or of a view of one; None for what is in memory."""
        found = self.dims.get(symbol)
        if found is not None:
            return found
        node = self.flow.producer.get(symbol)
        if node is None or node not in self.flow.regrouped:
            return None
        source = self.dims_of(node.symbols[0])
        if source is None:
            return None
        made = fresh(tensor_of(symbol).shape)
        unify(joined(source), joined([made[axis] for axis in self.flow.regrouped[node]]))
        self.dims[symbol] = made
        return made

    def elementwise(self, node: Node) -> None:
        shape = tensor_of(node.outputs[0]).shape
        made = fresh(shape)
        for position, operand in enumerate(node.inputs):
            if not isinstance(operand, Symbol) or not isinstance(operand.type, TensorType):
                continue
            inner = operand.type.shape
            aligned = made[len(shape) - len(inner) :]
            known = self.dims_of(operand)
            if known is None:
                seen = [d if n != 1 else [] for d, n in zip(aligned, inner, strict=True)]
                self.reads.append((node, position, operand, seen))
                continue
            for mine, other, size in zip(aligned, known, inner, strict=True):
                if size != 1:
                    unify(mine, other)
        self.iterated[node] = made
        for symbol in node.outputs:
            self.dims[symbol] = made

    def reduction(self, node: Node) -> None:
        (x,) = node.symbols
        gone = node.attributes["dims"]
        dims = self.dims_of(x)
        if dims is None:
            dims = fresh(tensor_of(x).shape)
            self.reads.append((node, 0, x, dims))
        self.iterated[node] = dims
        self.folded[node] = [atom for d in gone for atom in dims[d]]
        kept = [d for axis, d in enumerate(dims) if axis not in gone]
        if node.attributes["keepdim"]:
            kept = [[] if axis in gone else d for axis, d in enumerate(dims)]
        self.dims[node.outputs[0]] = kept

    def connect(self, largest: Node) -> None:
        """Where loops seem to differ, nodes that read one operand read it at the same place.

        Any others of one shape may as well run side by side.
        """
        first: dict[Symbol, Dims] = {}
        for _, _, symbol, dims in self.reads:
            other = first.setdefault(symbol, dims)
            if other is not dims:
                for mine, its in zip(other, dims, strict=True):
                    unify(mine, its)
        whole = self.iterated[largest]
        for dims in self.iterated.values():
            if [_sizes([d]) for d in dims] == [_sizes([d]) for d in whole]:
                for mine, its in zip(whole, dims, strict=True):
                    unify(mine, its)

    def space(self) -> Space:
        if self.head is not None:
            result = self.head.outputs[0]
            self.iterated[self.head] = self.dims[result] = fresh(tensor_of(result).shape)
        for node in self.nodes:
            (self.reduction if isinstance(node.op, Reduction) else self.elementwise)(node)
        largest = max(self.iterated, key=lambda n: element_count(_sizes(self.iterated[n])))
        if any(
            set(joined(d)) - set(joined(self.iterated[largest])) for d in self.iterated.values()
        ):
            self.connect(largest)
        loops = joined(self.iterated[largest])
        reads: dict[tuple[Node, int], Access] = {}
        unique: dict[object, Access] = {}
        for node, position, symbol, dims in self.reads:
            access = access_of(symbol, dims)
            key = (symbol, tuple(access.steps.items()))
            reads[node, position] = unique.setdefault(key, access)
            owner = self.flow.producer.get(self.flow.owner(symbol))
            if owner in self.members:
                raise Mismatch  # it reads other elements of what the group writes
        stores = tuple(
            access_of(symbol, self.dims[symbol])
            for symbol in self._made()
            if self.flow.leaves(symbol, self.members)
        )
        ordered = _ordered(loops, [*stores, *reads.values()])
        reduced, crossed = self._reduced(ordered)
        full = self._levels(loops, reduced)
        return Space(
            self.flow, self.nodes, ordered, reduced, full, reads, stores,
            {s: [flat(d) for d in dims] for s, dims in self.dims.items()}, crossed, self.head,
        )  # fmt: skip

    def _made(self) -> list[Symbol]:
        """What the group computes, the head's result first."""
        first = [] if self.head is None else [self.head.outputs[0]]
        return [*first, *(symbol for node in self.nodes for symbol in node.outputs)]

    def _reduced(self, loops: Sequence[Atom]) -> tuple[frozenset[Atom], frozenset[Node]]:
        """The reduced loops, and the crossed reductions; those along memory are not crossed."""
        folded = {node: frozenset(flat(atoms)) for node, atoms in self.folded.items()}
        found = set(folded.values())
        if len(found) <= 1:
            return (found.pop() if found else frozenset()), frozenset()
        reduced = next((atoms for atoms in found if loops[-1] in atoms), None)
        if reduced is None or found != {reduced, frozenset(loops) - reduced}:
            raise Mismatch
        return reduced, frozenset(node for node, atoms in folded.items() if atoms != reduced)

    def _levels(self, loops: Atoms, reduced: frozenset[Atom]) -> frozenset[Node]:
        whole = set(loops)
        if len(whole) != len(loops):
            raise Mismatch
        full = set()
        for dims in self.dims.values():
            atoms = joined(dims)
            if len(set(atoms)) != len(atoms) or not whole.issuperset(atoms):
                raise Mismatch
        for node, dims in self.iterated.items():
            mine = set(joined(dims))
            if mine == whole:
                full.add(node)
            elif node in self.folded or mine != whole - reduced:
                raise Mismatch
        return frozenset(full)


def _sizes(dims: Dims) -> Shape:
    return tuple(atom.size for atom in joined(dims))


def access_of(symbol: Symbol, dims: Dims) -> Access:
    """A tensor in memory, whose dimensions are these loops."""
    steps: dict[Atom, int] = {}
    for dim, stride in zip(dims, tensor_of(symbol).strides, strict=True):
        for atom in reversed(flat(dim)):
            if atom in steps:
                raise Mismatch  # a diagonal
            steps[atom] = stride
            stride *= atom.size
    return Access(symbol, steps)


def _ordered(loops: Atoms, accesses: Sequence[Access]) -> tuple[Atom, ...]:
    """The loops by the steps of the first operand that covers them all."""
    for access in accesses:
        if all(access.steps.get(atom) for atom in loops):
            return tuple(sorted(loops, key=lambda atom: -access.steps[atom]))
    return tuple(loops)


def space_of(flow: Flow, nodes: Sequence[Node], head: Node | None = None) -> Space:
    """The space of nodes that stand in the graph's order. Raises Mismatch."""
    return _Builder(flow, nodes, head).space()
