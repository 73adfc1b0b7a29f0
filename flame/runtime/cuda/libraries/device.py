"""The few calls of the CUDA driver that planning needs: contexts, scratch memory, timing.

Invariant: planning never disturbs a capture that is going on in this thread: it works on a stream
of its own, and what a capture would forbid (allocation) is done in relaxed mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from flame.core.dtypes import DType
from flame.core.errors import CudaError, OutOfMemoryError
from flame.runtime.cuda.packages import bindings, calling

_BLOCK_BYTES = 1 << 22


def checked(name: str, *arguments: Any) -> Any:
    """The values that a call of the driver gives. Raises CudaError or OutOfMemoryError."""
    status, *values = calling(getattr(bindings("driver"), name), *arguments)
    if int(status):
        kind = OutOfMemoryError if status.name == "CUDA_ERROR_OUT_OF_MEMORY" else CudaError
        raise kind(f"{name}: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


@contextlib.contextmanager
def on_device(device: int) -> Iterator[None]:
    """The device's primary context is the current one of this thread inside, and captures of this
    thread do not forbid planning."""
    driver = bindings("driver")
    checked("cuInit", 0)
    before = checked("cuCtxGetCurrent")
    checked("cuCtxSetCurrent", _context(device))
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    mode = checked("cuThreadExchangeStreamCaptureMode", relaxed)
    try:
        yield
    finally:
        checked("cuThreadExchangeStreamCaptureMode", mode)
        if int(before):
            checked("cuCtxSetCurrent", before)


_contexts: dict[int, Any] = {}


def _context(device: int) -> Any:
    if device not in _contexts:
        _contexts[device] = checked("cuDevicePrimaryCtxRetain", checked("cuDeviceGet", device))
    return _contexts[device]


def device_name(device: int) -> str:
    """As the driver says it, e.g. "NVIDIA H200"."""
    name = checked("cuDeviceGetName", 256, checked("cuDeviceGet", device))
    return str(bytes(name).split(b"\0")[0].decode())


class Scratch:
    """Memory and a stream for trial runs on the current device; closes with everything freed."""

    def __init__(self) -> None:
        flag = bindings("driver").CUstream_flags.CU_STREAM_NON_BLOCKING
        self._made = checked("cuStreamCreate", flag)
        self.stream = int(self._made)
        self._pointers: list[Any] = []

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        for pointer in self._pointers:
            checked("cuMemFreeAsync", pointer, self._made)
        checked("cuStreamSynchronize", self._made)
        checked("cuStreamDestroy", self._made)

    def allocate(self, nbytes: int) -> int:
        """Raises OutOfMemoryError."""
        pointer = checked("cuMemAllocAsync", max(nbytes, 256), self._made)
        self._pointers.append(pointer)
        return int(pointer)

    def random(self, dtype: DType, count: int) -> int:
        """``count`` normal numbers (of one repeated block: what they are does not matter, but all
        alike would draw less power, and run faster, than real data)."""
        size = max(count * dtype.itemsize, 1)
        pointer = self.allocate(size)
        block = _normal(dtype)[: max(count, 1)]
        filled = min(block.nbytes, size)
        checked("cuMemcpyHtoDAsync", pointer, block.ctypes.data, filled, self._made)
        checked("cuStreamSynchronize", self._made)
        while filled < size:
            step = min(filled, size - filled)
            checked("cuMemcpyDtoDAsync", pointer + filled, pointer, step, self._made)
            filled += step
        return pointer

    def milliseconds(self, run: Callable[[], None], repeats: int) -> float:
        """Time of one of ``repeats`` runs in a row."""
        flag = bindings("driver").CUevent_flags.CU_EVENT_DEFAULT
        begin, end = checked("cuEventCreate", flag), checked("cuEventCreate", flag)
        try:
            checked("cuEventRecord", begin, self._made)
            for _ in range(repeats):
                run()
            checked("cuEventRecord", end, self._made)
            checked("cuEventSynchronize", end)
            return float(checked("cuEventElapsedTime", begin, end)) / repeats
        finally:
            checked("cuEventDestroy", begin)
            checked("cuEventDestroy", end)


_normals: dict[DType, Any] = {}


def _normal(dtype: DType) -> Any:
    if dtype not in _normals:
        generator = np.random.default_rng(0)
        count = _BLOCK_BYTES // dtype.itemsize
        values = generator.standard_normal(count, np.float32)
        _normals[dtype] = values.astype(dtype.numpy)
    return _normals[dtype]


def fastest(
    scratch: Scratch, runs: Sequence[Callable[[], None]], failures: tuple[type[Exception], ...]
) -> int:
    """The index of the run that takes least time, each the best of two rounds. Runs that raise one
    of ``failures`` are left out, as heuristics now and then offer what a launch refuses; 0 where
    all do."""
    repeats = {}
    for index, run in enumerate(runs):
        try:
            run()  # loads the kernel
        except failures:
            continue
        once = scratch.milliseconds(run, 1)
        repeats[index] = max(2, min(20, int(1.0 / max(once, 1e-3))))
    best = dict.fromkeys(repeats, float("inf"))
    for _ in range(2):  # rounds, so that a change of the clock falls on no single one
        for index, count in repeats.items():
            best[index] = min(best[index], scratch.milliseconds(runs[index], count))
    return min(best, key=best.__getitem__, default=0)
