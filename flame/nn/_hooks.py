"""Hooks of modules: functions that run before and after forward, and at a module's borders during
backward.

A module without hooks holds no `Hooks` object, so that its call costs one comparison.
Hooks run in the order of their registration, but for those registered with `prepend=True`, which
run first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from flame.core.errors import ArgumentError
from flame.nn._backward_hooks import BackwardHooks
from flame.tensor import RemovableHandle

if TYPE_CHECKING:
    from flame.nn.module import Module

__all__ = ["HookTable", "Hooks"]

_identifiers = itertools.count()


class Hook(NamedTuple):
    """A user's function, and whether it wants the keyword arguments too."""

    function: Callable[..., Any]
    with_kwargs: bool


class HookTable(dict[int, Hook]):
    """Hooks by identifier, in calling order."""

    def register(
        self, function: Callable[..., Any], *, prepend: bool, with_kwargs: bool = False
    ) -> RemovableHandle:
        """Add a hook at the end, or with `prepend` before all others."""
        identifier = next(_identifiers)
        others = dict(self) if prepend else {}
        if prepend:
            self.clear()
        self[identifier] = Hook(function, with_kwargs)
        self.update(others)
        return RemovableHandle(self, identifier)


class Hooks:
    """The four kinds of hooks that one module has."""

    def __init__(self) -> None:
        self.forward_pre = HookTable()
        self.forward = HookTable()
        self.backward_pre = HookTable()
        self.backward = HookTable()

    def call(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `module.forward(*args, **kwargs)` with all the hooks around it."""
        for hook in list(self.forward_pre.values()):
            args, kwargs = _run_forward_pre_hook(hook, module, args, kwargs)
        backward = None
        if self.backward or self.backward_pre:
            backward = BackwardHooks(module, self.backward_pre, self.backward)
            args = backward.watch_inputs(args)
        result = module.forward(*args, **kwargs)
        for hook in list(self.forward.values()):
            extra = (kwargs,) if hook.with_kwargs else ()
            changed = hook.function(module, args, *extra, result)
            if changed is not None:
                result = changed
        return result if backward is None else backward.watch_outputs(result)


def _run_forward_pre_hook(
    hook: Hook, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not hook.with_kwargs:
        changed = hook.function(module, args)
        if changed is None:
            return args, kwargs
        return (changed if isinstance(changed, tuple) else (changed,)), kwargs
    changed = hook.function(module, args, kwargs)
    if changed is None:
        return args, kwargs
    if isinstance(changed, tuple) and len(changed) == 2:
        return changed
    raise ArgumentError(
        f"forward pre-hook of {type(module).__name__} with with_kwargs=True: must return None or "
        f"(args, kwargs), but returned {type(changed).__name__}"
    )
