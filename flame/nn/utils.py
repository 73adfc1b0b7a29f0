"""Helpers around gradients and parameters: clipping, and one flat vector for many parameters.

Clipping multiplies on the device without a look at the values, so that a step can be recorded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import flame
from flame.core.errors import ArgumentError, GradientError, ShapeError
from flame.ops.foreach import scale_each_
from flame.ops.norms import norm_of_each
from flame.tensor import Tensor

__all__ = [
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "parameters_to_vector",
    "vector_to_parameters",
]


def _tensors(values: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else list(values)


def _gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in _tensors(parameters) if p.grad is not None]


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The norm of all tensors as if they were one vector: a scalar, on the device of the first.

    Raises:
        GradientError: the norm is not finite and `error_if_nonfinite` is set (this reads the value
            from the device).
    """
    given = _tensors(tensors)
    if not given:
        return flame.tensor(0.0)
    order = float(norm_type)
    with flame.no_grad():
        if len(given) == 1:
            total = flame.norm(given[0], order)
        else:
            total = flame.norm(norm_of_each(given, order), order)
    if error_if_nonfinite and not math.isfinite(float(total.item())):
        raise GradientError(
            f"the total norm of order {order} of {len(given)} gradients is {total.item()}, so they "
            "cannot be "
            "clipped by it; look for the first non-finite loss, or set error_if_nonfinite=False"
        )
    return total


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Scale all gradients in place by max_norm / total_norm where that is less than 1."""
    gradients = _gradients(parameters)
    with flame.no_grad():
        # The small addend keeps a norm of zero from dividing by it.
        factor = (float(max_norm) / (total_norm + 1e-6)).clamp(max=1.0)
        scale_each_(gradients, factor)


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale all gradients in place so that their common norm is at most `max_norm`; returns the
    norm before.

    A norm that is not finite makes the gradients so too, unless `error_if_nonfinite` refuses it.
    `foreach` is accepted and has no effect. Source: Pascanu, Mikolov and Bengio, "On the
    difficulty of training
    recurrent neural networks", 2013.

    Raises:
        GradientError: the norm is not finite and `error_if_nonfinite` is set; gradients are left as
            they were.
    """
    given = _tensors(parameters)
    total = get_total_norm(_gradients(given), norm_type, error_if_nonfinite)
    clip_grads_with_norm_(given, max_norm, total)
    return total


def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Clamp every element of the gradients in place to [-clip_value, clip_value]."""
    bound = float(clip_value)
    with flame.no_grad():
        for gradient in _gradients(parameters):
            gradient.clamp_(-bound, bound)


def parameters_to_vector(parameters: Iterable[Tensor]) -> Tensor:
    """All parameters, flattened and one after the other: (total number of elements,)."""
    flat = [parameter.reshape(-1) for parameter in parameters]
    if not flat:
        raise ArgumentError("parameters_to_vector: got no parameters")
    return flame.cat(flat)


def vector_to_parameters(vec: Tensor, parameters: Iterable[Tensor]) -> None:
    """Copy the elements of `vec` into the parameters, the inverse of `parameters_to_vector`.

    Raises:
        ShapeError: `vec` is no vector, or its size is not the parameters' number of elements;
            nothing is copied.
    """
    given = list(parameters)
    wanted = sum(parameter.numel() for parameter in given)
    if vec.ndim != 1 or vec.shape[0] != wanted:
        raise ShapeError(
            f"vector_to_parameters: {wanted} parameter elements need a vector ({wanted},), got "
            f"{tuple(vec.shape)}"
        )
    offset = 0
    with flame.no_grad():
        for parameter in given:
            count = parameter.numel()
            parameter.copy_(vec[offset : offset + count].reshape(tuple(parameter.shape)))
            offset += count
