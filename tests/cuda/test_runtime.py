"""The runtime's own parts over the emulation: modules, raw kernels, transfers, graphs."""

import threading
from typing import Any

import pytest

import flame
from flame.core.errors import CompileError, CudaError, StateError
from flame.runtime.cuda import modules
from flame.runtime.cuda.graphs import capture
from flame.runtime.cuda.streams import Stream, current_handle, stream_context

from .emulation import EmulatedDriver

SQUARE = r"""
static __device__ float squared(float x) { return x * x; }
extern "C" __global__ void square(const float* x, float* y, long long n) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) y[i] = squared(x[i]);
}
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path))


def test_a_kernel_that_writes_beside_its_memory_is_found(emulated_cuda: EmulatedDriver) -> None:
    x = flame.ones(100).cuda()
    with pytest.raises(CudaError):
        flame.cuda.RawKernel(SQUARE, "square")(1, 256, (x, flame.empty(50, device="cuda"), 100))


def test_many_kernels_of_one_program(
    emulated_cuda: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAME_NUM_THREADS", "1")
    texts = [
        SQUARE.replace("square(", f"square{i}(").replace("x * x", f"x * {i}") for i in range(3)
    ]
    requests = [(text, f"square{i}", 0) for i, text in enumerate(texts)]
    assert len(set(modules.load_many(0, requests))) == 3
    assert modules.statistics().programs == 1
    with pytest.raises(CompileError, match="wrong"):
        modules.load_many(0, [(SQUARE.replace("x * x", "wrong"), "square", 0), *requests])


def test_a_graph_of_a_raw_kernel(emulated_cuda: EmulatedDriver) -> None:
    kernel = flame.cuda.RawKernel(SQUARE.replace("y[i] =", "y[i] +="), "square")
    x, y = flame.full((10,), 3.0).cuda(), flame.zeros(10).cuda()
    kernel.compile()
    dropped = [flame.zeros(10).cuda()]

    def work(stream: int) -> None:
        kernel(1, 32, (x, y, 10))
        dropped.clear()

    graph = capture(0, work)
    assert y.cpu().tolist() == [0.0] * 10
    for _ in range(3):
        graph.launch(current_handle(0))
    assert y.cpu().tolist() == [27.0] * 10
    with pytest.raises(StateError, match="captured graph"):
        capture(0, lambda stream: x.cpu() and None)
    assert y.cpu().tolist() == [27.0] * 10


def test_work_of_threads_on_streams_of_their_own(emulated_cuda: EmulatedDriver) -> None:
    found = []

    def work(number: int) -> None:
        with stream_context(Stream(0)):
            x = flame.full((1000,), float(number)).cuda()
            found.append(float((x + 1).sum().item()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [1000.0, 2000.0, 3000.0]
