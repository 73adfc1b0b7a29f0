"""Sparse linear maps along one dimension: what average pooling and interpolation do.

A Band says how each of ``outputs`` results is a weighted sum of a few neighbouring ones of
``inputs`` elements. The transpose of a band is a band again, so such a map and its gradient are
one operation.

Sources. Positions and weights follow PyTorch's documented conventions for `interpolate`; the cubic
weights are Keys, "Cubic convolution interpolation for digital image processing" (1981), with a =
-0.75.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
CUBIC = -0.75


@dataclass(frozen=True)
class Band:
    """A map of ``inputs`` elements to ``outputs`` results.

    kind: how the weights come about, see the functions below. parameters: numbers for that
    function. wide: whether positions are computed in float64. turned: the transpose instead, which
    maps ``outputs`` elements to ``inputs`` results.
    """

    kind: str
    inputs: int
    outputs: int
    parameters: tuple[float, ...] = ()
    wide: bool = False
    turned: bool = False

    def transpose(self) -> Band:
        return replace(self, turned=not self.turned)

    @property
    def source(self) -> int:
        return self.outputs if self.turned else self.inputs

    @property
    def target(self) -> int:
        return self.inputs if self.turned else self.outputs

    @property
    def whole(self) -> bool:
        """Whether all weights are 0 or 1, so that the map serves integers too."""
        ones = self.kind == "mean" and self.parameters[4] == 1.0
        return ones or self.kind in ("identity", "nearest")

    @property
    def identity(self) -> bool:
        return self.kind == "identity"


def identity(size: int) -> Band:
    return Band("identity", size, size)


@functools.lru_cache(maxsize=1024)
def table(band: Band) -> tuple[Array, Array]:
    """(first element of each result, weights (results, taps)); weight 0 means that nothing is
    read.
    """
    entries = _KINDS[band.kind]
    float_type = np.float64 if band.wide else np.float32
    index, weight = entries(band.inputs, band.outputs, float_type, *band.parameters)
    results = np.repeat(np.arange(band.outputs), index.shape[1])
    elements, weights = index.ravel(), weight.ravel().astype(np.float64)
    used = weights != 0
    results, elements, weights = results[used], elements[used], weights[used]
    if band.turned:
        results, elements = elements, results
    return _packed(results, elements, weights, band.target, band.source)


def _packed(
    results: Array, elements: Array, weights: Array, targets: int, sources: int
) -> tuple[Array, Array]:
    first = np.full(targets, sources, np.int64)
    last = np.zeros(targets, np.int64)
    np.minimum.at(first, results, elements)
    np.maximum.at(last, results, elements)
    taps = int(max((last - first).max(initial=0) + 1, 1))
    first = np.clip(first, 0, max(sources - taps, 0))
    made = np.zeros((targets, taps), np.float64)
    np.add.at(made, (results, elements - first[results]), weights)
    return first, made


def _identity(inputs: int, outputs: int, kind: Any) -> tuple[Array, Array]:
    return np.arange(outputs)[:, None], np.ones((outputs, 1))


def _mean(
    inputs: int, outputs: int, kind: Any, kernel: float, stride: float, padding: float,
    count_padding: float, scale: float,
) -> tuple[Array, Array]:  # fmt: skip
    """Windows with equal weights: 1 / elements counted, or ``scale`` where it is not 0."""
    start = np.arange(outputs) * int(stride) - int(padding)
    index = start[:, None] + np.arange(int(kernel))
    inside = (index >= 0) & (index < inputs)
    stop = np.minimum(start + int(kernel), inputs + int(padding))
    count = stop - start if count_padding else inside.sum(1)
    weight = np.full(outputs, scale) if scale else 1.0 / np.maximum(count, 1)
    return np.where(inside, index, 0), np.where(inside, weight[:, None], 0.0)


def _adaptive(inputs: int, outputs: int, kind: Any) -> tuple[Array, Array]:
    """The window of result o is floor(o * inputs / outputs) to ceil((o + 1) * inputs / outputs)."""
    begin, end = adaptive_windows(inputs, outputs)
    taps = int((end - begin).max(initial=1))
    index = begin[:, None] + np.arange(taps)
    inside = index < end[:, None]
    weight = 1.0 / np.maximum(end - begin, 1)
    return np.where(inside, index, 0), np.where(inside, weight[:, None], 0.0)


def adaptive_windows(inputs: int, outputs: int) -> tuple[Array, Array]:
    """(begin, end) of each adaptive window."""
    o = np.arange(outputs)
    return o * inputs // outputs, -((-(o + 1) * inputs) // outputs)


def _nearest(
    inputs: int, outputs: int, kind: Any, ratio: float, shift: float
) -> tuple[Array, Array]:
    """floor((o + shift) * ratio); positions are always computed in float32."""
    place = (np.arange(outputs, dtype=np.float32) + np.float32(shift)) * np.float32(ratio)
    index = np.minimum(np.floor(place).astype(np.int64), inputs - 1)
    return index[:, None], np.ones((outputs, 1))


def _places(outputs: int, kind: Any, ratio: float, align: float) -> Array:
    places = np.arange(outputs).astype(kind)
    half = kind(0.5)
    found: Array = places * kind(ratio) if align else (places + half) * kind(ratio) - half
    return found


def _linear(
    inputs: int, outputs: int, kind: Any, ratio: float, align: float
) -> tuple[Array, Array]:
    place = np.maximum(_places(outputs, kind, ratio, align), kind(0))
    low = np.minimum(np.floor(place).astype(np.int64), inputs - 1)
    high = np.minimum(low + 1, inputs - 1)
    part = np.clip(place - low.astype(kind), kind(0), kind(1))
    return np.stack([low, high], 1), np.stack([kind(1) - part, part], 1)


def _cubic(inputs: int, outputs: int, kind: Any, ratio: float, align: float) -> tuple[Array, Array]:
    place = _places(outputs, kind, ratio, align)
    low = np.floor(place)
    part = (place - low)[:, None]
    distance = np.abs(part - np.arange(-1, 3).astype(kind))
    near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance * distance + 1
    far = ((CUBIC * distance - 5 * CUBIC) * distance + 8 * CUBIC) * distance - 4 * CUBIC
    index = low.astype(np.int64)[:, None] + np.arange(-1, 3)
    return np.clip(index, 0, inputs - 1), np.where(distance <= 1, near, far).astype(kind)


_KINDS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "identity": _identity,
    "mean": _mean,
    "adaptive": _adaptive,
    "nearest": _nearest,
    "linear": _linear,
    "cubic": _cubic,
}
