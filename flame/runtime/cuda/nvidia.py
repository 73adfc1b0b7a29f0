"""The driver of NVIDIA's GPUs, by cuda-bindings; `flame.runtime.cuda.driver` says what each call
means.

Invariants: a device's primary context is retained at its first use and kept; handles leave this
file as plain integers; every status is checked.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from flame.core.errors import CudaError, DeviceError, OutOfMemoryError
from flame.kernel.library import Problem
from flame.runtime.cuda import nvrtc
from flame.runtime.cuda.driver import DeviceProperties, Dim, Lifetime, Prepared
from flame.runtime.cuda.packages import bindings

MINIMUM_CAPABILITY: Final = (8, 0)
MINIMUM_DRIVER: Final = 13000  # of CUDA 13, as cuDriverGetVersion counts
STATIC_SHARED_LIMIT: Final = 48 << 10  # bytes a kernel may ask for without saying so before

# Statuses after which every call of the process fails.
_BROKEN: Final = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        "ILLEGAL_ADDRESS",
        "MISALIGNED_ADDRESS",
        "LAUNCH_FAILED",
        "LAUNCH_TIMEOUT",
        "ILLEGAL_INSTRUCTION",
        "INVALID_ADDRESS_SPACE",
        "INVALID_PC",
        "HARDWARE_STACK_ERROR",
        "ECC_UNCORRECTABLE",
        "ASSERT",
        "CONTAINED",
    )
)

# What to do about statuses that mean more than a call that was wrong.
_HINTS: Final = {
    "CUDA_ERROR_ILLEGAL_ADDRESS": "a kernel touched memory that is not its own, and this process "
    "can use CUDA no more; FLAME_CUDA_POOL=0 compute-sanitizer python ... names the kernel",
    "CUDA_ERROR_MISALIGNED_ADDRESS": "a kernel read or wrote at an address that its type does not "
    "allow, and this process can use CUDA no more",
    "CUDA_ERROR_LAUNCH_FAILED": "a kernel failed while it ran, and this process can use CUDA no "
    "more; compute-sanitizer python ... names the kernel",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": "the kernel needs more registers or shared memory for a "
    "block than the device has",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the machine code is for another architecture",
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": "this cannot be done while a graph is captured",
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": "something that cannot be captured was called "
    "between the begin and the end of a capture",
}


@dataclass(frozen=True)
class _Held:
    """What is kept of a device in use."""

    device: Any
    context: Any
    pool: Any  # None: every allocation by itself


class NvidiaDriver:
    """`Driver` for NVIDIA's GPUs. Raises DeviceError where packages, the driver or GPUs are
    missing, with the way out."""

    def __init__(self) -> None:
        self._drv = bindings("driver")
        self._start()
        # 0: cuMemAlloc for each allocation, so that compute-sanitizer sees the bounds of all.
        self._pooled = os.environ.get("FLAME_CUDA_POOL", "1") != "0"
        self._held: dict[int, _Held] = {}
        self._properties: dict[int, DeviceProperties] = {}
        self._local = threading.local()
        self._lock = threading.RLock()
        self._shared: dict[int, int] = {}  # function -> bytes it was allowed to ask for
        # Objects of the bindings for handles on the path of each launch: an integer is converted
        # at each call, which costs more than a look-up.
        self._functions: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}
        self._bind()

    def _bind(self) -> None:
        """Bind the functions on hot paths: a look-up in the module costs as much as a check."""
        drv = self._drv
        self._cu_launch = drv.cuLaunchKernel
        self._cu_graph_launch = drv.cuGraphLaunch
        self._cu_allocate = drv.cuMemAllocAsync
        self._cu_free = drv.cuMemFreeAsync
        self._cu_copy = drv.cuMemcpyDtoDAsync
        self._cu_fill = drv.cuMemsetD8Async
        self._cu_set_context = drv.cuCtxSetCurrent

    def _start(self) -> None:
        drv = self._drv
        try:
            (status,) = drv.cuInit(0)
        except RuntimeError as error:  # pathfinder's: there is no libcuda
            raise DeviceError(
                "CUDA needs NVIDIA's display driver, whose library libcuda.so.1 is not on this "
                "machine; install the driver (580 or newer), or in a container pass the GPUs on "
                f"(docker run --gpus all). Without a GPU use device='cpu'. ({error})"
            ) from error
        if status:
            raise DeviceError(
                f"NVIDIA's driver does not start: cuInit gave {status.name}. "
                + (
                    "It sees no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
                    if status.name == "CUDA_ERROR_NO_DEVICE"
                    else "Look at nvidia-smi; after an update of the driver restart the machine"
                )
            )
        version = self._value("cuDriverGetVersion", drv.cuDriverGetVersion())
        if version < MINIMUM_DRIVER:
            raise DeviceError(
                f"NVIDIA's driver supports CUDA {version // 1000}.{version % 1000 // 10}; FLAME "
                "needs 13.0 or newer, which is driver 580 or newer. Update the driver"
            )
        self._count = int(self._value("cuDeviceGetCount", drv.cuDeviceGetCount()))
        if not self._count:
            raise DeviceError(
                "NVIDIA's driver sees no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use "
                "device='cpu'"
            )

    # --- statuses ---------------------------------------------------------------------------------

    def _value(self, call: str, result: tuple[Any, ...]) -> Any:
        """What a call gave beside its status, which must be success."""
        if result[0]:
            self._fail(call, result[0])
        return result[1] if len(result) == 2 else result[1:]

    def _fail(self, call: str, status: Any) -> NoReturn:
        name = status.name
        described = self._drv.cuGetErrorString(status)
        words = described[1].decode() if not described[0] and described[1] else "no description"
        if name == "CUDA_ERROR_OUT_OF_MEMORY":
            raise OutOfMemoryError(f"{call}: {name} ({words})")
        if name in _BROKEN:
            Lifetime.over = True  # nothing can be freed, and what tried would hide this error
        hint = _HINTS.get(name)
        raise CudaError(f"{call}: {name} ({words})" + (f": {hint}" if hint else ""))

    # --- devices ----------------------------------------------------------------------------------

    def device_count(self) -> int:
        return self._count

    def _check(self, device: int) -> None:
        if not 0 <= device < self._count:
            names = "cuda:0" if self._count == 1 else f"cuda:0 to cuda:{self._count - 1}"
            raise DeviceError(f"there is no device cuda:{device}; this machine has {names}")

    def properties(self, device: int) -> DeviceProperties:
        known = self._properties.get(device)
        if known is None:
            self._check(device)
            known = self._properties[device] = self._read_properties(device)
        return known

    def _read_properties(self, device: int) -> DeviceProperties:
        drv, kind = self._drv, self._drv.CUdevice_attribute
        handle = self._value("cuDeviceGet", drv.cuDeviceGet(device))

        def attribute(which: Any) -> int:
            return int(self._value("cuDeviceGetAttribute", drv.cuDeviceGetAttribute(which, handle)))

        name = self._value("cuDeviceGetName", drv.cuDeviceGetName(256, handle))
        return DeviceProperties(
            name=name.split(b"\0", 1)[0].decode(),
            capability=(
                attribute(kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
                attribute(kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
            ),
            total_memory=int(self._value("cuDeviceTotalMem", drv.cuDeviceTotalMem(handle))),
            multiprocessor_count=attribute(kind.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
            shared_memory_per_block=attribute(
                kind.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            ),
            l2_cache_size=attribute(kind.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE),
        )

    def use(self, device: int) -> None:
        if getattr(self._local, "device", -1) == device:
            return
        held = self._hold(device)
        (status,) = self._cu_set_context(held.context)
        if status:
            self._fail("cuCtxSetCurrent", status)
        self._local.device = device

    @contextmanager
    def _on(self, device: int) -> Iterator[None]:
        """A device is the current one inside, and the one before it afterwards: memory of another
        device may be freed at any line, by the garbage collector, and a launch that follows must
        still find its own device."""
        before = getattr(self._local, "device", -1)
        self.use(device)
        try:
            yield
        finally:
            if before >= 0:
                self.use(before)

    def _hold(self, device: int) -> _Held:
        """The device's context and pool, made at its first use."""
        held = self._held.get(device)
        if held is not None:
            return held
        with self._lock:
            if device not in self._held:
                self._held[device] = self._open(device)
            return self._held[device]

    def _open(self, device: int) -> _Held:
        drv = self._drv
        properties = self.properties(device)
        if properties.capability < MINIMUM_CAPABILITY:
            major, minor = properties.capability
            raise DeviceError(
                f"cuda:{device} ({properties.name}) has compute capability {major}.{minor}; FLAME "
                "needs 8.0 (Ampere: A100, RTX 30) or newer. Use device='cpu'"
            )
        handle = self._value("cuDeviceGet", drv.cuDeviceGet(device))
        context = self._value("cuDevicePrimaryCtxRetain", drv.cuDevicePrimaryCtxRetain(handle))
        pool = None
        if self._pooled:
            supported = self._value(
                "cuDeviceGetAttribute",
                drv.cuDeviceGetAttribute(
                    drv.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, handle
                ),
            )
            if not supported:
                raise DeviceError(
                    f"cuda:{device} ({properties.name}) has no memory pools, as some virtual GPUs; "
                    "set FLAME_CUDA_POOL=0 to allocate without them, which is slower"
                )
            pool = self._value("cuDeviceGetDefaultMemPool", drv.cuDeviceGetDefaultMemPool(handle))
            # By default a pool gives all that is free back at each synchronisation.
            self._value(
                "cuMemPoolSetAttribute",
                drv.cuMemPoolSetAttribute(
                    pool,
                    drv.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
                    drv.cuuint64_t(2**64 - 1),
                ),
            )
        return _Held(handle, context, pool)

    # --- memory -----------------------------------------------------------------------------------

    def allocate(self, device: int, nbytes: int, stream: int) -> int:
        if getattr(self._local, "device", -1) != device:
            with self._on(device):
                return self.allocate(device, nbytes, stream)
        if self._pooled:
            result = self._cu_allocate(nbytes or 1, self._streams.get(stream, stream))
            if result[0]:
                self._fail("cuMemAllocAsync", result[0])
        else:
            result = self._drv.cuMemAlloc(nbytes or 1)
            if result[0]:
                self._fail("cuMemAlloc", result[0])
        return int(result[1])

    def free(self, device: int, pointer: int, stream: int) -> None:
        if getattr(self._local, "device", -1) != device:
            with self._on(device):
                self.free(device, pointer, stream)
            return
        if self._pooled:
            (status,) = self._cu_free(pointer, self._streams.get(stream, stream))
            if status:
                self._fail("cuMemFreeAsync", status)
        else:
            self.synchronize(stream)
            self._value("cuMemFree", self._drv.cuMemFree(pointer))

    def trim(self, device: int) -> None:
        pool = self._hold(device).pool
        if pool is not None:
            self._value("cuMemPoolTrimTo", self._drv.cuMemPoolTrimTo(pool, 0))

    def memory_info(self, device: int) -> tuple[int, int]:
        with self._on(device):
            free, total = self._value("cuMemGetInfo", self._drv.cuMemGetInfo())
        return int(free), int(total)

    def reserved(self, device: int) -> int:
        drv, pool = self._drv, self._hold(device).pool
        if pool is None:
            return 0
        which = drv.CUmemPool_attribute.CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT
        return int(self._value("cuMemPoolGetAttribute", drv.cuMemPoolGetAttribute(pool, which)))

    def allocate_pinned(self, nbytes: int) -> int:
        drv = self._drv
        if getattr(self._local, "device", -1) < 0:
            self.use(0)  # any context will do: PORTABLE
        flags = drv.CU_MEMHOSTALLOC_PORTABLE | drv.CU_MEMHOSTALLOC_DEVICEMAP
        return int(self._value("cuMemHostAlloc", drv.cuMemHostAlloc(nbytes or 1, flags)))

    def free_pinned(self, pointer: int) -> None:
        if getattr(self._local, "device", -1) < 0:
            self.use(0)
        self._value("cuMemFreeHost", self._drv.cuMemFreeHost(pointer))

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._value(
            "cuMemcpyHtoDAsync", self._drv.cuMemcpyHtoDAsync(target, source, nbytes, stream)
        )

    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._value(
            "cuMemcpyDtoHAsync", self._drv.cuMemcpyDtoHAsync(target, source, nbytes, stream)
        )

    def copy_on_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        (status,) = self._cu_copy(target, source, nbytes, self._streams.get(stream, stream))
        if status:
            self._fail("cuMemcpyDtoDAsync", status)

    def copy_across(
        self,
        target: int,
        target_device: int,
        source: int,
        source_device: int,
        nbytes: int,
        stream: int,
    ) -> None:
        to, of = self._hold(target_device).context, self._hold(source_device).context
        self._value(
            "cuMemcpyPeerAsync", self._drv.cuMemcpyPeerAsync(target, to, source, of, nbytes, stream)
        )

    def fill(self, target: int, byte: int, nbytes: int, stream: int) -> None:
        (status,) = self._cu_fill(target, byte, nbytes, self._streams.get(stream, stream))
        if status:
            self._fail("cuMemsetD8Async", status)

    # --- streams and events -----------------------------------------------------------------------

    def create_stream(self, device: int, priority: int = 0) -> int:
        with self._on(device):  # first, as it refuses devices that are too old
            flags = int(self._drv.CUstream_flags.CU_STREAM_NON_BLOCKING)
            made = self._value(
                "cuStreamCreateWithPriority", self._drv.cuStreamCreateWithPriority(flags, priority)
            )
        handle = int(made)
        self._streams[handle] = made
        return handle

    def destroy_stream(self, stream: int) -> None:
        self._streams.pop(stream, None)
        self._value("cuStreamDestroy", self._drv.cuStreamDestroy(stream))

    def synchronize(self, stream: int) -> None:
        self._value("cuStreamSynchronize", self._drv.cuStreamSynchronize(stream))

    def synchronize_device(self, device: int) -> None:
        with self._on(device):
            self._value("cuCtxSynchronize", self._drv.cuCtxSynchronize())

    def stream_done(self, stream: int) -> bool:
        return self._done("cuStreamQuery", self._drv.cuStreamQuery(stream))

    def _done(self, call: str, result: tuple[Any, ...]) -> bool:
        if result[0] == self._drv.CUresult.CUDA_ERROR_NOT_READY:
            return False
        self._value(call, result)
        return True

    def create_event(self, device: int, *, timing: bool) -> int:
        flags = self._drv.CUevent_flags
        wanted = flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING
        with self._on(device):
            return int(self._value("cuEventCreate", self._drv.cuEventCreate(int(wanted))))

    def destroy_event(self, event: int) -> None:
        self._value("cuEventDestroy", self._drv.cuEventDestroy(event))

    def record_event(self, event: int, stream: int) -> None:
        self._value("cuEventRecord", self._drv.cuEventRecord(event, stream))

    def wait_event(self, stream: int, event: int) -> None:
        self._value("cuStreamWaitEvent", self._drv.cuStreamWaitEvent(stream, event, 0))

    def synchronize_event(self, event: int) -> None:
        self._value("cuEventSynchronize", self._drv.cuEventSynchronize(event))

    def event_done(self, event: int) -> bool:
        return self._done("cuEventQuery", self._drv.cuEventQuery(event))

    def elapsed(self, begin: int, end: int) -> float:
        return float(self._value("cuEventElapsedTime", self._drv.cuEventElapsedTime(begin, end)))

    # --- kernels ----------------------------------------------------------------------------------

    def compile(self, text: str, name: str, capability: tuple[int, int]) -> bytes:
        return nvrtc.compile_text(text, name, capability)

    def compile_together(
        self, texts: Sequence[str], name: str, capability: tuple[int, int]
    ) -> bytes:
        return nvrtc.compile_text(nvrtc.join(texts), name, capability)

    def compiler_identity(self) -> str:
        return nvrtc.identity()

    def load_module(self, device: int, image: bytes) -> int:
        with self._on(device):
            return int(self._value("cuModuleLoadData", self._drv.cuModuleLoadData(image)))

    def function(self, module: int, symbol: str, shared: int) -> int:
        drv = self._drv
        status, made = drv.cuModuleGetFunction(module, symbol.encode())
        if status:
            self._fail(f"cuModuleGetFunction({symbol!r})", status)
        handle = int(made)
        if shared > max(STATIC_SHARED_LIMIT, self._shared.get(handle, 0)):
            which = drv.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._value(
                f"cuFuncSetAttribute({symbol!r}, shared memory of {shared} bytes)",
                drv.cuFuncSetAttribute(made, which, shared),
            )
            self._shared[handle] = shared
        self._functions[handle] = made
        return handle

    def parameter_sizes(self, function: int) -> tuple[int, ...]:
        sizes: list[int] = []
        while True:
            status, _, size = self._drv.cuFuncGetParamInfo(function, len(sizes))
            if status == self._drv.CUresult.CUDA_ERROR_INVALID_VALUE:  # past the last one
                return tuple(sizes)
            if status:
                self._fail("cuFuncGetParamInfo", status)
            sizes.append(int(size))

    def launch(
        self, function: int, grid: Dim, block: Dim, shared: int, stream: int, arguments: int
    ) -> None:
        (status,) = self._cu_launch(
            self._functions[function],
            *grid,
            *block,
            shared,
            self._streams.get(stream, stream),
            arguments,
            0,
        )
        if status:
            self._fail(f"cuLaunchKernel(grid {grid}, block {block}, shared {shared})", status)

    # --- graphs -----------------------------------------------------------------------------------

    def begin_capture(self, stream: int) -> None:
        mode = self._drv.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._value("cuStreamBeginCapture", self._drv.cuStreamBeginCapture(stream, mode))

    def end_capture(self, stream: int) -> int:
        drv = self._drv
        graph = self._value("cuStreamEndCapture", drv.cuStreamEndCapture(stream))
        try:
            made = self._value("cuGraphInstantiate", drv.cuGraphInstantiate(graph, 0))
        finally:
            drv.cuGraphDestroy(graph)
        self._value("cuGraphUpload", drv.cuGraphUpload(made, stream))
        return int(made)

    def launch_graph(self, graph: int, stream: int) -> None:
        (status,) = self._cu_graph_launch(graph, self._streams.get(stream, stream))
        if status:
            self._fail("cuGraphLaunch", status)

    def destroy_graph(self, graph: int) -> None:
        self._value("cuGraphExecDestroy", self._drv.cuGraphExecDestroy(graph))

    # --- libraries --------------------------------------------------------------------------------

    def prepare(self, problem: Problem, device: int) -> Prepared | None:
        # Imported late: the libraries take longer to load than everything else.
        libraries = importlib.import_module("flame.runtime.cuda.libraries")
        plan: Prepared | None = libraries.prepare(problem, device)
        return plan

    def versions(self) -> dict[str, Any]:
        from flame.runtime.cuda.info import library_versions

        version = self._value("cuDriverGetVersion", self._drv.cuDriverGetVersion())
        return {
            "driver": f"CUDA {version // 1000}.{version % 1000 // 10}",
            **library_versions(),
        }
