"""The arithmetic of convolutions along each spatial dimension.

Invariant: a convolution and its input gradient are both sums over taps

    out[place + j * spread] = sum over t of  source[start + j * step + t * dilation] * weight[first
    + t * stride]

of a source padded with zeros; `Axis` holds these numbers. The input gradient of a strided
convolution is several such sums, one for each remainder of the position by the stride
(`gradient_phases`). Every kernel works on three spatial dimensions; missing ones have size 1 and
come first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flame.core.types import Shape, TensorType, tensor_type

SPATIAL = 3


@dataclass(frozen=True)
class Geometry:
    """What the user gave for each spatial dimension; ``padding`` stands before the first
    element.
    """

    kernel: Shape
    stride: Shape
    padding: Shape
    dilation: Shape
    groups: int

    @staticmethod
    def of(
        kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
        dilation: Sequence[int], groups: int,
    ) -> Geometry:  # fmt: skip
        """With missing spatial dimensions filled up."""
        missing = SPATIAL - len(kernel)
        ones, zeros = (1,) * missing, (0,) * missing
        return Geometry(
            (*ones, *kernel), (*ones, *stride), (*zeros, *padding), (*ones, *dilation), groups
        )


@dataclass(frozen=True)
class Axis:
    """One spatial dimension of a sum over taps; see the top of this file."""

    extent: int  # results
    place: int
    spread: int
    start: int
    step: int
    taps: int
    dilation: int
    first: int  # of the weight's taps
    stride: int

    @property
    def reach(self) -> int:
        """Elements of the padded source that are read."""
        return self.start + (self.extent - 1) * self.step + (self.taps - 1) * self.dilation + 1


@dataclass(frozen=True)
class Phase:
    """A sum over taps in all spatial dimensions."""

    axes: tuple[Axis, ...]

    @property
    def extent(self) -> Shape:
        return tuple(a.extent for a in self.axes)

    @property
    def taps(self) -> Shape:
        return tuple(a.taps for a in self.axes)


@dataclass(frozen=True)
class Contraction:
    """Phases over one source that is padded by ``low`` in front to the sizes ``padded``."""

    phases: tuple[Phase, ...]
    low: Shape
    padded: Shape


def output_size(
    size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int
) -> int:
    """Positions of a window over a dimension that is padded on both sides."""
    return (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1


def forward(g: Geometry, extent: Shape) -> Contraction:
    """The convolution itself, with results of the spatial sizes ``extent``."""
    axes = tuple(
        Axis(extent[i], 0, 1, 0, g.stride[i], g.kernel[i], g.dilation[i], 0, 1)
        for i in range(SPATIAL)
    )
    return Contraction((Phase(axes),), g.padding, tuple(a.reach for a in axes))


def gradient_phases(g: Geometry, size: Shape) -> Contraction:
    """The input gradient, of spatial sizes ``size``, as sums over the output's gradient.

    Along a dimension every phase has as many results, the last ones perhaps beyond ``size``.
    Phases that see no taps are left out; their results are 0.
    """
    axes = [
        _axis_phases(g.kernel[i], g.stride[i], g.padding[i], g.dilation[i], size[i])
        for i in range(SPATIAL)
    ]
    low = tuple(max((-a.start for a in each), default=0) for each in axes)
    moved = [
        [replace(a, start=a.start + shift) for a in each]
        for each, shift in zip(axes, low, strict=True)
    ]
    padded = tuple(max((a.reach for a in each), default=1) for each in moved)
    phases = tuple(Phase(combination) for combination in itertools.product(*moved))
    return Contraction(phases, low, padded)


def _axis_phases(kernel: int, stride: int, padding: int, dilation: int, size: int) -> list[Axis]:
    """Positions i with (i + padding) % stride = r see the taps t with (t * dilation) % stride = r.

    Taps run backwards, so that the source is read forwards.
    """
    common = math.gcd(stride, dilation)
    between, q = stride // common, dilation // common
    extent = -(-size // stride)
    found = []
    for remainder in range(stride):
        place = (remainder - padding) % stride
        taps = [t for t in range(min(kernel, between)) if (t * dilation) % stride == remainder]
        if place >= size or not taps:
            continue
        count = -((taps[0] - kernel) // between)
        start = (place + padding - taps[0] * dilation) // stride - (count - 1) * q
        last = taps[0] + (count - 1) * between
        found.append(Axis(extent, place, stride, start, 1, count, q, last, -between))
    return found


def spatial_view(type_: TensorType) -> TensorType:
    """A tensor (N, C, ...) or weight seen with three spatial dimensions."""
    missing = SPATIAL + 2 - type_.ndim
    ones, zeros = (1,) * missing, (0,) * missing
    shape = (*type_.shape[:2], *ones, *type_.shape[2:])
    strides = (*type_.strides[:2], *zeros, *type_.strides[2:])
    return tensor_type(type_.dtype, shape, strides)
