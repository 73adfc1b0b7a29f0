"""Bytes between host and devices, and between devices.

Invariants: when a function returns, memory of the host that is not pinned may be changed (a source)
or read (a target); copies of pinned memory that nobody waited for are known to its storage.
Everything else is ordered by the current stream. Large copies of ordinary memory go through pinned
blocks in chunks, so that the host's own copy and the device's run beside one another.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Final

from flame.core.errors import DeviceError
from flame.runtime.cpu.emission import compile_threads
from flame.runtime.cuda import errors
from flame.runtime.cuda.driver import Driver, driver
from flame.runtime.cuda.memory import refuse_capture
from flame.runtime.cuda.pinned import pinned_memory
from flame.runtime.cuda.storage import CudaStorage, PinnedStorage
from flame.runtime.cuda.streams import current_handle, wait
from flame.runtime.storage import Storage

SMALL: Final = 64 << 10  # the driver copies so much at once, whatever is queued before
CHUNK: Final = 16 << 20
_DEPTH: Final = 3  # chunks under way
_PIECE: Final = 2 << 20  # bytes that are worth a thread
_MOST_THREADS: Final = 8


def copy(
    target: Storage,
    target_pointer: int,
    source: Storage,
    source_pointer: int,
    nbytes: int,
    *,
    non_blocking: bool = False,
) -> None:
    """Copy bytes from one storage to another, at least one of which is on a device.

    ``non_blocking``: return before the bytes have arrived where the host's side is pinned; without
    it, a copy to the host has arrived. Raises what kernels found wrong where it waits.
    """
    if nbytes == 0:
        return
    if isinstance(target, CudaStorage):
        if isinstance(source, CudaStorage):
            _on_devices(target, target_pointer, source, source_pointer, nbytes)
        else:
            _upload(target, target_pointer, source, source_pointer, nbytes, non_blocking)
    elif isinstance(source, CudaStorage):
        _download(target, target_pointer, source, source_pointer, nbytes, non_blocking)
    else:
        raise DeviceError("transfer.copy is between a device and the host, or between devices")


def _on_devices(target: CudaStorage, to: int, source: CudaStorage, of: int, nbytes: int) -> None:
    made = driver()
    from_device, to_device = source.device_index, target.device_index
    stream = current_handle(from_device)
    source.record_stream(stream)
    made.use(from_device)
    if from_device == to_device:
        target.record_stream(stream)
        made.copy_on_device(to, of, nbytes, stream)
        return
    refuse_capture("a copy to another device")
    there = current_handle(to_device)
    target.record_stream(there)
    wait(stream, there, to_device)
    made.copy_across(to, to_device, of, from_device, nbytes, stream)
    wait(there, stream, from_device)


def _upload(
    target: CudaStorage, to: int, source: Storage, of: int, nbytes: int, non_blocking: bool
) -> None:
    device = target.device_index
    stream = current_handle(device)
    target.record_stream(stream)
    if not isinstance(source, PinnedStorage):
        from_host(device, to, of, nbytes, stream)
        return
    refuse_capture("a copy from the host")
    made = driver()
    made.use(device)
    made.copy_to_device(to, of, nbytes, stream)
    if non_blocking:
        source.uses.add((device, stream))
    else:
        made.synchronize(stream)
        errors.check(device)


def from_host(device: int, to: int, of: int, nbytes: int, stream: int) -> None:
    """Queue a copy of ordinary memory of the host, by address, on a stream. The source may be
    changed when this returns; nothing waits for what the stream has to do before."""
    refuse_capture("a copy from the host")
    made = driver()
    made.use(device)
    if nbytes <= SMALL:
        made.copy_to_device(to, of, nbytes, stream)
    else:
        _upload_staged(made, device, stream, to, of, nbytes)


def _upload_staged(made: Driver, device: int, stream: int, to: int, of: int, nbytes: int) -> None:
    """The source is read when this returns; the device may still be reading the pinned copy."""
    pinned = pinned_memory()
    size = min(nbytes, CHUNK)
    blocks = [pinned.allocate(size) for _ in range(min(_DEPTH, -(-nbytes // size)))]
    events: list[int] = []
    try:
        for number, start in enumerate(range(0, nbytes, size)):
            count = min(size, nbytes - start)
            place = number % len(blocks)
            if number >= len(blocks):
                made.synchronize_event(events[place])
            host_copy(blocks[place], of + start, count)
            made.copy_to_device(to + start, blocks[place], count, stream)
            if nbytes > size * len(blocks):
                if number < len(blocks):
                    events.append(made.create_event(device, timing=False))
                made.record_event(events[place], stream)
    finally:
        for event in events:
            made.destroy_event(event)
        for block in blocks:
            pinned.free(block, size, {(device, stream)})


def _download(
    target: Storage, to: int, source: CudaStorage, of: int, nbytes: int, non_blocking: bool
) -> None:
    device = source.device_index
    stream = current_handle(device)
    source.record_stream(stream)
    if not isinstance(target, PinnedStorage):
        to_host(device, to, of, nbytes, stream)
        return
    refuse_capture("a copy to the host")
    made = driver()
    made.use(device)
    made.copy_to_host(to, of, nbytes, stream)
    if non_blocking:
        target.uses.add((device, stream))
    else:
        made.synchronize(stream)
        errors.check(device)


def to_host(device: int, to: int, of: int, nbytes: int, stream: int) -> None:
    """Copy to ordinary memory of the host, by address, behind all that a stream has to do. The
    bytes are there when this returns; raises what kernels found wrong."""
    refuse_capture("a copy to the host")
    made = driver()
    made.use(device)
    if nbytes <= SMALL:
        made.copy_to_host(to, of, nbytes, stream)
        made.synchronize(stream)
    else:
        _download_staged(made, device, stream, to, of, nbytes)
    errors.check(device)


def _download_staged(made: Driver, device: int, stream: int, to: int, of: int, nbytes: int) -> None:
    pinned = pinned_memory()
    size = min(nbytes, CHUNK)
    idle = deque(pinned.allocate(size) for _ in range(min(_DEPTH, -(-nbytes // size))))
    blocks = tuple(idle)
    under_way: deque[tuple[int, int, int, int]] = deque()  # block, event, start, count

    def arrive() -> None:
        block, event, start, count = under_way.popleft()
        try:
            made.synchronize_event(event)
        finally:
            made.destroy_event(event)
        host_copy(to + start, block, count)
        idle.append(block)

    try:
        for start in range(0, nbytes, size):
            if not idle:
                arrive()
            block, count = idle.popleft(), min(size, nbytes - start)
            made.copy_to_host(block, of + start, count, stream)
            event = made.create_event(device, timing=False)
            under_way.append((block, event, start, count))
            made.record_event(event, stream)
        while under_way:
            arrive()
    finally:
        for _, event, _, _ in under_way:
            made.destroy_event(event)
        busy = {(device, stream)} if under_way else set()
        for block in blocks:
            pinned.free(block, size, busy)


@cache
def _threads() -> tuple[int, ThreadPoolExecutor]:
    count = min(_MOST_THREADS, compile_threads())
    return count, ThreadPoolExecutor(count, "flame-copy")


os.register_at_fork(after_in_child=_threads.cache_clear)


def host_copy(target: int, source: int, nbytes: int) -> None:
    """Copy memory of the host; several threads share a large copy, as one cannot use all of the
    memory's bandwidth."""
    pieces = nbytes // _PIECE
    if pieces < 2 or compile_threads() < 2:
        ctypes.memmove(target, source, nbytes)
        return
    count, threads = _threads()
    size = -(-nbytes // min(pieces, count))
    size = (size + 4095) & ~4095

    def part(start: int) -> None:
        ctypes.memmove(target + start, source + start, min(size, nbytes - start))

    list(threads.map(part, range(0, nbytes, size)))
