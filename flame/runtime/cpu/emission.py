"""LLVM IR text to object code, in several threads at once.

Invariant: a target machine and an LLVM context are used by one thread at a time, which is all that
LLVM asks for. llvmlite allows one call at a time altogether, under a lock of its own; only code
generation, which takes nearly all of the time, is called beside that lock.
"""

from __future__ import annotations

import ctypes
import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


def new_machine(cpu: str, features: str, *, quick: bool = False) -> Any:
    """A target machine for this host; a quick one makes slow code in a third of the time."""
    from llvmlite import binding

    return binding.Target.from_default_triple().create_target_machine(
        cpu=cpu, features=features, opt=0 if quick else 2, codemodel="jitdefault", jit=True
    )


def emit(machine: Any, module: Any) -> bytes:
    """The object code of a module that stands in a context of its own."""
    from llvmlite.binding import ffi

    handle = getattr(ffi.lib, "_lib", None)
    if handle is None:  # another version of llvmlite: right all the same, one at a time
        made: bytes = machine.emit_object(module)
        return made
    function = ffi.lib.LLVMPY_TargetMachineEmitToMemory
    unlocked = handle.LLVMPY_TargetMachineEmitToMemory
    unlocked.argtypes, unlocked.restype = function.argtypes, function.restype
    with ffi.OutputString() as error:
        buffer = unlocked(machine, module, 1, error)
        if not buffer:
            raise RuntimeError(str(error))
    try:
        start = ffi.lib.LLVMPY_GetBufferStart(buffer)
        return ctypes.string_at(start, ffi.lib.LLVMPY_GetBufferSize(buffer))
    finally:
        ffi.lib.LLVMPY_DisposeMemoryBuffer(buffer)


def compile_threads() -> int:
    """$FLAME_NUM_THREADS, else the CPUs that this process may use."""
    chosen = os.environ.get("FLAME_NUM_THREADS", "")
    if chosen.isdigit() and int(chosen):
        return int(chosen)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over_machines(
    machines: Sequence[Any], work: Callable[[Any, _T], _R], items: Sequence[_T]
) -> list[_R]:
    """``work(machine, item)`` for all items, as many at once as there are machines."""
    if len(machines) == 1 or len(items) == 1:
        return [work(machines[0], item) for item in items]
    free: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for machine in machines:
        free.put(machine)

    def one(item: _T) -> _R:
        machine = free.get()
        try:
            return work(machine, item)
        finally:
            free.put(machine)

    with ThreadPoolExecutor(len(machines), "flame-compile") as threads:
        return list(threads.map(one, items))
