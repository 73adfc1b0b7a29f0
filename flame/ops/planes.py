"""Windows that take their largest element, and moving elements of planes by index.

A plane is all positions of one channel of one image, flattened; an index counts in it. Taking by
index and adding by index are each other's gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from flame.core import dtypes
from flame.core.errors import ShapeError, UnsupportedError
from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.program import identity as neutral
from flame.kernel.values import Value, cast, const, read
from flame.ops.bands import adaptive_windows
from flame.ops.convolution.geometry import SPATIAL, spatial_view
from flame.ops.convolution.operation import result_type
from flame.ops.elementwise import compute_dtype
from flame.ops.indexed import failure
from flame.ops.indexed_writes import beginning
from flame.ops.op import Arg, Op, Sample, Types
from flame.ops.writes_cuda import lower_put_cuda

# --- taking and adding by index -------------------------------------------------------------------


def _infer_take(types: Types) -> TensorType:
    x, index = types
    assert isinstance(x, TensorType)
    assert isinstance(index, TensorType)
    if x.ndim != 3 or index.ndim != 3 or x.shape[:2] != index.shape[:2]:
        raise ShapeError(f"take_positions: planes {x.shape} do not go with indices {index.shape}")
    return tensor_type(x.dtype, index.shape, None, x.device)


def _lower_take(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    (x, index), (out,) = types, outputs
    assert isinstance(x, TensorType)
    assert isinstance(index, TensorType)
    k = KernelBuilder("take_positions")
    source, places = k.tensor("input", 0, x), k.tensor("input", 1, index)
    target = k.tensor("output", 0, out)
    planes, count = out.shape[:2], out.shape[2]
    with k.parallel(*planes, work=4 * count) as (n, c), k.vector(k.size(count)) as i:
        place = cast(places[n, c, i], dtypes.int64)
        k.store(target, (n, c, i), source[n, c, place])
    return k.finish()


take_positions: Op = Op(
    "take_positions", inputs=("x", "index"), infer=_infer_take, lower=_lower_take,
    vjp=(lambda g, index, x_type: add_positions(g, index, size=x_type.shape[2]), None),
    reference=lambda x, index: np.take_along_axis(x, index, 2),
    samples=[Sample((Arg((2, 3, 7)), Arg((2, 3, 5), 0, 7, "index")),),
             Sample((Arg((1, 1, 1)), Arg((1, 1, 4), 0, 1, "index")),),
             Sample((Arg((0, 2, 3)), Arg((0, 2, 2), 0, 3, "index")),)],
)  # fmt: skip


def _infer_add(types: Types, *, size: int) -> TensorType:
    y, index = types
    assert isinstance(y, TensorType)
    assert isinstance(index, TensorType)
    if y.ndim != 3 or y.shape != index.shape:
        raise ShapeError(f"add_positions: values {y.shape} do not go with indices {index.shape}")
    return tensor_type(y.dtype, (*y.shape[:2], size), None, y.device)


def lower_add(types: Types, outputs: tuple[TensorType, ...], *, size: int) -> Lowering:
    """Each iteration owns a plane, so equal indices never meet on two threads."""
    (y, index), (out,) = types, outputs
    assert isinstance(y, TensorType)
    assert isinstance(index, TensorType)
    k = KernelBuilder("add_positions")
    source, places = k.tensor("input", 0, y), k.tensor("input", 1, index)
    target = k.tensor("output", 0, out)
    dtype = compute_dtype(y.dtype)
    with k.parallel(*out.shape[:2], work=size // 8 + 4 * y.shape[2]) as (n, c):
        with k.vector(k.size(size), 4) as i:
            k.store(target, (n, c, i), const(0, out.dtype))
        with k.loop(k.size(y.shape[2])) as i:
            at = (n, c, cast(places[n, c, i], dtypes.int64))
            total = cast(target[at], dtype) + cast(source[n, c, i], dtype)
            k.store(target, at, total)
    return k.finish()


def _lower_add_on_gpu(
    types: Types, outputs: tuple[TensorType, ...], *, size: int
) -> Lowering:  # fmt: skip
    return lower_put_cuda(
        types, outputs, lambda: lower_add(types, outputs, size=size),
        lambda: beginning((None,), outputs).bind(), axes=(0, 1, -1), combine="add", wrap=False,
        first=0,
    )  # fmt: skip


def _add_reference(y: Any, index: Any, *, size: int) -> Any:
    out = np.zeros((*y.shape[:2], size), y.dtype)
    n, c = np.indices(y.shape[:2])
    np.add.at(out, (n[..., None], c[..., None], index), y)
    return out


add_positions: Op = Op(
    "add_positions", inputs=("y", "index"), infer=_infer_add, lower=lower_add,
    lower_cuda=_lower_add_on_gpu, failure=failure,
    vjp=(lambda g, index: take_positions(g, index), None),
    reference=_add_reference,
    samples=[Sample((Arg((2, 3, 5)), Arg((2, 3, 5), 0, 7, "index")), {"size": 7}),
             Sample((Arg((1, 1, 1)), Arg((1, 1, 1), 0, 1, "index")), {"size": 1}),
             Sample((Arg((1, 2, 0)), Arg((1, 2, 0), 0, 1, "index")), {"size": 3})],
    tolerance=2.0,
)  # fmt: skip


# --- the largest element of windows ---------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """Windows along one dimension: of equal size, or (``kernel`` 0) adaptive."""

    inputs: int
    outputs: int
    kernel: int = 0
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def windows(self) -> list[Any]:
        """The elements of each window, for references."""
        if not self.kernel:
            begin, end = adaptive_windows(self.inputs, self.outputs)
            return [np.arange(b, e) for b, e in zip(begin, end, strict=True)]
        found = []
        for o in range(self.outputs):
            start = o * self.stride - self.padding
            at = start + np.arange(self.kernel) * self.dilation
            found.append(at[(at >= 0) & (at < self.inputs)])
        return found


class _Axis:
    """A dimension's windows inside the kernel."""

    def __init__(self, k: KernelBuilder, windows: Windows, made: list[Any]) -> None:
        self.windows = windows
        if windows.kernel:
            self.taps = windows.kernel
            self.size = k.size(windows.inputs)
            self.before = k.size(windows.padding)
            return
        begin, end = adaptive_windows(windows.inputs, windows.outputs)
        count = end - begin
        self.taps = int(count.max(initial=1))
        self.even = bool((count == self.taps).all())
        table = tensor_type(dtypes.int32, begin.shape)
        self.begins = k.tensor("constant", len(made), table)
        self.counts = k.tensor("constant", len(made) + 1, table)
        made += [begin.astype(np.int32), count.astype(np.int32)]

    def at(self, o: Value, tap: Value) -> Value:
        if not self.windows.kernel:
            return cast(self.begins[o], dtypes.int64) + tap
        return o * self.windows.stride - self.before + tap * self.windows.dilation

    def inside(self, o: Value, tap: Value) -> Value | None:
        """Whether the tap counts; None where every tap does."""
        w = self.windows
        if not w.kernel:
            return None if self.even else cast(tap, dtypes.int32) < self.counts[o]
        last = (w.outputs - 1) * w.stride - w.padding + (w.kernel - 1) * w.dilation
        if not w.padding and last < w.inputs:
            return None
        place = self.at(o, tap)
        return (place >= 0) & (place < self.size)


