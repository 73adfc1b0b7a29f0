"""Adagrad: gradients divided by the root of the sum of all their squares so far."""

from __future__ import annotations

from typing import Any, ClassVar

from flame.optim import _arguments as check
from flame.optim._conditional import Counted
from flame.optim._optimizer import Optimizer, Parameters, Scalar, Update
from flame.optim._tensors import Tensor, full_like, pointwise, sqrt

__all__ = ["Adagrad"]


def adagrad_update(
    p: Any, g: Any, total: Any, step_size: Any, eps: Any, direction: Any, decay: Any
) -> Any:
    """total ← total + g²; p ← p − step_size·g / (√total + ε)."""
    g = g * direction + p * decay
    total = total + g * g
    return p - g / (sqrt(total) + eps) * step_size, total


@pointwise
def decayed_rate(step: Any, lr: Any, lr_decay: Any) -> Any:
    """The rate of this step, counted from 1."""
    return lr / (1.0 + (step - 1.0) * lr_decay)


ADAGRAD = Update(pointwise(adagrad_update), ("sum",))


class Adagrad(Optimizer):
    """Adagrad.

    Source: Duchi et al., Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization (2011).

    Args:
        params: parameters or parameter groups.
        lr: the learning rate, a number or a tensor of one element.
        lr_decay: the rate at step t is lr / (1 + (t − 1)·lr_decay).
        weight_decay: this much of the weight is added to its gradient.
        initial_accumulator_value: the sum of squares before the first step.
        eps: added to the root.
        maximize: climb instead of descending.
        foreach, fused: accepted and without effect, every update is one fused kernel.

    Raises:
        ArgumentError: a value out of range.
        UnsupportedError: differentiable=True.
    """

    _buffers: ClassVar[tuple[str, ...]] = ADAGRAD.buffers

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)
        # PyTorch's Adagrad has its state from the start, so a state_dict saved before the first
        # step has it too.
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"step": 0, "sum": self._initial("sum", parameter, group)}

    def _check_group(self, group: dict[str, Any]) -> None:
        check.learning_rate(self._name, group)
        for name in ("lr_decay", "weight_decay", "initial_accumulator_value", "eps"):
            check.non_negative(self._name, group, name)
        check.options(self._name, group)

    def _update(self, group: dict[str, Any]) -> Update:
        return ADAGRAD

    def _scalars(self, group: dict[str, Any], step: int) -> tuple[Scalar, ...]:
        return (
            group["lr"] / (1.0 + (step - 1) * group["lr_decay"]),
            group["eps"],
            -1.0 if group["maximize"] else 1.0,
            group["weight_decay"],
        )

    def _counted(self, group: dict[str, Any]) -> Counted:
        return Counted(decayed_rate, (group["lr"], group["lr_decay"]), 1)

    def _initial(self, name: str, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        return full_like(parameter.detach(), group["initial_accumulator_value"])
