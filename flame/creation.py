"""Tensors from data: tensor, from_numpy, asarray, DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np

from flame.core import dtypes
from flame.core.device import check_device
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError, FlameError, ShapeError
from flame.ops.transfer import move
from flame.tensor import Tensor, check_dtype, from_array


def tensor(
    data: Any,
    *,
    dtype: DType | None = None,
    device: Any = None,
    requires_grad: bool = False,
    pin_memory: bool = False,
) -> Tensor:
    """A new tensor with a copy of ``data``: a number, nested sequences, a NumPy array, or a tensor.

    Python floats take the default dtype, integers int64; NumPy's and tensors keep theirs. Raises
    ShapeError where nested sequences have unequal lengths, DTypeError where an element is no number
    that the dtype can hold.
    """
    check_dtype(dtype)
    if isinstance(data, Tensor):
        place = data.type.device if device is None else check_device(device)
        made = data.detach().to(place, data.dtype if dtype is None else dtype, copy=True)
    else:
        place = check_device(device)
        made = move(from_array(_array(data, dtype)), place)
    made = made.pin_memory() if pin_memory else made
    return made.requires_grad_() if requires_grad else made


def _array(data: Any, dtype: DType | None) -> np.ndarray[Any, Any]:
    """The values of ``data``, in memory of their own."""
    if isinstance(data, np.ndarray):
        array = _checked(np.array(data))
        return array if dtype is None else _cast(array, dtype)
    try:
        array = _checked(np.array(_plain(data)))
    except ValueError as error:
        if isinstance(error, FlameError):
            raise
        raise ShapeError(f"tensor: nested sequences must have equal lengths ({error})") from None
    except OverflowError as error:
        raise DTypeError(f"tensor: a number is too large ({error})") from None
    if dtype is None:
        return array if array.dtype != np.float64 and array.size else _inferred(data, array)
    if dtype.is_integer and array.size:
        _check_range(array, dtype)
    return _cast(array, dtype)


def _cast(array: np.ndarray[Any, Any], dtype: DType) -> np.ndarray[Any, Any]:
    with np.errstate(all="ignore"):
        return array.astype(dtype.numpy)


def _checked(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    known = array.dtype.kind in "biuf" or array.dtype == dtypes.bfloat16.numpy
    if not known or array.dtype == np.uint64:
        what = "mixed objects, or integers beyond int64" if array.dtype == object else array.dtype
        raise DTypeError(f"tensor: elements must be numbers that a dtype can hold, got {what}")
    return array


def _inferred(data: Any, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Floats from Python in the default dtype; NumPy's and tensors' float64 stay so."""
    while isinstance(data, (list, tuple)) and data:
        data = data[0]
    if isinstance(data, (np.ndarray, np.generic, Tensor)):
        return array
    return array.astype(dtypes.get_default_dtype().numpy)


def _check_range(array: np.ndarray[Any, Any], dtype: DType) -> None:
    """Raise where Python numbers do not fit an integer dtype; -1 may stand for its bits."""
    limits = np.iinfo(dtype.numpy)
    low = -limits.max - 1 if limits.min == 0 else limits.min
    least, most = array.min(), array.max()
    if not (low <= least and most <= limits.max):  # also where they are not numbers
        raise DTypeError(
            f"tensor: numbers from {least} to {most} do not fit {dtype.name} "
            f"({limits.min} to {limits.max})"
        )


def _plain(data: Any) -> Any:
    """Nested sequences with tensors inside as nested lists."""
    if isinstance(data, Tensor):
        return data.detach()._values()
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
    check_dtype(dtype)
    if isinstance(data, Tensor):
        made = data if dtype is None else data.to(dtype)
        return made if device is None else move(made, check_device(device))
    place = check_device(device)
    if isinstance(data, np.ndarray):
        made = from_array(_checked(data))
        return move(made if dtype is None else made.to(dtype), place)
    return tensor(data, dtype=dtype, device=place)


def asarray(
    obj: Any,
    *,
    dtype: DType | None = None,
    device: Any = None,
    copy: bool | None = None,
    requires_grad: bool = False,
) -> Tensor:
    """A tensor from tensors, NumPy arrays, DLPack, or sequences.

    copy: True always copies, False raises ArgumentError where a copy is needed, None copies where
    it is needed.
    """
    place = None if device is None else check_device(device)
    check_dtype(dtype)
    shared: Any = obj
    if not isinstance(obj, (Tensor, np.ndarray)) and hasattr(obj, "__dlpack__"):
        shared = from_dlpack(obj)
    sharing = isinstance(shared, (Tensor, np.ndarray))
    made = as_tensor(shared, dtype, place)
    copied = not sharing or made.data_ptr() != _address(shared)
    if copy is False and copied:
        raise ArgumentError("asarray: a copy is needed, but copy=False was given")
    if copy and not copied:
        made = made.detach().clone()
    return made.detach().requires_grad_() if requires_grad else made


def _address(x: Any) -> int:
    address: int = x.data_ptr() if isinstance(x, Tensor) else x.ctypes.data
    return address


def from_dlpack(source: Any) -> Tensor:
    """A tensor over the memory of any CPU array that speaks DLPack.

    Raises DTypeError where ``source`` does not, or its dtype has no counterpart, DeviceError where
    it is not in the memory of the CPU.
    """
    if isinstance(source, Tensor):
        return source.detach()
    if not hasattr(source, "__dlpack__"):
        raise DTypeError(f"from_dlpack: a {type(source).__name__} does not speak DLPack")
    try:
        return from_array(np.from_dlpack(source))
    except (BufferError, RuntimeError) as error:
        if isinstance(error, FlameError):
            raise
        raise DTypeError(f"from_dlpack: {error}; convert the array first") from error


def frombuffer(
    buffer: Any, *, dtype: DType, count: int = -1, offset: int = 0, requires_grad: bool = False
) -> Tensor:
    """A 1-d tensor over the memory of an object with a buffer, from ``offset`` bytes on."""
    check_dtype(dtype)
    try:
        array = np.frombuffer(buffer, dtype.numpy, count, offset)
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"frombuffer: {error}") from None
    made = from_array(array)
    return made.requires_grad_() if requires_grad else made


def scalar_tensor(
    s: Any, *, dtype: DType | None = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """A 0-d tensor of the default dtype (or the given one)."""
    return tensor(
        s, dtype=dtype or dtypes.get_default_dtype(), device=device, requires_grad=requires_grad
    )
