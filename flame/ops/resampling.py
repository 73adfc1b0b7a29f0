"""The op that applies a band (see `flame.ops.bands`) along each spatial dimension of (N, C,
...).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flame.core import dtypes
from flame.core.errors import DTypeError, ShapeError
from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering
from flame.kernel.values import Value, cast, const, read
from flame.ops.bands import Band, identity, table
from flame.ops.convolution.geometry import SPATIAL, spatial_view
from flame.ops.convolution.operation import channels_last, result_type
from flame.ops.elementwise import compute_dtype
from flame.ops.op import Arg, Op, Sample, Types


def _infer(types: Types, *, axes: tuple[Band, ...]) -> TensorType:
    (x,) = types
    assert isinstance(x, TensorType)
    if x.ndim != len(axes) + 2 or x.shape[2:] != tuple(b.source for b in axes):
        raise ShapeError(
            f"resample: {x.shape} does not fit maps of {tuple(b.source for b in axes)} elements"
        )
    if x.dtype.kind != "f" and not all(b.whole for b in axes):
        raise DTypeError(
            f"this resampling needs floating numbers, got {x.dtype.name}; convert them"
        )
    return result_type(x, (*x.shape[:2], *(b.target for b in axes)))


class _Axis:
    """A band's tables inside a kernel; an identity needs none."""

    def __init__(self, k: KernelBuilder, band: Band, dtype: dtypes.DType, made: list[Any]) -> None:
        self.band = band
        self.taps = 1
        self.plain = True  # every weight is 1
        if band.identity:
            return
        first, weight = table(band)
        self.taps = weight.shape[1]
        self.plain = bool((weight == 1).all())
        self.first = k.tensor("constant", len(made), tensor_type(dtypes.int64, first.shape))
        made.append(first)
        if not self.plain:
            flat = tensor_type(dtype, weight.shape)
            self.weights = k.tensor("constant", len(made), flat)
            made.append(weight.astype(dtype.numpy))

    def begin(self, o: Value) -> Value:
        return o if self.band.identity else self.first[o]

    def weight(self, o: Value, tap: Value) -> Value | None:
        return None if self.plain else self.weights[o, tap]


def _product(factors: list[Value | None]) -> Value | None:
    found: Value | None = None
    for factor in factors:
        if factor is not None:
            found = factor if found is None else found * factor
    return found


def _lower(types: Types, outputs: tuple[TensorType, ...], *, axes: tuple[Band, ...]) -> Lowering:
    (x,), (out,) = types, outputs
    assert isinstance(x, TensorType)
    missing = SPATIAL - len(axes)
    bands = (*(identity(1) for _ in range(missing)), *axes)
    by_channel = channels_last(x) and channels_last(out)
    x, out = spatial_view(x), spatial_view(out)
    k = KernelBuilder("resample")
    source, target = k.tensor("input", 0, x), k.tensor("output", 0, out)
    dtype = compute_dtype(x.dtype)
    constants: list[Any] = []
    tables = [_Axis(k, band, dtype, constants) for band in bands]
    taps = math.prod(t.taps for t in tables)
    n, c, d, h, w = out.shape

    def result(index: tuple[Value, ...]) -> None:
        """One vector of results: the weighted sum over the taps of all three dimensions."""
        image, channel, *place = index
        begins = [t.begin(o) for t, o in zip(tables, place, strict=True)]
        total = k.register(const(0, dtype))
        with k.nest([const(t.taps) for t in tables]) as at:
            weights = [t.weight(o, i) for t, o, i in zip(tables, place, at, strict=True)]
            weight = _product(weights)
            where = None if weight is None else values.compare("ne", weight, const(0, dtype))
            here = [b + i for b, i in zip(begins, at, strict=True)]
            value = cast(source.load(image, channel, *here, where=where), dtype)
            k.assign(total, read(total) + (value if weight is None else value * weight))
        k.store(target, index, read(total))

    if by_channel:
        with k.parallel(n, d, h, w, work=c * taps) as (i, od, oh, ow), k.vector(k.size(c)) as v:
            result((i, v, od, oh, ow))
    else:
        with k.parallel(n, c, d, h, work=w * taps) as (i, j, od, oh), k.vector(k.size(w)) as v:
            result((i, j, od, oh, v))
    lowering = k.finish()
    return Lowering(lowering.kernels, constants=tuple(constants))


def dense(band: Band) -> Any:
    """The matrix of a band, for references."""
    first, weight = table(band)
    made = np.zeros((band.target, band.source))
    for tap in range(weight.shape[1]):
        rows = np.flatnonzero(weight[:, tap])
        made[rows, first[rows] + tap] += weight[rows, tap]
    return made


def _reference(x: Any, *, axes: tuple[Band, ...]) -> Any:
    out = x.astype(np.float64)
    for axis, band in enumerate(axes, start=2):
        out = np.moveaxis(np.tensordot(dense(band), out, (1, axis)), 0, axis)
    return out.astype(x.dtype)


def _samples() -> list[Sample]:
    mean = Band("mean", 7, 4, (3, 2, 1, 1, 0.0), True)
    linear = Band("linear", 5, 9, (5 / 9, 0), True)
    cases: list[tuple[tuple[int, ...], tuple[Band, ...]]] = [
        ((2, 3, 7), (mean,)),
        ((2, 2, 7, 5), (mean, linear)),
        ((1, 3, 5, 7), (linear, mean.transpose().transpose())),
        ((2, 2, 4, 9), (mean.transpose(), linear.transpose())),
        ((1, 2, 3, 4, 5), (identity(3), Band("adaptive", 4, 3, (), True), linear)),
        ((0, 2, 5), (linear,)),
        ((1, 1, 1, 1), (identity(1), Band("nearest", 1, 3, (1 / 3, 0.0)))),
        ((2, 3, 4, 6), (Band("nearest", 4, 8, (0.5, 0.0)), Band("cubic", 6, 4, (1.5, 0), True))),
    ]
    return [Sample((Arg(shape),), {"axes": axes}) for shape, axes in cases]


def apply(x: Any, axes: tuple[Band, ...]) -> Any:
    """`resample`, one dimension after the other where that takes far fewer steps."""
    taps = [1 if b.identity else table(b)[1].shape[1] for b in axes]
    if math.prod(taps) <= 2 * sum(taps):
        return resample(x, axes=axes)
    # dimensions that shrink come first, so that the results in between are small
    for i in sorted(range(len(axes)), key=lambda i: axes[i].target / max(axes[i].source, 1)):
        rest = (identity(size) for size in x.shape[2:])
        x = resample(x, axes=tuple(axes[i] if j == i else b for j, b in enumerate(rest)))
    return x


resample: Op = Op(
    "resample", inputs=("x",), any_layout=True, infer=_infer, lower=_lower,
    vjp=(lambda g, axes: apply(g, tuple(b.transpose() for b in axes)),),
    reference=_reference, samples=_samples(), tolerance=2.0,
)  # fmt: skip
