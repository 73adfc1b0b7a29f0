"""Lion: the sign of an interpolated momentum, so that every weight moves by the same amount."""

from __future__ import annotations

from typing import Any, ClassVar

from flame.optim import _arguments as check
from flame.optim._optimizer import Optimizer, Parameters, Scalar, Update
from flame.optim._tensors import Tensor, pointwise, sign

__all__ = ["Lion"]


def lion_update(
    p: Any,
    g: Any,
    m: Any,
    lr: Any,
    direction: Any,
    kept: Any,
    beta1: Any,
    rest1: Any,
    beta2: Any,
    rest2: Any,
) -> Any:
    """p ← kept·p − lr·sign(β₁·m + (1 − β₁)·g), then m ← β₂·m + (1 − β₂)·g; kept is 1 − lr·decay."""
    g = g * direction
    p = p * kept - sign(m * beta1 + g * rest1) * lr
    return p, m * beta2 + g * rest2


LION = Update(pointwise(lion_update), ("exp_avg",))


class Lion(Optimizer):
    """Lion, with decoupled weight decay. It wants a rate 3 to 10 times smaller than AdamW's.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms (2023), algorithm 2.

    Args:
        params: parameters or parameter groups.
        lr: the learning rate, a number or a tensor of one element.
        betas: the interpolation for the step and for the momentum that is kept, each in [0, 1).
        weight_decay: the part of the weights, times the learning rate, that each step takes away.
        maximize: climb instead of descending.

    Raises:
        ArgumentError: a value out of range.
    """

    _counts_steps: ClassVar[bool] = False
    _buffers: ClassVar[tuple[str, ...]] = LION.buffers

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check.learning_rate(self._name, group)
        check.betas(self._name, group)
        check.non_negative(self._name, group, "weight_decay")

    def _update(self, group: dict[str, Any]) -> Update:
        return LION

    def _scalars(self, group: dict[str, Any], step: int) -> tuple[Scalar, ...]:
        lr = group["lr"]
        beta1, beta2 = group["betas"]
        direction = -1.0 if group["maximize"] else 1.0
        kept = 1.0 - lr * group["weight_decay"]
        return (lr, direction, kept, beta1, 1.0 - beta1, beta2, 1.0 - beta2)
