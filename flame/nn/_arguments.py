"""Sizes that layers take as one number or one for each axis, and the error that layers raise for a
wrong shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flame.core.errors import ArgumentError, ShapeError

if TYPE_CHECKING:
    from flame.nn.module import Module

__all__ = ["Device", "Size", "per_axis", "wrong_input"]

# A device as users write it ("cpu"), or an object that stands for one.
Device = Any

# One number for all axes, or one for each.
Size = int | Sequence[int]


def per_axis(value: Size, count: int, name: str) -> tuple[int, ...]:
    """`value` as a tuple of `count` integers."""
    if isinstance(value, int):
        return (value,) * count
    values = tuple(value)
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise ArgumentError(f"{name}: takes 1 or {count} integers, got {len(values)}: {values}")
    return values


def wrong_input(module: Module, expected: str, shape: Sequence[int], reason: str) -> ShapeError:
    """The error of a layer whose input does not fit its parameters."""
    return ShapeError(
        f"{module._get_name()}({module.extra_repr()}): expected an input of shape {expected}, "
        f"got {tuple(shape)}; {reason}"
    )
