"""Losses and similarities of pairs and triplets of vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flame.core.errors import ArgumentError, ShapeError
from flame.ops import pointwise_losses as parts
from flame.ops.autocast import autocasts
from flame.ops.loops import broadcast_shapes
from flame.ops.losses import reduced, reduction_of, spread_weight
from flame.ops.reductions import mean as mean_of
from flame.ops.reductions import sum as sum_of
from flame.ops.shapes import broadcast_to

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["cosine_similarity", "pairwise_distance"]


@autocasts("float32")
def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """x1 . x2 / (max(|x1|, eps) max(|x2|, eps)) over ``dim``; the shapes broadcast."""
    from flame.ops.comparison import clamp_min
    from flame.ops.mathematics import sqrt

    shape = broadcast_shapes("cosine_similarity", [x1.shape, x2.shape])
    x1, x2 = broadcast_to(x1, shape), broadcast_to(x2, shape)
    first, second = (clamp_min(sum_of(x * x, dim, keepdim=True), eps * eps) for x in (x1, x2))
    return sum_of((x1 / sqrt(first)) * (x2 / sqrt(second)), dim)


def pairwise_distance(
    x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Tensor:
    """The p-norm of x1 - x2 + eps over the last dimension."""
    from flame.ops.norms import norm

    return norm(x1 - x2 + eps, p, -1, keepdim)


@autocasts("float32")
def cosine_embedding_loss(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0,
    size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """1 - cos where target is 1, max(0, cos - margin) where it is -1."""
    from flame.ops.comparison import clamp_min, where
    from flame.ops.mathematics import sqrt

    reduction = reduction_of("cosine_embedding_loss", reduction, size_average, reduce)
    if input1.ndim != target.ndim + 1 or input2.ndim != target.ndim + 1:
        raise ShapeError(
            f"cosine_embedding_loss: target {target.shape} must have one dimension less than the "
            f"inputs {input1.shape} and {input2.shape}"
        )
    eps = 1e-12
    product = sum_of(input1 * input2, -1)
    lengths = (sum_of(input1 * input1, -1) + eps) * (sum_of(input2 * input2, -1) + eps)
    cosine = product / sqrt(lengths)
    apart = where(target == -1, clamp_min(cosine - margin, 0), 0.0)
    return reduced(where(target == 1, 1 - cosine, 0.0) + apart, reduction)


@autocasts("float32")
def margin_ranking_loss(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0,
    size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """max(0, -target (input1 - input2) + margin)."""
    from flame.ops.comparison import clamp_min

    reduction = reduction_of("margin_ranking_loss", reduction, size_average, reduce)
    if not input1.ndim == input2.ndim == target.ndim:
        raise ShapeError(
            f"margin_ranking_loss: {input1.shape}, {input2.shape} and target {target.shape} must "
            "have as many dimensions"
        )
    return reduced(clamp_min(-target * (input1 - input2) + float(margin), 0), reduction)


@autocasts("float32")
def hinge_embedding_loss(
    input: Tensor, target: Tensor, margin: float = 1.0,
    size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """input where target is 1, max(0, margin - input) where it is -1."""
    from flame.ops.comparison import clamp_min, where

    reduction = reduction_of("hinge_embedding_loss", reduction, size_average, reduce)
    margin = float(np.asarray(margin, input.dtype.numpy))  # PyTorch rounds it to the input's dtype
    far = where(target != 1, clamp_min(margin - input, 0), 0.0)
    return reduced(far + where(target != -1, input, 0.0), reduction)


@autocasts("float32")
def soft_margin_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None,
    reduce: bool | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """log(1 + exp(-target input))."""
    reduction = reduction_of("soft_margin_loss", reduction, size_average, reduce)
    return reduced(parts.soft_margin(input, target), reduction)


@autocasts("float32")
def triplet_margin_loss(
    anchor: Tensor, positive: Tensor, negative: Tensor, margin: float = 1.0, p: float = 2,
    eps: float = 1e-6, swap: bool = False, size_average: bool | None = None,
    reduce: bool | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """max(0, |anchor - positive| - |anchor - negative| + margin), lengths over the last dimension.

    swap: takes the distance of positive and negative where it is smaller.
    Source: Balntas and others, "Learning local feature descriptors with triplets", 2016.
    """
    from flame.ops.comparison import clamp_min, minimum

    reduction = reduction_of("triplet_margin_loss", reduction, size_average, reduce)
    if margin <= 0:
        raise ArgumentError(f"triplet_margin_loss: margin must be positive, got {margin}")
    if not anchor.ndim == positive.ndim == negative.ndim:
        raise ShapeError(
            f"triplet_margin_loss: {anchor.shape}, {positive.shape} and {negative.shape} must have "
            "as many dimensions"
        )
    near = pairwise_distance(anchor, positive, p, eps)
    far = pairwise_distance(anchor, negative, p, eps)
    if swap:
        far = minimum(far, pairwise_distance(positive, negative, p, eps))
    return reduced(clamp_min(near - far + margin, 0), reduction)


@autocasts("float32")
def multilabel_soft_margin_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None,
    size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The mean over classes (last dimension) of binary cross entropies of sigmoid(input)."""
    reduction = reduction_of("multilabel_soft_margin_loss", reduction, size_average, reduce)
    loss = spread_weight(parts.binary_entropy_logits(input, target, 1.0), weight)
    return reduced(mean_of(loss, -1), reduction)
