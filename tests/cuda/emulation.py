"""EmulatedDriver: the driver protocol on the host, CUDA texts run by g++ and fibers.

Work is done at once when it is queued; while a stream is captured it is noted instead, and done
when the graph is launched, each time in another of the orders that its events allow. Mistakes that
NVIDIA's driver would answer with a status, or with silent damage, raise: unknown handles and
addresses, copies out of bounds, writes beside an allocation, and what must not be done during a
capture.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flame.core.errors import CompileError, CudaError, CudnnError
from flame.kernel.library import MatmulProblem, Problem, operands_of
from flame.runtime.cuda.driver import DeviceProperties, Dim, Prepared

from .emulated_memory import HOST, EmulatedMemory, move
from .host_compiler import (
    HostLibrary,
    KernelFault,
    build,
    cache_folder,
    compiler_identity,
)
from .library_emulation import is_taken, prepare

SHARED_LIMIT = 232448
CHECKED = 256  # allocations up to which all guards are looked at after every launch

Work = Callable[[], None]


@dataclass(frozen=True)
class _Noted:
    """A piece of work: the stream it is on, and how much work of others it waits for."""

    do: Work
    stream: int
    after: dict[int, int]


@dataclass
class _Capture:
    """Work noted on a stream, and on those that joined it."""

    origin: int
    work: list[_Noted] = field(default_factory=list)
    queued: dict[int, int] = field(default_factory=dict)  # work of each stream so far
    seen: dict[int, dict[int, int]] = field(default_factory=dict)  # what each stream waited for


class _Replay:
    """A graph's work. Streams wait for each other only where events say so, so what a stream does
    comes as early as it may, and every second time as late."""

    def __init__(self, work: Sequence[_Noted]) -> None:
        streams = list(dict.fromkeys(noted.stream for noted in work))
        self._orders = [_order(work, streams), _order(work, streams[::-1])]

    def run(self) -> None:
        for do in self._orders[0]:
            do()
        self._orders.reverse()


def _order(work: Sequence[_Noted], streams: Sequence[int]) -> list[Work]:
    """The work in an order that events allow, the first of the streams always first."""
    waiting = {s: [noted for noted in work if noted.stream == s] for s in streams}
    done = dict.fromkeys(streams, 0)
    made: list[Work] = []
    while len(made) < len(work):
        for stream in streams:
            ready = done[stream] < len(waiting[stream])
            noted = waiting[stream][done[stream]] if ready else None
            if noted and all(done.get(s, 0) >= n for s, n in noted.after.items()):
                made.append(noted.do)
                done[stream] += 1
                break
        else:
            raise CudaError("cuGraphInstantiate: CUDA_ERROR_INVALID_VALUE: work waits in a circle")
    return made


@dataclass
class _Event:
    device: int
    timing: bool
    when: float | None = None
    capture: _Capture | None = None
    seen: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Function:
    library: HostLibrary
    symbol: str
    device: int
    shared: int
    sizes: tuple[int, ...]


class EmulatedDriver:
    """See the head of this file. devices: how many; memory: bytes of each."""

    def __init__(
        self, devices: int = 1, memory: int = 1 << 30, capability: tuple[int, int] = (9, 0)
    ) -> None:
        self.devices, self.capability = devices, capability
        self.memory = EmulatedMemory(devices, memory)
        self.lock = threading.RLock()
        self.launches: list[str] = []  # symbols and library calls, in the order in which they ran
        self.images: dict[str, bytes] = {}
        self._handles = itertools.count(0x1000, 0x10)
        self._current = threading.local()
        self._streams: dict[int, int] = {}  # stream -> device
        self._events: dict[int, _Event] = {}
        self._modules: dict[int, tuple[HostLibrary, int]] = {}
        self._functions: dict[int, _Function] = {}
        self._graphs: dict[int, _Replay] = {}
        self._captures: dict[int, _Capture] = {}  # stream -> the capture that it takes part in

    # --- devices ----------------------------------------------------------------------------------

    def device_count(self) -> int:
        return self.devices

    def properties(self, device: int) -> DeviceProperties:
        self._known_device("cuDeviceGetAttribute", device)
        limit = self.memory.limit
        return DeviceProperties("Emulated", self.capability, limit, 132, SHARED_LIMIT, 50 << 20)

    def use(self, device: int) -> None:
        self._known_device("cuCtxSetCurrent", device)
        self._current.device = device

    def _current_of(self, call: str, stream: int, device: int) -> None:
        """Raise CudaError unless a launch's stream is of its device, and that the current one."""
        if self._streams.get(stream, device) != device:
            raise CudaError(f"{call}: CUDA_ERROR_INVALID_HANDLE: a stream of another device")
        if getattr(self._current, "device", 0) != device:
            raise CudaError(f"{call}: CUDA_ERROR_INVALID_CONTEXT: another device is current")

    def _known_device(self, call: str, device: int) -> None:
        if not 0 <= device < self.devices:
            raise CudaError(f"{call}: CUDA_ERROR_INVALID_DEVICE: {device} of {self.devices}")

    # --- memory -----------------------------------------------------------------------------------

    def allocate(self, device: int, nbytes: int, stream: int) -> int:
        self._known_device("cuMemAllocFromPoolAsync", device)
        self._not_captured("cuMemAllocFromPoolAsync", stream)
        with self.lock:
            return self.memory.allocate(device, nbytes)

    def free(self, device: int, pointer: int, stream: int) -> None:
        self._not_captured("cuMemFreeAsync", stream)
        with self.lock:
            self.memory.free(device, pointer)

    def trim(self, device: int) -> None:
        self._known_device("cuMemPoolTrimTo", device)
        self.memory.kept[device].clear()

    def memory_info(self, device: int) -> tuple[int, int]:
        self._known_device("cuMemGetInfo", device)
        return self.memory.limit - self.memory.reserved(device), self.memory.limit

    def reserved(self, device: int) -> int:
        return self.memory.reserved(device)

    def allocate_pinned(self, nbytes: int) -> int:
        with self.lock:
            return self.memory.allocate(HOST, nbytes)

    def free_pinned(self, pointer: int) -> None:
        with self.lock:
            self.memory.free(HOST, pointer)

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        call = "cuMemcpyHtoDAsync"
        self.memory.expect(call, target, nbytes)
        self.memory.expect_host(call, source)
        self._queue(call, stream, lambda: move(target, source, nbytes))

    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        call = "cuMemcpyDtoHAsync"
        self.memory.expect(call, source, nbytes)
        self.memory.expect_host(call, target)
        self._queue(call, stream, lambda: move(target, source, nbytes))

    def copy_on_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        call = "cuMemcpyDtoDAsync"
        for place in (target, source):
            self.memory.expect(call, place, nbytes, device=self._streams.get(stream))
        self._queue(call, stream, lambda: move(target, source, nbytes))

    def copy_across(
        self, target: int, target_device: int, source: int, source_device: int, nbytes: int,
        stream: int,
    ) -> None:  # fmt: skip
        """Between two devices."""
        call = "cuMemcpyPeerAsync"
        self.memory.expect(call, target, nbytes, device=target_device)
        self.memory.expect(call, source, nbytes, device=source_device)
        self._queue(call, stream, lambda: move(target, source, nbytes))

    def fill(self, target: int, byte: int, nbytes: int, stream: int) -> None:
        self.memory.expect("cuMemsetD8Async", target, nbytes)
        self._queue("cuMemsetD8Async", stream, lambda: _set(target, byte, nbytes))

    # --- streams and events -----------------------------------------------------------------------

    def create_stream(self, device: int, priority: int = 0) -> int:
        self._known_device("cuStreamCreate", device)
        return self._register(self._streams, device)

    def _register(self, table: dict[int, Any], what: Any) -> int:
        with self.lock:
            handle = next(self._handles)
            table[handle] = what
            return handle

    def destroy_stream(self, stream: int) -> None:
        self._not_captured("cuStreamDestroy", stream)
        if self._streams.pop(stream, None) is None:
            raise CudaError(f"cuStreamDestroy: CUDA_ERROR_INVALID_HANDLE: {stream:#x}")

    def _known_stream(self, call: str, stream: int) -> None:
        if stream and stream not in self._streams:  # 0 is the default stream
            raise CudaError(f"{call}: CUDA_ERROR_INVALID_HANDLE: no stream {stream:#x}")

    def _not_captured(self, call: str, stream: int) -> None:
        self._known_stream(call, stream)
        if stream in self._captures:
            raise CudaError(
                f"{call}: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: stream {stream:#x} is captured"
            )

    def synchronize(self, stream: int) -> None:
        self._not_captured("cuStreamSynchronize", stream)
        self.memory.check("cuStreamSynchronize")

    def synchronize_device(self, device: int) -> None:
        """Wait for all streams of a device."""
        self._known_device("cuCtxSynchronize", device)
        if self._captures:
            raise CudaError("cuCtxSynchronize: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        self.memory.check("cuCtxSynchronize")

    def stream_done(self, stream: int) -> bool:
        self._not_captured("cuStreamQuery", stream)
        return True

    def create_event(self, device: int, *, timing: bool) -> int:
        self._known_device("cuEventCreate", device)
        return self._register(self._events, _Event(device, timing))

    def destroy_event(self, event: int) -> None:
        self._event("cuEventDestroy", event)
        del self._events[event]

    def _event(self, call: str, event: int) -> _Event:
        found = self._events.get(event)
        if found is None:
            raise CudaError(f"{call}: CUDA_ERROR_INVALID_HANDLE: no event {event:#x}")
        return found

    def record_event(self, event: int, stream: int) -> None:
        self._known_stream("cuEventRecord", stream)
        found, capture = self._event("cuEventRecord", event), self._captures.get(stream)
        if self._streams.get(stream, found.device) != found.device:
            raise CudaError("cuEventRecord: CUDA_ERROR_INVALID_HANDLE: a stream of another device")
        found.capture = capture
        if capture is None:
            found.when = time.perf_counter()
        else:
            own = {stream: capture.queued.get(stream, 0)}
            found.seen = {**capture.seen.get(stream, {}), **own}

    def wait_event(self, stream: int, event: int) -> None:
        self._known_stream("cuStreamWaitEvent", stream)
        found, capture = self._event("cuStreamWaitEvent", event), self._captures.get(stream)
        if found.capture is None:
            return
        if capture is None:  # the stream joins the capture
            if found.capture not in self._captures.values():
                raise CudaError("cuStreamWaitEvent: an event of a capture that has ended")
            capture = self._captures[stream] = found.capture
        if capture is not found.capture:
            raise CudaError("cuStreamWaitEvent: CUDA_ERROR_STREAM_CAPTURE_MERGE")
        seen = capture.seen.setdefault(stream, {})
        for other, count in found.seen.items():
            seen[other] = max(seen.get(other, 0), count)

    def _real_event(self, call: str, event: int) -> _Event:
        found = self._event(call, event)
        if found.capture is not None:
            raise CudaError(f"{call}: CUDA_ERROR_CAPTURED_EVENT")
        return found

    def synchronize_event(self, event: int) -> None:
        self._real_event("cuEventSynchronize", event)
        self.memory.check("cuEventSynchronize")

    def event_done(self, event: int) -> bool:
        self._real_event("cuEventQuery", event)
        return True

    def elapsed(self, begin: int, end: int) -> float:
        """Milliseconds between two events."""
        first, last = (self._real_event("cuEventElapsedTime", e) for e in (begin, end))
        if first.device != last.device:
            raise CudaError("cuEventElapsedTime: CUDA_ERROR_INVALID_HANDLE: of two devices")
        if first.when is None or last.when is None or not (first.timing and last.timing):
            raise CudaError(
                "cuEventElapsedTime: CUDA_ERROR_INVALID_HANDLE: not recorded, or untimed"
            )
        return (last.when - first.when) * 1e3

    # --- kernels ----------------------------------------------------------------------------------

    def compile(self, text: str, name: str, capability: tuple[int, int]) -> bytes:
        """A library for the host. Raises CompileError with g++'s words."""
        found = self.images.get(text)
        if found is None:
            try:
                found = self.images[text] = build([text]).read_bytes()
            except CompileError as error:
                raise CompileError(f"{name}: {error}") from None
        return found

    def compile_together(
        self, texts: Sequence[str], name: str, capability: tuple[int, int]
    ) -> bytes:
        """One library of several texts, each in a namespace of its own."""
        if not all(text in self.images for text in texts):
            return build(texts).read_bytes()
        images = {self.images[text] for text in texts}
        return images.pop() if len(images) == 1 else build(texts).read_bytes()

    def precompile(self, texts: Sequence[str]) -> None:
        """Compile many texts by one call of g++: `compile` then has them."""
        distinct = list(dict.fromkeys(t for t in texts if t not in self.images))
        if distinct:
            image = build(distinct).read_bytes()
            self.images.update(dict.fromkeys(distinct, image))

    def compiler_identity(self) -> str:
        return f"g++ {compiler_identity()}"

    def load_module(self, device: int, image: bytes) -> int:
        self._known_device("cuModuleLoadData", device)
        path = cache_folder() / f"image-{hashlib.sha256(image).hexdigest()[:24]}.so"
        if not path.exists():
            beside = path.with_suffix(f".{threading.get_ident()}")
            beside.write_bytes(image)
            beside.replace(path)
        return self._register(self._modules, (HostLibrary(path), device))

    def function(self, module: int, symbol: str, shared: int) -> int:
        if module not in self._modules:
            raise CudaError(f"cuModuleGetFunction: CUDA_ERROR_INVALID_HANDLE: {module:#x}")
        library, device = self._modules[module]
        if shared > SHARED_LIMIT:
            raise CudaError(f"cuFuncSetAttribute: CUDA_ERROR_INVALID_VALUE: {shared} bytes shared")
        sizes = library.argument_sizes(symbol)
        if sizes is None:
            raise CudaError(f"cuModuleGetFunction: CUDA_ERROR_NOT_FOUND: {symbol}")
        return self._register(self._functions, _Function(library, symbol, device, shared, sizes))

    def parameter_sizes(self, function: int) -> tuple[int, ...]:
        """Bytes of each of a kernel's parameters."""
        return self._functions[function].sizes

    def launch(
        self, function: int, grid: Dim, block: Dim, shared: int, stream: int, arguments: int
    ) -> None:
        found = self._functions.get(function)
        if found is None:
            raise CudaError(f"cuLaunchKernel: CUDA_ERROR_INVALID_HANDLE: {function:#x}")
        threads = block[0] * block[1] * block[2]
        limits = (2**31 - 1, 65535, 65535)
        fits = all(0 < g <= most for g, most in zip(grid, limits, strict=True))
        if not fits or not 0 < threads <= 1024 or block[2] > 64:
            raise CudaError(f"cuLaunchKernel: CUDA_ERROR_INVALID_VALUE: grid {grid}, block {block}")
        if shared > max(found.shared, 48 << 10):
            raise CudaError(f"cuLaunchKernel: CUDA_ERROR_INVALID_VALUE: {shared} bytes shared")
        self._current_of("cuLaunchKernel", stream, found.device)
        table = (ctypes.c_void_p * len(found.sizes)).from_address(arguments)
        values = [ctypes.string_at(a, n) for a, n in zip(table, found.sizes, strict=True)]
        self.memory.expect_reachable("cuLaunchKernel", values, found.device)
        self._queue("cuLaunchKernel", stream, lambda: self._run(found, grid, block, shared, values))

    def _run(
        self, function: _Function, grid: Dim, block: Dim, shared: int, values: list[bytes]
    ) -> None:
        kept = [ctypes.create_string_buffer(v, max(len(v), 8)) for v in values]
        words = (ctypes.c_void_p * max(len(kept), 1))(*(ctypes.addressof(k) for k in kept))
        try:
            function.library.launch(function.symbol, grid, block, shared, ctypes.addressof(words))
        except KernelFault as fault:
            raise CudaError(f"cuLaunchKernel: {fault}") from fault
        self.launches.append(function.symbol)
        if len(self.memory.live) <= CHECKED:
            self.memory.check(function.symbol)

    # --- graphs -----------------------------------------------------------------------------------

    def _queue(self, call: str, stream: int, work: Work) -> None:
        """Do it now, or note it where the stream is captured."""
        self._known_stream(call, stream)
        capture = self._captures.get(stream)
        if capture is None:
            with self.lock:
                work()
        else:
            capture.work.append(_Noted(work, stream, dict(capture.seen.get(stream, {}))))
            capture.queued[stream] = capture.queued.get(stream, 0) + 1

    def begin_capture(self, stream: int) -> None:
        self._not_captured("cuStreamBeginCapture", stream)
        if stream == 0:
            raise CudaError("cuStreamBeginCapture: the default stream cannot be captured")
        self._captures[stream] = _Capture(stream)

    def end_capture(self, stream: int) -> int:
        """The noted work as a graph."""
        capture = self._captures.get(stream)
        if capture is None or capture.origin != stream:
            raise CudaError("cuStreamEndCapture: CUDA_ERROR_ILLEGAL_STATE: not captured here")
        joined = [s for s, c in self._captures.items() if c is capture]
        for other in joined:
            del self._captures[other]
        seen = capture.seen.get(stream, {})
        for other in joined:
            if other != stream and seen.get(other, -1) < capture.queued.get(other, 0):
                raise CudaError(
                    f"cuStreamEndCapture: CUDA_ERROR_STREAM_CAPTURE_UNJOINED: stream {other:#x}"
                )
        return self._register(self._graphs, _Replay(capture.work))

    def launch_graph(self, graph: int, stream: int) -> None:
        work = self._graphs.get(graph)
        if work is None:
            raise CudaError(f"cuGraphLaunch: CUDA_ERROR_INVALID_HANDLE: {graph:#x}")

        self._queue("cuGraphLaunch", stream, work.run)

    def destroy_graph(self, graph: int) -> None:
        if self._graphs.pop(graph, None) is None:
            raise CudaError(f"cuGraphExecDestroy: CUDA_ERROR_INVALID_HANDLE: {graph:#x}")

    # --- libraries --------------------------------------------------------------------------------

    def prepare(self, problem: Problem, device: int) -> Prepared | None:
        """A plan that solves the problem by NumPy; None for what NVIDIA's libraries do not take."""
        self._known_device("prepare", device)
        return _Plan(self, problem) if is_taken(problem) else None

    def versions(self) -> dict[str, Any]:
        return {"driver": "emulated", "compiler": self.compiler_identity()}


class _Plan:
    """A problem of a library, solved on the host."""

    workspace = 0

    def __init__(self, driver: EmulatedDriver, problem: Problem) -> None:
        self._driver = driver
        self._solve, self._operands = prepare(problem)
        # cuDNN's kernels load 16 bytes at once
        self.alignment = 1 if isinstance(problem, MatmulProblem) else 16
        self._tensors = len(operands_of(problem))
        self.name = f"emulated {type(problem).__name__}"

    def enqueue(self, pointers: Sequence[int], workspace: int, stream: int) -> None:
        """Queue the call; operands are read and written when it runs."""
        given = list(pointers)
        if any(pointer % self.alignment for pointer in given[: self._tensors]):
            raise CudnnError(f"{self.name}: operands are not aligned: {given}")
        if len(given) != self._operands:
            raise CudaError(f"{self.name}: {len(given)} operands, wanted {self._operands}")

        def work() -> None:
            self._solve(given)
            self._driver.launches.append(self.name)
            self._driver.memory.check(self.name)

        self._driver._queue(self.name, stream, work)


def _set(target: int, byte: int, nbytes: int) -> None:
    ctypes.memset(target, byte, nbytes)
