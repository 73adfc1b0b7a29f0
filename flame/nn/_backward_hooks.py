"""Backward hooks of modules: identity functions at both borders of a module that see the gradients
pass.

During backward the gradients of a module's outputs reach the output border first: the pre-hooks may
change them there.
Those of its inputs leave through the input border: the backward hooks see both, and may change what
goes on.
A module whose inputs need no gradient has no input border; its hooks then run at the output border.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flame.autograd import Function
from flame.core.errors import ArgumentError, UnsupportedError
from flame.tensor import Tensor

if TYPE_CHECKING:
    from flame.nn._hooks import HookTable
    from flame.nn.module import Module

__all__ = ["BackwardHooks"]

Gradients = tuple[Tensor | None, ...]


class _Border(Function):
    """The identity of several tensors at once; its backward shows all their gradients to
    `visit`.
    """

    @staticmethod
    def forward(ctx: Any, visit: Callable[[Gradients], Gradients], *tensors: Tensor) -> Any:
        ctx.visit = visit
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return (None, *ctx.visit(gradients))


class BackwardHooks:
    """The borders of one call of a module."""

    def __init__(self, module: Module, pre_hooks: HookTable, hooks: HookTable) -> None:
        self._module = module
        self._pre_hooks = list(pre_hooks.values())
        self._hooks = list(hooks.values())
        self._grad_output: Gradients | None = None
        self._argument_count = 0
        self._input_places: list[int] = []
        self._has_input_border = False
        self._output_count = 1
        self._output_places: list[int] = []

    def watch_inputs(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Put the input border before the tensors among the positional arguments."""
        self._argument_count = len(args)
        self._input_places = _tensor_places(args)
        tensors = [args[place] for place in self._input_places]
        if not any(tensor.requires_grad for tensor in tensors):
            return args
        self._has_input_border = True
        return _replaced(args, self._input_places, _Border.apply(self._visit_inputs, *tensors))

    def watch_outputs(self, result: Any) -> Any:
        """Put the output border behind a tensor, or the tensors of a tuple or list."""
        if isinstance(result, Tensor):
            self._output_places = [0]
            (watched,) = _Border.apply(self._visit_outputs, result)
            return watched
        if not isinstance(result, tuple | list) or hasattr(result, "_fields"):
            raise UnsupportedError(
                f"backward hooks of {type(self._module).__name__}: the output must be a tensor, a "
                "tuple "
                f"or a list, not {type(result).__name__}; return one of these, or hook an inner "
                "module"
            )
        self._output_count = len(result)
        self._output_places = _tensor_places(result)
        if not self._output_places:
            return result
        tensors = [result[place] for place in self._output_places]
        watched = _Border.apply(self._visit_outputs, *tensors)
        return type(result)(_replaced(tuple(result), self._output_places, watched))

    def _visit_outputs(self, gradients: Gradients) -> Gradients:
        grad_output = _spread(gradients, self._output_places, self._output_count)
        for hook in self._pre_hooks:
            changed = hook.function(self._module, grad_output)
            if changed is not None:
                grad_output = _as_gradients(changed, self._output_count, "output", self._module)
        self._grad_output = grad_output
        if not self._has_input_border:
            self._run_hooks((None,) * self._argument_count)
        return tuple(grad_output[place] for place in self._output_places)

    def _visit_inputs(self, gradients: Gradients) -> Gradients:
        grad_input = _spread(gradients, self._input_places, self._argument_count)
        grad_input = self._run_hooks(grad_input)
        return tuple(grad_input[place] for place in self._input_places)

    def _run_hooks(self, grad_input: Gradients) -> Gradients:
        for hook in self._hooks:
            changed = hook.function(self._module, grad_input, self._grad_output)
            if changed is None:
                continue
            if not self._has_input_border:
                raise ArgumentError(
                    f"backward hook of {type(self._module).__name__}: returned gradients of "
                    "inputs, but no "
                    "input requires a gradient; return None, or use register_full_backward_pre_hook"
                )
            grad_input = _as_gradients(changed, self._argument_count, "input", self._module)
        return grad_input


def _tensor_places(values: Any) -> list[int]:
    return [place for place, value in enumerate(values) if isinstance(value, Tensor)]


def _replaced(values: tuple[Any, ...], places: list[int], new: Any) -> tuple[Any, ...]:
    result = list(values)
    for place, value in zip(places, new, strict=True):
        result[place] = value
    return tuple(result)


def _spread(gradients: Gradients, places: list[int], count: int) -> Gradients:
    result: list[Tensor | None] = [None] * count
    for place, gradient in zip(places, gradients, strict=True):
        result[place] = gradient
    return tuple(result)


def _as_gradients(value: Any, count: int, kind: str, module: Module) -> Gradients:
    gradients: Gradients = (value,) if isinstance(value, Tensor) else tuple(value)
    if len(gradients) != count:
        raise ArgumentError(
            f"backward hook of {type(module).__name__}: returned {len(gradients)} gradients "
            f"for {count} {kind}s; return one for each, None where there is none"
        )
    return gradients
