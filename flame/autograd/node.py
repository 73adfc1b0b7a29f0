"""The tape: one node for each recorded operation.

Invariants: an edge points to an older node, or to a leaf tensor; a node keeps what its formulas
name and nothing else; an output that a formula needs is kept without its node, so the tape has no
cycle, and its memory goes as soon as nothing refers to it.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from flame.autograd.mode import mode
from flame.core.errors import GradientError
from flame.core.types import TensorType
from flame.ops.elementwise import Elementwise
from flame.ops.op import Formula, Op, Types

_ages = itertools.count(1)

Edge = tuple[Any, int] | None  # (node or leaf tensor, which output)
Hook = Callable[[Any], Any]


class Node:
    """Base of all nodes. ``apply`` turns gradients of the outputs into gradients along
    ``edges``.
    """

    __slots__ = ("__weakref__", "age", "edges", "hooks", "line", "outputs")

    name: str
    materialize = True  # an output without a gradient gets zeros; else None

    def __init__(self, edges: Sequence[Edge], outputs: tuple[TensorType, ...]) -> None:
        self.age = next(_ages)
        self.edges = edges
        self.outputs = outputs
        self.hooks: list[tuple[int, Hook]] | None = None
        self.line: str | None = _user_line() if mode.anomaly else None

    def __repr__(self) -> str:
        return f"<{self.name}Backward>"

    @property
    def next_functions(self) -> tuple[Edge, ...]:
        return tuple(self.edges)

    def apply(
        self, grads: Sequence[Any], differentiable: bool, wanted: Sequence[bool] | None = None
    ) -> Sequence[Any]:
        """Gradients for the edges.

        differentiable: they will be differentiated again. wanted: which of them anybody asked for;
        the others may be None.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Forget what was saved, after a backward pass that keeps no graph."""


class Saved:
    """A tensor that backward needs, with the version that it had."""

    __slots__ = ("storage", "tensor", "version")

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.storage = tensor.storage
        self.version = tensor.storage.version

    def get(self, node: Node, name: str) -> Any:
        """The tensor. Raises GradientError naming ``node``'s op if it was changed in place."""
        storage = self.tensor.storage
        if storage.version != self.version or storage is not self.storage:
            raise GradientError(
                f"backward of {node.name} needs {name} (shape {self.tensor.shape}) as it was in "
                "the forward pass, but an in-place operation has changed it since; use the "
                "out-of-place form, or clone it before"
            )
        return self.tensor


def save(tensor: Any) -> Saved:
    """Keep a tensor for backward, in the way that the current mode has it."""
    saver = mode.saver
    if saver is None:
        return Saved(tensor)
    kept: Saved = saver.save(tensor)
    return kept


