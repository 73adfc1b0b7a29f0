"""Tensors moved from one device to another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flame.core.errors import DeviceError
from flame.core.types import TensorType, like_strides, tensor_type
from flame.kernel.builder import Lowering
from flame.ops.conversion import copy
from flame.ops.op import Arg, Op, Sample, Types
from flame.ops.rows import type_of
from flame.runtime.storage import Storage

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__: list[str] = []
METHODS = ("is_pinned", "pin_memory", "record_stream")


def _infer(types: Types, *, device: str, non_blocking: bool = False) -> TensorType:
    x = type_of(types[0])
    return tensor_type(x.dtype, x.shape, like_strides(x.shape, x), device)


def _lower(types: Types, outputs: tuple[TensorType, ...], **_: Any) -> Lowering:
    """Within a device it is a copy; between devices the runtime moves the bytes."""
    return copy.lowering(types, outputs, {})


transfer = Op(
    "transfer",
    inputs=("x",),
    infer=_infer,
    lower=_lower,
    vjp=(lambda g, x_type: move(g, x_type.device),),
    reference=lambda x, **_: x,
    samples=[Sample((Arg((3, 5)),), {"device": "cpu"}), Sample((Arg((0,)),), {"device": "cpu"})],
    reads=lambda t: t.dense or t.contiguous,  # contiguous, but not dense, is what has no elements
    moves=True,
)


def move(input: Tensor, device: str, *, non_blocking: bool = False) -> Tensor:
    """``input`` on a device; itself where it is there already. non_blocking: do not wait for a copy
    from pinned memory, which is not to be written before the copy is done."""
    if input.type.device == device:
        return input
    attributes = {"device": device, "non_blocking": True} if non_blocking else {"device": device}
    made: Any = transfer(input, **attributes)
    result: Tensor = made
    return result


def pin_memory(self: Tensor) -> Tensor:
    """A copy in page-locked memory of the host, which GPUs copy from and to faster, and (with
    ``non_blocking=True``) beside other work; itself where it is there. Without history.

    Raises DeviceError for a tensor on a GPU, and where there is no GPU.
    """
    if self.type.device != "cpu":
        raise DeviceError(
            f"pin_memory: only memory of the CPU can be pinned, this tensor is on "
            f"{self.type.device}"
        )
    if self.storage.pinned:
        return self
    type_ = tensor_type(self.dtype, self.shape, like_strides(self.shape, self.type))
    storage = Storage.allocate_pinned(type_.span * type_.dtype.itemsize)
    made = type(self.detach()).wrap(storage, storage.pointer, type_)
    return made.copy_(self.detach())


def is_pinned(self: Tensor) -> bool:
    """Whether it is in page-locked memory of the host."""
    return self.storage.pinned


def record_stream(self: Tensor, stream: Any) -> None:
    """Work of a `flame.cuda.Stream` that this tensor was not made on uses its memory, which is then
    not given to others before that work is done."""
    self.storage.record_stream(stream.cuda_stream)
