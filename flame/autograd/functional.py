"""grad and backward over several tensors, and what is built on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flame.autograd import engine
from flame.autograd.mode import set_grad_enabled
from flame.core.errors import ArgumentError
from flame.ops.creation import zeros


def _sequence(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _gradients(name: str, tensors: list[Any], gradients: Any) -> list[Any]:
    found = [None] * len(tensors) if gradients is None else _sequence(gradients)
    if len(found) != len(tensors):
        raise ArgumentError(
            f"{name}: {len(tensors)} outputs need as many gradients, got {len(found)}"
        )
    return found


def backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Accumulate gradients of several tensors into the leaves that they were computed from."""
    roots = _sequence(tensors)
    given = None if inputs is None else _sequence(inputs)
    engine.backward(
        roots, _gradients("backward", roots, grad_tensors), retain_graph, create_graph, given
    )


def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool | None = None,
    materialize_grads: bool = False,
) -> tuple[Any, ...]:
    """Gradients of ``outputs`` with respect to ``inputs``, without touching any ``.grad``.

    Raises GradientError for an input that was not used, unless ``allow_unused``.
    """
    roots, leaves = _sequence(outputs), _sequence(inputs)
    unused = materialize_grads if allow_unused is None else allow_unused
    found = engine.grad(
        roots, leaves, _gradients("grad", roots, grad_outputs), retain_graph, create_graph, unused
    )
    if materialize_grads:
        found = [
            zeros(x.shape, dtype=x.dtype, device=x.device) if g is None else g
            for g, x in zip(found, leaves, strict=True)
        ]
    return tuple(found)


def jacobian(function: Callable[..., Any], inputs: Any, create_graph: bool = False) -> Any:
    """d output / d input for each input: of the output's shape followed by the input's."""
    leaves = [x.detach().requires_grad_() if not x.requires_grad else x for x in _sequence(inputs)]
    with set_grad_enabled(True):
        output = function(*leaves)
        flat = output.reshape(-1)
        rows = [
            grad(
                flat[i],
                leaves,
                retain_graph=True,
                create_graph=create_graph,
                materialize_grads=True,
            )
            for i in range(flat.numel())
        ]
    from flame.ops.joining import stack

    made = [
        stack([row[k] for row in rows]).reshape((*output.shape, *x.shape))
        for k, x in enumerate(leaves)
    ]
    return tuple(made) if isinstance(inputs, (list, tuple)) else made[0]


def hvp(function: Callable[..., Any], inputs: Sequence[Any], v: Sequence[Any]) -> tuple[Any, ...]:
    """The Hessian of a scalar function times ``v``, by differentiating the gradient."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with set_grad_enabled(True):
        first = grad(function(*leaves), leaves, create_graph=True)
        return grad(first, leaves, grad_outputs=list(v), materialize_grads=True)
