"""Views of parts: subscripts, diagonals, windows, splits, bits; nothing here copies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError, IndexRangeError, ShapeError
from flame.core.handle import is_tensor
from flame.core.types import Shape, TensorType, contiguous_strides, tensor_type
from flame.ops.creation import shape_of
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Sample, Types
from flame.ops.shapes import (
    apart,
    as_strided_backward,
    reshape,
    slice_dim,
    wrap_dim,
)  # fmt: skip
from flame.ops.views import ViewOp

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "chunk", "diagonal", "dsplit", "hsplit", "select", "split", "split_with_sizes", "tensor_split",
    "unbind", "vsplit",
]  # fmt: skip
METHODS = (
    "chunk", "diagonal", "dsplit", "hsplit", "select", "split", "split_with_sizes", "tensor_split",
    "unbind", "unfold", "vsplit",
)  # fmt: skip

Item = int | tuple[int, int, int] | None  # an index; (start, size, step); a new dimension


# --- subscripts of ints, slices and None, as one view ---------------------------------------------


def geometry(shape: Shape, strides: Shape, items: tuple[Item, ...]) -> tuple[Shape, Shape, int]:
    """(shape, strides, offset) of the part that ``items``, one for each dimension, address."""
    sizes: list[int] = []
    steps: list[int] = []
    offset, dim = 0, 0
    for item in items:
        if item is None:
            sizes.append(1)
            steps.append(0)
            continue
        if isinstance(item, int):
            offset += item * strides[dim]
        else:
            start, size, step = item
            offset += start * strides[dim] if size else 0
            sizes.append(size)
            steps.append(step * strides[dim])
        dim += 1
    if 0 in sizes:
        offset = 0
    return tuple(sizes), tuple(steps), offset


def _part(types: Types, *, items: tuple[Item, ...]) -> tuple[TensorType, int]:
    x = types[0]
    assert isinstance(x, TensorType)
    shape, strides, offset = geometry(x.shape, x.strides, items)
    return tensor_type(x.dtype, shape, strides, x.device), offset


def _place_part(g: Any, shape: Shape, items: tuple[Item, ...]) -> Any:
    from flame.ops.joining import place

    if g.numel() == math.prod(shape):  # all of it, with other dimensions
        return reshape(g, shape)
    _, strides, offset = geometry(shape, contiguous_strides(shape), items)
    return place(g, offset, shape=shape, strides=strides)


def _as_index(items: tuple[Item, ...]) -> Any:
    return tuple(
        slice(i[0], i[0] + i[1] * i[2], i[2]) if isinstance(i, tuple) else i for i in items
    )


part = ViewOp(
    "part", _part,
    vjp=(lambda g, x_type, items: _place_part(g, x_type.shape, items),),
    reference=lambda x, *, items: x[_as_index(items)],
    samples=[Sample((Arg((5, 6)),), {"items": (2, (1, 2, 3))}),
             Sample((Arg((5, 6)),), {"items": ((1, 2, 2), None, (0, 6, 1))}),
             Sample((Arg((4,)),), {"items": (3,)}),
             Sample((Arg((4, 2)),), {"items": ((0, 0, 1), 1)})],
)  # fmt: skip


def select(input: Tensor, dim: int, index: int) -> Tensor:
    """Entry ``index`` of a dimension, which is left out."""
    if not input.ndim:
        raise IndexRangeError("select: a 0-d tensor has no dimension to select from")
    dim = wrap_dim("select", dim, input.ndim)
    place = _wrapped("select", index, dim, input.shape)
    items = tuple(place if d == dim else (0, s, 1) for d, s in enumerate(input.shape))
    result: Tensor = part(input, items=items)
    return result


def _wrapped(name: str, index: Any, dim: int, shape: Shape) -> int:
    found: int = index.__index__()
    if not -shape[dim] <= found < shape[dim]:
        raise IndexRangeError(
            f"{name}: index {found} is out of range for dimension {dim}, which has size "
            f"{shape[dim]}"
        )
    return found + shape[dim] if found < 0 else found


def unbind(input: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """Views of the entries of a dimension."""
    if not input.ndim:
        raise IndexRangeError("unbind: a 0-d tensor has no dimension to unbind")
    dim = wrap_dim("unbind", dim, input.ndim)
    return tuple(select(input, dim, i) for i in range(input.shape[dim]))


# --- diagonal, unfold, bit views ------------------------------------------------------------------


def _diagonal_geometry(
    shape: Shape, strides: Shape, offset: int, dim1: int, dim2: int
) -> tuple[Shape, Shape, int]:
    rows, columns = shape[dim1], shape[dim2]
    size = max(0, min(rows, columns - offset) if offset >= 0 else min(rows + offset, columns))
    start = offset * strides[dim2] if offset >= 0 else -offset * strides[dim1]
    kept = [d for d in range(len(shape)) if d not in (dim1, dim2)]
    made = (*(shape[d] for d in kept), size)
    steps = (*(strides[d] for d in kept), strides[dim1] + strides[dim2])
    return made, steps, 0 if 0 in made else start


def _diagonal(types: Types, *, offset: int, dim1: int, dim2: int) -> tuple[TensorType, int]:
    x = types[0]
    assert isinstance(x, TensorType)
    shape, strides, start = _diagonal_geometry(x.shape, x.strides, offset, dim1, dim2)
    return tensor_type(x.dtype, shape, strides, x.device), start


def _diagonal_back(g: Any, shape: Shape, offset: int, dim1: int, dim2: int) -> Any:
    from flame.ops.joining import place

    _, strides, start = _diagonal_geometry(shape, contiguous_strides(shape), offset, dim1, dim2)
    return place(g, start, shape=shape, strides=strides)


_diagonal_op = ViewOp(
    "diagonal", _diagonal,
    vjp=(
        lambda g, x_type, offset, dim1, dim2: _diagonal_back(g, x_type.shape, offset, dim1, dim2),
    ),
    reference=lambda x, *, offset, dim1, dim2: np.diagonal(x, offset, dim1, dim2),
    samples=[Sample((Arg((4, 5)),), {"offset": 0, "dim1": 0, "dim2": 1}),
             Sample((Arg((2, 3, 4)),), {"offset": 1, "dim1": 2, "dim2": 0}),
             Sample((Arg((4, 5)),), {"offset": -2, "dim1": 0, "dim2": 1}),
             Sample((Arg((2, 3)),), {"offset": 7, "dim1": 0, "dim2": 1})],
)  # fmt: skip


def diagonal(input: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """The diagonal of two dimensions, as a view; it becomes the last dimension."""
    dim1, dim2 = (wrap_dim("diagonal", d, input.ndim) for d in (dim1, dim2))
    if dim1 == dim2:
        raise ShapeError(f"diagonal: the two dimensions must differ, both are {dim1}")
    result: Tensor = _diagonal_op(input, offset=offset, dim1=dim1, dim2=dim2)
    return result


def _unfold(types: Types, *, dim: int, size: int, step: int) -> tuple[TensorType, int]:
    x = types[0]
    assert isinstance(x, TensorType)
    return tensor_type(x.dtype, *_unfolded(x.shape, x.strides, dim, size, step), x.device), 0


def _unfolded(shape: Shape, strides: Shape, dim: int, size: int, step: int) -> tuple[Shape, Shape]:
    count = (shape[dim] - size) // step + 1
    made = (*shape[:dim], count, *shape[dim + 1 :], size)
    return made, (*strides[:dim], step * strides[dim], *strides[dim + 1 :], strides[dim])


def _unfold_back(g: Any, base: TensorType, dim: int, size: int, step: int) -> Any:
    whole = tensor_type(base.dtype, base.shape)
    shape, strides = _unfolded(whole.shape, whole.strides, dim, size, step)
    if apart(shape, strides):
        return as_strided_backward(g, base=whole, shape=shape, strides=strides, offset=0)
    # windows overlap: each of their positions is a slice, and the slices are summed
    total = None
    count = shape[dim]
    for at in range(size):
        window = select(g, -1, at)
        items = tuple(
            (at, count, step) if d == dim else (0, s, 1) for d, s in enumerate(base.shape)
        )
        placed = _place_part(window, base.shape, items)
        total = placed if total is None else total + placed
    return total


def _unfold_reference(x: Any, *, dim: int, size: int, step: int) -> Any:
    windows = np.lib.stride_tricks.sliding_window_view(x, size, axis=dim)
    return windows[(slice(None),) * dim + (slice(None, None, step),)]


_unfold_op = ViewOp(
    "unfold", _unfold,
    vjp=(lambda g, x_type, dim, size, step: _unfold_back(g, x_type, dim, size, step),),
    reference=_unfold_reference,
    samples=[Sample((Arg((7,)),), {"dim": 0, "size": 3, "step": 2}),
             Sample((Arg((3, 8)),), {"dim": 1, "size": 2, "step": 2}),
             Sample((Arg((5, 2)),), {"dim": 0, "size": 5, "step": 1})],
)  # fmt: skip


def unfold(input: Tensor, dimension: int, size: int, step: int) -> Tensor:
    """Windows of ``size`` entries of a dimension, ``step`` apart, in a new last dimension: a
    view."""
    dim = wrap_dim("unfold", dimension, input.ndim)
    length = input.shape[dim] if input.ndim else 1
    if size < 0 or size > length or step <= 0:
        raise ArgumentError(
            f"unfold: windows of {size} in steps of {step} do not fit dimension {dim} of size "
            f"{length}"
        )
    if not input.ndim:
        return reshape(input, (1,)) if size else slice_dim(reshape(input, (1,)), 0, 0, 0)
    result: Tensor = _unfold_op(input, dim=dim, size=size, step=step)
    return result


def _bits(types: Types, *, dtype: DType) -> tuple[TensorType, int]:
    x = types[0]
    assert isinstance(x, TensorType)
    old, new = x.dtype.itemsize, dtype.itemsize
    if old == new:
        return tensor_type(dtype, x.shape, x.strides, x.device), 0
    fits = x.ndim > 0 and x.strides[-1] == 1
    if fits and new > old:
        ratio = new // old
        fits = x.shape[-1] % ratio == 0 and all(s % ratio == 0 for s in x.strides[:-1])
    if not fits:
        raise ShapeError(
            f"view: {x} cannot be seen as {dtype.name}: the last dimension must be contiguous, and "
            "its bytes and the other strides must be whole numbers of elements"
        )
    shape = (*x.shape[:-1], x.shape[-1] * old // new)
    strides = (*(s * old // new for s in x.strides[:-1]), 1)
    return tensor_type(dtype, shape, strides, x.device), 0


def _bits_reference(x: Any, *, dtype: DType) -> Any:
    return np.ascontiguousarray(x).view(dtype.numpy)


view_bits = ViewOp(
    "view_bits",
    _bits,
    vjp=NOT_DIFFERENTIABLE,
    of_memory=True,
    reference=_bits_reference,
    samples=[
        Sample((Arg((3, 4), 0, 9, kind="index", contiguous=True),), {"dtype": dtypes.int32}),
        Sample((Arg((3, 4), 0, 9, kind="index", contiguous=True),), {"dtype": dtypes.float64}),
    ],
)


# --- splits ---------------------------------------------------------------------------------------


def _split_at(name: str, input: Tensor, dim: int, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    if any(s < 0 for s in sizes) or sum(sizes) != input.shape[dim]:
        raise ShapeError(
            f"{name}: sizes {tuple(sizes)} must add up to {input.shape[dim]}, the size of "
            f"dimension {dim}"
        )
    found, start = [], 0
    for size in sizes:
        found.append(slice_dim(input, dim, start, start + size))
        start += size
    return tuple(found)


def _splittable(name: str, input: Tensor, dim: int) -> int:
    if not input.ndim:
        raise ShapeError(f"{name}: a 0-d tensor cannot be split")
    return wrap_dim(name, dim, input.ndim)


def split(input: Tensor, split_size_or_sections: Any, dim: int = 0) -> tuple[Tensor, ...]:
    """Views of parts of one size (the last may be smaller), or of the given sizes."""
    dim = _splittable("split", input, dim)
    if not isinstance(split_size_or_sections, int):
        return _split_at("split", input, dim, shape_of(split_size_or_sections))
    size, length = split_size_or_sections, input.shape[dim]
    if size < 0 or (size == 0 and length):
        raise ArgumentError(f"split: parts of size {size} cannot cover dimension {dim} of {length}")
    if not length:
        return (slice_dim(input, dim, 0, 0),)
    return _split_at("split", input, dim, [min(size, length - at) for at in range(0, length, size)])


def split_with_sizes(input: Tensor, split_sizes: Any, dim: int = 0) -> tuple[Tensor, ...]:
    """Views of parts of the given sizes."""
    dim = _splittable("split_with_sizes", input, dim)
    return _split_at("split_with_sizes", input, dim, shape_of(split_sizes))


def chunk(input: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """Views of at most ``chunks`` parts of one size; the last may be smaller."""
    dim = _splittable("chunk", input, dim)
    if chunks <= 0:
        raise ArgumentError(f"chunk: the number of chunks must be positive, got {chunks}")
    length = input.shape[dim]
    if not length:
        return tuple(slice_dim(input, dim, 0, 0) for _ in range(chunks))
    return split(input, -(-length // chunks), dim)


def tensor_split(input: Tensor, indices_or_sections: Any, dim: int = 0) -> tuple[Tensor, ...]:
    """Views of parts as equal as can be (for a number), or between the given indices."""
    dim = _splittable("tensor_split", input, dim)
    length, given = input.shape[dim], indices_or_sections
    if is_tensor(given):
        if given.ndim > 1 or given.dtype.kind not in "iu":
            raise DTypeError(
                "tensor_split: a tensor of sections must be integer, of 0 or 1 dimensions"
            )
        given = given.tolist()
    if isinstance(given, int):
        if given <= 0:
            raise ArgumentError(
                f"tensor_split: the number of sections must be positive, got {given}"
            )
        size, longer = divmod(length, given)
        ends = [size * i + min(i, longer) for i in range(given + 1)]
    else:
        ends = [0, *shape_of(given), length]
    found = []
    for start, stop in itertools.pairwise(ends):
        first, last, _ = slice(start, stop).indices(length)
        found.append(slice_dim(input, dim, first, max(first, last)))
    return tuple(found)


def _evenly(name: str, input: Tensor, given: Any, dim: int) -> tuple[Tensor, ...]:
    if isinstance(given, int) and (given <= 0 or input.shape[dim] % given):
        raise ShapeError(
            f"{name}: dimension {dim} of {input.shape} cannot be split into {given} equal parts"
        )
    return tensor_split(input, given, dim)


def hsplit(input: Tensor, indices_or_sections: Any) -> tuple[Tensor, ...]:
    """Equal parts of the second dimension, or the only one of a 1-d tensor."""
    if not input.ndim:
        raise ShapeError("hsplit: a 0-d tensor cannot be split")
    return _evenly("hsplit", input, indices_or_sections, 0 if input.ndim == 1 else 1)


def vsplit(input: Tensor, indices_or_sections: Any) -> tuple[Tensor, ...]:
    """Equal parts of the first dimension of a tensor of two or more."""
    if input.ndim < 2:
        raise ShapeError(f"vsplit: two dimensions are needed, got shape {input.shape}")
    return _evenly("vsplit", input, indices_or_sections, 0)


def dsplit(input: Tensor, indices_or_sections: Any) -> tuple[Tensor, ...]:
    """Equal parts of the third dimension."""
    if input.ndim < 3:
        raise ShapeError(f"dsplit: three dimensions are needed, got shape {input.shape}")
    return _evenly("dsplit", input, indices_or_sections, 2)
