"""Function: an operation with a forward and a backward of the user's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flame.autograd.engine import edge_of
from flame.autograd.mode import mode, no_grad
from flame.autograd.node import Node, save
from flame.core.errors import DTypeError, GradientError, UnsupportedError

F = TypeVar("F", bound=Callable[..., Any])


class Context:
    """What forward leaves for backward. ``needs_input_grad`` says which inputs want a gradient."""

    def __init__(self, needs: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs
        self._to_save: tuple[Any, ...] = ()
        self._node: FunctionNode | None = None  # while backward runs
        self._recorded = False
        self._no_gradient: set[int] = set()
        self._changed: set[int] = set()
        self._materialize = True

    def save_for_backward(self, *tensors: Any) -> None:
        """Keep tensors for backward; a later in-place change of one is then noticed."""
        for tensor in tensors:
            if tensor is not None and not hasattr(tensor, "storage"):
                raise DTypeError(
                    f"save_for_backward takes tensors and None, got {type(tensor).__name__}; "
                    "keep other values as attributes of ctx"
                )
        self._to_save = tensors

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """What was kept. Raises GradientError after the graph was freed, or a tensor changed."""
        if self._node is not None:
            return self._node.unpack()
        if self._recorded:
            raise GradientError("saved_tensors can be read while backward runs only")
        return self._to_save

    def mark_non_differentiable(self, *outputs: Any) -> None:
        """These outputs have no gradient."""
        self._no_gradient |= {id(t) for t in outputs}

    def mark_dirty(self, *inputs: Any) -> None:
        """These inputs were changed in place and are returned."""
        self._changed |= {id(t) for t in inputs}

    def set_materialize_grads(self, value: bool) -> None:
        """Whether backward gets zeros (True) or None for outputs without a gradient."""
        self._materialize = bool(value)


class FunctionNode(Node):
    """The tape's record of a Function's call. The context refers to it only while backward runs."""

    __slots__ = ("context", "function", "kept", "materialize")

    def __init__(self, function: type[Function], context: Context, *args: Any) -> None:
        super().__init__(*args)
        self.function, self.context = function, context
        self.materialize = context._materialize
        self.kept: list[Any] | None = []

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.function.__name__

    def keep(self, tensors: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Keep tensors; an output is kept without its history, which leads back to this node."""
        places = {id(t): i for i, t in enumerate(outputs)}
        self.kept = [
            (None if t is None else save(t.alias() if id(t) in places else t), places.get(id(t)))
            for t in tensors
        ]

    def unpack(self) -> tuple[Any, ...]:
        """The kept tensors, with their histories."""
        if self.kept is None:
            raise GradientError(
                f"{self.name}: saved tensors were freed by the first backward; pass "
                "retain_graph=True to it to go through the graph twice"
            )
        found = []
        for saved, place in self.kept:
            tensor: Any = None if saved is None else saved.get(self, "a saved tensor")
            found.append(tensor if place is None else tensor.alias(self, place))
        return tuple(found)

    def apply(
        self, grads: Sequence[Any], differentiable: bool, wanted: Sequence[bool] | None = None
    ) -> Sequence[Any]:
        self.context._node = self
        try:
            made = self.function.backward(self.context, *grads)
        finally:
            self.context._node = None
        results = list(made) if isinstance(made, (tuple, list)) else [made]
        count = len(self.edges)
        if len(results) < count or any(g is not None for g in results[count:]):
            raise GradientError(
                f"{self.name}.backward gave {len(results)} gradients for {count} inputs; return "
                "one for each argument of forward, None where there is none"
            )
        for grad in results:
            if grad is not None and not hasattr(grad, "storage"):
                raise DTypeError(
                    f"{self.name}.backward must return tensors and None, got {type(grad).__name__}"
                )
        return results[:count]

    def release(self) -> None:
        if self.kept:
            self.kept = None


class Function:
    """Subclass with static ``forward(ctx, *args)`` and ``backward(ctx, *grads)``; call ``apply``.

    backward returns one gradient (or None) for each argument of forward. Written with FLAME's own
    operations, it can be differentiated again. Alternatively ``forward(*args)`` takes no ctx, and
    ``setup_context(ctx, inputs, output)`` fills it.
    """

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Any:
        """The operation; it runs without being recorded."""
        raise UnsupportedError("a Function needs a static forward(ctx, ...)")

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Any) -> None:
        """Save what backward needs; for a ``forward`` that takes no ctx."""
        raise UnsupportedError("this Function has no setup_context")

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of the arguments of forward, from those of its outputs."""
        raise UnsupportedError("a Function needs a static backward(ctx, ...)")

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """Run forward and record it."""
        needs = tuple(bool(getattr(a, "requires_grad", False)) for a in args)
        context = Context(needs)
        edges = [edge_of(a) if need else None for a, need in zip(args, needs, strict=True)]
        with no_grad():
            if cls.setup_context is Function.setup_context:
                made = cls.forward(context, *args, **kwargs)
            else:
                made = cls.forward(*args, **kwargs)
                cls.setup_context(context, args, made)
        if not (mode.enabled and any(needs)):
            return made
        several = isinstance(made, (tuple, list))
        outputs = _outputs(cls, context, list(made) if several else [made], args)
        results = [t for t in outputs if _is_tensor(t)]
        node = FunctionNode(cls, context, edges, tuple(t.type for t in results))
        originals = [t for t in (made if several else [made]) if _is_tensor(t)]
        node.keep(context._to_save, originals)
        context._to_save, context._recorded = (), True
        for position, (tensor, before) in enumerate(zip(results, originals, strict=True)):
            if id(before) in context._no_gradient or tensor.type.dtype.kind != "f":
                continue
            if id(before) in context._changed:
                tensor.rebase(node, position, args)
            else:
                tensor.node, tensor.output_index, tensor.tracked = node, position, True
        return type(made)(outputs) if several else outputs[0]


def _is_tensor(x: Any) -> bool:
    return hasattr(x, "storage")


def _outputs(cls: type[Function], context: Context, made: list[Any], args: Any) -> list[Any]:
    """The results of forward as new tensors; those changed in place stay the tensors they are."""
    for a in args:
        if id(a) in context._changed and a.requires_grad:
            if a.current_node() is None:
                raise GradientError(
                    f"{cls.__name__} changes a leaf that requires grad in place; do it on a clone"
                )
            if a.base is not None and len(made) > 1:
                raise UnsupportedError(
                    f"{cls.__name__} changes a view in place and has several outputs; clone it"
                )
    return [t.alias() if _is_tensor(t) and id(t) not in context._changed else t for t in made]


def once_differentiable(function: F) -> F:
    """For a ``backward`` that cannot be differentiated again: its gradients have no history.

    Differentiating them raises GradientError.
    """

    @functools.wraps(function)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        recording = mode.enabled
        with no_grad():
            made = function(ctx, *grads)
        if not recording or not any(getattr(g, "requires_grad", False) for g in grads):
            return made
        several = isinstance(made, (tuple, list))
        results = [
            _NotAgain.apply(g, *grads) if _is_tensor(g) else g
            for g in (made if several else [made])
        ]
        return tuple(results) if several else results[0]

    return wrapper  # type: ignore[return-value]  # functools.wraps keeps the signature


class _NotAgain(Function):
    """The identity of its first argument, which cannot be gone back through."""

    @staticmethod
    def forward(ctx: Any, gradient: Any, *others: Any) -> Any:
        return gradient

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise GradientError("this backward is marked once_differentiable; it has no derivative")
