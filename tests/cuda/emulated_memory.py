"""Memory of emulated devices: guarded, poisoned, counted, and known by address."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flame.core.errors import CudaError, OutOfMemoryError

HOST = -1  # the "device" of page-locked memory
ALIGN = 256
GUARD = 256  # bytes on each side of an allocation
CANARY = 0xCB
POISON = 0xFF  # NaN in every float, -1 in every integer


@dataclass
class Allocation:
    """``nbytes`` from ``pointer``, between guards."""

    device: int
    pointer: int
    nbytes: int
    raw: np.ndarray = field(repr=False)  # type: ignore[type-arg]

    @property
    def name(self) -> str:
        where = "page-locked memory" if self.device == HOST else f"device {self.device}"
        return f"the allocation of {self.nbytes} bytes at {self.pointer:#x} on {where}"

    def check(self, after: str) -> None:
        """Raise CudaError where something was written beside the allocation."""
        start = self.pointer - self.raw.ctypes.data
        for side, guard in (
            ("before", self.raw[start - GUARD : start]),
            ("after", self.raw[start + self.nbytes : start + self.nbytes + GUARD]),
        ):
            if (guard != CANARY).any():
                guard[:] = CANARY
                raise CudaError(f"{after}: a write {side} {self.name}")


class EmulatedMemory:
    """The allocations of all devices. ``limit``: bytes of each device.

    A pool keeps what is freed, and gives it out again only to a request that is no larger and at
    least half as large: so a pool can hold memory that does not help, until `trim`.
    """

    def __init__(self, devices: int, limit: int) -> None:
        self.limit = limit
        self.live: dict[int, Allocation] = {}
        self.kept: list[list[int]] = [[] for _ in range(devices)]  # sizes that pools hold
        self.in_use = [0] * devices
        self.peak = [0] * devices
        self._order: list[int] = []

    def allocate(self, device: int, nbytes: int) -> int:
        size = max(nbytes, 1)
        if device != HOST:
            self._reserve(device, size)
        raw = np.full(size + 2 * GUARD + ALIGN, POISON, np.uint8)
        pointer = raw.ctypes.data + GUARD
        pointer += -pointer % ALIGN
        start = pointer - raw.ctypes.data
        raw[:start] = CANARY
        raw[start + size :] = CANARY
        self.live[pointer] = Allocation(device, pointer, size, raw)
        bisect.insort(self._order, pointer)
        return pointer

    def _reserve(self, device: int, size: int) -> None:
        fitting = sorted(k for k in self.kept[device] if size <= k <= 2 * size)
        if fitting:
            self.kept[device].remove(fitting[0])
        elif self.reserved(device) + size > self.limit:
            raise OutOfMemoryError(
                f"cuMemAllocFromPoolAsync: CUDA_ERROR_OUT_OF_MEMORY: {size} bytes on device "
                f"{device}, which has {self.limit - self.reserved(device)} of {self.limit} left"
            )
        self.in_use[device] += size
        self.peak[device] = max(self.peak[device], self.in_use[device])

    def reserved(self, device: int) -> int:
        return self.in_use[device] + sum(self.kept[device])

    def free(self, device: int, pointer: int) -> None:
        found = self.live.get(pointer)
        if found is None or found.device != device:
            raise CudaError(f"cuMemFreeAsync: CUDA_ERROR_INVALID_VALUE: {pointer:#x} is not live")
        del self.live[pointer]
        self._order.remove(pointer)
        if device != HOST:
            self.in_use[device] -= found.nbytes
            self.kept[device].append(found.nbytes)
        try:
            found.check("cuMemFreeAsync")
        finally:
            found.raw[:] = POISON  # what is read after this is seen to be wrong

    def find(self, pointer: int) -> Allocation | None:
        """The allocation in which an address lies."""
        at = bisect.bisect_right(self._order, pointer) - 1
        if at < 0:
            return None
        found = self.live[self._order[at]]
        return found if pointer < found.pointer + found.nbytes else None

    def expect(self, call: str, pointer: int, nbytes: int, *, device: int | None = None) -> None:
        """Raise CudaError unless one allocation (of ``device``, or page-locked) has the bytes."""
        found = self.find(pointer)
        if nbytes == 0 and found is None:
            return
        if found is None:
            raise CudaError(f"{call}: CUDA_ERROR_INVALID_VALUE: {pointer:#x} is not on a device")
        if pointer + nbytes > found.pointer + found.nbytes:
            raise CudaError(f"{call}: CUDA_ERROR_INVALID_VALUE: {nbytes} bytes leave {found.name}")
        if device is not None and found.device not in (device, HOST):
            raise CudaError(f"{call}: CUDA_ERROR_INVALID_VALUE: {found.name}, not device {device}")

    def expect_host(self, call: str, pointer: int) -> None:
        """Raise CudaError if an address, said to be the host's, is a device's."""
        found = self.find(pointer)
        if found is not None and found.device != HOST:
            raise CudaError(f"{call}: CUDA_ERROR_INVALID_VALUE: {found.name} is not host memory")

    def expect_reachable(self, call: str, arguments: Sequence[bytes], device: int) -> None:
        """Raise CudaError where a kernel's argument is an address on another device: devices do not
        see one another's memory."""
        for argument in arguments:
            found = self.find(int.from_bytes(argument, "little")) if len(argument) == 8 else None
            if found is not None and found.device not in (device, HOST):
                raise CudaError(f"{call}: CUDA_ERROR_ILLEGAL_ADDRESS: {found.name}, not {device}")

    def check(self, after: str) -> None:
        """Raise CudaError if a write left any live allocation."""
        for allocation in list(self.live.values()):
            allocation.check(after)


def move(target: int, source: int, nbytes: int) -> None:
    ctypes.memmove(target, source, nbytes)
