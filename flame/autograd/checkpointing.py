"""Activation checkpointing: recompute a part of the forward pass in backward instead of keeping it.

The part is recorded as ever, but what it would keep for backward is only counted. The first saved
tensor that backward asks for makes the part run again, and the tensors that it keeps this time, in
the same order, take the places of the first ones. So all that backward can do works through it.

Source of the method: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from flame.autograd.mode import _Switch, mode
from flame.autograd.node import Node, Saved, save
from flame.core.autocast import as_then, autocast
from flame.core.errors import ArgumentError, GradientError
from flame.ops.again import again
from flame.ops.op import interpreter


class _Slot(Saved):
    """A saved tensor that is not there until its part has run again."""

    __slots__ = ("__weakref__", "edge", "part", "value")

    def __init__(self, part: _Part, tensor: Any) -> None:
        self.part = part
        node = tensor.current_node()
        self.edge = None if node is None else (node, tensor.output_index)
        self.value: Saved | None = None

    def get(self, node: Node, name: str) -> Any:
        """The values, with the history of the tensor that was saved."""
        if self.value is None:
            self.part.run_again()
            if self.value is None:
                raise GradientError(
                    "checkpoint: the second run of the function kept fewer tensors than the first; "
                    "it must do the same both times"
                )
        found = self.value.get(node, name)
        return found if self.edge is None else found.alias(*self.edge)


class _Part:
    """One checkpointed call; the saver of its first run."""

    def __init__(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        random: Any,
    ) -> None:
        self.function, self.random = function, random
        self.autocast = autocast.settings, autocast.on
        self.args = [_kept(a) for a in args]
        self.kwargs = {name: _kept(a) for name, a in kwargs.items()}
        self.slots: list[weakref.ref[_Slot]] = []
        self.shapes: list[Any] = []

    def save(self, tensor: Any) -> Saved:
        if tensor.tracked and tensor.current_node() is None:
            return Saved(tensor)  # a parameter lives anyway
        slot = _Slot(self, tensor)
        self.slots.append(weakref.ref(slot))
        self.shapes.append((tensor.type.shape, tensor.type.dtype))
        return slot

    def run_again(self) -> None:
        from flame.ops.generator import default_generator

        args = [_once_more(_given(a)) for a in self.args]
        kwargs = {name: _once_more(_given(a)) for name, a in self.kwargs.items()}
        now = None if self.random is None else default_generator.mark()
        if self.random is not None:
            default_generator.rewind(self.random)
        again = _Again(self)
        try:
            with _Switch(enabled=True, saver=again), as_then(*self.autocast):
                self.function(*args, **kwargs)
        finally:
            if now is not None:
                default_generator.rewind(now)
        if again.count != len(self.slots):
            raise GradientError(
                f"checkpoint: the function kept {len(self.slots)} tensors when it ran first, "
                f"{again.count} when it ran again; it must do the same both times"
            )


class _Again:
    """The saver of the second run: hands what is kept to the slots of the first."""

    def __init__(self, part: _Part) -> None:
        self.part = part
        self.count = 0

    def save(self, tensor: Any) -> Saved:
        part = self.part
        if tensor.tracked and tensor.current_node() is None:
            return Saved(tensor)
        place = self.count
        self.count += 1
        if place < len(part.slots):
            if part.shapes[place] != (tensor.type.shape, tensor.type.dtype):
                raise GradientError(
                    f"checkpoint: the function kept a tensor of shape {part.shapes[place][0]} when "
                    f"it ran first, of shape {tensor.shape} when it ran again; it must do the same "
                    "both times"
                )
            slot = part.slots[place]()
            if slot is not None and slot.value is None:
                slot.value = Saved(tensor.alias())
        return _NOTHING


class _Nothing(Saved):
    """What the tape of the second run keeps: nobody goes back through it."""

    __slots__ = ()

    def __init__(self) -> None:
        self.tensor = None

    def get(self, node: Node, name: str) -> Any:
        raise GradientError("checkpoint: backward inside of a function's second run")


_NOTHING = _Nothing()


def _kept(argument: Any) -> Any:
    return save(argument) if hasattr(argument, "storage") else argument


def _given(argument: Any) -> Any:
    return argument.get(_ARGUMENT, "an argument") if isinstance(argument, Saved) else argument


def _once_more(argument: Any) -> Any:
    """In a recorded graph, what the second run computes must not look like the first one's."""
    is_float = hasattr(argument, "storage") and argument.dtype.kind == "f"
    return again(argument) if is_float and interpreter().recording else argument


class _Argument(Node):
    """Names the place of a saved argument in errors."""

    __slots__ = ()
    name = "checkpoint"


_ARGUMENT = _Argument((), ())


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool | None = None,
    preserve_rng_state: bool = True,
    determinism_check: str = "default",
    **kwargs: Any,
) -> Any:
    """``function(*args, **kwargs)`` without keeping what it computes; backward runs it again.

    Gradients are the same as without it, also of parameters and tensors that the function reaches
    by itself, and also those of higher order. Random draws inside are repeated exactly, unless
    ``preserve_rng_state`` is False. The function must do the same each time, and not change its
    arguments in place. ``use_reentrant`` and ``determinism_check`` are accepted for compatibility;
    there is one implementation, and it always compares shapes.
    """
    if not mode.enabled:
        return function(*args, **kwargs)
    from flame.ops.generator import default_generator

    place = default_generator.mark() if preserve_rng_state else None
    part = _Part(function, args, kwargs, place)
    with _Switch(saver=part):
        return function(*args, **kwargs)


def checkpoint_sequential(functions: Any, segments: int, input: Any, **options: Any) -> Any:
    """A sequence of modules in ``segments`` checkpointed runs."""
    modules = list(functions.children()) if hasattr(functions, "children") else list(functions)
    if segments < 1:
        raise ArgumentError(f"checkpoint_sequential: segments must be at least 1, got {segments!r}")
    size = -(-len(modules) // segments)

    def run(part: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
        def forward(x: Any) -> Any:
            for module in part:
                x = module(x)
            return x

        return forward

    for start in range(0, len(modules), max(size, 1)):
        input = checkpoint(run(modules[start : start + size]), input, **options)
    return input
