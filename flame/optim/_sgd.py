"""Stochastic gradient descent, with momentum in its classical and in Nesterov's form."""

from __future__ import annotations

from typing import Any, ClassVar

from flame.core.errors import ArgumentError
from flame.optim import _arguments as check
from flame.optim._conditional import Counted
from flame.optim._optimizer import Optimizer, Parameters, Scalar, Update
from flame.optim._tensors import Tensor, pointwise, where

__all__ = ["SGD"]


def sgd_update(p: Any, g: Any, lr: Any, direction: Any, decay: Any) -> Any:
    """p ← p − lr·g, where g includes the decay of the weights."""
    g = g * direction + p * decay
    return (p - g * lr,)


def momentum_update(
    p: Any, g: Any, buffer: Any, kept: Any, lr: Any, direction: Any, decay: Any, momentum: Any
) -> Any:
    """buffer ← momentum·buffer + kept·g; p ← p − lr·buffer."""
    g = g * direction + p * decay
    buffer = buffer * momentum + g * kept
    return p - buffer * lr, buffer


def nesterov_update(
    p: Any, g: Any, buffer: Any, kept: Any, lr: Any, direction: Any, decay: Any, momentum: Any
) -> Any:
    """buffer as with momentum; p ← p − lr·(g + momentum·buffer)."""
    g = g * direction + p * decay
    buffer = buffer * momentum + g * kept
    return p - (g + buffer * momentum) * lr, buffer


@pointwise
def kept_of_gradient(step: Any, kept: Any) -> Any:
    """What enters the buffer of the gradient: at the first step all of it."""
    return where(step == 1.0, 1.0, kept)


PLAIN = Update(pointwise(sgd_update), ())
MOMENTUM = Update(pointwise(momentum_update), ("momentum_buffer",))
NESTEROV = Update(pointwise(nesterov_update), ("momentum_buffer",))


class SGD(Optimizer):
    """Stochastic gradient descent.

    Source: Sutskever et al., On the importance of initialization and momentum in deep learning
    (2013), in the form that applies the learning rate to the buffer, as PyTorch does.

    Args:
        params: parameters or parameter groups.
        lr: the learning rate, a number or a tensor of one element.
        momentum: how much of the buffer each step keeps; 0 keeps no buffer.
        dampening: how much of the gradient is left out of the buffer, but for the first step.
        weight_decay: this much of the weight is added to its gradient.
        nesterov: look ahead along the buffer; needs momentum and no dampening.
        maximize: climb instead of descending.
        foreach, fused: accepted and without effect, every update is one fused kernel.

    Raises:
        ArgumentError: a value out of range.
        UnsupportedError: differentiable=True.
    """

    _counts_steps: ClassVar[bool] = False
    _buffers: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check.learning_rate(self._name, group)
        check.non_negative(self._name, group, "momentum")
        check.non_negative(self._name, group, "weight_decay")
        check.options(self._name, group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ArgumentError(
                f"{self._name}: nesterov needs momentum above 0 and dampening 0, "
                f"got momentum {group['momentum']} and dampening {group['dampening']}"
            )

    def _update(self, group: dict[str, Any]) -> Update:
        if group["momentum"] == 0:
            return PLAIN
        return NESTEROV if group["nesterov"] else MOMENTUM

    def _scalars(self, group: dict[str, Any], step: int) -> tuple[Scalar, ...]:
        direction = -1.0 if group["maximize"] else 1.0
        common = (group["lr"], direction, group["weight_decay"])
        if group["momentum"] == 0:
            return common
        # The first gradient enters the buffer whole, whatever the dampening.
        kept = 1.0 if step == 1 else 1.0 - group["dampening"]
        return (kept, *common, group["momentum"])

    def _counted(self, group: dict[str, Any]) -> Counted | None:
        if group["momentum"] == 0:
            return None
        return Counted(kept_of_gradient, (1.0 - group["dampening"],), 1)
