"""Dropout: elements, or whole channels, are zeroed at random in training.

No mask is stored: backward draws the same bits again from the saved seed and offset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flame.core.errors import ArgumentError, DTypeError, ShapeError
from flame.ops import draws
from flame.ops.creation import ones
from flame.ops.generator import default_generator
from flame.ops.philox import shared_blocks

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["dropout", "feature_dropout"]


def _check_chance(name: str, p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ArgumentError(f"{name}: p must lie in [0, 1], got {p}")


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero each element with probability ``p`` and scale the others by 1 / (1 - p), in training.

    Source: Srivastava et al., "Dropout", 2014. Raises ArgumentError for p outside [0, 1].
    """
    _check_chance("dropout", p)
    if input.dtype.kind != "f":
        raise DTypeError(f"dropout takes a floating tensor, got {input.dtype.name}")
    if not training or p == 0:
        return input
    scale = 0.0 if p == 1 else 1.0 / (1.0 - p)
    place = default_generator.reserve(shared_blocks(input.type.numel))
    if inplace:
        draws.drop.into((input,), input, float(p), scale, *place)
        return input
    result: Tensor = draws.drop(input, float(p), scale, *place)
    return result


def feature_dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Zero whole channels (dimension 1) with probability ``p`` and scale the others.

    input: (N, C, ...). Source: Tompson et al., "Efficient object localization", 2015.
    """
    _check_chance("feature_dropout", p)
    if input.ndim < 2:
        raise ShapeError(f"feature_dropout needs (N, C, ...), got shape {input.shape}")
    if not training or p == 0:
        return input
    shape = input.shape[:2] + (1,) * (input.ndim - 2)
    noise = dropout(ones(shape, dtype=input.dtype, device=input.device), p)
    if inplace:
        return input.mul_(noise)
    return input * noise


def _channels(name: str, batched: int) -> Callable[..., Tensor]:
    def function(
        input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if input.ndim == batched - 1:  # without a batch
            return feature_dropout(input.unsqueeze(0), p, training, inplace).squeeze(0)
        return feature_dropout(input, p, training, inplace)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = "Zero whole channels with probability ``p``, see `feature_dropout`."
    return function


dropout1d = _channels("dropout1d", 3)
dropout2d = _channels("dropout2d", -1)  # PyTorch's takes (C, L) rows of a batch as channels too
dropout3d = _channels("dropout3d", 5)
