"""Storage: the bytes behind tensors. Invariant: `pointer` is valid as long as the Storage lives.

This class is memory of the CPU; `flame.runtime.cuda.storage` has those of a GPU and of pinned
memory, which `allocate` and `allocate_pinned` import at their first use.

A storage owns its allocation and frees it, or borrows memory that `owner` keeps alive. `version`
counts the in-place changes of its content; whoever writes raises it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from flame.core.errors import ArgumentError
from flame.runtime.cpu.allocator import allocate, free


class Storage:
    """`nbytes` bytes at `pointer`. Made by `Storage.allocate` or `Storage.borrow`."""

    __slots__ = ("__weakref__", "device", "nbytes", "owner", "pointer", "version")

    pinned: ClassVar[bool] = False  # whether it is page-locked memory of the host

    def __init__(self, pointer: int, nbytes: int, owner: object = None) -> None:
        """`owner` None hands the allocation at `pointer` over to this storage."""
        self.pointer = pointer
        self.nbytes = nbytes
        self.owner = owner
        self.version = 0
        self.device = "cpu"

    @classmethod
    def allocate(cls, nbytes: int, device: str = "cpu") -> Storage:
        """Uninitialised memory; on a GPU for use on the current stream. Raises OutOfMemoryError,
        and DeviceError where there is no such device."""
        if device == "cpu":
            return cls(allocate(nbytes), nbytes)
        from flame.runtime.cuda.storage import allocate_storage

        return allocate_storage(nbytes, device)

    @classmethod
    def allocate_pinned(cls, nbytes: int) -> Storage:
        """Uninitialised page-locked memory of the host, which GPUs copy from and to at full speed.
        Raises DeviceError where there is no CUDA device."""
        from flame.runtime.cuda.storage import allocate_pinned_storage

        return allocate_pinned_storage(nbytes)

    @classmethod
    def borrow(cls, pointer: int, nbytes: int, owner: object, device: str = "cpu") -> Storage:
        """Memory of `owner`, which this storage keeps alive and never frees."""
        if owner is None:
            raise ArgumentError("Storage.borrow: the owner of borrowed memory must be an object")
        if device == "cpu":
            return cls(pointer, nbytes, owner)
        from flame.runtime.cuda.storage import borrow_storage

        return borrow_storage(pointer, nbytes, owner, device)

    # `free` is bound as a default, as module globals may be gone when the interpreter exits.
    def __del__(self, _free: Callable[[int, int], None] = free) -> None:
        if self.owner is None:
            _free(self.pointer, self.nbytes)

    def record_stream(self, stream: int) -> None:
        """Work of a stream, by handle, uses this memory; of no matter for memory of the host."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """The bytes, for NumPy: an array made from it keeps this storage alive."""
        return {
            "version": 3,
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self.pointer, False),
        }

    def as_numpy(
        self,
        dtype: npt.DTypeLike,
        shape: Sequence[int],
        strides: Sequence[int],
        offset: int = 0,
    ) -> npt.NDArray[Any]:
        """A view without a copy; `strides` and `offset` count elements. It keeps the storage alive.

        Raises ArgumentError where the view would reach outside the storage.
        """
        kind = np.dtype(dtype)
        item = kind.itemsize
        if math.prod(shape) == 0:
            return np.empty(tuple(shape), kind)
        last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        if offset < 0 or min(strides, default=0) < 0 or (last + 1) * item > self.nbytes:
            raise ArgumentError(
                f"as_numpy: shape {tuple(shape)}, strides {tuple(strides)} and offset {offset} of "
                f"{kind} reach outside a storage of {self.nbytes} bytes"
            )
        return np.ndarray(
            tuple(shape),
            kind,
            buffer=np.asarray(self),
            offset=offset * item,
            strides=tuple(step * item for step in strides),
        )

    def __repr__(self) -> str:
        kept = "owned" if self.owner is None else f"borrowed from {type(self.owner).__name__}"
        return f"Storage({self.nbytes} bytes at {self.pointer:#x} on {self.device}, {kept})"
