"""A fault for each tool of compute-sanitizer, to be found: a check that finds nothing may have
looked at nothing. ``scripts/sanitize.sh`` runs ``python -m tests.gpu.planted_faults TOOL``.

The kernels have names of their own, without the prefix of generated ones, so that the script's
filter of names must take them for hand-written ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import flame

THREADS = 64  # two warps, as racecheck only warns of races within one
SIZE = 1024  # floats, a multiple of what the driver rounds to: what follows is nobody's

# Reads and writes the elements behind the last one.
MEMCHECK = r"""
extern "C" __global__ void planted_memcheck(float* y, int size) {
    y[threadIdx.x + size] += 1;
}"""
# Threads read what the other warp writes, and no barrier lies between. Where they read is known
# when the kernel runs, so that the compiler cannot put their own value there.
RACECHECK = r"""
extern "C" __global__ void planted_racecheck(float* y, int other) {
    __shared__ float kept[64];
    kept[threadIdx.x] = y[threadIdx.x];
    y[threadIdx.x] = kept[threadIdx.x ^ other];
}"""
# Two faults, as generations of GPUs differ in what they forgive: thread 16 waits for a part of its
# warp that it is no part of itself, and 48 of 64 threads wait at a barrier for all. Neither waits
# for ever, as threads that have ended are not waited for.
SYNCCHECK = r"""
extern "C" __global__ void planted_synccheck(float* y, unsigned part, int threads) {
    __shared__ float kept[64];
    const int thread = threadIdx.x;
    kept[thread] = y[thread];
    if (thread <= 16) {
        __syncwarp(part);
        kept[thread] += 1;
    }
    if (thread < threads) {
        kept[thread] += 1;
        __syncthreads();
        y[thread] = kept[threads - 1 - thread];
    }
}"""
# Copies what nobody has written.
INITCHECK = r"""
extern "C" __global__ void planted_initcheck(float* y, const float* x) {
    y[threadIdx.x] = x[threadIdx.x];
}"""

# Tool -> text, and what the kernel takes besides its result. Only initcheck's has a second tensor:
# for memcheck it could lie where the fault is to miss all memory.
FAULTS: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "memcheck": (MEMCHECK, lambda: (SIZE,)),
    "racecheck": (RACECHECK, lambda: (THREADS // 2,)),
    "synccheck": (SYNCCHECK, lambda: (0xFFFF, THREADS - 16)),
    "initcheck": (INITCHECK, lambda: (flame.empty(SIZE, device="cuda"),)),
}


def commit(tool: str) -> None:
    """Launch the kernel with the fault that ``tool`` is to find, and wait for it."""
    text, others = FAULTS[tool]
    kernel = flame.cuda.RawKernel(text, f"planted_{tool}")
    kernel(1, THREADS, (flame.zeros(SIZE, device="cuda"), *others()))
    flame.cuda.synchronize()


if __name__ == "__main__":
    commit(sys.argv[1])
