"""Questions about tensors and dtypes: promotion, limits of numbers, what an object is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType, promote_types
from flame.core.errors import DTypeError
from flame.core.handle import is_tensor

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "can_cast", "finfo", "iinfo", "is_complex", "is_floating_point", "is_nonzero", "is_tensor",
    "numel", "promote_types", "result_type",
]  # fmt: skip
METHODS = ("is_nonzero",)

_ORDER = {"b": 0, "u": 1, "i": 1, "f": 2}


def is_floating_point(input: Tensor) -> bool:
    """Whether the elements are floating numbers."""
    return input.dtype.kind == "f"


def is_complex(input: Tensor) -> bool:
    """Always False: FLAME's dtypes are real."""
    return False


def is_nonzero(input: Tensor) -> bool:
    """Whether the only element differs from 0. Raises ShapeError where there is not exactly one."""
    return bool(input.item())


def numel(input: Tensor) -> int:
    """How many elements a tensor has."""
    return input.type.numel


def result_type(tensor1: Any, tensor2: Any) -> DType:
    """The dtype of an arithmetic operation on two tensors or numbers."""
    dimensioned: list[DType] = []
    zero_dimensional: list[DType] = []
    numbers: list[type] = []
    for x in (tensor1, tensor2):
        if is_tensor(x):
            (dimensioned if x.ndim else zero_dimensional).append(x.dtype)
        elif isinstance(x, (bool, int, float)):
            numbers.append(bool if isinstance(x, bool) else int if isinstance(x, int) else float)
        else:
            raise DTypeError(f"result_type takes tensors and numbers, got {type(x).__name__}")
    return dtypes.result_type(
        tuple(dimensioned), tuple(zero_dimensional), tuple(numbers), dtypes.get_default_dtype()
    )


def can_cast(from_: DType, to: DType) -> bool:
    """Whether a result of dtype ``from_`` may be stored in a tensor of dtype ``to`` in place."""
    return _ORDER[from_.kind] <= _ORDER[to.kind]


class iinfo:
    """Limits of an integer dtype: ``min``, ``max``, ``bits``, ``dtype``."""

    def __init__(self, type: DType) -> None:
        if getattr(type, "kind", None) not in ("i", "u"):
            raise DTypeError(f"iinfo takes an integer dtype, got {type!r}; see finfo")
        limits = np.iinfo(type.numpy)
        self.bits, self.min, self.max, self.dtype = type.bits, limits.min, limits.max, type.name

    def __repr__(self) -> str:
        return f"iinfo(min={self.min}, max={self.max}, dtype={self.dtype})"


class finfo:
    """Limits of a floating dtype: ``min``, ``max``, ``eps``, ``tiny``, ``resolution``, ``bits``."""

    def __init__(self, type: DType | None = None) -> None:
        type = type or dtypes.get_default_dtype()
        if getattr(type, "kind", None) != "f":
            raise DTypeError(f"finfo takes a floating dtype, got {type!r}; see iinfo")
        limits = ml_dtypes.finfo(type.numpy)  # type: ignore[no-untyped-call]  # it has no hints
        self.bits, self.dtype = type.bits, type.name
        self.min, self.max = float(limits.min), float(limits.max)
        self.eps = float(limits.eps)
        self.tiny = self.smallest_normal = float(limits.tiny)
        self.resolution = float(limits.resolution)

    def __repr__(self) -> str:
        return (
            f"finfo(resolution={self.resolution:g}, min={self.min:g}, max={self.max:g}, "
            f"eps={self.eps:g}, smallest_normal={self.smallest_normal:g}, tiny={self.tiny:g}, "
            f"dtype={self.dtype})"
        )
