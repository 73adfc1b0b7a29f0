"""One NVIDIA GPU with nothing between it and the libraries but the driver's own calls."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from flame.core.determinism import (
    are_deterministic_algorithms_enabled,
    use_deterministic_algorithms,
)
from flame.core.errors import CudaError, DeviceError, OutOfMemoryError
from flame.core.precision import choose_float32_matmul_precision, get_float32_matmul_precision
from flame.runtime.cuda.libraries import device as gpu
from flame.runtime.cuda.libraries import prepare
from flame.runtime.cuda.memory import ROOM
from flame.runtime.cuda.packages import bindings


class Gpu:
    """Device 0, a stream, and memory that is freed by `release`."""

    def __init__(self) -> None:
        self.driver = bindings("driver")
        gpu.checked("cuInit", 0)
        self.context = gpu.checked("cuDevicePrimaryCtxRetain", gpu.checked("cuDeviceGet", 0))
        gpu.checked("cuCtxSetCurrent", self.context)
        self.raw_stream = gpu.checked("cuStreamCreate", 1)
        self.stream = int(self.raw_stream)
        self.live: list[int] = []

    def allocate(self, nbytes: int) -> int:
        pointer = int(gpu.checked("cuMemAlloc", max(nbytes, 256)))
        self.live.append(pointer)
        return pointer

    def upload(self, values: np.ndarray, offset: int = 0) -> int:
        """A copy on the device, ``offset`` bytes behind an aligned address."""
        values = np.ascontiguousarray(values)
        pointer = self.allocate(values.nbytes + offset) + offset
        if values.nbytes:
            # In the stream: from pageable memory the call may return before its last bytes have
            # arrived, and this stream waits for no other.
            at = values.ctypes.data
            gpu.checked("cuMemcpyHtoDAsync", pointer, at, values.nbytes, self.raw_stream)
            self.synchronize()
        return pointer

    def download(self, pointer: int, like: np.ndarray) -> np.ndarray:
        found = np.empty_like(like)
        self.synchronize()
        if found.nbytes:
            gpu.checked("cuMemcpyDtoH", found.ctypes.data, pointer, found.nbytes)
        return found

    def synchronize(self) -> None:
        gpu.checked("cuStreamSynchronize", self.raw_stream)

    def run(self, prepared: Any, pointers: Sequence[int]) -> None:
        self._wait_for_room()
        workspace = self.allocate(prepared.workspace) if prepared.workspace else 0
        prepared.enqueue(pointers, workspace, self.stream)

    def _wait_for_room(self) -> None:
        """Until there is memory for a kernel's code: of a library that finds none, every call with
        that kernel fails from then on, and tests beside this one may have taken all for a while."""
        for _ in range(300):
            free, _ = gpu.checked("cuMemGetInfo")
            if int(free) >= ROOM:
                return
            time.sleep(0.1)
        raise OutOfMemoryError("other processes have left no room on the GPU for half a minute")

    def solve(self, problem: Any, pointers: Sequence[int]) -> bool:
        """Prepare and run; False where the library does not take the problem."""
        prepared = prepare(problem, 0)
        if prepared is None:
            return False
        self.run(prepared, pointers)
        self.synchronize()
        return True

    def capture(self, prepared: Any, pointers: Sequence[int], workspace: int) -> Any:
        """A graph of one call, not yet run."""
        local = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        gpu.checked("cuStreamBeginCapture", self.raw_stream, local)
        prepared.enqueue(pointers, workspace, self.stream)
        return gpu.checked("cuStreamEndCapture", self.raw_stream)

    def replay(self, graph: Any) -> None:
        executable = gpu.checked("cuGraphInstantiate", graph, 0)
        gpu.checked("cuGraphLaunch", executable, self.raw_stream)
        self.synchronize()

    def release(self) -> None:
        self.synchronize()
        for pointer in self.live:
            gpu.checked("cuMemFree", pointer)
        self.live.clear()


_device: Gpu | str | None = None


def _find() -> Gpu | str:
    try:
        gpu.checked("cuInit", 0)
        count = gpu.checked("cuDeviceGetCount")
    except (DeviceError, CudaError) as error:
        return f"no NVIDIA GPU: {error}"
    return Gpu() if count else "no NVIDIA GPU"


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> Iterator[Gpu]:
    """The GPU, with a cache on disk of the run's own; skips where there is none."""
    global _device
    if _device is None:
        _device = _find()
    if isinstance(_device, str):
        pytest.skip(_device)
    shared = tmp_path_factory.getbasetemp() / "plans"
    monkeypatch.setenv("FLAME_CACHE_DIR", str(shared))
    monkeypatch.setenv("FLAME_CUDA_TUNE", "0")
    precision, deterministic = (
        get_float32_matmul_precision(),
        are_deterministic_algorithms_enabled(),
    )
    yield _device
    choose_float32_matmul_precision(precision)
    use_deterministic_algorithms(deterministic)
    _device.release()
