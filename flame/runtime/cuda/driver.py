"""What FLAME asks of a CUDA driver.

One protocol, two implementations: NVIDIA's (`flame.runtime.cuda.nvidia`), and one of the tests
that runs the same CUDA text on the host, so that all above this line is tested without a GPU.

Invariants: every call checks the status that it gets, and raises CudaError with its name and the
call (OutOfMemoryError where memory is short); pointers, streams, events, modules, functions and
graphs are plain integers; work is asynchronous on its stream unless said otherwise.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from flame.core.errors import DeviceError
from flame.kernel.library import Problem

Dim = tuple[int, int, int]
T = TypeVar("T")


@dataclass(frozen=True)
class DeviceProperties:
    """name, compute capability (major, minor), bytes of memory, and what launches depend on."""

    name: str
    capability: tuple[int, int]
    total_memory: int
    multiprocessor_count: int
    shared_memory_per_block: int  # the most that a kernel may ask for
    l2_cache_size: int


class Prepared(Protocol):
    """A library's plan for one problem on one device."""

    workspace: int  # bytes that a call needs beside its operands
    name: str  # what runs, for reports

    def enqueue(self, pointers: Sequence[int], workspace: int, stream: int) -> None:
        """Queue the call. ``pointers``: in the problem's order of operands; 0 for None; numbers
        (seed, offset) as pointers to int64 on the device."""


class Driver(Protocol):
    """See the head of this file."""

    # --- devices ----------------------------------------------------------------------------------
    def device_count(self) -> int: ...
    def properties(self, device: int) -> DeviceProperties: ...
    def use(self, device: int) -> None:
        """Make a device's context the current one of this thread, which launches need. No other
        call changes it, unless there was none."""

    # --- memory -----------------------------------------------------------------------------------
    def allocate(self, device: int, nbytes: int, stream: int) -> int:
        """From the device's stream-ordered pool; aligned to 256 bytes. Raises OutOfMemoryError."""

    def free(self, device: int, pointer: int, stream: int) -> None: ...
    def trim(self, device: int) -> None:
        """Give memory that the pool holds and nobody uses back to the device."""

    def memory_info(self, device: int) -> tuple[int, int]:
        """(free, total) bytes of the device."""

    def reserved(self, device: int) -> int:
        """Bytes that the pool holds, in use or not."""

    def allocate_pinned(self, nbytes: int) -> int:
        """Page-locked host memory, that kernels can reach at the same address."""

    def free_pinned(self, pointer: int) -> None: ...
    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None: ...
    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None: ...
    def copy_on_device(self, target: int, source: int, nbytes: int, stream: int) -> None: ...
    def copy_across(
        self,
        target: int,
        target_device: int,
        source: int,
        source_device: int,
        nbytes: int,
        stream: int,
    ) -> None:
        """Between two devices."""

    def fill(self, target: int, byte: int, nbytes: int, stream: int) -> None: ...

    # --- streams and events -----------------------------------------------------------------------
    def create_stream(self, device: int, priority: int = 0) -> int: ...
    def destroy_stream(self, stream: int) -> None: ...
    def synchronize(self, stream: int) -> None: ...
    def synchronize_device(self, device: int) -> None:
        """Wait for all streams of a device."""

    def stream_done(self, stream: int) -> bool: ...
    def create_event(self, device: int, *, timing: bool) -> int: ...
    def destroy_event(self, event: int) -> None: ...
    def record_event(self, event: int, stream: int) -> None: ...
    def wait_event(self, stream: int, event: int) -> None: ...
    def synchronize_event(self, event: int) -> None: ...
    def event_done(self, event: int) -> bool: ...
    def elapsed(self, begin: int, end: int) -> float:
        """Milliseconds between two events."""

    # --- kernels ----------------------------------------------------------------------------------
    def compile(self, text: str, name: str, capability: tuple[int, int]) -> bytes:
        """Machine code of CUDA C++ text. Raises CompileError with the compiler's words and the
        lines around the fault. Several threads may call it at once."""

    def compile_together(
        self, texts: Sequence[str], name: str, capability: tuple[int, int]
    ) -> bytes:
        """As `compile`, one image of several texts, whose kernels have different names."""

    def compiler_identity(self) -> str:
        """Changes whenever `compile` might give something else for the same text."""

    def load_module(self, device: int, image: bytes) -> int: ...
    def function(self, module: int, symbol: str, shared: int) -> int:
        """A kernel that may be launched with up to ``shared`` bytes of dynamic shared memory."""

    def parameter_sizes(self, function: int) -> tuple[int, ...]:
        """Bytes of each of a kernel's parameters."""

    def launch(
        self, function: int, grid: Dim, block: Dim, shared: int, stream: int, arguments: int
    ) -> None:
        """``arguments``: address of an array of addresses of the packed arguments, which are read
        before this returns."""

    # --- graphs -----------------------------------------------------------------------------------
    def begin_capture(self, stream: int) -> None: ...
    def end_capture(self, stream: int) -> int:
        """The work queued since `begin_capture` as an executable graph."""

    def launch_graph(self, graph: int, stream: int) -> None: ...
    def destroy_graph(self, graph: int) -> None: ...

    # --- libraries --------------------------------------------------------------------------------
    def prepare(self, problem: Problem, device: int) -> Prepared | None:
        """A plan for a problem; None where the library does not take it (there is no fallback
        inside: the caller has another kernel, or raises)."""

    def versions(self) -> dict[str, Any]:
        """Names and versions of the driver and of all libraries in use, for `flame doctor`."""


class Lifetime:
    """Whether handles of drivers are still good: not while the interpreter exits, whose end gives
    everything back, not in a process that was forked, and not after a kernel broke the context."""

    over = False


_driver: Driver | None = None
_forked = False


def driver() -> Driver:
    """The driver of this process: NVIDIA's, unless another was installed. Raises DeviceError where
    there is none, saying what to install."""
    global _driver
    if _driver is None:
        if _forked:
            raise DeviceError(
                "this process was forked from one that uses CUDA, and cannot use it; start worker "
                "processes by the method 'spawn', and move data to the GPU in the main process"
            )
        from flame.runtime.cuda.nvidia import NvidiaDriver

        _driver = NvidiaDriver()
    return _driver


def has_driver() -> bool:
    """Whether `driver` was called, and gave one, or another was installed."""
    return _driver is not None


def install_driver(made: Driver | None) -> Driver | None:
    """Let `driver` be another one, for tests; None: look again. Returns the one before."""
    global _driver
    before, _driver = _driver, made
    return before


def _after_fork() -> None:
    """Contexts do not go over to a forked process."""
    global _driver, _forked
    if _driver is not None:
        _driver, _forked, Lifetime.over = None, True, True


def _at_exit() -> None:
    Lifetime.over = True


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork)


def per_driver(make: Callable[[Driver], T]) -> Callable[[], T]:
    """A function that gives what ``make`` makes once for each driver, that of `driver` first."""
    made: dict[Driver, T] = {}
    lock = threading.RLock()

    def get() -> T:
        current = _driver or driver()
        try:
            return made[current]
        except KeyError:
            with lock:
                if current not in made:
                    made[current] = make(current)
                return made[current]

    return get
