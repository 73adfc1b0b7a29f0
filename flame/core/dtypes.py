"""Element types, and the one table of type promotion (PyTorch's rules).

Invariant: a DType is a singleton; compare with ``is``.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import ml_dtypes
import numpy as np

from flame.core.errors import DTypeError


class DType:
    """A real element type: ``kind`` is 'b' (bool), 'u' (unsigned), 'i' (signed) or 'f'
    (floating).
    """

    __slots__ = ("bits", "is_floating_point", "itemsize", "kind", "name", "numpy")

    def __init__(self, name: str, kind: str, bits: int, numpy: Any) -> None:
        self.name: Final = name
        self.kind: Final = kind
        self.bits: Final = bits
        self.itemsize: Final = max(bits // 8, 1)
        self.numpy: Final = np.dtype(numpy)
        self.is_floating_point: Final = kind == "f"

    def __repr__(self) -> str:
        return f"flame.{self.name}"

    def __reduce__(self) -> str:
        return "bool_" if self.name == "bool" else self.name

    @property
    def is_signed(self) -> bool:
        return self.kind in "if"

    @property
    def is_integer(self) -> bool:
        return self.kind in "iu"


float64 = DType("float64", "f", 64, np.float64)
float32 = DType("float32", "f", 32, np.float32)
float16 = DType("float16", "f", 16, np.float16)
bfloat16 = DType("bfloat16", "f", 16, ml_dtypes.bfloat16)
int64 = DType("int64", "i", 64, np.int64)
int32 = DType("int32", "i", 32, np.int32)
int16 = DType("int16", "i", 16, np.int16)
int8 = DType("int8", "i", 8, np.int8)
uint8 = DType("uint8", "u", 8, np.uint8)
bool_ = DType("bool", "b", 8, np.bool_)
uint32 = DType("uint32", "u", 32, np.uint32)  # inside kernels only: random bits
uint64 = DType("uint64", "u", 64, np.uint64)  # inside kernels only: bit patterns of float64

FLOATING: Final = (float16, bfloat16, float32, float64)
INTEGRAL: Final = (uint8, int8, int16, int32, int64)
ALL: Final = (bool_, *INTEGRAL, *FLOATING)

_BY_NUMPY: Final = {dtype.numpy: dtype for dtype in ALL}
_ORDER: Final = {"b": 0, "u": 1, "i": 1, "f": 2}


def from_numpy(numpy_dtype: Any) -> DType:
    """The DType of a NumPy dtype. Raises DTypeError where FLAME has none."""
    try:
        return _BY_NUMPY[np.dtype(numpy_dtype)]
    except (KeyError, TypeError):
        names = ", ".join(d.name for d in ALL)
        raise DTypeError(
            f"NumPy dtype {numpy_dtype!r} has no FLAME counterpart; convert to one of {names}"
        ) from None


def of_scalar(value_type: type, default_float: DType = float32) -> DType:
    """The dtype that a Python number alone would have in a tensor."""
    if value_type is bool:
        return bool_
    if value_type is int:
        return int64
    if value_type is float:
        return default_float
    raise DTypeError(f"a {value_type.__name__} is not a number that a tensor can hold")


@functools.cache
def promote_types(a: DType, b: DType) -> DType:
    """The smallest dtype that both convert to, by PyTorch's table."""
    if a is b:
        return a
    if _ORDER[a.kind] < _ORDER[b.kind]:
        a, b = b, a
    if _ORDER[a.kind] > _ORDER[b.kind]:
        return a
    if a.kind == "f":
        if a.bits == b.bits:  # float16 with bfloat16
            return float32
        return a if a.bits > b.bits else b
    if a.kind == b.kind:
        return a if a.bits > b.bits else b
    signed, unsigned = (a, b) if a.kind == "i" else (b, a)  # unsigned is uint8
    return signed if signed.bits > unsigned.bits else int16


_category = _ORDER


def result_type(
    dimensioned: tuple[DType, ...],
    zero_dimensional: tuple[DType, ...] = (),
    numbers: tuple[type, ...] = (),
    default_float: DType = float32,
) -> DType:
    """Promotion with priorities: a tensor with dimensions beats a 0-d tensor, which beats a Python
    number, unless the weaker one is of a higher category (bool < integer < floating)."""

    def common(types: tuple[DType, ...]) -> DType | None:
        return functools.reduce(promote_types, types) if types else None

    def stronger(a: DType | None, b: DType | None) -> DType | None:
        if a is None or b is None:
            return a or b
        return b if _category[b.kind] > _category[a.kind] else a

    wrapped = tuple(of_scalar(n, default_float) for n in numbers)
    found = stronger(stronger(common(dimensioned), common(zero_dimensional)), common(wrapped))
    if found is None:
        raise DTypeError("a result type needs at least one operand")
    return found


_default_float: DType = float32


def get_default_dtype() -> DType:
    """The dtype of tensors made from Python floats, and of integer inputs to floating functions."""
    return _default_float


def set_default_dtype(dtype: DType) -> None:
    """Set what `get_default_dtype` returns. ``dtype`` must be floating."""
    global _default_float
    if dtype not in FLOATING:
        raise DTypeError(f"the default dtype must be a floating DType, got {dtype!r}")
    _default_float = dtype
