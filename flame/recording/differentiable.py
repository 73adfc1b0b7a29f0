"""A recorded function whose results a gradient may be asked of: a second graph, for backward.

Invariants: the backward graph is recorded right after the forward one, by the same autograd; what
it reads of the forward pass is kept as results of the forward graph, whole memories only, views
are made again; parameters are read where they are, and must not have changed meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flame.autograd import engine
from flame.autograd.node import Edge, Node, OpNode
from flame.compiler.compilation import compile_graph
from flame.compiler.schedule.task import owners_of
from flame.core.errors import GradientError
from flame.core.types import TensorType, tensor_type
from flame.graph import Graph, Symbol
from flame.graph import Node as GraphNode
from flame.ops.views import ViewOp
from flame.runtime.storage import Storage
from flame.tensor import Tensor


@dataclass
class Backward:
    """The backward graph of a recording.

    outputs: numbers of the results that gradients are given for; leaves: what gradients are made
    for, a tensor from outside or the number of an argument; saved: symbols of the forward graph
    that are kept; arguments, states: those that are read again.
    """

    graph: Graph
    types: tuple[TensorType, ...]
    outputs: tuple[int, ...]
    leaves: tuple[Tensor | int, ...]
    gradients: tuple[TensorType | None, ...]
    saved: tuple[Symbol, ...]
    arguments: tuple[int, ...]
    numbers: tuple[Symbol, ...]
    states: tuple[Any, ...]
    program: Any = None

    def compiled(self) -> Any:
        """The program, made at the first backward pass."""
        if self.program is None:
            state = {m.given: m.storage.pointer for m in self.states}
            self.program = compile_graph(self.graph, state)
        return self.program


def record_backward(recorder: Any, results: Sequence[Tensor], inputs: Sequence[Tensor]) -> Any:
    """Record the gradients of the ``results`` that have any; None where no gradient can flow."""
    wanted = [
        (i, t)
        for i, t in enumerate(results)
        if t.requires_grad and not t.is_leaf and not _gone_through(t)
    ]
    if not wanted:
        return None
    mark = len(recorder.nodes)
    tensors = [t for _, t in wanted]
    leaves = _leaves(tensors)
    given = []
    for tensor in tensors:
        type_ = tensor_type(tensor.dtype, tensor.shape, None, tensor.type.device)
        given.append(recorder.wrap(recorder.fresh(type_, "g"), "a gradient"))
    cotangents = [recorder.symbol_of(g) for g in given]
    found = engine.grad(tensors, leaves, given, False, False, True)
    known = [(leaf, g) for leaf, g in zip(leaves, found, strict=True) if g is not None]
    outputs = [recorder.symbol_of(g) for _, g in known]
    place = {id(t): i for i, t in enumerate(inputs)}
    nodes, recorder.nodes = recorder.nodes[mark:], recorder.nodes[:mark]
    return _Partition(recorder, nodes).backward(
        cotangents,
        outputs,
        tuple(i for i, _ in wanted),
        tuple(place.get(id(leaf), leaf) for leaf, _ in known),
    )


def _gone_through(tensor: Tensor) -> bool:
    """Whether a backward pass inside of the function has freed some of the history already."""
    return any(isinstance(n, OpNode) and n.kept is None for n in _history([tensor]))


def _history(tensors: Iterable[Tensor]) -> Iterator[Node]:
    """The nodes behind tensors, each once."""
    seen: set[int] = set()
    waiting = [t.current_node() for t in tensors]
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            waiting += [edge[0] for edge in node.edges if edge and isinstance(edge[0], Node)]


def _leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The leaves that gradients of these reach."""
    edges = [edge for node in _history(tensors) for edge in node.edges if edge is not None]
    found = {id(target): target for target, _ in edges if not isinstance(target, Node)}
    return list(found.values())


