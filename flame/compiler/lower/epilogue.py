"""Elementwise nodes behind an op with a kernel of its own take its results before they are stored.

Two ways, for the first output of the op, the *head* of the group:
 - the op has a form that hands its results to an epilogue (`Op.lower_fused`): operands may lie in
   any way that the result's dimensions can walk;
 - else the stores of its kernels are rewritten: ``out[i] = v`` becomes a store of what the group
   computes of v, at the same i. That is right where the kernels never read what they have stored
   there, and where every operand and result of the group lies as the head's result does. A kernel
   may store an element twice: the group is a pure function, so the last store counts as before.
   So nothing may be written in place, and what the graph updates stays a task of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from flame.compiler.lower.atoms import Mismatch, joined
from flame.compiler.lower.operands import kernel_name
from flame.compiler.lower.scalars import Scalars, inner_dtype, weight_of
from flame.compiler.lower.space import Access, Space
from flame.core import dtypes
from flame.core.types import Shape, tensor_type
from flame.graph import Node, Symbol, tensor_of
from flame.graph import Operand as GraphOperand
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Operand, Ref
from flame.kernel.program import (
    Accumulate,
    Assign,
    Declare,
    Gemm,
    If,
    Kernel,
    Loop,
    SplitProduct,
    Statement,
    Store,
    Target,
    Transpose,
)
from flame.kernel.values import Buffer, Value, cast

SHORT = 8  # the weight up to which an epilogue stands in the text several times


def head_inputs(head: Node, space: Space) -> tuple[GraphOperand, ...]:
    """What ``Ref("input", i)`` means in the kernels of a head with its epilogue."""
    return (*head.inputs, *(a.symbol for a in space.accesses), *space.numbers)


def lower_head(head: Node, space: Space) -> tuple[Lowering, frozenset[tuple[int, int]]]:
    """The head's kernels with the group in them, and `Task.in_place`.

    Raises Mismatch where there is no way.
    """
    result = head.outputs[0]
    if head.op.lower_fused is not None and tensor_of(result).dtype.kind == "f":
        types = tuple(tensor_of(s) for s in head.outputs)
        epilogue = GroupEpilogue(head, space)
        lowering = head.op.lower_fused(head.types, types, epilogue, **head.attributes)
        return lowering, frozenset() if epilogue.repeatable else _in_place(head, space)
    return _rewritten(head, space), _over_operands(head, space)


def _over_operands(head: Node, space: Space) -> frozenset[tuple[int, int]]:
    """Pairs of results that stand where the head's stood, and operands that it may lie over."""
    if len(space.stores) != 1 or space.accesses:
        return frozenset()
    (store,) = space.stores
    others = len(head.outputs) - 1
    return frozenset((others, i) for i in head.op.overlays if head.types[i] is store.type)


def _in_place(head: Node, space: Space) -> frozenset[tuple[int, int]]:
    """Pairs of one type and place, of which the input is read there alone."""
    flow = space.flow
    owners = [flow.owner(x) if isinstance(x, Symbol) else None for x in head_inputs(head, space)]
    return frozenset(
        (o, len(head.inputs) + i)
        for o, store in enumerate(space.stores)
        for i, access in enumerate(space.accesses)
        if access.type is store.type
        and access.steps == store.steps
        and owners.count(flow.owner(access.symbol)) == 1
    )


