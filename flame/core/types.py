"""TensorType: everything about a tensor but its memory.

Invariant: tensor types are interned, so equal types are the same object and hash by identity; this
is what lets the warm path of eager execution find a compiled kernel with one dictionary look-up.
"""

from __future__ import annotations

import weakref
from typing import Any

from flame.core.dtypes import DType
from flame.core.errors import OutOfMemoryError, ShapeError

MAX_RANK = 8  # of the public promise; more works wherever the dimensions coalesce

Shape = tuple[int, ...]


def contiguous_strides(shape: Shape) -> Shape:
    """Row-major strides, in elements."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def element_count(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


class TensorType:
    """dtype, shape and strides (in elements) of a tensor on ``device``; see `tensor_type`."""

    __slots__ = (
        "__weakref__",
        "contiguous",
        "device",
        "dtype",
        "ndim",
        "numel",
        "shape",
        "span",
        "strides",
    )

    dtype: DType
    shape: Shape
    strides: Shape
    device: str
    ndim: int
    numel: int
    contiguous: bool
    span: int  # elements from the first to the last one addressed, inclusive; 0 where empty

    def __repr__(self) -> str:
        sizes = ", ".join(map(str, self.shape))
        layout = "" if self.contiguous else f" strides {self.strides}"
        place = "" if self.device == "cpu" else f" on {self.device}"
        return f"{self.dtype.name}[{sizes}]{layout}{place}"

    def __reduce__(self) -> Any:
        return tensor_type, (self.dtype, self.shape, self.strides, self.device)

    @property
    def repeats(self) -> bool:
        """Whether elements share memory, as in an expanded tensor."""
        return any(s == 0 and n > 1 for s, n in zip(self.strides, self.shape, strict=True))

    @property
    def dense(self) -> bool:
        """Whether the elements fill their span without gaps or overlap, in whatever order."""
        if self.numel == 0:
            return True
        return self.span == self.numel and _non_overlapping(self.shape, self.strides)


def _non_overlapping(shape: Shape, strides: Shape) -> bool:
    expected = 1
    for stride, size in sorted((t, s) for s, t in zip(shape, strides, strict=True) if s != 1):
        if stride != expected:
            return False
        expected *= size
    return True


_interned: weakref.WeakValueDictionary[Any, TensorType] = weakref.WeakValueDictionary()


def tensor_type(
    dtype: DType, shape: Shape, strides: Shape | None = None, device: str = "cpu"
) -> TensorType:
    """The one TensorType with these fields; ``strides`` default to row-major."""
    if strides is None:
        strides = contiguous_strides(shape)
    key = (dtype, shape, strides, device)
    found = _interned.get(key)
    if found is not None:
        return found
    if len(shape) > 64:
        raise ShapeError(f"a tensor has at most 64 dimensions, {len(shape)} were asked for")
    if element_count(shape) >= 1 << 63:
        raise OutOfMemoryError(f"a tensor of shape {shape} is larger than any memory")
    made = TensorType.__new__(TensorType)
    made.dtype, made.shape, made.strides, made.device = dtype, shape, strides, device
    made.ndim, made.numel = len(shape), element_count(shape)
    made.contiguous = all(
        size == 1 or stride == expected
        for size, stride, expected in zip(shape, strides, contiguous_strides(shape), strict=True)
    )
    made.contiguous = made.contiguous or made.numel == 0
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    made.span = reach + 1 if made.numel else 0
    return _interned.setdefault(key, made)


def on_device(type_: TensorType, device: str) -> TensorType:
    """The same type on another device."""
    if type_.device == device:
        return type_
    return tensor_type(type_.dtype, type_.shape, type_.strides, device)


def like_strides(shape: Shape, model: TensorType) -> Shape:
    """Dense strides for ``shape`` in the memory order of ``model``, which has the same shape.

    Elementwise results keep the layout of their operand, as in PyTorch's preserve_format. On the
    CPU a model with gaps gives row-major results; on a GPU, whose kernels read a line of memory at
    once, its order counts too.
    """
    if model.contiguous:
        return contiguous_strides(shape)
    if model.dense:
        return model.strides
    return contiguous_strides(shape) if model.device == "cpu" else ordered_strides(shape, model)


def ordered_strides(shape: Shape, model: TensorType) -> Shape:
    """Dense strides for ``shape`` with the dimensions in the memory order of ``model``, which has
    as many; row-major where elements of ``model`` share memory."""
    if model.repeats:
        return contiguous_strides(shape)
    # dimensions of one element say nothing: they stay beside the one before them
    every = sorted(range(len(shape)), key=lambda d: -model.strides[d])
    order = [d for d in every if model.shape[d] > 1]
    for d in range(len(shape)):
        if model.shape[d] <= 1:
            order.insert(order.index(d - 1) + 1 if d - 1 in order else 0, d)
    dense = contiguous_strides(tuple(shape[d] for d in order))
    return tuple(dense[order.index(d)] for d in range(len(shape)))
