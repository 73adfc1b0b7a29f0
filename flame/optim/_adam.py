"""Adam: steps scaled by running averages of the gradient and of its square.

The bias corrections depend on the step alone, so they are folded into two scalars: the step size
and the scale of the root of the second average.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from flame.optim import _arguments as check
from flame.optim._conditional import Counted
from flame.optim._optimizer import Optimizer, Parameters, Scalar, Update
from flame.optim._tensors import Tensor, maximum, pointwise, sqrt

__all__ = ["Adam"]


def _averages(g: Any, m: Any, v: Any, rest1: Any, beta2: Any, rest2: Any) -> tuple[Any, Any]:
    """The averages of g and of g², where rest is 1 − β."""
    return m + (g - m) * rest1, v * beta2 + g * g * rest2


def _moved(p: Any, m: Any, v: Any, step_size: Any, root_scale: Any, eps: Any) -> Any:
    return p - m / (sqrt(v) * root_scale + eps) * step_size


def adam_update(
    p: Any,
    g: Any,
    m: Any,
    v: Any,
    step_size: Any,
    root_scale: Any,
    eps: Any,
    direction: Any,
    decay: Any,
    rest1: Any,
    beta2: Any,
    rest2: Any,
) -> Any:
    """Adam with weight decay as a part of the gradient."""
    m, v = _averages(g * direction + p * decay, m, v, rest1, beta2, rest2)
    return _moved(p, m, v, step_size, root_scale, eps), m, v


def adam_amsgrad_update(
    p: Any,
    g: Any,
    m: Any,
    v: Any,
    v_max: Any,
    step_size: Any,
    root_scale: Any,
    eps: Any,
    direction: Any,
    decay: Any,
    rest1: Any,
    beta2: Any,
    rest2: Any,
) -> Any:
    """Adam that divides by the largest second average so far."""
    m, v = _averages(g * direction + p * decay, m, v, rest1, beta2, rest2)
    v_max = maximum(v_max, v)
    return _moved(p, m, v_max, step_size, root_scale, eps), m, v, v_max


def adamw_update(
    p: Any,
    g: Any,
    m: Any,
    v: Any,
    step_size: Any,
    root_scale: Any,
    eps: Any,
    direction: Any,
    kept: Any,
    rest1: Any,
    beta2: Any,
    rest2: Any,
) -> Any:
    """Adam with weight decay beside the gradient: `kept` is 1 − lr·decay."""
    m, v = _averages(g * direction, m, v, rest1, beta2, rest2)
    return _moved(p * kept, m, v, step_size, root_scale, eps), m, v


def adamw_amsgrad_update(
    p: Any,
    g: Any,
    m: Any,
    v: Any,
    v_max: Any,
    step_size: Any,
    root_scale: Any,
    eps: Any,
    direction: Any,
    kept: Any,
    rest1: Any,
    beta2: Any,
    rest2: Any,
) -> Any:
    """AdamW that divides by the largest second average so far."""
    m, v = _averages(g * direction, m, v, rest1, beta2, rest2)
    v_max = maximum(v_max, v)
    return _moved(p * kept, m, v_max, step_size, root_scale, eps), m, v, v_max


@pointwise
def bias_corrections(step: Any, lr: Any, beta1: Any, beta2: Any) -> Any:
    """The step size and the scale of the root, after this many steps."""
    return lr / (1.0 - beta1**step), 1.0 / sqrt(1.0 - beta2**step)


AVERAGES = ("exp_avg", "exp_avg_sq")
ADAM = Update(pointwise(adam_update), AVERAGES)
ADAM_AMSGRAD = Update(pointwise(adam_amsgrad_update), (*AVERAGES, "max_exp_avg_sq"))
ADAMW = Update(pointwise(adamw_update), AVERAGES)
ADAMW_AMSGRAD = Update(pointwise(adamw_amsgrad_update), (*AVERAGES, "max_exp_avg_sq"))


class Adam(Optimizer):
    """Adam. Its weight decay is a part of the gradient; AdamW's acts on the weights themselves.

    Sources: Kingma and Ba, Adam: A Method for Stochastic Optimization (2015); amsgrad: Reddi et
    al., On the Convergence of Adam and Beyond (2018).

    Args:
        params: parameters or parameter groups.
        lr: the learning rate, a number or a tensor of one element.
        betas: how much the averages of the gradient and of its square keep, each in [0, 1).
        eps: added to the root of the second average.
        weight_decay: this much of the weight is added to its gradient.
        amsgrad: divide by the largest second average so far.
        maximize: climb instead of descending.
        decoupled_weight_decay: decay as AdamW does.
        foreach, fused, capturable: accepted and without effect, every update is one fused kernel.

    Raises:
        ArgumentError: a value out of range.
        UnsupportedError: differentiable=True.
    """

    _buffers: ClassVar[tuple[str, ...]] = (*AVERAGES, "max_exp_avg_sq")

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check.learning_rate(self._name, group)
        check.betas(self._name, group)
        check.non_negative(self._name, group, "eps")
        check.non_negative(self._name, group, "weight_decay")
        check.options(self._name, group)

    def _update(self, group: dict[str, Any]) -> Update:
        if group["decoupled_weight_decay"]:
            return ADAMW_AMSGRAD if group["amsgrad"] else ADAMW
        return ADAM_AMSGRAD if group["amsgrad"] else ADAM

    def _scalars(self, group: dict[str, Any], step: int) -> tuple[Scalar, ...]:
        lr, decay = group["lr"], group["weight_decay"]
        beta1, beta2 = group["betas"]
        return (
            lr / (1.0 - beta1**step),
            1.0 / math.sqrt(1.0 - beta2**step),
            group["eps"],
            -1.0 if group["maximize"] else 1.0,
            1.0 - lr * decay if group["decoupled_weight_decay"] else decay,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
        )

    def _counted(self, group: dict[str, Any]) -> Counted:
        return Counted(bias_corrections, (group["lr"], *group["betas"]), 2)
