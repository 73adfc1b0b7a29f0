"""Arguments of convolutions as users give them, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flame.core.errors import ArgumentError, DTypeError, ShapeError
from flame.core.types import Shape
from flame.ops.convolution.geometry import output_size

if TYPE_CHECKING:
    from flame.tensor import Tensor


def per_dimension(name: str, what: str, value: Any, rank: int, least: int) -> Shape:
    """One integer for each spatial dimension, from a number or a sequence of them."""
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    try:
        found = [number.__index__() for number in numbers]
    except AttributeError:
        raise DTypeError(f"{name}: {what} must be integers, got {value!r}") from None
    if len(found) == 1:
        found = found * rank
    if len(found) != rank:
        raise ShapeError(
            f"{name}: {what} has {len(found)} numbers for {rank} spatial dimensions: {value!r}"
        )
    if any(number < least for number in found):
        raise ArgumentError(f"{name}: {what} must be at least {least}, got {value!r}")
    return tuple(found)


def check_operands(
    name: str, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, rank: int,
    *, transposed: bool,
) -> None:  # fmt: skip
    """Raises ShapeError or ArgumentError, naming the shapes, where the operands do not fit."""
    if weight.ndim != rank + 2 or input.ndim not in (rank + 1, rank + 2):
        raise ShapeError(
            f"{name} takes an input (N, C, ...) or (C, ...) and a weight with {rank} spatial "
            f"dimensions, got {input.shape} and {weight.shape}"
        )
    if groups < 1:
        raise ArgumentError(f"{name}: groups must be a positive integer, got {groups}")
    if weight.shape[0] % groups:
        raise ShapeError(
            f"{name}: {groups} groups do not divide the {weight.shape[0]} channels of the weight "
            f"{weight.shape}"
        )
    if 0 in weight.shape[1:]:
        raise ShapeError(f"{name}: the weight {weight.shape} has no elements")
    channels = input.shape[-rank - 1]
    wanted = weight.shape[0] if transposed else weight.shape[1] * groups
    if channels != wanted:
        raise ShapeError(
            f"{name}: the input {input.shape} has {channels} channels, but the weight "
            f"{weight.shape} with {groups} groups wants {wanted}"
        )
    made = weight.shape[1] * groups if transposed else weight.shape[0]
    if bias is not None and bias.shape != (made,):
        raise ShapeError(f"{name}: the bias must have shape ({made},), got {bias.shape}")
    for operand in (weight, bias):
        if operand is not None and operand.dtype is not input.dtype:
            raise DTypeError(
                f"{name}: the input is {input.dtype.name}, but weight or bias is "
                f"{operand.dtype.name}; convert one of them"
            )


def padding_of(
    name: str, padding: Any, rank: int, kernel: Shape, stride: Shape, dilation: Shape
) -> tuple[tuple[int, int], ...]:
    """(before, after) of each spatial dimension; 'same' puts the odd one after."""
    if not isinstance(padding, str):
        return tuple((p, p) for p in per_dimension(name, "padding", padding, rank, 0))
    if padding == "valid":
        return ((0, 0),) * rank
    if padding != "same":
        raise ArgumentError(f"{name}: padding must be integers, 'same' or 'valid', got {padding!r}")
    if any(s != 1 for s in stride):
        raise ArgumentError(f"{name}: padding='same' needs stride 1, got {stride}; give numbers")
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


def window_sizes(
    name: str, sizes: Shape, kernel: Shape, stride: Shape, padding: Sequence[tuple[int, int]],
    dilation: Shape,
) -> Shape:  # fmt: skip
    """Spatial sizes of the result. Raises ShapeError where the kernel exceeds the padded input."""
    found = []
    for size, k, s, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True):
        if d * (k - 1) + 1 > size + sum(p):
            raise ShapeError(
                f"{name}: the kernel {kernel} with dilation {dilation} does not fit into the input "
                f"of spatial sizes {sizes} padded by {[sum(p) for p in padding]} in all"
            )
        found.append(output_size(size, k, s, p, d))
    return tuple(found)
