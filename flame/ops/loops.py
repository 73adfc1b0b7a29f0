"""Loop nests for strided operands: broadcasting, coalescing, and the order of dimensions.

Invariant: the nest visits each output element once, with the output's smallest stride innermost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flame.core.errors import ShapeError
from flame.core.types import Shape, TensorType

BLOCK = 8192  # elements of a flat range that one step of a parallel loop takes


def broadcast_shapes(name: str, shapes: Sequence[Shape]) -> Shape:
    """The common shape by NumPy's rule. Raises ShapeError naming the op and all shapes."""
    rank = max((len(s) for s in shapes), default=0)
    result = [1] * rank
    for shape in shapes:
        for axis, size in enumerate(shape, start=rank - len(shape)):
            if size == 1:
                continue
            if result[axis] not in (1, size):
                listed = " and ".join(str(tuple(s)) for s in shapes)
                raise ShapeError(
                    f"{name}: shapes {listed} do not broadcast: dimension {axis - rank} has sizes "
                    f"{result[axis]} and {size}; make them equal, or one of them 1"
                )
            result[axis] = size
    return tuple(result)


def broadcast_strides(type_: TensorType, shape: Shape) -> Shape:
    """Strides of a tensor seen with ``shape``: 0 in the dimensions that it lacks or repeats."""
    missing = len(shape) - type_.ndim
    return (0,) * missing + tuple(
        0 if size == 1 else stride for size, stride in zip(type_.shape, type_.strides, strict=True)
    )


@dataclass(frozen=True)
class Nest:
    """Dimensions after coalescing, outermost first; ``strides[k]`` belong to operand k."""

    sizes: Shape
    strides: tuple[Shape, ...]


def coalesce(sizes: Shape, strides: Sequence[Shape], order: Sequence[int] | None = None) -> Nest:
    """Drop dimensions of size 1 and merge neighbours that every operand walks as one.

    ``order`` lists the dimensions outermost first; default: as they stand.
    """
    axes = [a for a in (range(len(sizes)) if order is None else order) if sizes[a] != 1]
    merged: list[int] = []
    steps: list[list[int]] = []
    for axis in axes:
        here = [s[axis] for s in strides]
        if merged and all(
            before == after * sizes[axis] for before, after in zip(steps[-1], here, strict=True)
        ):
            merged[-1] *= sizes[axis]
            steps[-1] = here
        else:
            merged.append(sizes[axis])
            steps.append(here)
    columns = tuple(tuple(step[k] for step in steps) for k in range(len(strides)))
    return Nest(tuple(merged), columns)


def by_stride(strides: Shape, sizes: Shape) -> list[int]:
    """Dimensions from the largest stride to the smallest; ties keep their order."""
    return sorted(range(len(sizes)), key=lambda axis: -strides[axis])
