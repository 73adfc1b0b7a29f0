"""`grid_sample` and `affine_grid`: images read at places that a network computes.

Source: Jaderberg et al., "Spatial Transformer Networks", 2015. Places are (x, y[, z]) from -1 to 1
over an image; with ``align_corners`` -1 and 1 are the centres of the outermost elements, without it
their outer edges.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flame.core.errors import ArgumentError, DTypeError, ShapeError
from flame.ops.autocast import autocasts
from flame.ops.comparison import where
from flame.ops.creation import linspace
from flame.ops.joining import stack
from flame.tensor import Tensor

__all__ = ["affine_grid", "grid_sample"]

MODES = ("bilinear", "nearest", "bicubic")
PADDINGS = ("zeros", "border", "reflection")
_CUBIC = -0.75  # the slope of the cubic at distance 1, as everywhere in PyTorch

Tap = tuple[Tensor, Tensor]  # a place along one dimension, and its weight
Fold = Callable[[Tensor, int], Tensor]  # places beyond the edges to places within, for a size


@autocasts("widest")
def grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    """(N, C, H, W) read at grid (N, H', W', 2), or (N, C, D, H, W) at (N, D', H', W', 3).

    mode: 'bilinear' (of all dimensions), 'nearest', 'bicubic' (of images alone). padding_mode: what
    lies beyond the edges: 'zeros', the 'border' elements, or the image's 'reflection'.
    Raises ShapeError, DTypeError and ArgumentError where these do not fit.
    """
    _check(input, grid, mode, padding_mode)
    sizes = input.shape[2:]
    if grid.dtype.bits == 16:
        grid = grid.float()  # half a width has too few digits for places, and for weights
    places = list(reversed(grid.unbind(-1)))  # by dimension of the input
    corners = bool(align_corners)

    def fold(at: Tensor, size: int) -> Tensor:
        if padding_mode == "reflection":
            at = _reflected(at, size, corners=corners)
        return at if padding_mode == "zeros" else _held(at, size)

    taps = []
    for place, size in zip(places, sizes, strict=True):
        at = (place + 1) * ((size - 1) / 2) if corners else (place + 1) * (size / 2) - 0.5
        taps.append(list(_taps(at, size, mode, fold)))
    total: Tensor | None = None
    for chosen in itertools.product(*taps):
        value = _read(input, [at for at, _ in chosen])
        weight = functools.reduce(operator.mul, (weight for _, weight in chosen))
        value = value * weight.unsqueeze(1)
        total = value if total is None else total + value
    assert total is not None
    made: Tensor = total.to(input.dtype)
    return made


def _check(input: Tensor, grid: Tensor, mode: str, padding_mode: str) -> None:
    rank = input.ndim - 2
    if rank not in (2, 3) or grid.ndim != input.ndim or grid.shape[-1] != rank:
        raise ShapeError(
            f"grid_sample: input {tuple(input.shape)} and grid {tuple(grid.shape)} do not fit; "
            "they must be (N, C, H, W) and (N, H', W', 2), or (N, C, D, H, W) and "
            "(N, D', H', W', 3)"
        )
    if input.shape[0] != grid.shape[0]:
        raise ShapeError(
            f"grid_sample: {input.shape[0]} images and {grid.shape[0]} grids; each needs one"
        )
    if not all(input.shape[2:]):
        raise ShapeError(f"grid_sample: input {tuple(input.shape)} has no elements to read")
    if input.dtype is not grid.dtype or input.dtype.kind != "f":
        raise DTypeError(
            f"grid_sample: input is {input.dtype.name} and grid {grid.dtype.name}; both must be of "
            "one floating dtype"
        )
    if mode not in MODES or (mode == "bicubic" and rank != 2):
        known = "bilinear, nearest, or, for images, bicubic"
        raise ArgumentError(f"grid_sample: mode must be {known}, got {mode!r}")
    if padding_mode not in PADDINGS:
        raise ArgumentError(
            f"grid_sample: padding_mode must be {', '.join(PADDINGS)}, got {padding_mode!r}"
        )


def _reflected(at: Tensor, size: int, *, corners: bool) -> Tensor:
    """Places beyond the edges as in a mirror: at the centres of the outermost elements, or at
    their outer edges."""
    low, span = (0.0, size - 1.0) if corners else (-0.5, float(size))
    if not span:
        still: Tensor = at * 0
        return still
    distance = (at - low).abs()
    turns = (distance / span).floor()
    rest = distance - turns * span
    made: Tensor = where(turns % 2 == 0, rest, span - rest) + low
    return made


def _held(at: Tensor, size: int) -> Tensor:
    """Places beyond the edges at the edges; there, and on them, nothing depends on the place.
    What is no number is the first."""
    within = (at > 0) & (at < size - 1)
    made: Tensor = where(within, at, at.detach().nan_to_num().clamp(0, size - 1))
    return made


def _taps(at: Tensor, size: int, mode: str, fold: Fold) -> Iterator[Tap]:
    """What is read along one dimension."""
    if mode == "nearest":
        still = at.detach()
        never = still.isnan() & still.isinf()
        yield fold(still, size).round(), where(never, at, 1.0)  # a slope, which is 0
        return
    if mode == "bilinear":
        at = fold(at, size)
        first = at.floor().detach()
        yield first, 1 - (at - first)
        yield first + 1, at - first
        return
    first = at.floor().detach()
    part = at - first
    for step in (-1, 0, 1, 2):
        yield fold(first + step, size), _cubic((part - step).abs(), near=step in (0, 1))


def _cubic(x: Tensor, *, near: bool) -> Tensor:
    """Keys' kernel at distance ``x``, of up to 1 or from 1 to 2."""
    a = _CUBIC
    if near:
        made: Tensor = ((a + 2) * x - (a + 3)) * x * x + 1
    else:
        made = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return made


def _read(input: Tensor, places: Sequence[Tensor]) -> Tensor:
    """(N, C, *output): the elements at whole places, 0 where one lies outside."""
    samples, channels, *sizes = input.shape
    inside: Any = None
    index: Any = 0
    for place, size in zip(places, sizes, strict=True):
        known = (place >= 0) & (place <= size - 1)
        inside = known if inside is None else inside & known
        index = index * size + where(known, place, 0.0).long()
    count = math.prod(index.shape[1:])
    flat = index.reshape(samples, 1, count).expand(samples, channels, count)
    found = input.reshape(samples, channels, math.prod(sizes)).gather(2, flat)
    found = found.reshape(samples, channels, *index.shape[1:])
    made: Tensor = where(inside[:, None], found, 0.0)
    return made


def affine_grid(theta: Tensor, size: Sequence[int], align_corners: bool | None = None) -> Tensor:
    """Grids for `grid_sample` from matrices theta (N, 2, 3) and size (N, C, H, W), or (N, 3, 4) and
    (N, C, D, H, W): (N, H, W, 2) or (N, D, H, W, 3). Raises ShapeError where these do not fit.
    """
    rank = len(size) - 2
    if rank not in (2, 3) or tuple(theta.shape) != (size[0], rank, rank + 1):
        raise ShapeError(
            f"affine_grid: theta {tuple(theta.shape)} does not fit the size {tuple(size)}; it must "
            "be (N, 2, 3) for (N, C, H, W), (N, 3, 4) for (N, C, D, H, W)"
        )
    if min(size[2:]) < 1:
        raise ShapeError(f"affine_grid: the size {tuple(size)} has no places")
    if theta.dtype.kind != "f":
        raise DTypeError(f"affine_grid: theta must be floating, got {theta.dtype.name}")
    sizes = list(size[2:])
    places = []
    for dim, count in enumerate(sizes):
        last = 1.0 if align_corners else (count - 1) / count
        if count == 1:
            last = 0.0
        along = linspace(-last, last, count, dtype=theta.dtype, device=theta.device)
        shape = [count if d == dim else 1 for d in range(rank)]
        places.append(along.reshape(shape).expand(sizes))
    base = stack([*reversed(places), places[0] * 0 + 1], -1).reshape(-1, rank + 1)
    made: Tensor = (base @ theta.transpose(1, 2)).reshape(size[0], *sizes, rank)
    return made