def _infer_max(types: Types, *, axes: tuple[Windows, ...]) -> tuple[TensorType, TensorType]:
    (x,) = types
    assert isinstance(x, TensorType)
    if x.ndim != len(axes) + 2 or x.shape[2:] != tuple(a.inputs for a in axes):
        raise ShapeError(
            f"max_pool: {x.shape} does not fit windows over {[a.inputs for a in axes]}"
        )
    if x.numel and x.numel // (x.shape[0] * x.shape[1]) >= 1 << 31:
        raise UnsupportedError(f"max_pool over more than 2**31 positions of a channel: {x.shape}")
    shape = (*x.shape[:2], *(a.outputs for a in axes))
    made = result_type(x, shape)
    return made, tensor_type(dtypes.int32, shape, made.strides, x.device)


def _lower_max(
    types: Types, outputs: tuple[TensorType, ...], *, axes: tuple[Windows, ...]
) -> Lowering:
    (x,) = types
    assert isinstance(x, TensorType)
    by_channel = all(t.strides[1] == 1 and not t.contiguous for t in (x, *outputs))
    x, out, index = (spatial_view(t) for t in (x, *outputs))
    k = KernelBuilder("max_pool")
    source = k.tensor("input", 0, x)
    target, places = k.tensor("output", 0, out), k.tensor("output", 1, index)
    made: list[Any] = []
    whole = (*(Windows(1, 1, 1) for _ in range(SPATIAL - len(axes))), *axes)
    windows = [_Axis(k, a, made) for a in whole]
    n, c, d, h, w = out.shape
    sizes = [cast(k.size(s), dtypes.int32) for s in x.shape[3:]]
    work = w * windows[0].taps * windows[1].taps * windows[2].taps
    if by_channel:
        work = work // max(w, 1) * c
        with k.parallel(n, d, h, w, work=work) as (i, od, oh, ow), k.vector(k.size(c)) as v:
            _largest(k, source, (target, places), windows, sizes, (i, v, od, oh, ow))
    else:
        with k.parallel(n, c, d, h, work=work) as (i, j, od, oh), k.vector(k.size(w)) as v:
            _largest(k, source, (target, places), windows, sizes, (i, j, od, oh, v))
    return Lowering((k.bind(),), constants=tuple(made))


