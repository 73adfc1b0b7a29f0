"""Activation checkpointing: recompute a part of the forward pass in backward instead of keeping it.

Source of the method: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flame.autograd import engine
from flame.autograd.engine import edge_of
from flame.autograd.mode import mode, no_grad, set_grad_enabled
from flame.autograd.node import Node, Saved
from flame.core.errors import GradientError


class _CheckpointNode(Node):
    """Holds a function and its inputs; its backward runs the function again, with the tape."""

    __slots__ = ("arguments", "function", "keywords", "random")

    name = "checkpoint"

    def __init__(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        random: Any,
        edges: Sequence[Any],
        outputs: Any,
    ) -> None:
        super().__init__(edges, outputs)
        self.function, self.keywords, self.random = function, kwargs, random
        self.arguments: list[Any] | None = [Saved(a) if hasattr(a, "storage") else a for a in args]

    def apply(self, grads: Sequence[Any], differentiable: bool) -> Sequence[Any]:
        if differentiable:
            raise GradientError(
                "checkpoint cannot be differentiated twice; call the function without it"
            )
        if self.arguments is None:
            raise GradientError("checkpoint: its graph was freed; pass retain_graph=True")
        from flame.ops.random import get_rng_state, set_rng_state

        given = [a.get(self, "an input") if isinstance(a, Saved) else a for a in self.arguments]
        inputs = [
            a.detach().requires_grad_() if edge is not None else a
            for a, edge in zip(given, self.edges, strict=True)
        ]
        now = None if self.random is None else get_rng_state()
        if self.random is not None:
            set_rng_state(self.random)
        with set_grad_enabled(True):
            made = self.function(*inputs, **self.keywords)
        if now is not None:
            set_rng_state(now)
        outputs = list(made) if isinstance(made, tuple) else [made]
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        engine.backward([o for o, _ in pairs], [g for _, g in pairs], None, False)
        return [
            None if edge is None else x.grad for x, edge in zip(inputs, self.edges, strict=True)
        ]

    def release(self) -> None:
        self.arguments = None


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool = False,
    preserve_rng_state: bool = True,
    **kwargs: Any,
) -> Any:
    """``function(*args)`` without keeping what it computes; backward runs it again.

    Parameters that the function reaches by itself get their gradients too. Random draws inside are
    repeated exactly, unless ``preserve_rng_state`` is False.
    """
    if not mode.enabled:
        return function(*args, **kwargs)
    from flame.ops.random import get_rng_state

    random = get_rng_state() if preserve_rng_state else None
    with no_grad():
        made = function(*args, **kwargs)
    outputs = list(made) if isinstance(made, tuple) else [made]
    edges = [edge_of(a) if getattr(a, "requires_grad", False) else None for a in args]
    aliases = [t.alias() for t in outputs]
    node = _CheckpointNode(function, args, kwargs, random, edges, tuple(t.type for t in aliases))
    for position, tensor in enumerate(aliases):
        if tensor.type.dtype.kind == "f":
            tensor.node, tensor.output_index, tensor.tracked = node, position, True
    return tuple(aliases) if isinstance(made, tuple) else aliases[0]


def checkpoint_sequential(functions: Any, segments: int, input: Any, **options: Any) -> Any:
    """A sequence of modules in ``segments`` checkpointed runs."""
    modules = list(functions)
    size = -(-len(modules) // segments)

    def run(part: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
        def forward(x: Any) -> Any:
            for module in part:
                x = module(x)
            return x

        return forward

    for start in range(0, len(modules), size):
        input = checkpoint(run(modules[start : start + size]), input, **options)
    return input
