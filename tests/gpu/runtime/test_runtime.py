"""The runtime on a real GPU: memory, streams, errors, copies, graphs."""

import ctypes
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import flame
from flame.core.errors import CudaError, IndexRangeError, OutOfMemoryError
from flame.core.types import tensor_type
from flame.runtime.cpu.cache import DiskCache
from flame.runtime.cuda import errors, modules, transfer
from flame.runtime.cuda.driver import driver
from flame.runtime.cuda.graphs import capture
from flame.runtime.cuda.streams import Event, Stream, current_handle, stream_context, synchronize
from flame.runtime.storage import Storage
from flame.tensor import Tensor

TEXT = r"""#include <cuda_bf16.h>
extern "C" __global__ void add(float* x, float a, long long n) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) x[i] += a;
}
// Adds after at least ``cycles`` of the clock.
extern "C" __global__ void late(float* x, float a, long long cycles) {
    const long long begin = clock64();
    while (clock64() - begin < cycles) {}
    x[threadIdx.x] += a;
}
extern "C" __global__ void fail(long long* slot, long long code) {
    slot[1] = code;
    slot[0] = 1;
}
extern "C" __global__ void large(float* x) {
    extern __shared__ float held[];
    held[20000 + threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = 2 * held[20000 + threadIdx.x];
}
"""
CYCLES = 50_000_000  # some 30 ms


def launch(symbol: str, *values: ctypes._SimpleCData, shared: int = 0, grid: int = 1) -> None:
    function = modules.load(0, TEXT, symbol, shared)
    packed = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    block = (32, 1, 1) if symbol != "fail" else (1, 1, 1)
    driver().use(0)
    driver().launch(
        function, (grid, 1, 1), block, shared, current_handle(0), ctypes.addressof(packed)
    )


