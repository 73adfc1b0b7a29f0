"""Sliding blocks of (N, C, H, W) as a tensor (N, C, KH, KW, blocks down, blocks across), and back.

Cutting out blocks and adding them up again are each other's gradients. Both kernels gather, so no
two iterations write the same element.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from flame.core.errors import ShapeError
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel.builder import KernelBuilder, Lowering
from flame.kernel.values import cast, const, read
from flame.ops.convolution.depthwise import Reads, place_in, reader
from flame.ops.convolution.geometry import Geometry, output_size
from flame.ops.elementwise import compute_dtype
from flame.ops.op import Arg, Op, Sample, Types


def block_counts(
    size: Shape, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape
) -> Shape:
    """Blocks down and across. Raises ShapeError where none fits."""
    counts = tuple(
        output_size(n, k, s, (p, p), d)
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    if any(c < 1 for c in counts):
        raise ShapeError(
            f"blocks of {kernel} with dilation {dilation} and padding {padding} do not fit into "
            f"{size}"
        )
    return counts


def _infer_cut(
    types: Types, *, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape
) -> TensorType:
    (x,) = types
    assert isinstance(x, TensorType)
    if x.ndim != 4:
        raise ShapeError(f"cut_blocks takes (N, C, H, W), got {x.shape}")
    counts = block_counts(x.shape[2:], kernel, stride, padding, dilation)
    return tensor_type(x.dtype, (*x.shape[:2], *kernel, *counts), None, x.device)


def _lower_cut(
    types: Types, outputs: tuple[TensorType, ...], *, kernel: Shape, stride: Shape, padding: Shape,
    dilation: Shape,
) -> Lowering:  # fmt: skip
    (x,), (out,) = types, outputs
    assert isinstance(x, TensorType)
    k = KernelBuilder("cut_blocks")
    source, target = k.tensor("input", 0, x), k.tensor("output", 0, out)
    g = Geometry.of(kernel, stride, padding, dilation, 1)
    *outer, width = out.shape
    reads = [Reads(k, g, 1 + i, x.shape[2 + i], out.shape[4 + i], turned=False) for i in range(2)]
    with k.parallel(*outer, work=width) as (n, c, t0, t1, j0), k.vector(k.size(width)) as j1:
        places, inside = place_in(reads, (j0, j1), [t0, t1])
        k.store(target, (n, c, t0, t1, j0, j1), source.load(n, c, *places, where=inside))
    return k.finish()


def _infer_add(
    types: Types, *, size: Shape, stride: Shape, padding: Shape, dilation: Shape
) -> TensorType:
    (y,) = types
    assert isinstance(y, TensorType)
    if y.ndim != 6:
        raise ShapeError(f"add_blocks takes (N, C, KH, KW, down, across), got {y.shape}")
    counts = block_counts(size, y.shape[2:4], stride, padding, dilation)
    if y.shape[4:] != counts:
        raise ShapeError(f"add_blocks: {size} has {counts} blocks, got {y.shape}")
    return tensor_type(y.dtype, (*y.shape[:2], *size), None, y.device)


def _lower_add(
    types: Types, outputs: tuple[TensorType, ...], *, size: Shape, stride: Shape, padding: Shape,
    dilation: Shape,
) -> Lowering:  # fmt: skip
    (y,), (out,) = types, outputs
    assert isinstance(y, TensorType)
    k = KernelBuilder("add_blocks")
    source, target = k.tensor("input", 0, y), k.tensor("output", 0, out)
    kernel = y.shape[2:4]
    g = Geometry.of(kernel, stride, padding, dilation, 1)
    constants: list[Any] = []
    reads = [reader(k, g, 1 + i, y.shape[4 + i], size[i], constants) for i in range(2)]
    dtype = compute_dtype(y.dtype)
    *outer, width = out.shape
    work = width * kernel[0] * kernel[1]
    with k.parallel(*outer, work=work) as (n, c, h), k.vector(k.size(width)) as w:
        total = k.register(const(0, dtype))
        with k.nest([const(kernel[0]), const(kernel[1])]) as (t0, t1):
            places, inside = place_in(reads, (h, w), [t0, t1])
            value = cast(source.load(n, c, t0, t1, *places, where=inside), dtype)
            k.assign(total, read(total) + value)
        k.store(target, (n, c, h, w), read(total))
    return Lowering((k.bind(),), constants=tuple(constants))


def _taps(size: Shape, counts: Shape, kernel: Shape, stride: Shape, padding: Shape,
          dilation: Shape) -> Any:  # fmt: skip
    """For each tap: (tap, blocks whose element is inside, those elements)."""
    for tap in itertools.product(*map(range, kernel)):
        blocks, elements = [], []
        for t, n, c, s, p, d in zip(tap, size, counts, stride, padding, dilation, strict=True):
            at = np.arange(c) * s - p + t * d
            inside = (at >= 0) & (at < n)
            blocks.append(np.flatnonzero(inside))
            elements.append(at[inside])
        yield tap, np.ix_(*blocks), np.ix_(*elements)


def _cut_reference(x: Any, *, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape) -> Any:
    counts = block_counts(x.shape[2:], kernel, stride, padding, dilation)
    out = np.zeros((*x.shape[:2], *kernel, *counts), x.dtype)
    for tap, blocks, elements in _taps(x.shape[2:], counts, kernel, stride, padding, dilation):
        part = out[(slice(None), slice(None), *tap)]
        part[(slice(None), slice(None), *blocks)] = x[(slice(None), slice(None), *elements)]
    return out


def _add_reference(y: Any, *, size: Shape, stride: Shape, padding: Shape, dilation: Shape) -> Any:
    out = np.zeros((*y.shape[:2], *size), y.dtype)
    for tap, blocks, elements in _taps(size, y.shape[4:], y.shape[2:4], stride, padding, dilation):
        part = y[(slice(None), slice(None), *tap)]
        out[(slice(None), slice(None), *elements)] += part[(slice(None), slice(None), *blocks)]
    return out


_FORMS: list[tuple[Shape, dict[str, Shape]]] = [
    ((2, 3, 5, 6), {"kernel": (3, 2), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}),
    ((1, 2, 7, 9), {"kernel": (2, 3), "stride": (2, 3), "padding": (0, 2), "dilation": (2, 1)}),
    ((0, 1, 3, 3), {"kernel": (2, 2), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}),
    ((1, 1, 1, 1), {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}),
]


def _add_samples() -> list[Sample]:
    found = []
    for shape, form in _FORMS:
        counts = block_counts(shape[2:], **form)
        rest = {name: value for name, value in form.items() if name != "kernel"}
        blocks = (*shape[:2], *form["kernel"], *counts)
        found.append(Sample((Arg(blocks),), {"size": shape[2:], **rest}))
    return found


cut_blocks: Op = Op(
    "cut_blocks", inputs=("x",), infer=_infer_cut, lower=_lower_cut,
    vjp=(
        lambda g, x_type, stride, padding, dilation: add_blocks(
            g, size=x_type.shape[2:], stride=stride, padding=padding, dilation=dilation
        ),
    ),
    reference=_cut_reference, samples=[Sample((Arg(shape),), form) for shape, form in _FORMS],
)  # fmt: skip

add_blocks: Op = Op(
    "add_blocks", inputs=("y",), infer=_infer_add, lower=_lower_add,
    vjp=(
        lambda g, y_type, stride, padding, dilation: cut_blocks(
            g, kernel=y_type.shape[2:4], stride=stride, padding=padding, dilation=dilation
        ),
    ),
    reference=_add_reference, samples=_add_samples(), tolerance=2.0,
)  # fmt: skip
