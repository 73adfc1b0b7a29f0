"""Functions of `flame.nn.functional` that are a few lines of others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flame.core import dtypes
from flame.core.errors import ArgumentError, IndexRangeError, ShapeError
from flame.ops.activations import leaky_relu
from flame.ops.autocast import autocasts
from flame.ops.comparison import minimum, where
from flame.ops.composites import rows_norm
from flame.ops.creation import ones, ones_like, zeros_like
from flame.ops.losses import reduced
from flame.ops.op import constant
from flame.ops.padding import pad
from flame.ops.random import bernoulli, rand_like
from flame.ops.shapes import reshape, unsqueeze
from flame.ops.softmax import softmax

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__: list[str] = []

# The value that selu tends to far to the left; alpha dropout puts it in place of what it drops.
SATURATION = -1.7580993408473766


@autocasts("float32")
def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """p-norms between all pairs of rows of (N, M), in the order of the upper triangle."""
    if input.ndim != 2:
        raise ShapeError(f"pdist takes two dimensions, got shape {input.shape}")
    pairs = list(itertools.combinations(range(input.shape[0]), 2))
    first, second = (
        constant([pair[k] for pair in pairs], dtype=dtypes.int64, device=input.device)
        for k in (0, 1)
    )
    return rows_norm(input.index_select(0, first) - input.index_select(0, second), float(p))


def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """(N, C, ...) with the channels of ``groups`` groups interleaved (ShuffleNet, 2017)."""
    if input.ndim < 3 or groups < 1 or input.shape[1] % groups:
        raise ShapeError(f"channel_shuffle: {groups} groups do not divide {input.shape}")
    batch, channels, *rest = input.shape
    parts = reshape(input, (batch, groups, channels // groups, *rest))
    return reshape(parts.transpose(1, 2), input.shape)


def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """Each channel divided by a power of the mean square of ``size`` channels (AlexNet, 2012)."""
    if input.ndim < 3:
        raise ShapeError(f"local_response_norm takes 3 dimensions or more, got {input.shape}")
    if not input.numel():
        return input
    rest = (0, 0) * (input.ndim - 2)
    squares = pad(input * input, (*rest, size // 2, (size - 1) // 2))
    channels = input.shape[1]
    total = squares.narrow(1, 0, channels)
    for offset in range(1, size):
        total = total + squares.narrow(1, offset, channels)
    result: Tensor = input / (total * (alpha / size) + k).pow(beta)
    return result


# --- noise ----------------------------------------------------------------------------------------


def rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False,
    inplace: bool = False,
) -> Tensor:  # fmt: skip
    """relu with a random slope below 0, uniform in [lower, upper); their mean in evaluation."""
    if lower > upper:
        raise ArgumentError(f"rrelu: lower {lower} must not be above upper {upper}")
    if training:
        slopes = rand_like(input) * (upper - lower) + lower
        made: Tensor = where(input >= 0, input, input * slopes)
    else:
        made = leaky_relu(input, (lower + upper) / 2)
    return input.copy_(made) if inplace else made


def _alpha_noise(input: Tensor, kept: Tensor, p: float, inplace: bool) -> Tensor:
    scale = 1 / math.sqrt((1 - p) * (1 + p * SATURATION**2)) if p < 1 else 0.0
    shift = -scale * SATURATION * p
    made: Tensor = input * (kept * scale) + ((1 - kept) * (SATURATION * scale) + shift)
    return input.copy_(made) if inplace else made


def alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    """Dropout for selu networks: mean and variance stay (Klambauer et al., 2017)."""
    return _alpha("alpha_dropout", input, p, input.shape, training=training, inplace=inplace)


def feature_alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    """`alpha_dropout` of whole channels of (N, C, ...)."""
    shape = (*input.shape[:2], *(1 for _ in input.shape[2:]))
    return _alpha("feature_alpha_dropout", input, p, shape, training=training, inplace=inplace)


def _alpha(
    name: str, input: Tensor, p: float, shape: Any, *, training: bool, inplace: bool
) -> Tensor:
    if not 0 <= p <= 1:
        raise ArgumentError(f"{name}: p must be from 0 to 1, got {p}")
    if not training or p == 0:
        return input
    kept = bernoulli(ones(shape, dtype=input.dtype, device=input.device) * (1 - p))
    return _alpha_noise(input, kept, p, inplace=inplace)


def gumbel_softmax(
    logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Tensor:
    """A sample of the Gumbel-softmax distribution (Jang et al., 2017).

    hard: one-hot in the forward pass, with the gradient of the soft sample.
    """
    noise = -(-(rand_like(logits).clamp(min=1e-38)).log()).log()
    soft = softmax((logits + noise) / tau, dim)
    if not hard:
        return soft
    place = soft.detach().argmax(dim, keepdim=True)
    one: Tensor = zeros_like(soft).detach().scatter(dim, place, 1.0)
    result: Tensor = one - soft.detach() + soft
    return result


# --- losses ---------------------------------------------------------------------------------------


@autocasts("float32")
def multi_margin_loss(
    input: Tensor, target: Tensor, p: int = 1, margin: float = 1.0, weight: Tensor | None = None,
    size_average: Any = None, reduce: Any = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """How far the scores (N, C) of other classes come within ``margin`` of the target's (N)."""
    if p not in (1, 2):
        raise ArgumentError(f"multi_margin_loss: p must be 1 or 2, got {p}")
    scores = input if input.ndim == 2 else reshape(input, (1, -1))
    labels = reshape(target, (-1,))
    if scores.shape[0] != labels.shape[0]:
        raise ShapeError(f"multi_margin_loss: labels {target.shape} for scores {input.shape}")
    count = scores.shape[1]
    place = unsqueeze(labels, 1)
    own = scores.gather(1, place)
    gaps = (scores - own + margin).clamp(min=0)
    gaps = gaps * gaps if p == 2 else gaps
    if weight is not None:
        gaps = gaps * unsqueeze(weight.index_select(0, labels), 1)
    others = ones_like(scores).detach().scatter(1, place, 0.0)
    losses = (gaps * others).sum(1) / count
    return reduced(losses if target.ndim else reshape(losses, ()), reduction)


