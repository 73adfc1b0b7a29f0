"""The caching allocator."""

from __future__ import annotations

import ctypes
import gc
import itertools
import threading
from pathlib import Path

import pytest

from flame.core.errors import ArgumentError, OutOfMemoryError
from flame.runtime.cpu import memory
from flame.runtime.cpu.allocator import CachingAllocator, rounded

pytestmark = pytest.mark.unit

SIZES = [0, 1, 63, 64, 65, 511, 512, 513, 576, 577, 4096, 4097, 99999, 2**20, 2**21 - 1, 2**21 + 1]


@pytest.mark.parametrize("nbytes", SIZES)
def test_blocks_are_aligned_and_can_be_written_to_their_end(nbytes: int) -> None:
    allocator = CachingAllocator()
    pointer = allocator.allocate(nbytes)
    assert pointer % 64 == 0
    ctypes.memset(pointer, 7, max(nbytes, 64))
    allocator.free(pointer, nbytes)
    assert allocator.allocate(nbytes) == pointer
    allocator.free(pointer, nbytes)
    statistics = allocator.statistics()
    assert statistics.system_allocations == 1
    assert statistics.allocated == 0
    assert statistics.reserved == rounded(nbytes)
    allocator.empty_cache()
    assert allocator.statistics().reserved == 0


def test_size_classes_waste_at_most_an_eighth() -> None:
    for nbytes in [*range(513, 5000), *(3**k for k in range(6, 40)), 2**40, 2**40 + 1]:
        size = rounded(nbytes)
        assert size % 64 == 0
        assert nbytes <= size <= nbytes * 1.125
    assert [rounded(n) for n in (0, 1, 64, 65, 512)] == [64, 64, 64, 128, 512]


def test_huge_pages_boundary() -> None:
    allocator = CachingAllocator()
    for nbytes in (memory.HUGE_PAGE, memory.HUGE_PAGE + 1, 5 * memory.HUGE_PAGE + 12345):
        pointer = allocator.allocate(nbytes)
        assert pointer % memory.HUGE_PAGE == 0
        ctypes.memset(pointer, 1, nbytes)
        allocator.free(pointer, nbytes)
    allocator.empty_cache()


def test_released_blocks_leave_the_address_space() -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")

    def mapped(address: int) -> bool:
        for line in maps.read_text().splitlines():
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            if first <= address < last:
                return True
        return False

    pointer = memory.reserve(64 << 20)
    assert mapped(pointer)
    assert mapped(pointer + (64 << 20) - 1)
    memory.release(pointer, 64 << 20)
    assert not mapped(pointer)
    assert not mapped(pointer + (64 << 20) - 1)


def test_live_blocks_are_disjoint() -> None:
    allocator = CachingAllocator()
    blocks = [(allocator.allocate(nbytes), nbytes) for nbytes in SIZES * 3]
    ends = sorted((pointer, pointer + max(nbytes, 64)) for pointer, nbytes in blocks)
    for (_, end), (start, _) in itertools.pairwise(ends):
        assert end <= start
    for pointer, nbytes in blocks:
        allocator.free(pointer, nbytes)
    assert allocator.statistics().allocated == 0


def test_statistics_and_peaks() -> None:
    allocator = CachingAllocator()
    one = allocator.allocate(1000)
    two = allocator.allocate(5000)
    held = rounded(1000) + rounded(5000)
    now = allocator.statistics()
    assert (now.allocated, now.reserved, now.peak_allocated, now.peak_reserved) == (held,) * 4
    allocator.free(two, 5000)
    assert allocator.statistics().allocated == rounded(1000)
    assert allocator.statistics().peak_allocated == held
    allocator.reset_peak()
    assert allocator.statistics().peak_allocated == rounded(1000)
    allocator.empty_cache()
    assert allocator.statistics().reserved == rounded(1000)
    allocator.free(one, 1000)
    allocator.empty_cache()
    assert allocator.statistics().reserved == 0


@pytest.mark.parametrize("nbytes", [2**60, 2**63 + 5, 2**70])
def test_out_of_memory_names_what_was_asked_and_held(nbytes: int) -> None:
    allocator = CachingAllocator()
    live = allocator.allocate(1 << 20)
    cached = allocator.allocate(4 << 20)
    allocator.free(cached, 4 << 20)
    with pytest.raises(OutOfMemoryError, match=f"{nbytes} bytes") as caught:
        allocator.allocate(nbytes)
    assert "1 MiB are in use" in str(caught.value)
    assert isinstance(caught.value, MemoryError)
    now = allocator.statistics()
    assert now.allocated == now.reserved == 1 << 20
    allocator.free(live, 1 << 20)
    allocator.empty_cache()


def test_a_shortage_is_met_from_the_cache_and_from_garbage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allocator = CachingAllocator()
    limit = 3 << 20
    real = memory.reserve

    def scarce(size: int) -> int:
        return real(size) if allocator.statistics().reserved + size <= limit else 0

    monkeypatch.setattr(memory, "reserve", scarce)
    cached = allocator.allocate(2 << 20)
    allocator.free(cached, 2 << 20)
    pointer = allocator.allocate(3 << 20)

    class Cycle:
        def __init__(self, pointer: int) -> None:
            self.itself = self
            self.pointer = pointer

        def __del__(self) -> None:
            allocator.free(self.pointer, 3 << 20)

    gc.collect()
    Cycle(pointer)
    again = allocator.allocate(1 << 20)
    allocator.free(again, 1 << 20)
    allocator.empty_cache()
    assert allocator.statistics().reserved == 0


def test_memory_that_the_machine_does_not_have_is_refused() -> None:
    available = memory.available()
    if available is None:
        pytest.skip("the system does not say what it has")
    assert memory.reserve(available + (1 << 30)) == 0


def test_negative_sizes_raise() -> None:
    with pytest.raises(ArgumentError, match="-1000"):
        CachingAllocator().allocate(-1000)


def test_the_cache_is_bounded_by_what_was_in_use() -> None:
    slack = 8 << 20
    allocator = CachingAllocator(slack=slack)
    for step in range(40):
        nbytes = (1 << 20) + step * (256 << 10)
        allocator.free(allocator.allocate(nbytes), nbytes)
        now = allocator.statistics()
        assert now.reserved <= now.peak_allocated + slack
    allocator.empty_cache()


def test_many_threads_allocate() -> None:
    allocator = CachingAllocator()

    def work() -> None:
        for nbytes in range(1, 4000, 7):
            allocator.free(allocator.allocate(nbytes), nbytes)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert allocator.statistics().allocated == 0
    allocator.empty_cache()
    assert allocator.statistics().reserved == 0
