"""Rows of a table by index, and the reverse: embedding and one_hot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core import dtypes
from flame.core.errors import ArgumentError, DTypeError, IndexRangeError, ShapeError
from flame.core.types import TensorType
from flame.kernel.builder import Lowering
from flame.ops.autocast import autocasts
from flame.ops.conversion import convert
from flame.ops.creation import full
from flame.ops.elementwise import compute_dtype
from flame.ops.indexed import failure, infer_take, lower_take, take_at
from flame.ops.indexed_writes import put_at
from flame.ops.indexing import along, check_index, named
from flame.ops.op import Arg, Op, Sample, Types
from flame.ops.shapes import expand, unsqueeze

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__: list[str] = []


def _axes(index: TensorType) -> tuple[int, int]:
    """Rows by the index, columns by the last dimension, along which the index repeats."""
    return (-1, index.ndim - 1)


def _infer(types: Types, **attributes: Any) -> TensorType:
    weight, index = types
    assert isinstance(weight, TensorType)
    assert isinstance(index, TensorType)
    return infer_take((weight, index), axes=_axes(index), wrap=False)


def _lower(types: Types, outputs: tuple[TensorType, ...], **attributes: Any) -> Lowering:
    index = types[1]
    assert isinstance(index, TensorType)
    return lower_take(types, outputs, axes=_axes(index), wrap=False)


def _gradient(
    g: Any, index: Any, weight_type: TensorType, padding: int | None, by_frequency: bool
) -> Any:
    """Rows of ``g`` summed into the table, each row in the order of the index."""
    wide = convert(g, dtype=compute_dtype(g.dtype))
    if by_frequency:
        first = index.select(-1, 0)
        ones = expand(full((), 1, dtype=wide.dtype, device=wide.device), first.shape)
        counts = put_at(None, ones, first, axes=(-1,), shape=weight_type.shape[:1], combine="add",
                        wrap=False)  # fmt: skip
        wide = wide / unsqueeze(take_at(counts, first, axes=(-1,), wrap=False), -1)
    made = put_at(None, wide, index, axes=_axes(index.type), shape=weight_type.shape, combine="add",
                  wrap=False)  # fmt: skip
    if padding is not None:
        made.select(0, padding).copy_(0)
    return made


_INDEX = Arg((4, 5), 0, 6, kind="index")

_embedding = Op(
    "embedding", inputs=("weight", "index"), infer=_infer, lower=_lower,
    vjp=(_gradient, None),
    reference=lambda weight, index, **_: weight[index, np.arange(weight.shape[1])],
    samples=[Sample((Arg((6, 5)), _INDEX), {"padding": None, "by_frequency": False})],
    failure=failure,
)  # fmt: skip


@autocasts("plain")
def embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """Rows of ``weight`` (rows, width): indices (...) -> (..., width).

    padding_idx: a row that gets no gradient. max_norm: rows that are used and longer (in the norm
    of order norm_type) are shortened to it first, in place. scale_grad_by_freq: a row's gradient is
    divided by how often the index names it. Gradients are always dense; ``sparse`` changes nothing.
    """
    check_index("embedding", input)
    if weight.ndim != 2:
        raise ShapeError(f"embedding: the weight must have two dimensions, got {weight.shape}")
    rows = weight.shape[0]
    if padding_idx is not None:
        if not -rows <= padding_idx < rows:
            raise IndexRangeError(f"embedding: padding_idx {padding_idx} is no row of {rows}")
        padding_idx %= rows
    if max_norm is not None:
        _shorten(weight, input, max_norm, norm_type)
    shape = (*input.shape, weight.shape[1])
    index = along(input, shape, range(input.ndim))
    made: Tensor = named(
        "embedding", (0,), weight.shape, _embedding,
        weight, index, padding=padding_idx, by_frequency=bool(scale_grad_by_freq),
    )  # fmt: skip
    return made


def _shorten(weight: Tensor, index: Tensor, limit: float, order: float) -> None:
    from flame.ops.indexing import index_copy_, index_select
    from flame.ops.sorting import unique

    weight = weight.detach()  # the rows shrink in place, outside of the tape
    used = unique(index.reshape(-1))
    rows = index_select(weight, 0, used)
    if order == float("inf"):
        length = abs(rows).amax(1, keepdim=True)
    else:
        length = (abs(rows) ** order).sum(1, keepdim=True) ** (1.0 / order)
    factor = (limit / (length + 1e-7)).masked_fill(length <= limit, 1.0)
    index_copy_(weight, 0, used, rows * factor)


def one_hot(input: Tensor, num_classes: int = -1) -> Tensor:
    """int64 indices (...) -> (..., num_classes) with ones at the indices; -1: as many as needed."""
    if not hasattr(input, "dtype") or input.dtype is not dtypes.int64:
        raise DTypeError("one_hot takes an int64 tensor of class numbers")
    if num_classes == 0 or num_classes < -1:
        raise ArgumentError(f"one_hot: num_classes must be positive or -1, got {num_classes}")
    if num_classes == -1:
        if not input.numel():
            raise ArgumentError("one_hot: an empty tensor does not say how many classes there are")
        num_classes = int(input.max().item()) + 1
    shape = (*input.shape, num_classes)
    index = unsqueeze(input, -1)
    ones = expand(full((), 1, device=index.device), index.shape)
    made: Tensor = named(
        "one_hot", (input.ndim,), shape, put_at,
        None, ones, index, axes=(*range(input.ndim), -1), shape=shape, combine="set", wrap=False,
    )  # fmt: skip
    return made
