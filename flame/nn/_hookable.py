"""The part of Module that registers hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flame.nn._hooks import Hooks
from flame.tensor import RemovableHandle

__all__ = ["Hookable"]


class Hookable:
    """Hooks around the forward and backward of a module; `_hooks` is None until the first one."""

    _hooks: Hooks | None

    def _ensure_hooks(self) -> Hooks:
        if self._hooks is None:
            self._hooks = Hooks()
        return self._hooks

    def register_forward_pre_hook(
        self, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
    ) -> RemovableHandle:
        """Call `hook(module, args)` before forward; what it returns, if not None, replaces
        the arguments.

        With `with_kwargs` it is called as `hook(module, args, kwargs)` and returns None or
        (args, kwargs).
        """
        table = self._ensure_hooks().forward_pre
        return table.register(hook, prepend=prepend, with_kwargs=with_kwargs)

    def register_forward_hook(
        self, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
    ) -> RemovableHandle:
        """Call `hook(module, args, output)` after forward; what it returns, if not None,
        replaces the output.

        With `with_kwargs` it is called as `hook(module, args, kwargs, output)`.
        """
        table = self._ensure_hooks().forward
        return table.register(hook, prepend=prepend, with_kwargs=with_kwargs)

    def register_full_backward_pre_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call `hook(module, grad_output)` when the outputs' gradients are known; it may
        return new ones.
        """
        return self._ensure_hooks().backward_pre.register(hook, prepend=prepend)

    def register_full_backward_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call `hook(module, grad_input, grad_output)` when the inputs' gradients are
        known; it may return new ones.

        Gradients are tuples with one entry for each positional argument or output, None
        where it has no gradient.
        """
        return self._ensure_hooks().backward.register(hook, prepend=prepend)
