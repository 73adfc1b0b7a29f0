"""Convolutions and attention in the terms of cuDNN's graph API, as plain data.

Invariant: a graph's tensors have as uid their place among the operands of a call, counted from 1,
so pointers need no names. A graph holds all that decides a plan, hence it is the key under which
one is kept, in memory and on disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flame.core.dtypes import DType, bfloat16, float16, float32, float64, int64
from flame.core.types import Shape, TensorType
from flame.kernel.library import AttentionProblem, ConvolutionProblem

HALVES = (float16, bfloat16)
WIDEST = 16  # bytes to which cuDNN takes every tensor to be aligned


@dataclass(frozen=True)
class Tensor:
    """A tensor of a graph; ``uid`` is its place among the operands, from 1."""

    uid: int
    dims: Shape
    strides: Shape
    dtype: DType


@dataclass(frozen=True)
class ConvolutionGraph:
    """``result`` of ``first`` and ``second``, in the order of the library's function; plus bias.

    ``exact``: float32 products are float32; else they may be tf32.
    """

    direction: str
    first: Tensor
    second: Tensor
    result: Tensor
    bias: Tensor | None
    padding: Shape
    stride: Shape
    dilation: Shape
    exact: bool
    deterministic: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a call needs a pointer for."""
        bias = () if self.bias is None else (self.bias,)
        return (self.first, self.second, self.result, *bias)


