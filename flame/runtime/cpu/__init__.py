"""The CPU as a device: memory, text to machine code, launch.

`launch` is made from machine code at its first use (`flame.runtime.cpu.launch`): it needs
llvmlite, which `import flame` must not load. Kernels may declare what `blas` and `pool` register
(flame_sgemm, flame_parallel, ...), so both are imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flame.runtime.cpu import blas
from flame.runtime.cpu.allocator import ALLOCATOR, MemoryStatistics, allocate, free
from flame.runtime.cpu.jit import Statistics, load, statistics
from flame.runtime.cpu.pool import get_num_threads, set_num_threads

if TYPE_CHECKING:
    launch: Callable[..., None]

__all__ = [
    "ALLOCATOR",
    "MemoryStatistics",
    "Statistics",
    "allocate",
    "blas",
    "free",
    "get_num_threads",
    "launch",
    "load",
    "set_num_threads",
    "statistics",
]


def __getattr__(name: str) -> object:
    if name == "launch":
        from flame.runtime.cpu.launcher import launcher

        globals()["launch"] = launcher()
        return globals()["launch"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
