"""Function: an operation with a forward and a backward of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flame.autograd.engine import edge_of
from flame.autograd.mode import mode, no_grad
from flame.autograd.node import Node, Saved
from flame.core.errors import GradientError


class Context:
    """What forward leaves for backward. ``needs_input_grad`` says which inputs want a gradient."""

    def __init__(self, needs: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs
        self._to_save: tuple[Any, ...] = ()
        self._node: FunctionNode | None = None
        self._no_gradient: set[int] = set()
        self._changed: set[int] = set()
        self.materialize = True

    def save_for_backward(self, *tensors: Any) -> None:
        """Keep tensors for backward; a later in-place change of one is then noticed."""
        self._to_save = tensors

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """What was kept. Raises GradientError after the graph was freed, or a tensor changed."""
        if self._node is None:
            return self._to_save
        return self._node.unpack()

    def mark_non_differentiable(self, *outputs: Any) -> None:
        """These outputs have no gradient."""
        self._no_gradient |= {id(t) for t in outputs}

    def mark_dirty(self, *inputs: Any) -> None:
        """These inputs were changed in place and are returned."""
        self._changed |= {id(t) for t in inputs}

    def set_materialize_grads(self, value: bool) -> None:
        """Whether backward gets zeros (True) or None for outputs without a gradient."""
        self.materialize = value


class FunctionNode(Node):
    """The tape's record of a Function's call."""

    __slots__ = ("context", "function", "kept")

    def __init__(self, function: type[Function], context: Context, *args: Any) -> None:
        super().__init__(*args)
        self.function, self.context = function, context
        self.kept: list[Any] | None = []

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.function.__name__

    def keep(self, tensors: Sequence[Any], outputs: Sequence[Any]) -> None:
        places = {id(t): i for i, t in enumerate(outputs)}
        self.kept = [
            (None if t is None else Saved(t.alias() if id(t) in places else t), places.get(id(t)))
            for t in tensors
        ]

    def unpack(self) -> tuple[Any, ...]:
        if self.kept is None:
            raise GradientError(
                f"{self.name}: saved tensors were freed by the first backward; pass "
                "retain_graph=True to it to go through the graph twice"
            )
        found = []
        for saved, place in self.kept:
            tensor = None if saved is None else saved.get(self, "a saved tensor")
            found.append(tensor if place is None else tensor.alias(self, place))
        return tuple(found)

    def apply(self, grads: Sequence[Any], differentiable: bool) -> Sequence[Any]:
        made = self.function.backward(self.context, *grads)
        results = list(made) if isinstance(made, tuple) else [made]
        extra = results[len(self.edges) :]
        if len(results) < len(self.edges) or any(g is not None for g in extra):
            raise GradientError(
                f"{self.name}.backward gave {len(results)} gradients for {len(self.edges)} inputs"
            )
        return results[: len(self.edges)]

    def release(self) -> None:
        self.kept = None


class Function:
    """Subclass with static ``forward(ctx, *args)`` and ``backward(ctx, *grads)``; call ``apply``.

    backward returns one gradient (or None) for each argument of forward. Written with FLAME's own
    operations, it can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Context, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a Function needs a static forward(ctx, ...)")

    @staticmethod
    def backward(ctx: Context, *grads: Any) -> Any:
        raise NotImplementedError("a Function needs a static backward(ctx, ...)")

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """Run forward and record it."""
        needs = tuple(bool(getattr(a, "requires_grad", False)) for a in args)
        context = Context(needs)
        edges = [edge_of(a) if need else None for a, need in zip(args, needs, strict=True)]
        recording = mode.enabled and any(needs)
        with no_grad():
            made = cls.forward(context, *args, **kwargs)
        outputs = list(made) if isinstance(made, tuple) else [made]
        if not recording:
            return made
        passed = {id(a) for a in args} - context._changed
        outputs = [t.alias() if id(t) in passed else t for t in outputs]
        types = tuple(t.type for t in outputs)
        node = FunctionNode(cls, context, edges, types)
        node.keep(context._to_save, outputs)
        context._to_save = ()
        context._node = node
        for position, tensor in enumerate(outputs):
            if id(tensor) not in context._no_gradient and tensor.type.dtype.kind == "f":
                tensor.node, tensor.output_index, tensor.tracked = node, position, True
        return tuple(outputs) if isinstance(made, tuple) else outputs[0]
