"""Tensors moved from one device to another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flame.core.types import TensorType, like_strides, tensor_type
from flame.kernel.builder import Lowering
from flame.ops.conversion import copy
from flame.ops.op import Arg, Op, Sample, Types
from flame.ops.rows import type_of

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__: list[str] = []


def _infer(types: Types, *, device: str) -> TensorType:
    x = type_of(types[0])
    return tensor_type(x.dtype, x.shape, like_strides(x.shape, x), device)


def _lower(types: Types, outputs: tuple[TensorType, ...], *, device: str) -> Lowering:
    """Within a device it is a copy; between devices the runtime moves the bytes."""
    return copy.lowering(types, outputs, {})


transfer = Op(
    "transfer",
    inputs=("x",),
    infer=_infer,
    lower=_lower,
    vjp=(lambda g, x_type: move(g, x_type.device),),
    reference=lambda x, *, device: x,
    samples=[Sample((Arg((3, 5)),), {"device": "cpu"}), Sample((Arg((0,)),), {"device": "cpu"})],
    reads=lambda t: t.dense or t.contiguous,  # contiguous, but not dense, is what has no elements
    moves=True,
)


def move(input: Tensor, device: str) -> Tensor:
    """``input`` on a device; itself where it is there already."""
    if input.type.device == device:
        return input
    made: Any = transfer(input, device=device)
    result: Tensor = made
    return result
