"""Loss functions of torch.nn.functional.

Invariants: a loss is one fused kernel for its pointwise part, then a mean or sum; ``reduction`` is
none, mean or sum. The arguments size_average and reduce are PyTorch's older spelling of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flame.core.errors import ArgumentError, DTypeError, ShapeError
from flame.ops import pointwise_losses as parts
from flame.ops.arithmetic import mul, neg, true_divide
from flame.ops.autocast import autocasts
from flame.ops.class_rows import REDUCTIONS, class_dim
from flame.ops.cross_entropy import cross_entropy_op
from flame.ops.negative_log_likelihood import nll_loss_op
from flame.ops.reductions import mean as mean_of
from flame.ops.reductions import sum as sum_of
from flame.ops.shapes import broadcast_to, reshape
from flame.ops.softmax import log_softmax

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__: list[str] = []


def reduction_of(name: str, reduction: str, size_average: Any = None, reduce: Any = None) -> str:
    """The reduction that the arguments ask for. Raises ArgumentError on an unknown one."""
    if size_average is not None or reduce is not None:
        if reduce is False:
            return "none"
        return "sum" if size_average is False else "mean"
    if reduction not in REDUCTIONS:
        raise ArgumentError(f"{name}: reduction must be none, mean or sum, got {reduction!r}")
    return reduction


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """The loss of each element, their mean, or their sum."""
    if reduction == "mean":
        return mean_of(loss)
    return sum_of(loss) if reduction == "sum" else loss


def _weighted(
    name: str, loss: Tensor, weight: Tensor | None, reduction: str, *, by_weight: bool = True
) -> Tensor:
    """As `reduced`, with a weight for each element; the mean is divided by the weights' sum, or,
    as PyTorch has it for the Huber loss, by their number.
    """
    if weight is None:
        return reduced(loss, reduction)
    if weight.shape != loss.shape:
        raise ShapeError(f"{name}: weight has shape {weight.shape}, the input {loss.shape}")
    loss = mul(loss, weight)
    if reduction == "mean" and by_weight:
        return true_divide(sum_of(loss), sum_of(weight))
    return reduced(loss, reduction)


# --- classes --------------------------------------------------------------------------------------


@autocasts("float32")
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy between scores (unnormalized) and classes.

    input: (C,), (N, C) or (N, C, d1, ...). target: class indices (), (N,) or (N, d1, ...), or
    probabilities of input's shape. weight: (C,). The mean over class indices is weighted by the
    targets' weights; targets equal to ``ignore_index`` count for nothing.
    Raises IndexRangeError for an index that is no class, ShapeError and DTypeError on a mismatch.
    """
    reduction = reduction_of("cross_entropy", reduction, size_average, reduce)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ArgumentError(
            f"cross_entropy: label_smoothing must be within 0 and 1, got {label_smoothing}"
        )
    if target.shape == input.shape and target.dtype.kind == "f":
        return _soft_cross_entropy(
            input, target, weight, ignore_index, reduction, float(label_smoothing)
        )
    loss, _, _ = cross_entropy_op(
        input, target, weight,
        ignore_index=int(ignore_index), smoothing=float(label_smoothing), reduction=reduction,
    )  # fmt: skip
    result: Tensor = loss
    return result


def _soft_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str,
    smoothing: float,
) -> Tensor:  # fmt: skip
    """With probabilities as target. The mean is over rows, weights or not."""
    if ignore_index >= 0:
        raise ArgumentError(
            "cross_entropy: ignore_index has no meaning for probabilities as target"
        )
    if not input.ndim or input.dtype.kind != "f":
        raise DTypeError(
            f"cross_entropy needs floating scores with a class dimension, got {input.dtype.name} "
            f"of shape {input.shape}"
        )
    dim = class_dim(input.type)
    classes = input.shape[dim]
    if smoothing:
        target = target * (1 - smoothing) + smoothing / max(classes, 1)
    logs = log_softmax(input, dim)
    if weight is not None:
        if weight.shape != (classes,):
            raise ShapeError(
                f"cross_entropy: weight must have shape ({classes},), got {weight.shape}"
            )
        logs = logs * reshape(weight, (classes,) + (1,) * (input.ndim - dim - 1))
    product = parts.soft_target(logs, target)
    if reduction == "none":
        rows: Tensor = neg(sum_of(product, dim))
        return rows
    total: Tensor = neg(sum_of(product))
    count = input.numel() // classes if classes else 0
    return total if reduction == "sum" else true_divide(total, count)


@autocasts("float32")
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-input at the target class; input holds log-probabilities. Shapes as in `cross_entropy`."""
    reduction = reduction_of("nll_loss", reduction, size_average, reduce)
    loss, _ = nll_loss_op(
        input, target, weight, ignore_index=int(ignore_index), reduction=reduction
    )
    result: Tensor = loss
    return result


# --- regression -----------------------------------------------------------------------------------


@autocasts("float32")
def mse_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean", weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(input - target)²; the shapes broadcast."""
    reduction = reduction_of("mse_loss", reduction, size_average, reduce)
    return _weighted("mse_loss", parts.squared_difference(input, target), weight, reduction)


