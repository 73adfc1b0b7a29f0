"""The emulated driver: memory, streams, kernels, graphs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flame.core.errors import CudaError, OutOfMemoryError
from flame.runtime.cuda.driver import driver

from .emulation import EmulatedDriver

SCALE = """
extern "C" __global__ void scale(float* x, const double factor, const long long n) {
  const long long i = blockIdx.x * 32LL + threadIdx.x;
  if (i < n) x[i] *= (float)factor;
}
"""


def put(made: EmulatedDriver, array: Any, stream: int = 0) -> int:
    pointer = made.allocate(0, array.nbytes, stream)
    made.copy_to_device(pointer, array.ctypes.data, array.nbytes, stream)
    return pointer


def get(made: EmulatedDriver, pointer: int, count: int) -> Any:
    array = np.zeros(count, np.float32)
    made.copy_to_host(array.ctypes.data, pointer, array.nbytes, 0)
    return array


class Scale:
    """The kernel of this file, launched as the runtime launches kernels."""

    def __init__(self, made: EmulatedDriver) -> None:
        self.made = made
        module = made.load_module(0, made.compile(SCALE, "scale", (9, 0)))
        self.function = made.function(module, "scale", 0)

    def __call__(self, pointer: int, factor: float, count: int, stream: int) -> None:
        words = (ctypes.c_int64(pointer), ctypes.c_double(factor), ctypes.c_int64(count))
        table = (ctypes.c_void_p * 3)(*(ctypes.addressof(w) for w in words))
        grid = (-(-count // 32), 1, 1)
        address = ctypes.addressof(table)
        self.made.launch(self.function, grid, (32, 1, 1), 0, stream, address)


def test_is_the_driver_of_the_process(emulated_cuda: EmulatedDriver) -> None:
    assert driver() is emulated_cuda


def test_memory_is_poisoned_and_aligned(emulated_cuda: EmulatedDriver) -> None:
    pointer = emulated_cuda.allocate(0, 40, 0)
    assert pointer % 256 == 0
    assert np.isnan(get(emulated_cuda, pointer, 10)).all()


def test_runs_a_kernel(emulated_cuda: EmulatedDriver) -> None:
    pointer = put(emulated_cuda, np.arange(100, dtype=np.float32))
    scale = Scale(emulated_cuda)
    assert emulated_cuda.parameter_sizes(scale.function) == (8, 8, 8)
    scale(pointer, 2.0, 100, 0)
    np.testing.assert_array_equal(get(emulated_cuda, pointer, 100), 2 * np.arange(100))
    assert emulated_cuda.launches == ["scale"]


def test_write_out_of_bounds_is_an_error(emulated_cuda: EmulatedDriver) -> None:
    pointer = put(emulated_cuda, np.zeros(100, np.float32))
    with pytest.raises(CudaError, match="scale: a write after the allocation of 400 bytes"):
        Scale(emulated_cuda)(pointer, 2.0, 120, 0)


def test_copies_know_device_memory(emulated_cuda: EmulatedDriver) -> None:
    array = np.zeros(4, np.float32)
    pointer = put(emulated_cuda, array)
    host = array.ctypes.data
    with pytest.raises(CudaError, match="not on a device"):
        emulated_cuda.copy_to_device(host, host, 16, 0)
    with pytest.raises(CudaError, match="not host memory"):
        emulated_cuda.copy_to_host(pointer, pointer, 16, 0)
    with pytest.raises(CudaError, match="leave the allocation"):
        emulated_cuda.copy_to_host(host, pointer, 17, 0)
    emulated_cuda.free(0, pointer, 0)
    with pytest.raises(CudaError, match="not on a device"):
        emulated_cuda.copy_to_host(host, pointer, 16, 0)
    with pytest.raises(CudaError, match="not live"):
        emulated_cuda.free(0, pointer, 0)


def test_memory_runs_out_and_trimming_helps(
    make_emulated_cuda: Callable[..., EmulatedDriver],
) -> None:
    made = make_emulated_cuda(memory=1 << 20)
    first = made.allocate(0, 700 << 10, 0)
    with pytest.raises(OutOfMemoryError, match="cuMemAllocFromPoolAsync"):
        made.allocate(0, 700 << 10, 0)
    made.free(0, first, 0)
    assert made.reserved(0) == 700 << 10
    with pytest.raises(OutOfMemoryError):  # what the pool holds is too large to be cut up
        made.allocate(0, 330 << 10, 0)
    made.trim(0)
    assert made.memory_info(0) == (1 << 20, 1 << 20)
    made.allocate(0, 330 << 10, 0)


def test_devices_are_counted_and_apart(make_emulated_cuda: Callable[..., EmulatedDriver]) -> None:
    made = make_emulated_cuda(devices=2)
    assert made.device_count() == 2
    pointer, there = put(made, np.ones(4, np.float32)), made.allocate(1, 16, 0)
    made.copy_across(there, 1, pointer, 0, 16, 0)
    np.testing.assert_array_equal(get(made, there, 4), 1)
    with pytest.raises(CudaError, match="INVALID_DEVICE"):
        made.use(2)
    with pytest.raises(CudaError, match="another device"):
        Scale(made)(pointer, 2.0, 4, made.create_stream(1))


def test_a_capture_is_replayed(emulated_cuda: EmulatedDriver) -> None:
    made, scale = emulated_cuda, Scale(emulated_cuda)
    pointer, stream = put(made, np.ones(4, np.float32)), made.create_stream(0)
    made.begin_capture(stream)
    scale(pointer, 3.0, 4, stream)
    with pytest.raises(CudaError, match="captured"):
        made.synchronize(stream)
    graph = made.end_capture(stream)
    np.testing.assert_array_equal(get(made, pointer, 4), 1)
    for expected in (3, 9):
        made.launch_graph(graph, stream)
        np.testing.assert_array_equal(get(made, pointer, 4), expected)
    made.destroy_graph(graph)
    with pytest.raises(CudaError, match="INVALID_HANDLE"):
        made.launch_graph(graph, stream)


def test_a_capture_may_fork_and_must_join(emulated_cuda: EmulatedDriver) -> None:
    made, scale = emulated_cuda, Scale(emulated_cuda)
    pointer = put(made, np.ones(4, np.float32))
    main, side = made.create_stream(0), made.create_stream(0)
    fork, join = (made.create_event(0, timing=False) for _ in range(2))
    for joins in (True, False):
        made.begin_capture(main)
        made.record_event(fork, main)
        made.wait_event(side, fork)
        scale(pointer, 2.0, 4, side)
        if joins:
            made.record_event(join, side)
            made.wait_event(main, join)
            made.launch_graph(made.end_capture(main), main)
        else:
            with pytest.raises(CudaError, match="UNJOINED"):
                made.end_capture(main)
    np.testing.assert_array_equal(get(made, pointer, 4), 2)


def test_events_time(emulated_cuda: EmulatedDriver) -> None:
    begin, end = (emulated_cuda.create_event(0, timing=True) for _ in range(2))
    with pytest.raises(CudaError, match="not recorded"):
        emulated_cuda.elapsed(begin, end)
    for event in (begin, end):
        emulated_cuda.record_event(event, 0)
    assert emulated_cuda.event_done(end)
    assert emulated_cuda.elapsed(begin, end) >= 0
