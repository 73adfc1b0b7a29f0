"""The gradient of max pooling: every element collects what the windows that it won pass on.

Invariant: an element looks at the windows that cover it, in order, and takes the gradients of those
whose saved index is its own; so nothing is written twice, and the order of sums is fixed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flame.core import dtypes
from flame.core.errors import ShapeError
from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const, read
from flame.ops.bands import adaptive_windows
from flame.ops.convolution.geometry import SPATIAL, spatial_view
from flame.ops.convolution.operation import channels_last, result_type
from flame.ops.elementwise import compute_dtype
from flame.ops.op import Arg, Op, Sample, Types
from flame.ops.planes import Windows, lower_add, take_positions
from flame.ops.rows import type_of


def _infer(types: Types, *, axes: tuple[Windows, ...]) -> TensorType:
    grad, index = type_of(types[0]), type_of(types[1])
    if grad.shape != index.shape or grad.shape[2:] != tuple(a.outputs for a in axes):
        raise ShapeError(
            f"max_pool_backward: gradients {grad.shape} and indices {index.shape} do not fit "
            f"{tuple(a.outputs for a in axes)} windows"
        )
    shape = (*grad.shape[:2], *(a.inputs for a in axes))
    strides = result_type(index, shape).strides
    return tensor_type(grad.dtype, shape, strides, grad.device)


class _Cover:
    """The windows of a dimension that may cover an element, inside the kernel."""

    def __init__(self, k: KernelBuilder, windows: Windows, made: list[Any]) -> None:
        self.windows = w = windows
        if w.kernel:
            self.reach = w.dilation * (w.kernel - 1) + 1
            self.taps = min(-(-self.reach // w.stride), max(w.outputs, 1))
            self.last_window = k.size(max(w.outputs - 1, 0))
            self.before = k.size(w.padding)
            return
        begin, end = adaptive_windows(w.inputs, w.outputs)
        places = np.arange(w.inputs)
        first = np.searchsorted(end, places, side="right")
        last = np.searchsorted(begin, places, side="right") - 1
        self.taps = int((last - first).max(initial=0)) + 1
        table = tensor_type(dtypes.int32, (w.inputs,))
        self.first, self.last = (k.tensor("constant", len(made) + i, table) for i in range(2))
        made += [first.astype(np.int32), last.astype(np.int32)]

    def between(self, place: Value) -> tuple[Value, Value]:
        """The first and the last of the windows."""
        w = self.windows
        if not w.kernel:
            return cast(self.first[place], dtypes.int64), cast(self.last[place], dtypes.int64)
        padded, stride = place + self.before, const(w.stride)
        # the smallest o with o * stride + reach > padded
        start = values.binary("max", padded + (w.stride - self.reach), const(0))
        last = values.binary("udiv", padded, stride)
        return (
            values.binary("udiv", start, stride),
            values.binary("min", last, self.last_window),
        )


def _lower(types: Types, outputs: tuple[TensorType, ...], *, axes: tuple[Windows, ...]) -> Lowering:
    grad, index, out = type_of(types[0]), type_of(types[1]), outputs[0]
    rows = grad.contiguous and index.contiguous and out.contiguous
    if rows and out.device == "cpu":  # one thread does a plane, window by window
        size = math.prod(out.shape[2:])
        flat = (*grad.shape[:2], math.prod(grad.shape[2:]))
        planes = tuple(tensor_type(t.dtype, flat) for t in (grad, index))
        target = tensor_type(out.dtype, (*out.shape[:2], size))
        return lower_add(planes, (target,), size=size)
    return _gather(grad, index, out, axes)


def _gather(
    grad: TensorType, index: TensorType, out: TensorType, axes: tuple[Windows, ...]
) -> Lowering:
    by_channel = channels_last(out)
    grad, index, out = (spatial_view(t) for t in (grad, index, out))
    k = KernelBuilder("max_pool_backward")
    source, places = k.tensor("input", 0, grad), k.tensor("input", 1, index)
    target = k.tensor("output", 0, out)
    made: list[Any] = []
    whole = (*(Windows(1, 1, 1) for _ in range(SPATIAL - len(axes))), *axes)
    covers = [_Cover(k, a, made) for a in whole]
    n, c, d, h, w = out.shape
    sizes = [k.size(s) for s in (h, w)]
    work = math.prod(cover.taps for cover in covers)
    if by_channel:
        with k.parallel(n, d, h, w, work=work * c) as (i, *at), k.vector(k.size(c)) as v:
            _collect(k, (source, places, target), covers, sizes, (i, v, *at))
    else:
        with k.parallel(n, c, d, h, work=work * w) as (i, j, *at), k.vector(k.size(w)) as v:
            _collect(k, (source, places, target), covers, sizes, (i, j, *at, v))
    return Lowering((k.bind(),), constants=tuple(made))


def _collect(
    k: KernelBuilder, operands: tuple[Operand, Operand, Operand], covers: list[_Cover],
    sizes: list[Value], at: tuple[Value, ...],
) -> None:  # fmt: skip
    """A vector of elements."""
    source, places, target = operands
    image, channel, *place = at
    dtype = compute_dtype(source.dtype)
    own = cast((place[0] * sizes[0] + place[1]) * sizes[1] + place[2], places.dtype)
    total = k.register(0.0, dtype)
    ranges = [cover.between(p) for cover, p in zip(covers, place, strict=True)]
    with k.nest([const(cover.taps) for cover in covers]) as taps:
        windows = [first + tap for (first, _), tap in zip(ranges, taps, strict=True)]
        inside = const(True, dtypes.bool_)
        for window, (_, last) in zip(windows, ranges, strict=True):
            inside = inside & (window <= last)
        here = (image, channel, *windows)
        mine = places.load(*here, where=inside, otherwise=const(-1, places.dtype)) == own
        passed = cast(source.load(*here, where=inside), dtype)
        k.accumulate(total, "add", values.select(mine, passed, const(0.0, dtype)))
    k.store(target, at, read(total))


def _reference(grad: Any, index: Any, *, axes: tuple[Windows, ...]) -> Any:
    size = math.prod(a.inputs for a in axes)
    out = np.zeros((*grad.shape[:2], size), np.float64)
    n, c = np.indices(grad.shape[:2])
    flat = (*grad.shape[:2], math.prod(grad.shape[2:]))
    np.add.at(out, (n[..., None], c[..., None], index.reshape(flat)), grad.reshape(flat))
    return out.reshape(*grad.shape[:2], *(a.inputs for a in axes)).astype(grad.dtype)


def _second(g: Any, index: Any, axes: tuple[Windows, ...]) -> Any:
    size = math.prod(a.inputs for a in axes)
    flat = (*index.shape[:2], math.prod(index.shape[2:]))
    taken = take_positions(g.reshape((*g.shape[:2], size)), index.reshape(flat))
    return taken.reshape(index.shape)


# Indices of one element alone, so that each is a place of its window whatever is drawn.
_SAMPLES = [
    Sample((Arg((2, 3, 4)), Arg((2, 3, 4), 0, 1, "index")), {"axes": (Windows(1, 4, 4, 1, 3),)}),
    Sample((Arg((2, 2, 3, 1)), Arg((2, 2, 3, 1), 2, 3, "index")),
           {"axes": (Windows(5, 3, 3, 1), Windows(1, 1, 1))}),
    Sample((Arg((1, 2, 2)), Arg((1, 2, 2), 1, 2, "index")), {"axes": (Windows(3, 2),)}),
    Sample((Arg((0, 2, 2)), Arg((0, 2, 2), 0, 1, "index")), {"axes": (Windows(4, 2, 2, 2),)}),
]  # fmt: skip

max_pool_backward: Op = Op(
    "max_pool_backward", inputs=("grad", "index"), any_layout=True, infer=_infer, lower=_lower,
    vjp=(_second, None), reference=_reference, samples=_SAMPLES, tolerance=2.0,
)  # fmt: skip
