"""AdamW: Adam whose weight decay acts on the weights, not through the gradient's averages."""

from __future__ import annotations

from flame.optim._adam import Adam
from flame.optim._optimizer import Parameters
from flame.optim._tensors import Tensor

__all__ = ["AdamW"]


class AdamW(Adam):
    """Adam with decoupled weight decay: each step multiplies the weights by 1 − lr·weight_decay.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019).

    Args:
        params: parameters or parameter groups.
        lr: the learning rate, a number or a tensor of one element.
        betas: how much the averages of the gradient and of its square keep, each in [0, 1).
        eps: added to the root of the second average.
        weight_decay: the part of the weights, times the learning rate, that each step takes away.
        amsgrad: divide by the largest second average so far.
        maximize: climb instead of descending.
        foreach, fused, capturable: accepted and without effect, every update is one fused kernel.

    Raises:
        ArgumentError: a value out of range.
        UnsupportedError: differentiable=True.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
        )
