"""Device memory from the driver's stream-ordered pool, with statistics.

Invariants: memory is freed on the stream that it was allocated on, or on one that waits for all
streams that used it, so that its next owner cannot write into it too early; while a graph is
captured nothing is freed, and the capturing thread allocates nothing.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from flame.core.errors import OutOfMemoryError, StateError
from flame.runtime.cpu.allocator import readable
from flame.runtime.cuda.devices import check_exists
from flame.runtime.cuda.driver import Driver, Lifetime, per_driver
from flame.runtime.cuda.live import live_report
from flame.runtime.cuda.streams import current_handle, wait

ROOM: Final = 64 << 20  # bytes, see `leave_room`
_WAYS_OUT: Final = (
    "Use a smaller batch, drop tensors you no longer need, compute in flame.bfloat16, or trade "
    "time for memory by flame.autograd.checkpoint"
)


@dataclass(frozen=True)
class MemoryStatistics:
    """Bytes in use by tensors and programs, bytes that the pool holds, and counts.

    Peaks count since `reset_peak`; ``retries``: allocations that needed a wait and a trim.
    """

    allocated: int
    peak_allocated: int
    reserved: int
    live: int
    allocations: int
    retries: int


class DeviceMemory:
    """The memory of one device of one driver."""

    __slots__ = (
        "_allocate",
        "_free",
        "allocated",
        "allocations",
        "device",
        "driver",
        "freed",
        "peak",
        "retries",
    )

    def __init__(self, driver: Driver, device: int) -> None:
        self.driver, self.device = driver, device
        self._allocate, self._free = driver.allocate, driver.free
        self.allocated = self.peak = self.allocations = self.freed = self.retries = 0

    def allocate(self, nbytes: int, stream: int) -> int:
        """At least ``nbytes`` bytes, for use on a stream. Raises OutOfMemoryError."""
        if _capturing:
            refuse_capture(f"allocating {readable(nbytes)} on cuda:{self.device}")
        try:
            pointer = self._allocate(self.device, nbytes, stream)
        except OutOfMemoryError:
            pointer = self._retry(nbytes, stream)
        # Under the GIL no other thread runs between reading and writing a counter.
        self.allocations += 1
        allocated = self.allocated + nbytes
        self.allocated = allocated
        if allocated > self.peak:
            self.peak = allocated
        return pointer

    def free(self, pointer: int, nbytes: int, stream: int, uses: set[int] | None = None) -> None:
        """Take back what ``allocate(nbytes, stream)`` gave; ``uses``: other streams whose work may
        still touch it."""
        if Lifetime.over:
            return
        if _capturing:
            _waiting.append((self, pointer, nbytes, stream, uses))
            return
        if uses:
            stream = self._last(stream, uses)
        self._free(self.device, pointer, stream)
        self.allocated -= nbytes
        self.freed += 1

    def _last(self, stream: int, uses: set[int]) -> int:
        """A stream that has waited for all others. One of the users: it may have to wait anyway,
        while the work that follows in the allocating stream may not."""
        others = sorted(uses - {stream})
        if not others:
            return stream
        last = others.pop()
        for other in (stream, *others):
            wait(last, other, self.device, self.driver)
        return last

    def _retry(self, nbytes: int, stream: int) -> int:
        """Once more after all that was freed is back, then after cycles were collected, too."""
        for _ in self._reclaim():
            try:
                return self._allocate(self.device, nbytes, stream)
            except OutOfMemoryError as error:
                refusal = error
        raise OutOfMemoryError(self._refusal(nbytes)) from refusal

    def _reclaim(self) -> Iterator[None]:
        """Two ways to have more memory free, each before a step of the iteration."""
        self.retries += 1
        for collect in (False, True):
            if collect:
                gc.collect()
            self.driver.synchronize_device(self.device)
            self.driver.trim(self.device)
            yield

    def leave_room(self) -> None:
        """Have `ROOM` bytes free outside of the pool, which code that is about to be loaded takes.
        A library that found none for a kernel cannot load it any more, however much becomes free.
        Raises OutOfMemoryError."""
        if self._free_outside() >= ROOM:
            return
        for _ in self._reclaim():
            if self._free_outside() >= ROOM:
                return
        raise OutOfMemoryError(f"Code that is about to be loaded needs room: {self._refusal(ROOM)}")

    def _free_outside(self) -> int:
        return self.driver.memory_info(self.device)[0]

    def _refusal(self, nbytes: int) -> str:
        free, total = self.driver.memory_info(self.device)
        reserved = self.driver.reserved(self.device)
        kept = max(0, reserved - self.allocated)
        others = max(0, total - free - max(reserved, self.allocated))
        name = self.driver.properties(self.device).name
        return (
            f"cuda:{self.device} ({name}) has no room for {readable(nbytes)} ({nbytes} bytes). Of "
            f"{readable(total)}, {readable(self.allocated)} are in use by tensors and programs, "
            f"{readable(kept)} lie between them in the pool, {readable(others)} are taken "
            f"otherwise (kernels, libraries, other processes), {readable(free)} are free."
            f"{live_report(self.device)}\n{_WAYS_OUT}"
        )

    def reset_peak(self) -> None:
        """Count the peak from now on."""
        self.peak = self.allocated

    def statistics(self) -> MemoryStatistics:
        """The counters as they stand."""
        return MemoryStatistics(
            allocated=self.allocated,
            peak_allocated=self.peak,
            reserved=self.driver.reserved(self.device),
            live=self.allocations - self.freed,
            allocations=self.allocations,
            retries=self.retries,
        )


# Threads that capture, and what was freed meanwhile.
_capturing: set[int] = set()
_waiting: list[tuple[DeviceMemory, int, int, int, set[int] | None]] = []


@contextmanager
def capturing() -> Iterator[None]:
    """While the calling thread captures a graph: frees wait until the end, as they would become a
    part of the graph or break it."""
    thread = threading.get_ident()
    if thread in _capturing:
        raise StateError("this thread captures a graph already")
    _capturing.add(thread)
    try:
        yield
    finally:
        _capturing.discard(thread)
        while _waiting and not _capturing:
            memory, pointer, nbytes, stream, uses = _waiting.pop()
            memory.free(pointer, nbytes, stream, uses)


def leave_room(device: int) -> None:
    """See `DeviceMemory.leave_room`; a capture has seen to it before it began."""
    if threading.get_ident() not in _capturing:
        device_memory(device).leave_room()


def refuse_capture(what: str) -> None:
    """Raises StateError where the calling thread captures a graph."""
    if threading.get_ident() in _capturing:
        raise StateError(f"{what} cannot be a part of a captured graph; do it before the capture")


@per_driver
def _memories(driver: Driver) -> list[DeviceMemory]:
    return [DeviceMemory(driver, device) for device in range(driver.device_count())]


def device_memory(device: int) -> DeviceMemory:
    """The memory of a device. Raises DeviceError where there is none of this number."""
    memories = _memories()
    if not 0 <= device < len(memories):
        check_exists(device)
    return memories[device]


def allocate(device: int, nbytes: int, stream: int | None = None) -> int:
    """The address of at least ``nbytes`` bytes, aligned to 256, to be used on a stream (the current
    one of this thread). Raises OutOfMemoryError, which lists the largest tensors."""
    where = current_handle(device) if stream is None else stream
    return device_memory(device).allocate(nbytes, where)


def free(device: int, pointer: int, nbytes: int, stream: int | None = None) -> None:
    """Take back what `allocate` gave for the same stream."""
    where = current_handle(device) if stream is None else stream
    device_memory(device).free(pointer, nbytes, where)


def empty_cache(device: int) -> None:
    """Give what the pool holds and nobody uses back to the device, for other processes."""
    memory = device_memory(device)
    memory.driver.synchronize_device(device)
    memory.driver.trim(device)