def _largest(
    k: KernelBuilder, source: Operand, targets: tuple[Operand, Operand], windows: list[_Axis],
    sizes: list[Value], index: tuple[Value, ...],
) -> None:  # fmt: skip
    """A vector of windows: the first largest element, or the last NaN, as PyTorch has it."""
    image, channel, *place = index
    dtype = compute_dtype(source.dtype)
    best = k.register(const(neutral("max", dtype), dtype))
    where = k.register(const(-1, dtypes.int32))
    with k.nest([const(a.taps) for a in windows]) as taps:
        inside = const(True, dtypes.bool_)
        for axis, o, tap in zip(windows, place, taps, strict=True):
            here = axis.inside(o, tap)
            inside = inside if here is None else inside & here
        d, h, w = (a.at(o, t) for a, o, t in zip(windows, place, taps, strict=True))
        value = cast(source.load(image, channel, d, h, w, where=inside), dtype)
        wins = (value > read(best)) | (read(where) < 0)
        if dtype.kind == "f":
            wins = wins | values.unary("is_nan", value)
        wins = wins & inside
        flat = cast(d, dtypes.int32) * sizes[0] + cast(h, dtypes.int32)
        flat = flat * sizes[1] + cast(w, dtypes.int32)
        taken = read(k.register(wins))  # decided before either register changes
        k.assign(best, values.select(taken, value, read(best)))
        k.assign(where, values.select(taken, flat, read(where)))
    k.store_all([(targets[0], index, read(best)), (targets[1], index, read(where))])


def _max_reference(x: Any, *, axes: tuple[Windows, ...]) -> Any:
    shape = (*x.shape[:2], *(a.outputs for a in axes))
    best = np.zeros(shape, x.dtype)
    index = np.zeros(shape, np.int32)
    flat = np.arange(int(np.prod(x.shape[2:]))).reshape(x.shape[2:])
    windows = [a.windows() for a in axes]
    for place in np.ndindex(*shape[2:]):
        chosen = np.ix_(*(w[o] for w, o in zip(windows, place, strict=True)))
        block = x[(slice(None), slice(None), *chosen)]
        block = block.reshape(*x.shape[:2], math.prod(block.shape[2:]))
        found = np.argmax(block, 2)
        best[(slice(None), slice(None), *place)] = np.take_along_axis(block, found[..., None], 2)[
            ..., 0
        ]
        index[(slice(None), slice(None), *place)] = flat[chosen].reshape(-1)[found]
    return best, index


def _max_samples() -> list[Sample]:
    def arg(shape: tuple[int, ...]) -> Arg:
        return Arg(shape, -2.0, 2.0, distinct=True)

    return [
        Sample((arg((2, 3, 8)),), {"axes": (Windows(8, 4, 2, 2),)}),
        Sample((arg((2, 2, 7, 6)),), {"axes": (Windows(7, 4, 3, 2, 1), Windows(6, 4, 3, 1))}),
        Sample((arg((1, 2, 9, 5)),), {"axes": (Windows(9, 5, 2, 1, 0, 4), Windows(5, 3))}),
        Sample((arg((1, 1, 4, 4, 5)),),
               {"axes": (Windows(4, 2, 2, 2), Windows(4, 3, 2), Windows(5, 2, 3, 2))}),
        Sample((arg((0, 2, 4)),), {"axes": (Windows(4, 2, 2, 2),)}),
        Sample((arg((1, 1, 1)),), {"axes": (Windows(1, 1, 1),)}),
    ]  # fmt: skip


def _spread(g: Any, out: Any, axes: tuple[Windows, ...]) -> Any:
    """The gradients at the positions of the largest elements, zeros elsewhere."""
    from flame.ops.max_gradient import max_pool_backward

    return max_pool_backward(g, out[1], axes=axes)


max_pool = Op(
    "max_pool", inputs=("x",), any_layout=True, infer=_infer_max, lower=_lower_max, extras=1,
    vjp=(_spread,), reference=_max_reference, samples=_max_samples(),
)  # fmt: skip