@autocasts("float32")
def multilabel_margin_loss(
    input: Tensor, target: Tensor, size_average: Any = None, reduce: Any = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """How far other classes come within 1 of those that ``target`` names, up to its first -1."""
    if input.shape != target.shape:
        raise ShapeError(f"multilabel_margin_loss: {input.shape} and {target.shape} must be equal")
    scores = input if input.ndim == 2 else reshape(input, (1, -1))
    labels = target if target.ndim == 2 else reshape(target, (1, -1))
    count = scores.shape[1]
    if bool((labels >= count).any()):
        raise IndexRangeError(f"multilabel_margin_loss: a label is not below {count}")
    valid = ((labels < 0).to(dtypes.int64).cumsum(1) == 0).to(scores.dtype)
    place = labels.clamp(min=0)
    named = zeros_like(scores).detach().scatter_add(1, place, valid).clamp(max=1)
    own = scores.gather(1, place)
    gaps = (1 - unsqueeze(own, 2) + unsqueeze(scores, 1)).clamp(min=0)
    losses = (gaps * unsqueeze(valid, 2) * unsqueeze(1 - named, 1)).sum((1, 2)) / count
    return reduced(losses if input.ndim == 2 else reshape(losses, ()), reduction)


def triplet_margin_with_distance_loss(
    anchor: Tensor, positive: Tensor, negative: Tensor, *,
    distance_function: Callable[..., Any] | None = None, margin: float = 1.0, swap: bool = False,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """How far the negative comes within ``margin`` of the positive, by a distance of one's own."""
    from flame.ops.embedding_losses import pairwise_distance

    if margin <= 0:
        raise ArgumentError(f"triplet_margin_with_distance_loss: margin {margin} must be positive")
    distance = distance_function or pairwise_distance
    near, far = distance(anchor, positive), distance(anchor, negative)
    if swap:
        far = minimum(far, distance(positive, negative))
    return reduced((near - far + margin).clamp(min=0), reduction)
