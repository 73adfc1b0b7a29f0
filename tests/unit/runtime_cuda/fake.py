"""A driver on host memory, for what stands above the protocol: it runs everything at once, notes
every call, and can be told to have little memory. Kernels are Python functions by symbol.
"""

import ctypes
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from flame.core.errors import CompileError, CudaError, OutOfMemoryError
from flame.runtime.cuda.driver import DeviceProperties

MAGIC = b"FAKE"


class FakeDriver:
    def __init__(self, *, devices: int = 2, total: int = 1 << 30) -> None:
        self.devices, self.total = devices, total
        self.calls: list[tuple[Any, ...]] = []
        self.blocks: dict[int, tuple[int, Any, int]] = {}  # pointer -> device, memory, bytes
        self.pinned: dict[int, Any] = {}
        self.most_pinned = 1 << 40
        self.kept = [0] * devices  # bytes that a pool holds and nobody uses
        self.numbers = itertools.count(0x1000, 16)
        self.events: dict[int, bool] = {}  # event -> whether it has happened
        self.pending = False  # whether events that are recorded have yet to happen
        self.modules: dict[int, str] = {}
        self.functions: dict[int, str] = {}
        self.kernels: dict[str, tuple[tuple[int, ...], Callable[..., None]]] = {}
        self.capturing: int | None = None
        self.identity = "fake 1"
        self.programs: list[str] = []

    def note(self, *call: Any) -> None:
        self.calls.append(call)

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == name]

    # --- devices ----------------------------------------------------------------------------------
    def device_count(self) -> int:
        return self.devices

    def properties(self, device: int) -> DeviceProperties:
        return DeviceProperties("Fake", (9, 0), self.total, 4, 232448, 1 << 20)

    def use(self, device: int) -> None:
        assert 0 <= device < self.devices
        self.note("use", device)

    # --- memory -----------------------------------------------------------------------------------
    def used(self, device: int) -> int:
        return sum(nbytes for where, _, nbytes in self.blocks.values() if where == device)

    def allocate(self, device: int, nbytes: int, stream: int) -> int:
        self.note("allocate", device, nbytes, stream)
        assert self.capturing is None
        size = max(nbytes, 1)
        # Memory of one size is not cut up for another, so that only a trim makes room.
        if self.used(device) + self.kept[device] + size > self.total:
            raise OutOfMemoryError("fake: out of memory")
        memory = (ctypes.c_char * (size + 256))()
        pointer = (ctypes.addressof(memory) + 255) & ~255
        self.blocks[pointer] = device, memory, size
        return pointer

    def free(self, device: int, pointer: int, stream: int) -> None:
        self.note("free", device, pointer, stream)
        assert self.capturing is None
        where, _, size = self.blocks.pop(pointer)
        assert where == device
        self.kept[device] += size

    def trim(self, device: int) -> None:
        self.note("trim", device)
        self.kept[device] = 0

    def memory_info(self, device: int) -> tuple[int, int]:
        return self.total - self.used(device) - self.kept[device], self.total

    def reserved(self, device: int) -> int:
        return self.used(device) + self.kept[device]

    def allocate_pinned(self, nbytes: int) -> int:
        self.note("allocate_pinned", nbytes)
        if sum(map(ctypes.sizeof, self.pinned.values())) + nbytes > self.most_pinned:
            raise OutOfMemoryError("fake: no pinned memory")
        memory = (ctypes.c_char * (nbytes + 64))()
        pointer = (ctypes.addressof(memory) + 63) & ~63
        self.pinned[pointer] = memory
        return pointer

    def free_pinned(self, pointer: int) -> None:
        self.note("free_pinned", pointer)
        del self.pinned[pointer]

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.note("copy_to_device", target, source, nbytes, stream)
        ctypes.memmove(target, source, nbytes)

    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.note("copy_to_host", target, source, nbytes, stream)
        ctypes.memmove(target, source, nbytes)

    def copy_on_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.note("copy_on_device", target, source, nbytes, stream)
        ctypes.memmove(target, source, nbytes)

    def copy_across(
        self,
        target: int,
        target_device: int,
        source: int,
        source_device: int,
        nbytes: int,
        stream: int,
    ) -> None:
        assert target_device != source_device
        self.note("copy_across", target_device, source_device, nbytes, stream)
        ctypes.memmove(target, source, nbytes)

    def fill(self, target: int, byte: int, nbytes: int, stream: int) -> None:
        ctypes.memset(target, byte, nbytes)

    # --- streams and events -----------------------------------------------------------------------
    def create_stream(self, device: int, priority: int = 0) -> int:
        self.note("create_stream", device, priority)
        return next(self.numbers)

    def destroy_stream(self, stream: int) -> None:
        self.note("destroy_stream", stream)

    def synchronize(self, stream: int) -> None:
        self.note("synchronize", stream)
        self.happen()

    def synchronize_device(self, device: int) -> None:
        self.note("synchronize_device", device)
        self.happen()

    def happen(self) -> None:
        self.events = dict.fromkeys(self.events, True)

    def stream_done(self, stream: int) -> bool:
        return not self.pending

    def create_event(self, device: int, *, timing: bool) -> int:
        event = next(self.numbers)
        self.note("create_event", device, timing, event)
        self.events[event] = True
        return event

    def destroy_event(self, event: int) -> None:
        del self.events[event]

    def record_event(self, event: int, stream: int) -> None:
        self.note("record_event", event, stream)
        self.events[event] = not self.pending

    def wait_event(self, stream: int, event: int) -> None:
        assert event in self.events
        self.note("wait_event", stream, event)

    def synchronize_event(self, event: int) -> None:
        self.note("synchronize_event", event)
        self.events[event] = True

    def event_done(self, event: int) -> bool:
        return self.events[event]

    def elapsed(self, begin: int, end: int) -> float:
        return float(end - begin)

    # --- kernels ----------------------------------------------------------------------------------
    def compile(self, text: str, name: str, capability: tuple[int, int]) -> bytes:
        if "wrong" in text:
            raise CompileError(f"fake: kernel {name} is wrong")
        self.programs.append(text)
        return MAGIC + f"{capability}{text}".encode()

    def compile_together(
        self, texts: Sequence[str], name: str, capability: tuple[int, int]
    ) -> bytes:
        return self.compile("\n".join(texts), name, capability)

    def compiler_identity(self) -> str:
        return self.identity

    def load_module(self, device: int, image: bytes) -> int:
        assert image[: len(MAGIC)] == MAGIC
        self.note("load_module", device)
        module = next(self.numbers)
        self.modules[module] = image.decode()
        return module

    def function(self, module: int, symbol: str, shared: int) -> int:
        if symbol not in self.modules[module]:
            raise CudaError(f"fake: no {symbol}")
        function = next(self.numbers)
        self.functions[function] = symbol
        return function

    def parameter_sizes(self, function: int) -> tuple[int, ...]:
        return self.kernels[self.functions[function]][0]

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        stream: int,
        arguments: int,
    ) -> None:
        symbol = self.functions[function]
        self.note("launch", symbol, grid, block, shared, stream)
        sizes, body = self.kernels[symbol]
        addresses = (ctypes.c_uint64 * len(sizes)).from_address(arguments)
        values = [ctypes.string_at(a, n) for a, n in zip(addresses, sizes, strict=True)]
        body(grid, block, *values)

    # --- graphs -----------------------------------------------------------------------------------
    def begin_capture(self, stream: int) -> None:
        assert self.capturing is None
        self.capturing = stream

    def end_capture(self, stream: int) -> int:
        assert self.capturing == stream
        self.capturing = None
        self.note("end_capture", stream)
        return next(self.numbers)

    def launch_graph(self, graph: int, stream: int) -> None:
        self.note("launch_graph", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self.note("destroy_graph", graph)

    # --- libraries --------------------------------------------------------------------------------
    def prepare(self, problem: Any, device: int) -> None:
        return None

    def versions(self) -> dict[str, Any]:
        return {"driver": "fake 1.0"}