@dataclass(frozen=True)
class AttentionGraph:
    """Scaled dot-product attention; ``gradients`` are empty for the forward direction."""

    query: Tensor
    key: Tensor
    value: Tensor
    result: Tensor
    log_sum: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    dropout: float
    random: tuple[Tensor, ...]  # seed and offset
    result_gradient: Tensor | None
    gradients: tuple[Tensor, ...]  # of query, key and value
    deterministic: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a call needs a pointer for."""
        optional = (self.mask, self.result_gradient)
        return (
            *(self.query, self.key, self.value, self.result, self.log_sum),
            *(tensor for tensor in optional if tensor is not None),
            *self.random,
            *self.gradients,
        )


Graph = ConvolutionGraph | AttentionGraph


# --- convolution ----------------------------------------------------------------------------------
def convolution_graph(
    problem: ConvolutionProblem, *, precision: str, deterministic: bool
) -> ConvolutionGraph | None:
    """The graph; None for empty tensors, dtypes that differ (but for a weight gradient in float32
    of half-width factors), tensors that are neither row-major nor channels-last, and shapes that
    do not go together."""
    types = (problem.x, problem.weight, problem.y)
    if not _dtypes_fit(problem) or 0 in (size for type_ in types for size in type_.shape):
        return None
    if not _shapes_fit(problem):
        return None
    layouts = _layouts(types)
    if layouts is None:
        return None
    x, weight, y = (
        _flat_as_plane(type_.shape, strides) for type_, strides in zip(types, layouts, strict=True)
    )
    flat = len(problem.stride) == 1
    order = {
        "forward": ((x, problem.x), (weight, problem.weight), (y, problem.y)),
        "input_gradient": ((y, problem.y), (weight, problem.weight), (x, problem.x)),
        "weight_gradient": ((y, problem.y), (x, problem.x), (weight, problem.weight)),
    }[problem.direction]
    operands = [
        Tensor(index + 1, dims, strides, type_.dtype)
        for index, ((dims, strides), type_) in enumerate(order)
    ]
    result = operands[2]
    return ConvolutionGraph(
        problem.direction,
        operands[0],
        operands[1],
        result,
        _bias(result) if problem.bias else None,
        padding=(0, *problem.padding) if flat else problem.padding,
        stride=(1, *problem.stride) if flat else problem.stride,
        dilation=(1, *problem.dilation) if flat else problem.dilation,
        exact=problem.x.dtype is float32 and precision == "highest",
        deterministic=deterministic,
    )


def _bias(result: Tensor) -> Tensor:
    channels, ones = result.dims[1], (1,) * (len(result.dims) - 2)
    strides = (channels, 1, *(channels for _ in ones))
    return Tensor(4, (1, channels, *ones), strides, result.dtype)


def _dtypes_fit(problem: ConvolutionProblem) -> bool:
    x, weight, y = problem.x.dtype, problem.weight.dtype, problem.y.dtype
    if x is not y or x not in (*HALVES, float32, float64):
        return False
    if problem.bias and problem.direction == "weight_gradient":
        return False
    wide = problem.direction == "weight_gradient" and x in HALVES and weight is float32
    return weight is x or wide


def _shapes_fit(problem: ConvolutionProblem) -> bool:
    space = len(problem.stride)
    if not 1 <= space <= 3 or problem.x.ndim != space + 2:
        return False
    x, weight, y = problem.x.shape, problem.weight.shape, problem.y.shape
    groups = problem.groups
    if x[0] != y[0] or y[1] != weight[0] or x[1] != weight[1] * groups or y[1] % groups:
        return False
    for index in range(space):
        extent = (weight[index + 2] - 1) * problem.dilation[index] + 1
        room = x[index + 2] + 2 * problem.padding[index] - extent
        if room < 0 or room // problem.stride[index] + 1 != y[index + 2]:
            return False
    return True


def row_major(shape: Shape) -> Shape:
    """Strides of (N, C, ...) in that order."""
    return tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))


def channels_last(shape: Shape) -> Shape:
    """Strides of (N, C, ...) that lies in memory as (N, ..., C)."""
    space = [math.prod(shape[index + 1 :]) * shape[1] for index in range(2, len(shape))]
    return (math.prod(shape[1:]), 1, *space)


def _layouts(types: tuple[TensorType, ...]) -> list[Shape] | None:
    """Strides of all tensors; those of dimensions of size 1 say nothing, and where they leave the
    layout open a tensor gets that of the others, as engines want one for all."""
    chosen = []
    fits = [(_same(t, channels_last(t.shape)), _same(t, row_major(t.shape))) for t in types]
    rows = any(by_row and not last for last, by_row in fits)
    lasts = any(last and not by_row for last, by_row in fits)
    for type_, (last, by_row) in zip(types, fits, strict=True):
        if not last and not by_row:
            return None
        wanted_last = last and (not by_row or lasts or not rows)
        chosen.append(channels_last(type_.shape) if wanted_last else row_major(type_.shape))
    return chosen


def _same(type_: TensorType, strides: Shape) -> bool:
    return all(
        size == 1 or have == want
        for size, have, want in zip(type_.shape, type_.strides, strides, strict=True)
    )


def _flat_as_plane(shape: Shape, strides: Shape) -> tuple[Shape, Shape]:
    """(N, C, L) as (N, C, 1, L); others as they are."""
    if len(shape) != 3:
        return shape, strides
    row = shape[2] * strides[2]
    return (*shape[:2], 1, shape[2]), (*strides[:2], row, strides[2])


# --- attention ------------------------------------------------------------------------------------
def attention_graph(problem: AttentionProblem, *, deterministic: bool) -> AttentionGraph | None:
    """The graph; None where cuDNN's kernels have no place for the problem:

    - dtypes other than float16 and bfloat16, or several;
    - a bool mask (the library adds masks), or one in another dtype or of a memory order of its own;
    - a gradient of log_sum; head dimensions that are no multiple of 8; empty tensors;
    - operands whose last stride is not 1, or that lie over themselves.

    - gradients of other shapes than what they are the gradients of; sequences of several lengths.
    """
    if problem.sequences is not None:
        return None
    types = (problem.query, problem.key, problem.value, problem.result)
    sources = (problem.query, problem.key, problem.value)
    made = problem.gradients or sources
    grad = problem.grad or problem.result
    if any(a.shape != b.shape for a, b in zip((*made, grad), (*sources, types[3]), strict=True)):
        return None
    if any(not _distinct(type_) for type_ in (*made, grad)):
        return None
    dtype = problem.query.dtype
    if dtype not in HALVES or any(type_.dtype is not dtype for type_ in types):
        return None
    if problem.shift or not _attention_shapes_fit(problem):
        return None
    if any(not _distinct(type_) for type_ in types):
        return None
    backward = problem.backward
    places = (3, 4, 5, 7) if backward else (1, 2, 3, 5)
    query, key, value, result = (
        Tensor(uid, type_.shape, _outer_strides(type_), dtype)
        for uid, type_ in zip(places, types, strict=True)
    )
    mask = None
    if problem.mask is not None:
        mask = _mask(problem, 6 if backward else 4)
        if mask is None:
            return None
    batch, heads, length, _ = problem.query.shape
    log_sum = Tensor(
        8 if backward else 6,
        (batch, heads, length, 1),
        (heads * length, length, 1, 1),
        float32,
    )
    seed = 12 if backward else 7
    random = tuple(
        Tensor(uid, (1, 1, 1, 1), (1, 1, 1, 1), int64)
        for uid in ((seed, seed + 1) if problem.dropout else ())
    )
    gradients = tuple(
        Tensor(uid, type_.shape, _outer_strides(type_), dtype)
        for uid, type_ in zip((9, 10, 11), made if backward else (), strict=False)
    )
    return AttentionGraph(
        query,
        key,
        value,
        result,
        log_sum,
        mask,
        problem.causal,
        problem.scale,
        problem.dropout,
        random,
        Tensor(1, grad.shape, _outer_strides(grad), dtype) if backward else None,
        gradients,
        # The forward direction gives the same bits either way: one plan serves both.
        deterministic=deterministic and backward,
    )


def _attention_shapes_fit(problem: AttentionProblem) -> bool:
    query, key, value = problem.query.shape, problem.key.shape, problem.value.shape
    if any(len(shape) != 4 or 0 in shape for shape in (query, key, value)):
        return False
    groups = key[1]
    return (
        query[0] == key[0] == value[0]
        and groups == value[1]
        and query[1] % groups == 0
        and query[3] == key[3]
        and key[2] == value[2]
        and query[3] % 8 == 0
        and value[3] % 8 == 0
        and problem.result.shape == (*query[:3], value[3])
        and 0 <= problem.dropout < 1
    )


def _distinct(type_: TensorType) -> bool:
    """Whether the last stride is 1 and no two elements share a place, nor rows an odd start."""
    pairs = sorted(
        (stride, size) for size, stride in zip(type_.shape, type_.strides, strict=True) if size != 1
    )
    reach = 0
    for stride, size in pairs:
        if stride <= reach:
            return False
        reach += (size - 1) * stride
    widths = WIDEST // type_.dtype.itemsize
    rows = zip(type_.shape[:-1], type_.strides[:-1], strict=True)
    aligned = all(size == 1 or stride % widths == 0 for size, stride in rows)
    return aligned and type_.strides[-1] == 1


def _outer_strides(type_: TensorType) -> Shape:
    """Strides, where a dimension of size 1 gets one beyond all others: its own says nothing, and
    may be no multiple of what the library loads at once."""
    sizes = list(zip(type_.shape, type_.strides, strict=True))
    beyond = max((size * stride for size, stride in sizes if size != 1), default=1)
    outer = tuple(beyond if size == 1 else stride for size, stride in sizes[:-1])
    return (*outer, 1)


def _mask(problem: AttentionProblem, uid: int) -> Tensor | None:
    """The mask that is added, with dimensions that are broadcast as dimensions of size 1."""
    mask = problem.mask
    if mask is None or mask.dtype is not problem.query.dtype or mask.ndim > 4:
        return None
    batch, heads, length, _ = problem.query.shape
    full = (batch, heads, length, problem.key.shape[2])
    missing = 4 - mask.ndim
    shape, strides = (1,) * missing + mask.shape, (0,) * missing + mask.strides
    dims = tuple(1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True))
    if any(dim not in (1, size) for dim, size in zip(dims, full, strict=True)):
        return None
    if dims[3] != full[3] or (strides[3] != 1 and full[3] != 1):
        return None
    if problem.backward and dims[2] != full[2]:
        return None  # gradients are wrong there: cuDNN 9.19 with a mask that all queries share
    kept = [stride for dim, stride in zip(dims, strides, strict=True) if dim != 1]
    if kept != sorted(kept, reverse=True):
        return None
    beyond = max((d * s for d, s in zip(dims, strides, strict=True) if d != 1), default=1)
    outer = tuple(
        beyond if dim == 1 else stride for dim, stride in zip(dims[:-1], strides[:-1], strict=True)
    )
    return Tensor(uid, dims, (*outer, 1), mask.dtype)