class _Partition:
    """Divides what was recorded into the forward and the backward graph."""

    def __init__(self, recorder: Any, nodes: list[GraphNode]) -> None:
        self.recorder, self.nodes = recorder, nodes
        forward: list[GraphNode] = recorder.nodes
        self.views = {n.outputs[0]: n for n in forward if isinstance(n.op, ViewOp)}
        self.made = {s for n in forward for s in n.outputs}
        graph = Graph((), tuple(forward), ())
        self.owners = owners_of(graph)

    def backward(
        self,
        cotangents: list[Symbol],
        outputs: list[Symbol],
        results: tuple[int, ...],
        leaves: tuple[Tensor | int, ...],
    ) -> Backward:
        recorder = self.recorder
        own = {*cotangents, *(s for n in self.nodes for s in n.outputs)}
        read = [s for n in self.nodes for s in n.symbols] + outputs
        outer = list(dict.fromkeys(s for s in read if s not in own))
        again: dict[Symbol, GraphNode] = {}
        roots = list(dict.fromkeys(self._root(s, again) for s in outer))
        changed = {m.given for m in recorder.states if m.whole is not m.given}
        states = tuple(m for m in recorder.states if m.given in roots and m.given not in changed)
        arguments = tuple(i for i, m in enumerate(recorder.arguments) if m.given in roots)
        numbers = tuple(s for r in recorder.repeated for s in r.numbers if s in roots)
        constants = {s: recorder.constants[s] for s in roots if s in recorder.constants}
        apart = {
            *(m.given for m in states),
            *(recorder.arguments[i].given for i in arguments),
            *numbers,
            *constants,
        }
        saved = tuple(s for s in roots if s not in apart)
        inputs = (
            *saved,
            *(recorder.arguments[i].given for i in arguments),
            *cotangents,
            *numbers,
            *(m.given for m in states),
        )
        graph = Graph(inputs, (*again.values(), *self.nodes), tuple(outputs), (), constants)
        return Backward(
            graph,
            tuple(_tensor_type(s) for s in cotangents),
            results,
            leaves,
            tuple(_tensor_type(s) for s in outputs),
            saved,
            arguments,
            numbers,
            states,
        )

    def _root(self, symbol: Symbol, again: dict[Symbol, GraphNode]) -> Symbol:
        """What must be kept for a symbol; the views on the way are made again."""
        node = self.views.get(symbol)
        if node is None:
            return symbol
        root = self._root(node.symbols[0], again)
        again[symbol] = node
        return root


class CompiledNode(Node):
    """The backward pass of one call of a compiled function."""

    __slots__ = ("backward", "kept", "numbers", "read", "states")

    name = "compiled"

    def __init__(
        self,
        backward: Backward,
        edges: Sequence[Edge],
        kept: Sequence[tuple[Storage, int]],
        read: Sequence[Tensor],
        numbers: Sequence[Any],
    ) -> None:
        super().__init__(edges, backward.types)
        self.backward = backward
        self.kept: Sequence[tuple[Storage, int]] | None = kept
        self.read = [(t, t.storage.version) for t in read]
        self.states = [(m.storage, m.storage.version) for m in backward.states]
        self.numbers = numbers

    def release(self) -> None:
        self.kept = None

    def apply(
        self, grads: Sequence[Any], differentiable: bool, wanted: Sequence[bool] | None = None
    ) -> list[Any]:
        if differentiable:
            raise GradientError(
                "the backward pass of a compiled function cannot be differentiated again; use the "
                "function uncompiled, or take all gradients inside of the compiled function"
            )
        if self.kept is None:
            raise GradientError(
                "backward of a compiled function was already done and its results freed; pass "
                "retain_graph=True to the first backward to go through it twice"
            )
        changed = [s for s, version in self.states if s.version != version]
        changed += [s for s, _ in self.kept if s.version]
        changed += [t.storage for t, version in self.read if t.storage.version != version]
        if changed:
            raise GradientError(
                "a parameter, argument or result of a compiled function was changed in place "
                "between its forward and its backward pass; change it after backward"
            )
        program = self.backward.compiled()
        given = [g.contiguous() for g in grads]
        results = [Storage.allocate(nbytes, program.device) for _, nbytes in program.result_types]
        program.run(
            *[s.pointer + offset for s, offset in self.kept],
            *[t.pointer for t, _ in self.read],
            *[g.pointer for g in given],
            *self.numbers,
            *[s.pointer for s in results],
        )
        made = []
        types = self.backward.gradients
        for place, type_ in zip(program.output_places, types, strict=True):
            assert type_ is not None
            storage = results[place.index]
            made.append(Tensor.wrap(storage, storage.pointer + place.offset, type_))
        return made


def _tensor_type(symbol: Symbol) -> TensorType:
    assert isinstance(symbol.type, TensorType)
    return symbol.type
