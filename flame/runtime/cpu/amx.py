"""The matrix unit of Intel processors (AMX): whether this process may use it.

Invariant: what `status` says does not change while the process lives; the permission that Linux
gives covers all threads, those that start later too, and children.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache

_ARCH_PRCTL = 158  # system call of x86-64
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


@cache
def status() -> str:
    """ "" where products in bfloat16 tiles can be used, else why not."""
    if os.environ.get("FLAME_CPU_AMX", "1") == "0":
        return "turned off by FLAME_CPU_AMX=0"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "not on this platform"
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    if not all(features.get(name) for name in ("amx-tile", "amx-bf16", "avx512f")):
        return "this processor has none"
    library = ctypes.CDLL(None, use_errno=True)
    request = (_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
    if library.syscall(*(ctypes.c_long(x) for x in request)):
        return f"Linux refuses it: {os.strerror(ctypes.get_errno())}"
    return ""


def available() -> bool:
    """Whether kernels may multiply tiles of bfloat16."""
    return not status()
