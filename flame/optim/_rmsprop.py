"""RMSprop: gradients divided by the root of the running average of their squares."""

from __future__ import annotations

from typing import Any, ClassVar

from flame.optim import _arguments as check
from flame.optim._optimizer import Optimizer, Parameters, Scalar, Update
from flame.optim._tensors import Tensor, pointwise, sqrt, where

__all__ = ["RMSprop"]


def _square_average(g: Any, v: Any, alpha: Any, rest: Any) -> Any:
    return v * alpha + g * g * rest


def _deviation(v: Any, mean: Any) -> Any:
    """The root of the variance, which rounding may bring below 0 when gradients are alike."""
    variance = v - mean * mean
    return sqrt(where(variance < 0.0, variance * 0.0, variance))


def rmsprop_update(
    p: Any, g: Any, v: Any, lr: Any, eps: Any, direction: Any, decay: Any, alpha: Any, rest: Any
) -> Any:
    """v ← α·v + (1 − α)·g²; p ← p − lr·g / (√v + ε)."""
    g = g * direction + p * decay
    v = _square_average(g, v, alpha, rest)
    return p - g / (sqrt(v) + eps) * lr, v


def centered_update(
    p: Any,
    g: Any,
    v: Any,
    mean: Any,
    lr: Any,
    eps: Any,
    direction: Any,
    decay: Any,
    alpha: Any,
    rest: Any,
) -> Any:
    """Divides by the deviation of the gradient from its average instead."""
    g = g * direction + p * decay
    v = _square_average(g, v, alpha, rest)
    mean = mean + (g - mean) * rest
    return p - g / (_deviation(v, mean) + eps) * lr, v, mean


def momentum_update(
    p: Any,
    g: Any,
    v: Any,
    buffer: Any,
    lr: Any,
    eps: Any,
    direction: Any,
    decay: Any,
    alpha: Any,
    rest: Any,
    momentum: Any,
) -> Any:
    """The scaled gradients gather in a buffer, and p ← p − lr·buffer."""
    g = g * direction + p * decay
    v = _square_average(g, v, alpha, rest)
    buffer = buffer * momentum + g / (sqrt(v) + eps)
    return p - buffer * lr, v, buffer


def centered_momentum_update(
    p: Any,
    g: Any,
    v: Any,
    buffer: Any,
    mean: Any,
    lr: Any,
    eps: Any,
    direction: Any,
    decay: Any,
    alpha: Any,
    rest: Any,
    momentum: Any,
) -> Any:
    """Both."""
    g = g * direction + p * decay
    v = _square_average(g, v, alpha, rest)
    mean = mean + (g - mean) * rest
    buffer = buffer * momentum + g / (_deviation(v, mean) + eps)
    return p - buffer * lr, v, buffer, mean


PLAIN = Update(pointwise(rmsprop_update), ("square_avg",))
CENTERED = Update(pointwise(centered_update), ("square_avg", "grad_avg"))
MOMENTUM = Update(pointwise(momentum_update), ("square_avg", "momentum_buffer"))
CENTERED_MOMENTUM = Update(
    pointwise(centered_momentum_update), ("square_avg", "momentum_buffer", "grad_avg")
)


class RMSprop(Optimizer):
    """RMSprop.

    Sources: Hinton, Neural Networks for Machine Learning, lecture 6e (2012); the centered form:
    Graves, Generating Sequences With Recurrent Neural Networks (2013).

    Args:
        params: parameters or parameter groups.
        lr: the learning rate, a number or a tensor of one element.
        alpha: how much the average of the squares keeps.
        eps: added to the root.
        weight_decay: this much of the weight is added to its gradient.
        momentum: how much of the buffer of scaled gradients each step keeps; 0 keeps no buffer.
        centered: divide by the deviation of the gradient from its average.
        maximize: climb instead of descending.
        foreach, capturable: accepted and without effect, every update is one fused kernel.

    Raises:
        ArgumentError: a value out of range.
        UnsupportedError: differentiable=True.
    """

    _buffers: ClassVar[tuple[str, ...]] = CENTERED_MOMENTUM.buffers

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check.learning_rate(self._name, group)
        check.unit_interval(self._name, group, "alpha")
        for name in ("eps", "weight_decay", "momentum"):
            check.non_negative(self._name, group, name)
        check.options(self._name, group)

    def _update(self, group: dict[str, Any]) -> Update:
        if group["momentum"] > 0:
            return CENTERED_MOMENTUM if group["centered"] else MOMENTUM
        return CENTERED if group["centered"] else PLAIN

    def _scalars(self, group: dict[str, Any], step: int) -> tuple[Scalar, ...]:
        scalars = (
            group["lr"],
            group["eps"],
            -1.0 if group["maximize"] else 1.0,
            group["weight_decay"],
            group["alpha"],
            1.0 - group["alpha"],
        )
        return (*scalars, group["momentum"]) if group["momentum"] > 0 else scalars