class GroupEpilogue:
    """The group as an `flame.ops.contraction.Epilogue`."""

    def __init__(self, head: Node, space: Space) -> None:
        self.space, self.result = space, head.outputs[0]
        self.first = len(head.inputs)
        self.strides = {a: self._along(a) for a in (*space.accesses, *space.stores)}
        updates = any(s.symbol in space.flow.updated for s in space.stores)
        self.repeatable = not updates and sum(map(weight_of, space.nodes)) <= SHORT
        self.bound: dict[Access, Operand] = {}
        self.numbers: dict[Symbol, Value] = {}

    def _along(self, access: Access) -> Shape:
        """The strides of an operand along the result's dimensions."""
        found = []
        for dim in self.space.dims[self.result]:
            step, size = 0, 1
            for place, atom in enumerate(reversed(joined([dim]))):
                mine = access.steps.get(atom, 0)
                if place and mine != step * size:
                    raise Mismatch
                if not place:
                    step = mine
                size *= atom.size
            found.append(step)
        return tuple(found)

    def declare(self, k: KernelBuilder) -> None:
        space, shape = self.space, tensor_of(self.result).shape
        count = len(space.accesses)
        self.bound = {}
        for i, access in enumerate(space.accesses):
            type_ = tensor_type(access.type.dtype, shape, self.strides[access])
            self.bound[access] = k.tensor("input", self.first + i, type_)
        for i, access in enumerate(space.stores):
            type_ = tensor_type(access.type.dtype, shape, self.strides[access])
            self.bound[access] = k.tensor("output", i, type_)
        self.numbers = {
            symbol: k.number(self.first + count + i, symbol.type)
            for i, symbol in enumerate(space.numbers)
            if isinstance(symbol.type, type)
        }

    def store(self, k: KernelBuilder, index: tuple[Value, ...], value: Value) -> None:
        space = self.space
        known = {self.result: cast(value, inner_dtype(self.result))}
        scalars = Scalars(space, self.numbers, lambda a: self.bound[a][index], known)
        k.store_all([(self.bound[s], index, scalars.of(s.symbol)) for s in space.stores])


# --- stores rewritten -----------------------------------------------------------------------------


def _rewritten(head: Node, space: Space) -> Lowering:
    result = head.outputs[0]
    own = {atom: step for atom, step in _own_steps(space, result).items() if step}
    for access in (*space.accesses, *space.stores):
        steps = {atom: step for atom, step in access.steps.items() if step}
        if steps and steps != own:
            raise Mismatch
    if any(s.symbol in space.flow.updated for s in space.stores):
        raise Mismatch
    types = tuple(tensor_of(s) for s in head.outputs)
    lowering = head.op.lower(head.types, types, **head.attributes)
    if lowering.host is not None or not lowering.kernels:
        raise Mismatch
    ref = Ref("output", 0)
    return replace(
        lowering, kernels=tuple(_Rewriter(b, ref, head, space).bound() for b in lowering.kernels)
    )


def _own_steps(space: Space, result: Symbol) -> dict[object, int]:
    found: dict[object, int] = {}
    for dim, stride in zip(space.dims[result], tensor_of(result).strides, strict=True):
        for atom in reversed(joined([dim])):
            found[atom] = stride
            stride *= atom.size
    return found


