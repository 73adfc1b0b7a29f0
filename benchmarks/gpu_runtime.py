"""What the runtime costs around the kernels of a GPU: the host's time of each call, copies, and
compilation.

    python benchmarks/gpu_runtime.py
"""

from __future__ import annotations

import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import flame
from flame.runtime.cpu.cache import DiskCache
from flame.runtime.cpu.emission import compile_threads
from flame.runtime.cuda import errors, modules, transfer
from flame.runtime.cuda.driver import driver
from flame.runtime.cuda.graphs import capture
from flame.runtime.cuda.streams import current_handle, synchronize
from flame.runtime.storage import Storage

BURST = 16  # launches between two waits: the queue never fills
TEXT = r"""#include <cuda_bf16.h>
#include <cuda_fp16.h>
extern "C" __global__ void NAME(const float* x, float* y, long long n) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) y[i] = tanhf(x[i]) * NUMBERf + __bfloat162float(__float2bfloat16(x[i]));
}
"""


def host_time(function: Callable[[], object], rounds: int = 300) -> float:
    """Median microseconds of a call, in bursts."""
    times = []
    for _ in range(rounds):
        synchronize(0)
        start = time.perf_counter()
        for _ in range(BURST):
            function()
        times.append((time.perf_counter() - start) / BURST)
    return statistics.median(times) * 1e6


def calls() -> None:
    made, stream = driver(), current_handle(0)
    x, y = Storage.allocate(4096, "cuda:0"), Storage.allocate(4096, "cuda:0")
    text = TEXT.replace("NAME", "work").replace("NUMBER", "1.0")
    function = modules.load(0, text, "work")
    values = [ctypes.c_void_p(x.pointer), ctypes.c_void_p(y.pointer), ctypes.c_longlong(1024)]
    packed = (ctypes.c_void_p * 3)(*(ctypes.addressof(v) for v in values))
    address = ctypes.addressof(packed)
    kernel = flame.cuda.RawKernel(text, "work")
    a, b = flame.ones(1024).cuda(), flame.ones(1024).cuda()
    graph = capture(0, lambda s: made.launch(function, (4, 1, 1), (256, 1, 1), 0, s, address))
    slot = errors.error_slot(0, lambda code: errors.FlameError(str(code)))
    rows: list[tuple[str, Callable[[], object]]] = [
        (
            "driver launch",
            lambda: made.launch(function, (4, 1, 1), (256, 1, 1), 0, stream, address),
        ),
        ("graph launch", lambda: graph.launch(stream)),
        ("RawKernel", lambda: kernel(4, 256, (a, b, 1024))),
        ("flame.add", lambda: a + b),
        ("storage, allocated and freed", lambda: Storage.allocate(4096, "cuda:0")),
        ("current stream", lambda: current_handle(0)),
        ("check of errors", lambda: errors.check(0)),
        ("synchronize", lambda: synchronize(0)),
        ("item()", lambda: a[0].item()),
    ]
    print("host time of a call, µs")
    for name, function_ in rows:
        print(f"  {name:<32}{host_time(function_):8.2f}")
    slot.release()


def copies(nbytes: int = 256 << 20) -> None:
    there = Storage.allocate(nbytes, "cuda:0")
    print(f"copies of {nbytes >> 20} MiB, GB/s (best of 5)")
    for kind, host in (
        ("ordinary memory", Storage.allocate(nbytes)),
        ("pinned memory", Storage.allocate_pinned(nbytes)),
    ):
        ctypes.memset(host.pointer, 1, nbytes)
        for name, to, of in (("to the GPU", there, host), ("to the host", host, there)):
            best = float("inf")
            for _ in range(5):
                synchronize(0)
                start = time.perf_counter()
                transfer.copy(to, to.pointer, of, of.pointer, nbytes)
                synchronize(0)
                best = min(best, time.perf_counter() - start)
            print(f"  {kind + ' ' + name:<32}{nbytes / best / 1e9:8.1f}")


def compilation(count: int = 48) -> None:
    requests = [
        (TEXT.replace("NAME", f"k{i}").replace("NUMBER", f"{i}.5"), f"k{i}", 0)
        for i in range(count)
    ]
    print(f"{count} kernels, {compile_threads()} threads, s")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("compiled", "from disk"):
            fresh = modules.Modules(driver(), DiskCache(Path(folder)))
            start = time.perf_counter()
            fresh.load_many(0, requests)
            taken = time.perf_counter() - start
            print(f"  {name:<32}{taken:8.3f}  ({fresh.statistics.programs} programs)")
    start = time.perf_counter()
    driver().compile(requests[0][0], "k0", driver().properties(0).capability)
    print(f"  {'one alone':<32}{time.perf_counter() - start:8.3f}")


def main() -> None:
    print(f"{flame.cuda.get_device_name()}, {driver().versions()}")
    calls()
    copies()
    compilation()


if __name__ == "__main__":
    main()