@autocasts("float32")
def l1_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean", weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """|input - target|; the shapes broadcast."""
    reduction = reduction_of("l1_loss", reduction, size_average, reduce)
    return _weighted("l1_loss", parts.absolute_difference(input, target), weight, reduction)


@autocasts("float32")
def smooth_l1_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean", beta: float = 1.0,
) -> Tensor:  # fmt: skip
    """d² / (2 beta) where d = |input - target| < beta, else d - beta / 2.

    Source: Girshick, "Fast R-CNN", 2015.
    """
    reduction = reduction_of("smooth_l1_loss", reduction, size_average, reduce)
    if beta < 0:
        raise ArgumentError(f"smooth_l1_loss: beta must not be negative, got {beta}")
    if beta == 0:
        return reduced(parts.absolute_difference(input, target), reduction)
    return reduced(parts.smooth_absolute(input, target, float(beta)), reduction)


@autocasts("float32")
def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """d² / 2 where d = |input - target| <= delta, else delta (d - delta / 2).

    Source: Huber, "Robust Estimation of a Location Parameter", 1964.
    """
    reduction = reduction_of("huber_loss", reduction)
    if delta <= 0:
        raise ArgumentError(f"huber_loss: delta must be positive, got {delta}")
    loss = parts.huber(input, target, float(delta))
    return _weighted("huber_loss", loss, weight, reduction, by_weight=False)


# --- probabilities --------------------------------------------------------------------------------


def _same_shape(name: str, input: Tensor, target: Tensor) -> None:
    if input.shape != target.shape:
        raise ShapeError(
            f"{name}: target has shape {target.shape}, input {input.shape}; they must be equal"
        )


def spread_weight(loss: Tensor, weight: Tensor | None) -> Tensor:
    return loss if weight is None else mul(loss, broadcast_to(weight, loss.shape))


@autocasts("unsafe")
def binary_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None,
    size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """-(target log(input) + (1 - target) log(1 - input)), logarithms taken as at least -100.

    input holds probabilities, target is of its shape; weight broadcasts.
    """
    reduction = reduction_of("binary_cross_entropy", reduction, size_average, reduce)
    _same_shape("binary_cross_entropy", input, target)
    loss = parts.binary_entropy(input, target)
    return reduced(spread_weight(loss, weight), reduction)


@autocasts("float32")
def binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None = None,
    size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Binary cross entropy of sigmoid(input), without overflow.

    pos_weight multiplies the loss of positive targets; it broadcasts, as weight does.
    """
    name = "binary_cross_entropy_with_logits"
    reduction = reduction_of(name, reduction, size_average, reduce)
    _same_shape(name, input, target)
    loss = parts.binary_entropy_logits(input, target, 1.0 if pos_weight is None else pos_weight)
    return reduced(spread_weight(loss, weight), reduction)


@autocasts("float32")
def kl_div(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean", log_target: bool = False,
) -> Tensor:  # fmt: skip
    """target (log(target) - input): the divergence of log-probabilities from a target distribution.

    log_target: target holds log-probabilities. reduction "batchmean" divides by the first size.
    Source: Kullback and Leibler, "On Information and Sufficiency", 1951.
    """
    batch = reduction == "batchmean" and size_average is None and reduce is None
    reduction = reduction_of("kl_div", "sum" if batch else reduction, size_average, reduce)
    loss = (parts.divergence_log if log_target else parts.divergence)(input, target)
    total = reduced(loss, reduction)
    if not batch or not input.ndim:
        return total
    return true_divide(total, input.shape[0])


@autocasts("float32")
def gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Any, full: bool = False, eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """(log(var) + (input - target)² / var) / 2, with var at least eps (without a gradient there).

    var: of input's shape, or with a last dimension of 1, or without it, or a number.
    full: adds log(2 pi) / 2. Source: Nix and Weigend, 1994.
    """
    from flame.ops.creation import full as filled

    reduction = reduction_of("gaussian_nll_loss", reduction)
    if isinstance(var, (int, float)):
        var = filled(input.shape, float(var), dtype=input.dtype)
    if var.shape != input.shape:
        if var.shape == input.shape[:-1]:
            var = reshape(var, (*var.shape, 1))
        elif not (var.ndim == input.ndim and var.shape[:-1] == input.shape[:-1]
                  and var.shape[-1] == 1):  # fmt: skip
            raise ShapeError(
                f"gaussian_nll_loss: var of shape {var.shape} does not fit {input.shape}"
            )
    if bool((var < 0).any().item()):
        raise ArgumentError("gaussian_nll_loss: var has negative entries")
    floor = var + (var.clamp(min=eps) - var).detach()
    loss = parts.gaussian(input, target, floor)
    return reduced(loss + parts.HALF_LOG_TAU if full else loss, reduction)


@autocasts("float32")
def poisson_nll_loss(
    input: Tensor, target: Tensor, log_input: bool = True, full: bool = False,
    size_average: bool | None = None, eps: float = 1e-8, reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """exp(input) - target input, or input - target log(input + eps) without log_input.

    full: adds Stirling's approximation of log(target!) where target > 1.
    """
    from flame.ops.comparison import where
    from flame.ops.mathematics import exp, log

    reduction = reduction_of("poisson_nll_loss", reduction, size_average, reduce)
    loss = exp(input) - target * input if log_input else input - target * log(input + eps)
    if full:
        stirling = target * log(target) - target + log(target * parts.TAU) * 0.5
        loss = loss + where(target > 1, stirling, 0.0)
    return reduced(loss, reduction)
