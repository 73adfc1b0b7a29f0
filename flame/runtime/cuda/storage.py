"""Storages on a device, and of page-locked host memory.

Invariant: `pointer` is valid for work that was queued while the Storage lived, on the stream that
it was allocated on and on those that `record_stream` named.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import numpy.typing as npt

from flame.core.errors import DeviceError
from flame.runtime.cuda.devices import device_index, device_name
from flame.runtime.cuda.memory import DeviceMemory, device_memory
from flame.runtime.cuda.pinned import PinnedMemory, pinned_memory
from flame.runtime.cuda.streams import current_handle
from flame.runtime.storage import Storage


class CudaStorage(Storage):
    """Memory of a device; made by ``Storage.allocate(nbytes, "cuda:0")``."""

    __slots__ = ("_memory", "stream", "uses")

    def __init__(
        self,
        pointer: int,
        nbytes: int,
        owner: object,
        device: str,
        memory: DeviceMemory,
        stream: int,
    ) -> None:
        self.pointer = pointer
        self.nbytes = nbytes
        self.owner = owner
        self.version = 0
        self.device = device
        self._memory = memory
        self.stream = stream
        self.uses: set[int] | None = None

    def __del__(self) -> None:  # type: ignore[override]  # the base's default is its own affair
        if self.owner is None:
            self._memory.free(self.pointer, self.nbytes, self.stream, self.uses)

    @property
    def device_index(self) -> int:
        return self._memory.device

    def record_stream(self, stream: int) -> None:
        """Work of another stream, by handle, uses this memory: it is not given to others before
        that work is done, even if this storage goes."""
        if stream != self.stream:
            if self.uses is None:
                self.uses = set()
            self.uses.add(stream)

    @property
    def __array_interface__(self) -> NoReturn:
        self._refuse()

    def as_numpy(
        self,
        dtype: npt.DTypeLike,
        shape: Sequence[int],
        strides: Sequence[int],
        offset: int = 0,
    ) -> npt.NDArray[Any]:
        """Raises DeviceError: NumPy reads host memory alone."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise DeviceError(
            f"NumPy cannot read memory of {self.device}; copy the tensor to the host first: .cpu()"
        )


class PinnedStorage(Storage):
    """Page-locked host memory; made by `Storage.allocate_pinned`."""

    __slots__ = ("_memory", "uses")

    pinned: ClassVar[bool] = True

    def __init__(self, nbytes: int, memory: PinnedMemory) -> None:
        super().__init__(memory.allocate(nbytes), nbytes)
        self._memory = memory
        # (device, stream) pairs with copies of this memory that nobody waited for
        self.uses: set[tuple[int, int]] = set()

    def __del__(self) -> None:  # type: ignore[override]  # the base's default is its own affair
        memory = getattr(self, "_memory", None)  # absent where the allocation failed
        if memory is not None:
            memory.free(self.pointer, self.nbytes, self.uses)


def allocate_storage(nbytes: int, device: str, stream: int | None = None) -> CudaStorage:
    """Uninitialised memory of a device, for use on a stream (this thread's current one)."""
    index = _INDICES.get(device, -1)
    if index < 0:
        index = device_index(device)
    memory = device_memory(index)
    where = current_handle(index) if stream is None else stream
    return CudaStorage(memory.allocate(nbytes, where), nbytes, None, _NAMES[index], memory, where)


def borrow_storage(pointer: int, nbytes: int, owner: object, device: str) -> CudaStorage:
    """Memory of a device that ``owner`` holds."""
    index = device_index(device)
    memory = device_memory(index)
    return CudaStorage(pointer, nbytes, owner, _NAMES[index], memory, current_handle(index))


def allocate_pinned_storage(nbytes: int) -> PinnedStorage:
    """Uninitialised page-locked host memory."""
    return PinnedStorage(nbytes, pinned_memory())


# One string for each device, as types compare devices on hot paths.
_NAMES = [sys.intern(device_name(index)) for index in range(64)]
_INDICES = {name: index for index, name in enumerate(_NAMES)}