class OpNode(Node):
    """A recorded call of an op."""

    __slots__ = ("attributes", "kept", "names", "needs", "op", "types")

    def __init__(
        self,
        op: Op,
        inputs: Sequence[Any],
        types: Types,
        attributes: dict[str, Any],
        needs: tuple[bool, ...],
        edges: Sequence[Edge],
        outputs: tuple[TensorType, ...],
        overwritten: Sequence[Any] = (),
    ) -> None:
        super().__init__(edges, outputs)
        self.op, self.types, self.attributes, self.needs = op, types, attributes, needs
        self.names = saved_names(op, needs)
        self.kept: list[Any] | None = [None] * len(self.names)
        for position, name in enumerate(self.names):
            if name != "out":
                operand = _operand(op, inputs, name)
                if overwritten:  # in place: the values from before the write are kept as a copy
                    operand = _apart(operand, overwritten)
                self.kept[position] = _keep(operand)

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.op.name

    def keep_outputs(self, outputs: tuple[Any, ...]) -> None:
        """Keep the outputs, given without their tape, if a formula names them."""
        if "out" in self.names:
            assert self.kept is not None
            unkept = len(self.outputs) if self.op.extras else 0
            self.kept[self.names.index("out")] = [
                None if i < unkept else save(t.alias()) for i, t in enumerate(outputs)
            ]

    @property
    def materialize(self) -> bool:  # type: ignore[override]
        return self.op.materialize

    def release(self) -> None:
        if self.kept:  # what keeps nothing can be gone through again
            self.kept = None

    def _known(self, attach: bool) -> dict[str, Any]:
        if self.kept is None:
            raise GradientError(
                f"backward of {self.name} was already done and its graph freed; pass "
                "retain_graph=True to the first backward to go through it twice"
            )
        known: dict[str, Any] = {}
        for name, kept in zip(self.names, self.kept, strict=True):
            known[name] = self._get(kept, name, attach)
        return known

    def _get(self, kept: Any, name: str, attach: bool) -> Any:
        if isinstance(kept, Saved):
            return kept.get(self, name)
        if isinstance(kept, list):
            tensors = tuple(self._get(k, name, False) for k in kept)
            if name != "out":
                return tensors
            if attach:
                known = len(self.outputs)  # the rest are extras, which have no history
                tensors = tuple(
                    t if t is None or i >= known else t.alias(self, i)
                    for i, t in enumerate(tensors)
                )
            return tensors[0] if len(tensors) == 1 else tensors
        return kept

    def apply(
        self, grads: Sequence[Any], differentiable: bool, wanted: Sequence[bool] | None = None
    ) -> Sequence[Any]:
        op = self.op
        known = self._known(differentiable)
        needs = self.needs
        if wanted is not None:
            needs = tuple([a and b for a, b in zip(needs, wanted, strict=True)])
        if isinstance(op, Elementwise) and not differentiable:
            made = op.backward(needs, self.types)(
                grads[0], *(known[n] for n in op.backward_names(needs)), **self.attributes
            )
            results = iter(made if isinstance(made, tuple) else (made,))
            return [next(results) if need else None for need in needs]
        known["g"] = grads[0] if len(grads) == 1 else tuple(grads)
        known["needs"] = needs
        known.update(self.attributes)
        if op.joint is not None:
            gradients: Sequence[Any] = op.joint.function(*self._arguments(op.joint, known))
            return gradients
        return [
            f.function(*self._arguments(f, known)) if need and f is not None else None
            for f, need in zip(op.formulas, needs, strict=True)
        ]

    def _arguments(self, formula: Formula, known: dict[str, Any]) -> list[Any]:
        return [known[n] if n in known else self._type_of(n) for n in formula.names]

    def _type_of(self, name: str) -> Any:
        """``<input>_type`` of a formula."""
        wanted = name.removesuffix("_type")
        return _operand(self.op, self.types, wanted)


def _operand(op: Op, operands: Sequence[Any], name: str) -> Any:
    """The operand called ``name``; a list of them for the variadic one."""
    if op.variadic and op.inputs[-1].lstrip("*") == name.lstrip("*"):
        return list(operands[len(op.inputs) - 1 :])
    return operands[op.inputs.index(name)]


def _apart(operand: Any, overwritten: Sequence[Any]) -> Any:
    if isinstance(operand, list):
        return [_apart(o, overwritten) for o in operand]
    if hasattr(operand, "storage") and any(t.storage is operand.storage for t in overwritten):
        return operand.clone()
    return operand


def _keep(operand: Any) -> Any:
    if isinstance(operand, list):
        return [_keep(o) for o in operand]
    return save(operand) if hasattr(operand, "storage") else operand


_saved_names: dict[tuple[Op, tuple[bool, ...]], tuple[str, ...]] = {}


def saved_names(op: Op, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """What the formulas of the needed inputs keep."""
    found = _saved_names.get((op, needs))
    if found is None:
        if op.joint is not None:
            found = op.joint.saved
        else:
            formulas = [f for f, n in zip(op.formulas, needs, strict=True) if n and f is not None]
            found = tuple(dict.fromkeys(name for f in formulas for name in f.saved))
        _saved_names[op, needs] = found
    return found


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def _user_line() -> str:
    """The innermost stack line outside FLAME."""
    import linecache

    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    name, number = frame.f_code.co_filename, frame.f_lineno
    return f"{name}:{number}: {linecache.getline(name, number).strip()}"
