"""What the CPU runtime has, for `flame doctor`."""

from __future__ import annotations

import platform

from flame.core.errors import DeviceError
from flame.runtime.cpu import amx, blas, memory
from flame.runtime.cpu.allocator import ALLOCATOR, readable
from flame.runtime.cpu.jit import compiler
from flame.runtime.cpu.pool import get_num_threads

# Features that decide how fast generated kernels are, in the words of LLVM.
_NOTABLE = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bf16",
    "avx512fp16",
    "avx512vnni",
    "amx-bf16",
    "amx-int8",
    "neon",
    "fullfp16",
    "bf16",
    "dotprod",
    "sve",
    "sve2",
)


def info() -> dict[str, str]:
    """Label -> text, in the order to print. A missing OpenBLAS is told in its line."""
    built = compiler()
    present = {name[1:] for name in built.cpu_features.split(",") if name.startswith("+")}
    entries, size = built.disk.size()
    try:
        openblas = blas.version()
    except DeviceError as error:
        openblas = str(error)
    available = memory.available()
    return {
        "cpu": f"{built.cpu_name} ({platform.machine()})",
        "cpu features": " ".join(name for name in _NOTABLE if name in present) or "none of note",
        "matrix unit": f"not used: {reason}" if (reason := amx.status()) else "AMX",
        "threads": str(get_num_threads()),
        "memory available": "unknown" if available is None else readable(available),
        "memory held": readable(ALLOCATOR.statistics().reserved),
        "compiler": built.version,
        "blas": openblas,
        "kernel cache": f"{built.disk.directory} ({entries} entries, {readable(size)})",
    }