class _Rewriter:
    """One kernel of the head, in which the group replaces the stores of ``ref``.

    The head's other outputs come first among the outputs of the group's task, then its stores.
    """

    def __init__(self, bound: BoundKernel, ref: Ref, head: Node, space: Space) -> None:
        self.old, self.ref, self.head, self.space = bound, ref, head, space
        self.target: Buffer | None = None
        self.operands: list[Buffer | Value] = []
        self.refs: list[Ref] = []
        others = len(head.outputs) - 1
        for operand, its in zip(bound.kernel.operands, bound.operands, strict=True):
            if its == ref:
                assert isinstance(operand, Buffer)
                if self.target is not None:  # the kernel reads what another one has stored there
                    raise Mismatch
                self.target = operand
                continue
            if its.role == "output":
                its = Ref("output", its.position - (1 if its.position > ref.position else 0))
            self.operands.append(operand)
            self.refs.append(its)
        self.stores: dict[Access, Buffer] = {}
        self.loads: dict[Access, Buffer] = {}
        self.numbers: dict[Symbol, Value] = {}
        if self.target is None:
            return
        first = len(head.inputs)
        for i, access in enumerate(space.accesses):
            self.loads[access] = self._add(access, Ref("input", first + i), f"more{i}", False)
        for i, access in enumerate(space.stores):
            self.stores[access] = self._add(access, Ref("output", others + i), f"made{i}", True)
        for i, symbol in enumerate(space.numbers):
            dtype = dtypes.float64 if symbol.type is float else dtypes.int64
            value = values.param(f"number{i}", dtype)
            self.numbers[symbol] = value
            self.operands.append(value)
            self.refs.append(Ref("input", first + len(space.accesses) + i))

    def _add(self, access: Access, ref: Ref, name: str, written: bool) -> Buffer:
        made = Buffer(name, access.type.dtype, written)
        self.operands.append(made)
        self.refs.append(ref)
        return made

    def bound(self) -> BoundKernel:
        old = self.old.kernel
        body = old.body
        if self.target is not None:
            body = replace(body, body=self._statements(body.body))
        name = old.name if self.target is None else f"{old.name}_{kernel_name(self.space)}"[:60]
        kernel = replace(old, name=name, operands=tuple(self.operands), body=body)
        if self.target is not None and self.target in set(_touched(kernel)):
            raise Mismatch
        return replace(self.old, kernel=kernel, operands=tuple(self.refs))

    def _statements(self, body: tuple[Statement, ...]) -> tuple[Statement, ...]:
        made: list[Statement] = []
        for statement in body:
            if isinstance(statement, (Loop, If)):
                made.append(replace(statement, body=self._statements(statement.body)))
            elif isinstance(statement, Store):
                made.append(Store(tuple(t for old in statement.targets for t in self._target(old))))
            else:
                made.append(statement)
        return tuple(made)

    def _target(self, old: Target) -> Iterator[Target]:
        if old.buffer is not self.target:
            yield old
            return
        result = self.head.outputs[0]
        value, inner = old.value, inner_dtype(result)
        if value.op == "cast" and value.args[0].dtype is inner:
            value = value.args[0]  # not rounded before it is used

        def load(access: Access) -> Value:
            index = old.index if any(access.steps.values()) else values.const(0)
            return values.load(self.loads[access], index, old.where)

        scalars = Scalars(self.space, self.numbers, load, {result: cast(value, inner)})
        for access, buffer in self.stores.items():
            made = cast(scalars.of(access.symbol), buffer.dtype)
            yield Target(buffer, old.index, made, old.where)


def _touched(kernel: Kernel) -> Iterator[Buffer]:
    """Buffers that a kernel loads, or that its vendor calls use, or stores."""
    seen: set[Value] = set()

    def loads(value: Value | None) -> Iterator[Buffer]:
        if value is None or value in seen:
            return
        seen.add(value)
        if value.op == "load":
            yield value.attr
        for arg in value.args:
            yield from loads(arg)

    def visit(statements: tuple[Statement, ...]) -> Iterator[Buffer]:
        for statement in statements:
            if isinstance(statement, Loop):
                yield from loads(statement.extent)
                yield from visit(statement.body)
            elif isinstance(statement, If):
                yield from loads(statement.condition)
                yield from visit(statement.body)
            elif isinstance(statement, Store):
                for t in statement.targets:
                    yield t.buffer
                    for value in (t.index, t.value, t.where):
                        yield from loads(value)
            elif isinstance(statement, (Gemm, SplitProduct)):
                yield from (m.buffer for m in (statement.a, statement.b, statement.c))
            elif isinstance(statement, Transpose):
                yield from (statement.source.buffer, statement.target.buffer)
            elif isinstance(statement, (Declare, Assign, Accumulate)):
                yield from loads(statement.value)

    yield from visit(kernel.body.body)


def can_be_head(node: Node) -> bool:
    """Whether elementwise nodes may follow inside the node's own kernels."""
    if node.op.lower_cuda is not node.op.lower and tensor_of(node.outputs[0]).device != "cpu":
        return False  # a library's call, or a text that is written as a whole
    return not node.op.updates and all(tensor_of(s).numel for s in node.outputs)
