"""What `test_nvidia.py` runs in a process of its own, whose libcuda is the stub."""

import ctypes
import os
import threading

import numpy as np
import pytest
from cuda.bindings import driver as bindings

from flame.core.errors import CudaError, DeviceError, OutOfMemoryError
from flame.runtime.cuda.driver import Lifetime, install_driver
from flame.runtime.cuda.nvidia import NvidiaDriver
from flame.runtime.storage import Storage

IMAGE = b"\x7fELF"


def devices(made: NvidiaDriver) -> None:
    assert made.device_count() == 2
    found = made.properties(1)
    assert (found.name, found.capability, found.multiprocessor_count) == ("Stub 1", (9, 0), 132)
    assert (found.total_memory, found.shared_memory_per_block) == (80 << 30, 232448)
    with pytest.raises(DeviceError, match="no device cuda:2; this machine has cuda:0 to cuda:1"):
        made.use(2)


def memory(made: NvidiaDriver) -> None:
    stream, there = made.create_stream(0), made.create_stream(1, -1)
    pointer, other = made.allocate(0, 1000, stream), made.allocate(1, 0, there)
    assert pointer % 256 == 0
    made.free(1, other, there)
    other = made.allocate(1, 1000, there)
    pinned = made.allocate_pinned(1000)
    made.fill(pointer, 7, 1000, stream)
    made.copy_across(other, 1, pointer, 0, 1000, stream)
    made.copy_to_host(pinned, other, 1000, there)
    assert ctypes.string_at(pinned, 1000) == b"\7" * 1000
    ctypes.memset(pinned, 9, 500)
    made.copy_to_device(other, pinned, 500, there)
    made.copy_on_device(other + 500, other, 500, there)
    assert ctypes.string_at(other, 1000) == b"\x09" * 1000
    made.free_pinned(pinned)
    assert made.memory_info(0)[1] == 80 << 30
    if pooled:
        assert made.reserved(0) == 12345  # the pool's threshold was raised
        assert made.memory_info(0)[0] == 64 << 30
    else:
        assert made.reserved(0) == 0
        assert made.memory_info(0)[0] == (64 << 30) + 3  # three calls of cuMemAlloc
    made.trim(0)
    with pytest.raises(OutOfMemoryError, match=r"cuMemAlloc(Async)?: CUDA_ERROR_OUT_OF_MEMORY"):
        made.allocate(0, 1 << 33, stream)
    for device, each, where in ((0, pointer, stream), (1, other, there)):
        made.free(device, each, where)
        made.destroy_stream(where)


def streams(made: NvidiaDriver) -> None:
    stream = made.create_stream(0)
    assert [made.stream_done(stream), made.stream_done(stream)] == [False, True]
    begin, end = made.create_event(0, timing=True), made.create_event(0, timing=True)
    made.record_event(begin, stream)
    made.wait_event(stream, begin)
    made.synchronize_event(begin)
    assert made.event_done(begin)
    assert made.elapsed(begin, end) == 1.5
    plain = made.create_event(1, timing=False)
    with pytest.raises(CudaError, match=r"cuEventElapsedTime: CUDA_ERROR_INVALID_HANDLE \(in wor"):
        made.elapsed(plain, end)
    for event in (begin, end, plain):
        made.destroy_event(event)
    made.synchronize(stream)
    made.synchronize_device(1)


def kernels(made: NvidiaDriver) -> None:
    stream = made.create_stream(0)
    with pytest.raises(CudaError, match="cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE"):
        made.load_module(0, b"text")
    module = made.load_module(0, IMAGE)
    with pytest.raises(CudaError, match=r"cuModuleGetFunction\('sub'\): CUDA_ERROR_NOT_FOUND"):
        made.function(module, "sub", 0)
    function = made.function(module, "add", 0)
    assert made.parameter_sizes(function) == (8, 8, 4)
    x, y = np.arange(512, dtype=np.float32), np.zeros(512, np.float32)
    values = [
        ctypes.c_void_p(x.ctypes.data),
        ctypes.c_void_p(y.ctypes.data),
        ctypes.c_float(2.5),
    ]
    packed = (ctypes.c_void_p * 3)(*(ctypes.addressof(v) for v in values))
    launch = (function, (2, 1, 1), (256, 1, 1))
    made.launch(*launch, 0, stream, ctypes.addressof(packed))
    assert np.array_equal(y, x + 2.5)
    # More shared memory than any kernel may ask for has to be allowed before.
    with pytest.raises(CudaError, match=r"cuLaunchKernel\(grid \(2, 1, 1\), .* shared 100000\)"):
        made.launch(*launch, 100_000, stream, ctypes.addressof(packed))
    made.function(module, "add", 100_000)
    made.function(module, "add", 60_000)  # does not take back what is allowed
    made.launch(*launch, 100_000, stream, ctypes.addressof(packed))
    with pytest.raises(CudaError, match="shared memory of 1000000 bytes"):
        made.function(module, "add", 1_000_000)


def current_device(made: NvidiaDriver) -> None:
    """It stays where `use` put it, whatever is done with the other device."""

    def current() -> int:
        status, context = bindings.cuCtxGetCurrent()
        assert not status
        return int(context)

    made.use(1)
    there = current()
    stream = made.create_stream(0)
    held = made.allocate(0, 64, stream)
    assert current() == there
    with pytest.raises(OutOfMemoryError):
        made.allocate(0, 1 << 33, stream)
    made.free(0, held, stream)
    made.destroy_event(made.create_event(0, timing=False))
    made.load_module(0, IMAGE)
    made.memory_info(0)
    made.synchronize_device(0)
    assert current() == there
    made.use(0)
    assert current() == there - 1


def graphs(made: NvidiaDriver) -> None:
    stream = made.create_stream(0)
    made.begin_capture(stream)
    with pytest.raises(CudaError, match=r"CAPTURE_UNSUPPORTED .*while a graph is captured"):
        made.synchronize(stream)
    graph = made.end_capture(stream)
    made.launch_graph(graph, stream)
    made.destroy_graph(graph)
    with pytest.raises(CudaError, match="cuGraphLaunch: CUDA_ERROR_INVALID_HANDLE"):
        made.launch_graph(graph, stream)
    with pytest.raises(CudaError, match="cuStreamEndCapture"):
        made.end_capture(stream)


def threads(made: NvidiaDriver) -> None:
    """Each thread has a current context of its own."""
    stream = made.create_stream(0)
    done = []

    def work() -> None:
        made.free(0, made.allocate(0, 64, stream), stream)
        made.free_pinned(made.allocate_pinned(64))
        done.append(made.memory_info(1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def faults(made: NvidiaDriver) -> None:
    """After a kernel broke the context nothing is freed, whose failure would hide the fault."""
    install_driver(made)
    held = Storage.allocate(100, "cuda:0")
    function = made.function(made.load_module(0, IMAGE), "fault", 0)
    words = (ctypes.c_void_p * 1)()
    with pytest.raises(CudaError, match=r"ILLEGAL_ADDRESS .*compute-sanitizer python .* names the"):
        made.launch(function, (1, 1, 1), (1, 1, 1), 0, held.stream, ctypes.addressof(words))
    assert Lifetime.over
    del held


pooled = os.environ.get("FLAME_CUDA_POOL") != "0"
driver = NvidiaDriver()
for check in (devices, memory, streams, kernels, current_device, graphs, threads, faults):
    check(driver)
print("all well")
