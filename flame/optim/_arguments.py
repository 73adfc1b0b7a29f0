"""Checks of the values that optimizers are made with.

They run on whole parameter groups, so a bad value is refused wherever it was given: as a default or
for one group.
"""

from __future__ import annotations

import math
from typing import Any

from flame.core.errors import ArgumentError, DTypeError, UnsupportedError
from flame.optim._tensors import Tensor

__all__ = ["as_float", "betas", "learning_rate", "non_negative", "options", "unit_interval"]


def as_float(value: Any) -> float:
    """The number in `value`: a Python number or a tensor of one element."""
    return float(value.item()) if isinstance(value, Tensor) else float(value)


def _number(owner: str, name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ArgumentError(
            f"{owner}: {name} as a tensor must have one element, got shape {tuple(value.shape)}"
        )
    try:
        return as_float(value)
    except (TypeError, ValueError):
        raise DTypeError(f"{owner}: {name} must be a number, got {value!r}") from None


def learning_rate(owner: str, group: dict[str, Any]) -> None:
    """Refuse a learning rate that is negative or not finite."""
    non_negative(owner, group, "lr")


def non_negative(owner: str, group: dict[str, Any], name: str) -> None:
    """Refuse a value that is negative or not finite."""
    number = _number(owner, name, group[name])
    if not (math.isfinite(number) and number >= 0.0):
        raise ArgumentError(f"{owner}: {name} must be finite and at least 0, got {number}")


def unit_interval(owner: str, group: dict[str, Any], name: str) -> None:
    """Refuse a value outside [0, 1]."""
    number = _number(owner, name, group[name])
    if not 0.0 <= number <= 1.0:
        raise ArgumentError(f"{owner}: {name} must lie in [0, 1], got {number}")


def betas(owner: str, group: dict[str, Any]) -> None:
    """Refuse averaging coefficients that are not two numbers in [0, 1)."""
    values = group["betas"]
    if not isinstance(values, (tuple, list)) or len(values) != 2:
        raise ArgumentError(f"{owner}: betas must be two numbers, got {values!r}")
    for position, value in enumerate(values):
        number = _number(owner, f"betas[{position}]", value)
        if not 0.0 <= number < 1.0:
            raise ArgumentError(f"{owner}: betas[{position}] must lie in [0, 1), got {number}")


def options(owner: str, group: dict[str, Any]) -> None:
    """Refuse the one option of PyTorch's optimizers that would change the result here.

    `foreach`, `fused` and `capturable` choose between implementations of the same update. Here
    there is one, so they are kept for the layout of the state_dict and change nothing.
    """
    if group.get("differentiable"):
        raise UnsupportedError(
            f"{owner}: differentiable=True is not supported, the update is written in place "
            "without a tape; "
            "write the update with tensor operations to differentiate through it"
        )
