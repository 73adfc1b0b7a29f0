"""Changes of dtype, and copies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core.dtypes import DType
from flame.core.types import TensorType, contiguous_strides, like_strides, tensor_type
from flame.kernel.builder import KernelBuilder, Lowering
from flame.ops.elementwise import compute_dtype, nest_of, walk
from flame.ops.op import Arg, Op, Sample, Types

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["clone"]
METHODS = ("clone", "contiguous", "copy_")


def _infer(types: Types, *, dtype: DType | None = None, contiguous: bool = False) -> TensorType:
    (x,) = types
    assert isinstance(x, TensorType)
    strides = contiguous_strides(x.shape) if contiguous else like_strides(x.shape, x)
    return tensor_type(dtype or x.dtype, x.shape, strides, x.device)


def _lower(types: Types, outputs: tuple[TensorType, ...], **attributes: Any) -> Lowering:
    (x,), (out,) = types, outputs
    assert isinstance(x, TensorType)
    k = KernelBuilder("copy")
    nest = nest_of(types, outputs)
    source = k.tensor("input", 0, tensor_type(x.dtype, nest.sizes, nest.strides[0]))
    target = k.tensor("output", 0, tensor_type(out.dtype, nest.sizes, nest.strides[1]))
    same = x.dtype is out.dtype

    def body(index: tuple[Any, ...]) -> None:
        value = source[index]
        k.store(target, index, value if same else _computed(value, x.dtype, out.dtype))

    walk(k, nest, body, light=True)
    return k.finish()


def _computed(value: Any, source: DType, target: DType) -> Any:
    from flame.kernel.values import cast

    return cast(cast(value, compute_dtype(source)), target)


def _reference(x: Any, *, dtype: DType | None = None, contiguous: bool = False) -> Any:
    return np.array(x, None if dtype is None else dtype.numpy)


copy = Op(
    "copy",
    inputs=("x",),
    infer=_infer,
    lower=_lower,
    vjp=(lambda g: g,),  # the engine gives it the dtype of the input
    reference=_reference,
    samples=[Sample((Arg((3, 5)),)), Sample((Arg(()),)), Sample((Arg((0, 4)),)),
             Sample((Arg((2, 3, 4)),), {"contiguous": True})],
)  # fmt: skip


def convert(input: Tensor, *, dtype: DType) -> Tensor:
    """``input`` in another dtype; itself where it has that dtype already."""
    if input.dtype is dtype:
        return input
    result: Tensor = copy(input, dtype=dtype)
    return result


def clone(input: Tensor, *, memory_format: Any = None) -> Tensor:
    """A copy in new memory, with the layout kept."""
    result: Tensor = copy(input)
    return result


def contiguous(input: Tensor, memory_format: Any = None) -> Tensor:
    """``input`` in row-major order; itself where it is so already."""
    if input.type.contiguous:
        return input
    result: Tensor = copy(input, contiguous=True)
    return result


def copy_(input: Tensor, src: Any, non_blocking: bool = False) -> Tensor:
    """Write ``src`` (a tensor or number, broadcast and converted) into ``input``, in place."""
    from flame.ops.shapes import expand
    from flame.tensor import Tensor

    if not isinstance(src, Tensor):
        from flame.ops.creation import full

        src = full((), src, dtype=input.dtype)
    if src.shape != input.shape:
        src = expand(src, input.shape)
    if src.dtype is not input.dtype:
        src = convert(src, dtype=input.dtype)
    copy.into((input,), src)
    return input