def add(storage: Storage, a: float, n: int = 32) -> None:
    launch("add", *_add(storage, a, n), grid=-(-n // 32))


def _add(storage: Storage, a: float, n: int) -> tuple[ctypes._SimpleCData, ...]:
    return ctypes.c_void_p(storage.pointer), ctypes.c_float(a), ctypes.c_longlong(n)


def late(storage: Storage, a: float) -> None:
    launch("late", ctypes.c_void_p(storage.pointer), ctypes.c_float(a), ctypes.c_longlong(CYCLES))


def upload(values: np.ndarray) -> Storage:
    host = np.ascontiguousarray(values)
    made = Storage.allocate(host.nbytes, "cuda:0")
    source = Storage.borrow(host.ctypes.data, host.nbytes, host)
    transfer.copy(made, made.pointer, source, source.pointer, host.nbytes)
    return made


def download(storage: Storage, dtype: type = np.float32) -> np.ndarray:
    made = Storage.allocate(storage.nbytes)
    transfer.copy(made, made.pointer, storage, storage.pointer, storage.nbytes)
    count = storage.nbytes // np.dtype(dtype).itemsize
    return made.as_numpy(dtype, (count,), (1,)).copy()


def test_the_device() -> None:
    found = flame.cuda.get_device_properties()
    assert (found.major, found.minor) >= (8, 0)
    assert found.name
    assert found.shared_memory_per_block_optin > 48 << 10
    free, total = flame.cuda.mem_get_info()
    assert 0 < free <= total <= found.total_memory
    assert flame.cuda.is_bf16_supported()


def test_kernels_and_their_caches(tmp_path: Path) -> None:
    x = upload(np.arange(100, dtype=np.float32))
    add(x, 1.5, 100)
    assert np.array_equal(download(x), np.arange(100) + np.float32(1.5))
    function = modules.load(0, TEXT, "add")
    assert driver().parameter_sizes(function) == (8, 4, 8)
    again = modules.Modules(driver(), DiskCache(tmp_path / "kept"))
    texts = [TEXT.replace("add", f"add{i}").replace("late", f"late{i}") for i in range(6)]
    texts = [t.replace("fail", f"fail{i}").replace("large", f"la{i}") for i, t in enumerate(texts)]
    requests = [(text, f"add{i}", 0) for i, text in enumerate(texts)]
    handles = again.load_many(0, requests)
    assert len(set(handles)) == 6
    third = modules.Modules(driver(), DiskCache(tmp_path / "kept"))
    third.load_many(0, requests)
    assert (third.statistics.compiled, third.statistics.disk_hits) == (0, 6)


def test_much_shared_memory() -> None:
    x = upload(np.arange(32, dtype=np.float32))
    launch("large", ctypes.c_void_p(x.pointer), shared=100_000)
    assert np.array_equal(download(x), 2 * np.arange(32))


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("nbytes", [4, 64 << 10, (64 << 10) + 4, 100_000_004])
def test_copies(nbytes: int, pinned: bool) -> None:
    make = Storage.allocate_pinned if pinned else Storage.allocate
    source, back = make(nbytes), make(nbytes)
    values = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    view = source.as_numpy(np.uint8, (nbytes,), (1,))
    view[:] = values
    there = Storage.allocate(nbytes, "cuda:0")
    transfer.copy(there, there.pointer, source, source.pointer, nbytes, non_blocking=pinned)
    if not pinned:
        view[:] = 0  # at once: the bytes are on their way
    second = Storage.allocate(nbytes, "cuda:0")
    transfer.copy(second, second.pointer, there, there.pointer, nbytes)
    transfer.copy(back, back.pointer, second, second.pointer, nbytes)
    assert np.array_equal(back.as_numpy(np.uint8, (nbytes,), (1,)), values)


def test_a_copy_behind_a_long_kernel() -> None:
    x = upload(np.zeros(1 << 20, np.float32))
    late(x, 1.0)
    assert download(x)[:32].tolist() == [1.0] * 32


def test_streams_wait_for_one_another() -> None:
    x = upload(np.zeros(32, np.float32))
    synchronize(0)
    one, two = Stream(0), Stream(0)
    with stream_context(one):
        late(x, 1.0)
    assert not one.query()
    two.wait_stream(one)
    with stream_context(two):
        x.record_stream(current_handle(0))
        function_values = download(x)
    assert function_values.tolist() == [1.0] * 32


def test_events_measure() -> None:
    x = upload(np.zeros(32, np.float32))
    begin, end = Event(enable_timing=True), Event(enable_timing=True)
    begin.record()
    late(x, 1.0)
    end.record()
    assert not end.query()
    end.synchronize()
    assert begin.elapsed_time(end) > 1.0


def test_memory_is_not_given_on_before_other_streams_are_done() -> None:
    side = Stream(0)
    for _ in range(10):
        x = upload(np.zeros(32, np.float32))
        synchronize(0)
        with stream_context(side):
            late(x, 1.0)
            x.record_stream(current_handle(0))
        pointer = x.pointer
        del x
        y = upload(np.full(32, 5, np.float32))  # may be the same memory
        side.synchronize()
        assert download(y).tolist() == [5.0] * 32, pointer == y.pointer


def test_errors_arrive_at_a_wait() -> None:
    slot = errors.error_slot(0, lambda code: IndexRangeError(f"index {code} is out of range"))
    launch("fail", ctypes.c_void_p(slot.pointer), ctypes.c_longlong(17))
    with pytest.raises(IndexRangeError, match="index 17"):
        synchronize(0)
    synchronize(0)


def test_out_of_memory_names_tensors_and_leaves_the_process_well() -> None:
    type_ = tensor_type(flame.float32, (1 << 20, 3), None, "cuda:0")
    storage = Storage.allocate(type_.span * 4, "cuda:0")
    held = Tensor.wrap(storage, storage.pointer, type_)
    with pytest.raises(OutOfMemoryError) as caught:
        Storage.allocate(flame.cuda.mem_get_info()[1] * 2, "cuda:0")
    assert "float32 (1048576, 3): 12 MiB" in str(caught.value)
    del held
    x = upload(np.zeros(32, np.float32))
    add(x, 1.0)
    assert download(x)[0] == 1.0


def test_statistics() -> None:
    gc.collect()
    before = flame.cuda.memory_allocated()
    flame.cuda.reset_peak_memory_stats()
    storage = Storage.allocate(50 << 20, "cuda:0")
    assert flame.cuda.memory_allocated() == before + (50 << 20)
    del storage
    assert flame.cuda.memory_allocated() == before
    assert flame.cuda.max_memory_allocated() == before + (50 << 20)
    assert flame.cuda.memory_reserved() >= 50 << 20
    flame.cuda.empty_cache()


def test_graphs() -> None:
    x = upload(np.zeros(32, np.float32))
    add(x, 1.0)  # loaded before
    values = _add(x, 2.0, 32)
    dropped = [Storage.allocate(100, "cuda:0")]

    def work(stream: int) -> None:
        for _ in range(5):
            launch("add", *values)
        dropped.clear()

    graph = capture(0, work)
    assert download(x)[0] == 1.0
    for _ in range(3):
        graph.launch(current_handle(0))
    assert download(x).tolist() == [31.0] * 32


def test_a_capture_that_fails_leaves_the_stream_well() -> None:
    x = upload(np.zeros(32, np.float32))
    add(x, 1.0)

    def wait(stream: int) -> None:
        add(x, 1.0)
        driver().synchronize(stream)

    with pytest.raises(CudaError, match="capture"):
        capture(0, wait)
    assert download(x)[0] == 1.0
    capture(0, lambda stream: add(x, 1.0)).launch(current_handle(0))
    assert download(x)[0] == 2.0


def test_threads_have_streams_and_contexts_of_their_own() -> None:
    found: list[float] = []

    def work(number: int) -> None:
        with stream_context(Stream(0)):
            x = upload(np.full(32, number, np.float32))
            for _ in range(100):
                add(x, 1.0)
            found.append(float(download(x)[0]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [100.0, 101.0, 102.0, 103.0]


@pytest.mark.skipif(flame.cuda.device_count() < 2, reason="needs two GPUs")
def test_copies_between_devices() -> None:
    x = upload(np.arange(1 << 20, dtype=np.float32))
    late(x, 1.0)
    there = Storage.allocate(x.nbytes, "cuda:1")
    transfer.copy(there, there.pointer, x, x.pointer, x.nbytes)
    found = download(there)
    assert found[:32].tolist() == list(range(1, 33))
    assert np.array_equal(found[32:], np.arange(32, 1 << 20))


@pytest.mark.parametrize("pool", ["0", "1"])
def test_a_whole_process(pool: str) -> None:
    """Starting, working and ending leaves no complaint; without a pool as well."""
    program = """
import flame
from flame.runtime.storage import Storage
held = [Storage.allocate(1 << 20, "cuda:0") for _ in range(10)]
del held[::2]
event = flame.cuda.Event()
event.record()
flame.cuda.synchronize()
print(flame.cuda.memory_allocated())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "FLAME_CUDA_POOL": pool},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert (done.stdout, done.stderr) == (f"{5 << 20}\n", "")
