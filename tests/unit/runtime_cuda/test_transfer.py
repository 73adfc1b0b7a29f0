"""Copies between host and devices."""

import ctypes
import gc

import numpy as np
import pytest

from flame.core.errors import DeviceError, IndexRangeError, OutOfMemoryError, StateError
from flame.runtime.cuda import errors, transfer
from flame.runtime.cuda.graphs import capture
from flame.runtime.cuda.pinned import PATIENCE, pinned_memory
from flame.runtime.cuda.streams import Stream, current_handle, stream_context
from flame.runtime.storage import Storage

from .fake import FakeDriver

SIZES = (1, 1000, transfer.SMALL, transfer.SMALL + 1, 5 << 20, 4 * transfer.CHUNK + 12345)


def fill(storage: Storage, seed: int) -> bytes:
    data = np.random.default_rng(seed).bytes(storage.nbytes)
    ctypes.memmove(storage.pointer, data, storage.nbytes)
    return data


def content(storage: Storage) -> bytes:
    return ctypes.string_at(storage.pointer, storage.nbytes)


def copy(target: Storage, source: Storage, *, non_blocking: bool = False) -> None:
    transfer.copy(
        target,
        target.pointer,
        source,
        source.pointer,
        source.nbytes,
        non_blocking=non_blocking,
    )


@pytest.mark.parametrize("nbytes", SIZES)
def test_to_a_device_and_back(fake: FakeDriver, nbytes: int) -> None:
    source, there, back = (Storage.allocate(nbytes, d) for d in ("cpu", "cuda:0", "cpu"))
    data = fill(source, nbytes)
    copy(there, source)
    ctypes.memset(source.pointer, 0, nbytes)  # the source may be changed at once
    copy(back, there)
    assert content(back) == data
    assert not fake.events  # none is left


def test_large_copies_use_few_pinned_blocks_again_and_again(fake: FakeDriver) -> None:
    nbytes = 10 * transfer.CHUNK
    source, there = Storage.allocate(nbytes), Storage.allocate(nbytes, "cuda:0")
    data = fill(source, 1)
    for _ in range(3):
        copy(there, source)
    assert content(there) == data
    assert len(fake.named("allocate_pinned")) == 3
    assert len(fake.named("copy_to_device")) == 30


def test_a_pinned_block_waits_for_the_device(fake: FakeDriver) -> None:
    source, there = Storage.allocate(1 << 20), Storage.allocate(1 << 20, "cuda:0")
    fake.pending = True  # the device does not get on
    for _ in range(3):
        copy(there, source)
    assert len(fake.named("allocate_pinned")) == 3
    fake.happen()
    copy(there, source)
    assert len(fake.named("allocate_pinned")) == 3


def test_pinned_memory_does_not_grow_without_end(fake: FakeDriver) -> None:
    fake.pending = True
    memory = pinned_memory()
    size = PATIENCE // 2
    first = memory.allocate(size)
    second = memory.allocate(size)
    memory.free(first, size, {(0, current_handle(0))})
    memory.free(second, size, {(0, current_handle(0))})
    assert memory.allocate(size) == first  # waited for rather than a third one
    assert len(fake.named("synchronize_event")) == 1
    memory.free(first, size, set())
    memory.empty_cache()
    assert fake.named("free_pinned") == [("free_pinned", first)]  # the other one is busy
    fake.happen()
    memory.empty_cache()
    assert memory.held == 0


def test_a_shortage_of_pinned_memory_is_met_by_what_is_kept(fake: FakeDriver) -> None:
    memory = pinned_memory()
    memory.free(memory.allocate(1 << 20), 1 << 20, set())
    fake.most_pinned = 3 << 19
    pointer = memory.allocate(1 << 14)
    assert fake.named("free_pinned") == []
    memory.free(pointer, 1 << 14, set())
    assert memory.allocate(1 << 19)
    assert len(fake.named("free_pinned")) == 2
    with pytest.raises(OutOfMemoryError):
        memory.allocate(1 << 21)


def test_pinned_storages(fake: FakeDriver) -> None:
    source, back = Storage.allocate_pinned(5000), Storage.allocate_pinned(5000)
    assert source.pinned
    assert not Storage.allocate(1).pinned
    assert source.device == "cpu"
    view = source.as_numpy(np.uint8, (5000,), (1,))
    view[:] = np.arange(5000) % 251
    there = Storage.allocate(5000, "cuda:0")
    fake.calls.clear()
    copy(there, source, non_blocking=True)
    copy(back, there, non_blocking=True)
    assert not fake.named("synchronize")
    assert content(back) == view.tobytes()
    # While a copy may be under way the memory is not given to others, whoever drops it.
    fake.pending = True
    pointer = source.pointer
    del source, view
    gc.collect()
    assert Storage.allocate_pinned(5000).pointer != pointer
    fake.happen()
    made = [Storage.allocate_pinned(5000) for _ in range(3)]
    assert pointer in {s.pointer for s in made}


def test_a_blocking_copy_from_pinned_memory_waits(fake: FakeDriver) -> None:
    source, there = Storage.allocate_pinned(100), Storage.allocate(100, "cuda:0")
    copy(there, source)
    assert fake.named("synchronize") == [("synchronize", current_handle(0))]


def test_on_a_device_and_across(fake: FakeDriver) -> None:
    one, two, other = (Storage.allocate(300, d) for d in ("cuda:0", "cuda:0", "cuda:1"))
    data = fill(one, 3)
    copy(two, one)
    assert fake.named("copy_on_device")[-1][3:] == (300, current_handle(0))
    fake.calls.clear()
    copy(other, two)
    assert content(other) == data
    here, there = current_handle(0), current_handle(1)
    order = [call for call in fake.calls if call[0] in ("record_event", "wait_event")]
    assert [(name, stream if name == "wait_event" else event) for name, stream, event in order] == [
        ("record_event", there),
        ("wait_event", here),
        ("record_event", here),
        ("wait_event", there),
    ]
    assert fake.named("copy_across") == [("copy_across", 1, 0, 300, here)]


def test_another_stream_is_known_to_the_memory(fake: FakeDriver) -> None:
    source, there = Storage.allocate(100), Storage.allocate(100, "cuda:0")
    side = Stream(0)
    with stream_context(side):
        copy(there, source)
    del there
    assert fake.named("free")[-1][3] == side.cuda_stream


def test_a_copy_to_the_host_tells_what_kernels_found_wrong(fake: FakeDriver) -> None:
    slot = errors.error_slot(0, lambda code: IndexRangeError(f"index {code}"))
    there, back = Storage.allocate(100, "cuda:0"), Storage.allocate(100)
    (ctypes.c_int64 * 2).from_address(slot.pointer)[:] = [1, 5]
    with pytest.raises(IndexRangeError, match="index 5"):
        copy(back, there)
    copy(back, there)


def test_refusals(fake: FakeDriver) -> None:
    host, there = Storage.allocate(100), Storage.allocate(100, "cuda:0")
    with pytest.raises(DeviceError, match="between a device and the host"):
        copy(host, Storage.allocate(100))
    for target, source in ((host, there), (there, host)):
        with pytest.raises(StateError, match="captured graph"):
            capture(0, lambda stream, t=target, s=source: copy(t, s))  # type: ignore[misc]
    transfer.copy(host, host.pointer, host, host.pointer, 0)  # nothing to do is no error
