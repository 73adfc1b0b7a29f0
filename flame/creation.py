"""Tensors from data: tensor, from_numpy, asarray, DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import DTypeError, ShapeError
from flame.ops.creation import _full
from flame.tensor import Tensor, check_device, from_array


def tensor(
    data: Any, *, dtype: DType | None = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """A new tensor with a copy of ``data``: a number, nested sequences, a NumPy array, or a tensor.

    Floats take the default dtype, integers int64. Raises ShapeError where nested sequences have
    unequal lengths, DTypeError where an element is no number.
    """
    check_device(device)
    if isinstance(data, Tensor):
        made = data.detach().clone() if dtype is None else data.detach().to(dtype, copy=True)
    elif isinstance(data, (bool, int, float)):
        made = _full(
            data,
            shape=(),
            dtype=dtype or dtypes.of_scalar(type(data), dtypes.get_default_dtype()),
        )
    else:
        made = from_array(_array(data, dtype))
    return made.requires_grad_() if requires_grad else made


def _array(data: Any, dtype: DType | None) -> np.ndarray[Any, Any]:
    if isinstance(data, (np.ndarray, np.generic)):
        array = np.array(data)
    else:
        try:
            array = np.array(_plain(data))
        except ValueError as error:
            raise ShapeError(
                f"tensor: nested sequences must have equal lengths ({error})"
            ) from None
        if array.dtype == np.float64:
            array = array.astype(dtypes.get_default_dtype().numpy)
        if array.size == 0 and dtype is None:
            array = array.astype(dtypes.get_default_dtype().numpy)
    if array.dtype.kind not in "biufV":
        raise DTypeError(f"tensor: elements must be numbers, got {array.dtype}")
    return array if dtype is None else array.astype(dtype.numpy)


def _plain(data: Any) -> Any:
    """Nested sequences with tensors inside as nested lists."""
    if isinstance(data, Tensor):
        return data.detach().numpy()
    if isinstance(data, (list, tuple)):
        return [_plain(d) for d in data]
    return data


def from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    """A tensor over the memory of a NumPy array: a change of one is seen in the other.

    Arrays with negative strides, or read-only ones, are copied. Raises DTypeError where the dtype
    has no counterpart.
    """
    if not isinstance(array, np.ndarray):
        raise DTypeError(f"from_numpy takes a NumPy array, got {type(array).__name__}")
    return from_array(array)


def as_tensor(data: Any, dtype: DType | None = None, device: Any = None) -> Tensor:
    """As `tensor`, without a copy where the memory can be shared."""
    check_device(device)
    if isinstance(data, Tensor):
        return data if dtype is None else data.to(dtype)
    if isinstance(data, np.ndarray):
        made = from_array(data)
        return made if dtype is None else made.to(dtype)
    return tensor(data, dtype=dtype)


def from_dlpack(source: Any) -> Tensor:
    """A tensor over the memory of any CPU array that speaks DLPack."""
    return from_array(np.from_dlpack(source))
