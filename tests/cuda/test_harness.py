"""The host harness: what CUDA texts mean, and what it refuses."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from flame.core.errors import CompileError

from .host_compiler import HostLibrary, KernelFault

TEXT = """
extern "C" __global__ void reverse_block(const int* x, int* y) {
  __shared__ int kept[64];
  kept[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  __syncthreads();
  y[blockIdx.x * 64 + threadIdx.x] = kept[63 - threadIdx.x];
}

extern "C" __global__ void no_barrier(const int* x, int* y) {
  __shared__ int kept[64];
  kept[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = kept[63 - threadIdx.x];
}

extern "C" __global__ void lost_thread(int* y) {
  if (threadIdx.x < 40) return;
  if (threadIdx.x < 50) __syncthreads();
  else __syncwarp(0xffffffffu);
  y[threadIdx.x] = 1;
}

extern "C" __global__ void two_barriers(int* y) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 1;
}

extern "C" __global__ void lanes(int* y) {
  int lane = threadIdx.x;
  y[lane] = __shfl_sync(0xffffffffu, lane * 10, 3);
  y[32 + lane] = __shfl_up_sync(0xffffffffu, lane, 2);
  y[64 + lane] = __shfl_down_sync(0xffffffffu, lane, 2, 8);
  y[96 + lane] = __shfl_xor_sync(0xffffffffu, lane, 5);
  y[128 + lane] = (int)__ballot_sync(0xffffffffu, lane % 2);
  y[160 + lane] = __any_sync(0xffffffffu, lane == 7) + 2 * __all_sync(0xffffffffu, lane == 7);
}

extern "C" __global__ void part_of_a_warp(float* y) {
  const unsigned mates = 0xffu << (threadIdx.x / 8 * 8);
  float sum = threadIdx.x;
  for (int turn = 0; turn <= (int)threadIdx.x / 8; ++turn)  // each part goes round another time
    for (int apart = 4; apart > 0; apart /= 2) sum += __shfl_xor_sync(mates, sum, apart);
  y[threadIdx.x] = sum;
}

extern "C" __global__ void stranger(int* y) {
  y[threadIdx.x] = __shfl_sync(0xffu, 1, 9);
}

extern "C" __global__ void dynamic(float* y, const long long n) {
  extern __shared__ __align__(16) float room[];
  y[threadIdx.x] = room[threadIdx.x];
  room[n] = 1.0f;
}

extern "C" __global__ void count_up(int* total, float* sum) {
  atomicAdd(total, 1);
  atomicAdd(sum, 0.5f);
  atomicMax(total + 1, (int)(blockIdx.x * blockDim.x + threadIdx.x));
}
"""


@pytest.fixture(scope="module")
def library() -> HostLibrary:
    return HostLibrary.of([TEXT])


def run(
    library: HostLibrary, name: str, block: int, *words: Any, grid: int = 1, shared: int = 0,
    descending: bool = False,
) -> None:  # fmt: skip
    given = [ctypes.c_int64(w.ctypes.data if isinstance(w, np.ndarray) else w) for w in words]
    table = (ctypes.c_void_p * len(given))(*(ctypes.addressof(w) for w in given))
    library.launch(name, (grid, 1, 1), (block, 1, 1), shared, ctypes.addressof(table),
                   descending=descending)  # fmt: skip


@pytest.mark.parametrize("descending", [False, True])
def test_threads_wait_at_barriers(library: HostLibrary, descending: bool) -> None:
    x, y = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    run(library, "reverse_block", 64, x, y, grid=2, descending=descending)
    np.testing.assert_array_equal(y.reshape(2, 64), x.reshape(2, 64)[:, ::-1])


def test_missing_barrier_shows_in_the_other_order(library: HostLibrary) -> None:
    x, found = np.arange(64, dtype=np.int32), []
    for descending in (False, True):
        y = np.zeros(64, np.int32)
        run(library, "no_barrier", 64, x, y, descending=descending)
        found.append(y)
    assert not np.array_equal(*found)
    assert any((y == -1).any() for y in found), "fresh shared memory is poisoned"


def test_missed_barrier_is_an_error(library: HostLibrary) -> None:
    with pytest.raises(KernelFault, match="barrier that not all threads"):
        run(library, "lost_thread", 64, np.zeros(64, np.int32))


def test_different_barriers_are_an_error(library: HostLibrary) -> None:
    with pytest.raises(KernelFault, match="different barriers"):
        run(library, "two_barriers", 64, np.zeros(64, np.int32))


def test_library_works_after_an_error(library: HostLibrary) -> None:
    x, y = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    with pytest.raises(KernelFault):
        run(library, "two_barriers", 64, np.zeros(64, np.int32))
    run(library, "reverse_block", 64, x, y)
    np.testing.assert_array_equal(y, x[::-1])


def test_exchanges_between_lanes(library: HostLibrary) -> None:
    y = np.zeros(192, np.int32)
    run(library, "lanes", 32, y)
    lane = np.arange(32)
    np.testing.assert_array_equal(y[:32], 30)
    np.testing.assert_array_equal(y[32:64], np.where(lane < 2, lane, lane - 2))
    np.testing.assert_array_equal(y[64:96], np.where(lane % 8 < 6, lane + 2, lane))
    np.testing.assert_array_equal(y[96:128], lane ^ 5)
    np.testing.assert_array_equal(y[128:160], np.int32(np.uint32(0xAAAAAAAA).view(np.int32)))
    np.testing.assert_array_equal(y[160:], 1)


def test_parts_of_a_warp_go_their_own_ways(library: HostLibrary) -> None:
    y = np.zeros(32, np.float32)
    run(library, "part_of_a_warp", 32, y)
    sums = np.arange(32).reshape(4, 8).sum(1)
    np.testing.assert_array_equal(
        y.reshape(4, 8), (sums * 8.0 ** np.arange(4))[:, None].repeat(8, 1)
    )


def test_exchange_with_a_stranger_is_an_error(library: HostLibrary) -> None:
    with pytest.raises(KernelFault, match=r"takes no part|mask lacks"):
        run(library, "stranger", 32, np.zeros(32, np.int32))


def test_dynamic_shared_memory_has_bounds(library: HostLibrary) -> None:
    y = np.zeros(8, np.float32)
    run(library, "dynamic", 8, y, 7, shared=32)
    assert np.isnan(y[:7]).all()
    with pytest.raises(KernelFault, match="past the block's dynamic shared memory"):
        run(library, "dynamic", 8, y, 8, shared=32)


def test_atomics_count(library: HostLibrary) -> None:
    total, sums = np.zeros(2, np.int32), np.zeros(1, np.float32)
    run(library, "count_up", 64, total, sums, grid=3)
    assert total.tolist() == [192, 191]
    assert sums[0] == 96


def test_arguments_are_known(library: HostLibrary) -> None:
    assert library.argument_sizes("dynamic") == (8, 8)
    assert library.argument_sizes("absent") is None


def test_wrong_text_raises_with_the_compilers_words() -> None:
    with pytest.raises(CompileError, match="nothing_of_the_kind"):
        HostLibrary.of(['extern "C" __global__ void f(int* x) { *x = nothing_of_the_kind; }'])
