"""Tensors to arrays and back: data is prepared with NumPy and becomes tensors batch by batch.

Sharing memory is free in both directions; a tensor of another device is copied to the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flame.creation import from_numpy
from flame.tensor import Tensor

__all__ = ["Tensor", "as_array", "as_tensor"]


def as_array(value: Tensor | np.ndarray) -> np.ndarray:
    """The value as an array, without a copy where it lies in the host's memory."""
    if isinstance(value, np.ndarray):
        return value
    array: np.ndarray = value.detach().cpu().numpy()
    return array


def as_tensor(array: Any) -> Tensor:
    """The array as a tensor that shares its memory, or a copy of it where it cannot be shared."""
    array = np.asarray(array)
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy(order="C")
    tensor: Tensor = from_numpy(array)
    return tensor
