"""The worker pool's life: start, size, stop, fork. What runs in a region is in `native.py`.

Invariant: the number of threads that the native side reads is the number of workers that have been
started plus the caller, 1 where the pool must not be used, 0 where it has yet to start. The
floating point environment is left alone: workers inherit the one of the thread that starts them
(round to nearest, denormals kept, unless someone changed it).
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
import warnings
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path

from flame.core.errors import ArgumentError, FlameWarning
from flame.runtime.cpu import native
from flame.runtime.cpu.jit import hold_over_forks, load_symbols, register_symbol

# Long enough to bridge the Python between two launches of a training step, short enough to be
# polite.
SPIN_SECONDS = 50e-6
_MAXIMUM_THREADS = 1024


def default_threads() -> int:
    """$FLAME_NUM_THREADS, else the CPUs that this process may use (affinity and cgroup quota)."""
    chosen = os.environ.get("FLAME_NUM_THREADS")
    if chosen:
        return _checked(chosen, "FLAME_NUM_THREADS")
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = _quota()
    return max(1, min(count, quota or count, _MAXIMUM_THREADS))


def _checked(value: int | str, origin: str) -> int:
    try:
        count = int(value)
    except ValueError:
        count = 0
    if not 1 <= count <= _MAXIMUM_THREADS:
        raise ArgumentError(
            f"{origin} must be a whole number from 1 to {_MAXIMUM_THREADS}, got {value!r}"
        )
    return count


def _quota() -> int | None:
    """CPUs that a container's quota allows, rounded up; None without one."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else max(1, -(-int(limit) // int(period)))
    except (OSError, ValueError):
        return None


class _Settings:
    """The number of threads, known before the pool exists (which needs llvmlite)."""

    @cached_property
    def threads(self) -> int:
        return default_threads()


_settings = _Settings()


class Pool:
    """Worker threads around one native state. Regions are run by `native`'s functions."""

    def __init__(self) -> None:
        names = (
            "flame_pool_state",
            "flame_pool_worker",
            "flame_pool_spin",
            "flame_pool_try_lock",
            "flame_pool_unlock",
            "flame_pool_stop",
            "flame_parallel",
            "flame_launch",
        )
        addresses = dict(zip(names, load_symbols(native.native_text(), names), strict=True))
        self.parallel_address = addresses["flame_parallel"]
        self.launch_address = addresses["flame_launch"]
        self.state_address = addresses["flame_pool_state"]
        self._worker = ctypes.CFUNCTYPE(None, ctypes.c_int64)(addresses["flame_pool_worker"])
        self._spin = ctypes.CFUNCTYPE(None, ctypes.c_int64)(addresses["flame_pool_spin"])
        self._try_lock = ctypes.CFUNCTYPE(ctypes.c_int32)(addresses["flame_pool_try_lock"])
        self._unlock = ctypes.CFUNCTYPE(None)(addresses["flame_pool_unlock"])
        self._stop_workers = ctypes.CFUNCTYPE(None)(addresses["flame_pool_stop"])
        self._threads = ctypes.c_int64.from_address(self.state_address + native.THREADS)
        self._stop = ctypes.c_int32.from_address(self.state_address + native.STOP)
        self._spins = ctypes.c_int64.from_address(self.state_address + native.SPINS)
        self._workers: list[threading.Thread] = []
        self._lock = threading.RLock()
        self.size = _settings.threads
        self._closed = False
        # The builtin calls this object; the attribute keeps it alive.
        self._starter: Callable[[], None] = self.start
        ctypes.c_void_p.from_address(self.state_address + native.STARTER).value = id(self._starter)

    def start(self) -> None:
        """Start the workers, if they do not run yet."""
        with self._lock:
            if self._threads.value:
                return
            if self._closed:
                self._threads.value = 1
                return
            self._spins.value = self._spins_for(SPIN_SECONDS) if self.size <= _cpus() else 0
            # An interrupt (Ctrl-C) may leave this loop: what has started stays counted, as no two
            # workers may have one index.
            for index in range(len(self._workers) + 1, self.size):
                worker = threading.Thread(
                    target=self._worker, args=(index,), name=f"flame-worker-{index}", daemon=True
                )
                self._workers.append(worker)
                try:
                    worker.start()
                except RuntimeError as error:
                    self._workers.pop()
                    warnings.warn(
                        f"only {index} of {self.size} threads could be started ({error}); kernels "
                        "run on those. FLAME_NUM_THREADS sets a number that the system allows.",
                        FlameWarning,
                        stacklevel=2,
                    )
                    break
            self._threads.value = len(self._workers) + 1

    def _spins_for(self, seconds: float) -> int:
        """Turns of the waiting loop that take about `seconds`; the best of 3, as others may run."""
        turns = 500
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            self._spin(turns)
            best = min(best, time.perf_counter() - started)
        return max(1, int(turns * seconds / best))

    def stop(self) -> None:
        """End the workers when the region that runs, if any, is over. The next starts them anew."""
        with self._lock:
            if self._threads.value:
                # Regions that begin now run in their own thread: threads that launch without a
                # pause could keep the pool from us otherwise.
                self._threads.value = 1
            while not self._try_lock():
                time.sleep(20e-6)
            try:
                self._threads.value = 0
                self._stop_workers()
                for worker in self._workers:
                    if worker.ident is not None:
                        worker.join()
                self._workers.clear()
                self._stop.value = 0
            finally:
                self._unlock()

    def resize(self, count: int) -> None:
        """Use `count` threads from the next region on."""
        with self._lock:
            if count != self.size:
                self.stop()
                self.size = count

    def close(self) -> None:
        """Stop for good, at interpreter exit: kernels that come later run in their own thread."""
        with self._lock:
            self._closed = True
            self.stop()
            # Not 0: the native side must not call the starter, which goes with the interpreter.
            self._threads.value = 1

    def forget(self) -> None:
        """In the child of a fork: the workers are not there, and nobody is inside a region."""
        keep_spins = self._spins.value
        ctypes.memset(self.state_address, 0, native.STATE_BYTES)
        ctypes.c_void_p.from_address(self.state_address + native.STARTER).value = id(self._starter)
        self._spins.value = keep_spins
        self._threads.value = 1 if self._closed else 0
        self._workers = []
        self._lock = threading.RLock()


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _shared() -> Pool:
    pool = Pool()
    atexit.register(pool.close)
    os.register_at_fork(after_in_child=pool.forget)
    return pool


_creation = threading.RLock()
hold_over_forks(_creation)


def pool() -> Pool:
    """The process's pool, made (not started) at the first call."""
    with _creation:
        return _shared()


register_symbol("flame_parallel", lambda: pool().parallel_address)


def set_num_threads(count: int) -> None:
    """Run kernels on `count` threads, the caller's among them. Raises ArgumentError below 1."""
    with _creation:
        _settings.threads = _checked(count, "set_num_threads: count")
        if _shared.cache_info().currsize:
            pool().resize(_settings.threads)


def get_num_threads() -> int:
    """The threads that a parallel region has, the calling thread among them."""
    return _settings.threads
