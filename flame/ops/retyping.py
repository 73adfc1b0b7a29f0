"""Methods that convert by a name, and new tensors after the model of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flame.core import dtypes
from flame.core.device import check_device
from flame.core.dtypes import DType
from flame.core.errors import ShapeError
from flame.core.types import Shape, TensorType, tensor_type
from flame.ops.creation import empty, fill_, full, ones, shape_of, zeros
from flame.ops.op import constant
from flame.ops.shapes import inverse

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["empty_permuted", "empty_strided", "fill"]


def _converting(name: str, dtype: DType) -> Callable[..., Any]:
    def method(self: Tensor, memory_format: Any = None) -> Tensor:
        result: Tensor = self.to(dtype, memory_format=memory_format)
        return result

    method.__name__ = name
    method.__doc__ = f"Converted to {dtype.name}."
    return method


_CONVERSIONS = {
    name: _converting(name, dtype)
    for name, dtype in {
        "double": dtypes.float64, "float": dtypes.float32, "half": dtypes.float16,
        "bfloat16": dtypes.bfloat16, "long": dtypes.int64, "int": dtypes.int32,
        "short": dtypes.int16, "char": dtypes.int8, "byte": dtypes.uint8, "bool": dtypes.bool_,
    }.items()
}  # fmt: skip


def type_as(self: Tensor, other: Tensor) -> Tensor:
    """Converted to the dtype of ``other``."""
    result: Tensor = self.to(other.dtype)
    return result


def new_tensor(
    self: Tensor,
    data: Any,
    *,
    dtype: DType | None = None,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """A tensor with a copy of ``data``, of this tensor's dtype unless another is given."""
    device = self.type.device if device is None else device
    return constant(data, dtype=dtype or self.dtype, device=device, requires_grad=requires_grad)


def new_full(
    self: Tensor, size: Any, fill_value: Any, *, dtype: DType | None = None, **options: Any
) -> Tensor:
    """A tensor of a shape filled with a number, of this tensor's dtype unless another is given."""
    return full(size, fill_value, dtype=dtype or self.dtype, **_known(self, options))


def new_zeros(self: Tensor, *size: Any, dtype: DType | None = None, **options: Any) -> Tensor:
    """Zeros of a shape, of this tensor's dtype unless another is given."""
    return zeros(*_sizes(size, options), dtype=dtype or self.dtype, **_known(self, options))


def new_ones(self: Tensor, *size: Any, dtype: DType | None = None, **options: Any) -> Tensor:
    """Ones of a shape, of this tensor's dtype unless another is given."""
    return ones(*_sizes(size, options), dtype=dtype or self.dtype, **_known(self, options))


def new_empty(self: Tensor, *size: Any, dtype: DType | None = None, **options: Any) -> Tensor:
    """Uninitialised memory of a shape, of this tensor's dtype unless another is given."""
    return empty(*_sizes(size, options), dtype=dtype or self.dtype, **_known(self, options))


def new_empty_strided(
    self: Tensor, size: Any, stride: Any, dtype: DType | None = None, **options: Any
) -> Tensor:
    """`empty_strided` of this tensor's dtype unless another is given."""
    return empty_strided(size, stride, dtype=dtype or self.dtype, **_known(self, options))


def _sizes(size: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    return size or ((options.pop("size"),) if "size" in options else ())


def _known(self: Tensor | None, options: dict[str, Any]) -> dict[str, Any]:
    """Without options that mean nothing here (one layout), on ``self``'s device by default."""
    known = {k: v for k, v in options.items() if k not in ("layout", "pin_memory")}
    if self is not None and known.get("device") is None:
        known["device"] = self.type.device
    return known


def empty_strided(
    size: Any,
    stride: Any,
    *,
    dtype: DType | None = None,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """Uninitialised memory of a shape with strides in elements. Raises ShapeError for bad ones."""
    shape, strides = shape_of(size), shape_of(stride)
    if len(shape) != len(strides) or any(s < 0 for s in (*shape, *strides)):
        raise ShapeError(
            f"empty_strided: sizes {shape} and strides {strides} must be as many, and not negative"
        )
    made_on = check_device(device)
    type_ = tensor_type(dtype or dtypes.get_default_dtype(), shape, strides, made_on)
    made = empty((type_.span,), dtype=type_.dtype, device=made_on)
    made.type = type_
    return made.requires_grad_() if requires_grad else made


def empty_permuted(size: Any, physical_layout: Any, **options: Any) -> Tensor:
    """Uninitialised memory whose dimensions lie in the order ``physical_layout``."""
    shape, order = shape_of(size), shape_of(physical_layout)
    if sorted(order) != list(range(len(shape))):
        raise ShapeError(f"empty_permuted: {order} must name each dimension of {shape} once")
    model = tensor_type(dtypes.float32, tuple(shape[d] for d in order))
    strides = tuple(model.strides[d] for d in inverse(order))
    return empty_strided(shape, strides, **_known(None, options))


def fill(input: Tensor, value: Any) -> Tensor:
    """A copy with every element set to ``value``."""
    return fill_(input.clone(), value)


def resize_(self: Tensor, *sizes: Any, memory_format: Any = None) -> Tensor:
    """Another shape in place, row-major; elements beyond the old ones are not initialised.

    Raises ShapeError on a tensor with history, or with a view of it.
    """
    return _resized(self, tensor_type(self.dtype, shape_of(*sizes), None, self.type.device))


def resize_as_(self: Tensor, the_template: Tensor, *, memory_format: Any = None) -> Tensor:
    """`resize_` to the shape of another tensor."""
    return _resized(self, tensor_type(self.dtype, _shape(the_template), None, self.type.device))


def _shape(tensor: Tensor) -> Shape:
    return tensor.type.shape


def _resized(self: Tensor, wanted: TensorType) -> Tensor:
    from flame.ops.shapes import as_strided

    if self.requires_grad:
        raise ShapeError("resize_: a tensor that requires grad cannot be resized; use reshape")
    room = (self.storage.nbytes - (self.pointer - self.storage.pointer)) // self.dtype.itemsize
    if wanted.span > room:
        grown = empty((wanted.span,), dtype=self.dtype, device=self.type.device)
        grown[:room] = as_strided(self, shape=(room,), strides=(1,), offset=0)
        self.storage, self.pointer = grown.storage, grown.pointer
    self.type = wanted
    self.storage.version += 1
    return self


METHODS = (
    "new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros", "resize_",
    "resize_as_", "type_as",
)  # fmt: skip
OPERATORS: dict[str, Callable[..., Any]] = _CONVERSIONS
