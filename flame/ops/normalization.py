"""Normalization functions: layer, group, RMS, batch and instance normalization, and normalize.

Invariant: running statistics change in place, under no gradient, and only where batch statistics
are used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError, ShapeError
from flame.core.types import TensorType
from flame.kernel import values
from flame.kernel.values import Value, cast
from flame.ops.arithmetic import true_divide
from flame.ops.autocast import autocasts
from flame.ops.conversion import clone
from flame.ops.elementwise import compute_dtype, elementwise
from flame.ops.norm_ops import batch_norm_op, group_norm_op, layer_norm_op, rms_norm_op
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Sample, Types
from flame.ops.shapes import reshape

if TYPE_CHECKING:
    from flame.tensor import Tensor

# torch.batch_norm and torch.instance_norm take their arguments in another order than the functions
# of torch.nn.functional, so these two stand in nn.functional alone.
__all__ = ["group_norm", "layer_norm", "rms_norm"]


def _check_parameter(name: str, label: str, given: Any, shape: tuple[int, ...]) -> None:
    if given is not None and tuple(given.shape) != shape:
        raise ShapeError(f"{name}: {label} has shape {tuple(given.shape)}, it must be {shape}")


def _check_trailing(name: str, input: Tensor, normalized_shape: Any) -> tuple[int, ...]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ShapeError(
            f"{name}: an input of shape {input.shape} does not end in normalized_shape {shape}"
        )
    return shape


@autocasts("float32")
def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """(input - mean) / sqrt(variance + eps) * weight + bias over the last dimensions.

    Shapes: input (..., *normalized_shape), weight and bias normalized_shape.
    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """
    shape = _check_trailing("layer_norm", input, normalized_shape)
    _check_parameter("layer_norm", "weight", weight, shape)
    _check_parameter("layer_norm", "bias", bias, shape)
    result: Tensor = layer_norm_op(input, weight, bias, float(eps), rows=len(shape))
    return result


@autocasts("float32")
def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """input / sqrt(mean(input²) + eps) * weight over the last dimensions.

    eps None: the machine epsilon of the dtype that is computed in (float32 for half-width floats).
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    shape = _check_trailing("rms_norm", input, normalized_shape)
    _check_parameter("rms_norm", "weight", weight, shape)
    if eps is None:
        compute = compute_dtype(input.dtype) if input.dtype.kind == "f" else dtypes.float32
        eps = float(np.finfo(compute.numpy).eps)
    result: Tensor = rms_norm_op(input, weight, None, float(eps), rows=len(shape))
    return result


@autocasts("float32")
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Normalization of (N, C, ...) over each group of channels and all positions.

    Shapes: weight and bias (C,); C must be divisible by num_groups.
    Source: Wu and He, "Group Normalization", 2018.
    """
    if input.ndim < 2:
        raise ShapeError(f"group_norm needs an input (N, C, ...), got shape {input.shape}")
    channels = input.shape[1]
    if num_groups <= 0 or channels % num_groups:
        raise ShapeError(
            f"group_norm: {channels} channels cannot be split into {num_groups} groups"
        )
    _check_parameter("group_norm", "weight", weight, (channels,))
    _check_parameter("group_norm", "bias", bias, (channels,))
    result: Tensor = group_norm_op(input, weight, bias, float(eps), rows=num_groups)
    return result


# --- batch normalization --------------------------------------------------------------------------


def _lerp_both(
    running_mean: Value, running_variance: Value, mean: Value, variance: Value,
    momentum: Value, correction: Value,
) -> tuple[Value, Value]:  # fmt: skip
    return (
        running_mean + (mean - running_mean) * momentum,
        running_variance + (variance * correction - running_variance) * momentum,
    )


def _running_rule(name: str, types: Types) -> tuple[list[DType], list[DType]]:
    kept = [t.dtype for t in types[:2] if isinstance(t, TensorType)]
    return [compute_dtype(kept[0])] * len(types), kept


_update_running = elementwise(
    "update_running_statistics", _lerp_both, rule=_running_rule,
    inputs=("running_mean", "running_variance", "mean", "variance", "momentum", "correction"),
    vjp=NOT_DIFFERENTIABLE,
    reference=lambda rm, rv, m, v, momentum, correction: (
        rm + (m - rm) * momentum, rv + (v * correction - rv) * momentum
    ),
    samples=[Sample((*(Arg((5,)),) * 4, 0.1, 1.25))],
)  # fmt: skip


def _scale_shift(x: Value, mean: Value, variance: Value, weight: Any, bias: Any, eps: Any) -> Any:
    compute = x.dtype
    root = values.unary("sqrt", cast(variance, compute) + cast(eps, compute))
    return (x - cast(mean, compute)) * (cast(weight, compute) / root) + cast(bias, compute)


def _first_rule(name: str, types: Types) -> tuple[list[DType], list[DType]]:
    """The result is as the first operand; all are computed in its width."""
    first = types[0]
    if not isinstance(first, TensorType):
        raise DTypeError(f"{name}: the first operand must be a tensor")
    if first.dtype.kind != "f":
        raise DTypeError(f"batch_norm needs a floating input, got {first.dtype.name}")
    return [compute_dtype(first.dtype)] * len(types), [first.dtype]


def _root(variance: Any, eps: Any) -> Any:
    from flame.ops.mathematics import rsqrt

    return rsqrt(variance + eps)


batch_norm_inference = elementwise(
    "batch_norm_inference", _scale_shift, rule=_first_rule,
    inputs=("x", "mean", "variance", "weight", "bias", "eps"),
    vjp=(
        lambda g, variance, weight, eps: g * (weight * _root(variance, eps)),
        lambda g, variance, weight, eps: -g * (weight * _root(variance, eps)),
        lambda g, x, mean, variance, weight, eps: (
            g * (x - mean) * weight * _root(variance, eps) / (variance + eps) * -0.5
        ),
        lambda g, x, mean, variance, eps: g * ((x - mean) * _root(variance, eps)),
        lambda g: g,
        None,
    ),
    reference=lambda x, m, v, w, b, eps: ((x - m) / np.sqrt(v + eps) * w + b).astype(x.dtype),
    samples=[Sample((Arg((2, 3, 5)), Arg((3, 1)), Arg((3, 1), 0.5, 2.0), Arg((3, 1)), Arg((3, 1)),
                     1e-5)),
             Sample((Arg((4, 3)), Arg((3,)), Arg((3,), 0.5, 2.0), 1.0, 0.0, 1e-3))],
)  # fmt: skip


def _check_batch(input: Tensor, *given: tuple[str, Tensor | None]) -> None:
    if input.ndim < 2:
        raise ShapeError(f"batch_norm needs an input (N, C, ...), got shape {input.shape}")
    for label, tensor in given:
        _check_parameter("batch_norm", label, tensor, (input.shape[1],))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Normalization of (N, C, ...) over the batch and all positions, for each channel.

    training: by the statistics of the batch, which are folded into the running ones in place
    (running += momentum * (batch - running), with the unbiased variance). Otherwise by the running
    ones. Shapes: statistics, weight and bias (C,).
    Source: Ioffe and Szegedy, "Batch Normalization", 2015.
    """
    if input.ndim == 1 and not input.numel():
        return clone(input)  # as PyTorch allows
    _check_batch(input, ("running_mean", running_mean), ("running_var", running_var),
                 ("weight", weight), ("bias", bias))  # fmt: skip
    if not training:
        return _evaluate(input, running_mean, running_var, weight, bias, eps)
    count = input.numel() // input.shape[1] if input.shape[1] else 0
    if count == 1 and input.ndim >= 2:
        raise ShapeError(
            f"batch_norm in training needs more than one value for each channel, got {input.shape}"
        )
    y, mean, variance = batch_norm_op(input, weight, bias, float(eps))
    if running_mean is not None and running_var is not None and count:
        correction = count / (count - 1)
        _fold(running_mean, running_var, mean, variance, momentum, correction)
    result: Tensor = y
    return result


def _fold(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor,
    momentum: float, correction: float,
) -> None:  # fmt: skip
    targets = (running_mean, running_var)
    _update_running.into(
        targets, *targets, mean.detach(), variance.detach(), float(momentum), correction
    )


def _evaluate(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    if running_mean is None or running_var is None:
        raise ArgumentError("batch_norm: without running statistics, training must be True")
    shape = (input.shape[1],) + (1,) * (input.ndim - 2)

    def spread(t: Tensor) -> Tensor:
        return reshape(t, shape)

    result: Tensor = batch_norm_inference(
        input, spread(running_mean), spread(running_var),
        1.0 if weight is None else spread(weight), 0.0 if bias is None else spread(bias),
        float(eps),
    )  # fmt: skip
    return result


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Normalization of (N, C, ...) over all positions, for each sample and channel.

    Running statistics, where given, take in the mean over samples of each sample's statistics.
    Source: Ulyanov, Vedaldi and Lempitsky, "Instance Normalization", 2016.
    """
    _check_batch(input, ("running_mean", running_mean), ("running_var", running_var),
                 ("weight", weight), ("bias", bias))  # fmt: skip
    if not use_input_stats:
        return _evaluate(input, running_mean, running_var, weight, bias, eps)
    samples, channels = input.shape[:2]
    space = math.prod(input.shape[2:])
    if space == 1:
        raise ShapeError(
            f"instance_norm needs more than one position for each channel, got {input.shape}"
        )
    if running_mean is not None and running_var is not None and input.numel():
        _, mean, variance = batch_norm_op(
            reshape(input.detach(), (1, samples * channels, space)), None, None, float(eps)
        )
        shape = (samples, channels)
        _fold(running_mean, running_var, reshape(mean, shape).mean(0),
              reshape(variance, shape).mean(0), momentum, space / (space - 1))  # fmt: skip
    result: Tensor = group_norm_op(input, weight, bias, float(eps), rows=max(channels, 1))
    return result


def normalize(
    input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: None = None
) -> Tensor:
    """input / max(norm_p(input), eps) over ``dim``."""
    from flame.ops.comparison import clamp_min
    from flame.ops.norms import norm

    length = clamp_min(norm(input, p, dim, keepdim=True), eps)
    result: Tensor = true_divide(input, length)
    return result
