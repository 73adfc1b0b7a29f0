"""Device memory: statistics, shortage, streams that share, captures."""

import gc
import re

import numpy as np
import pytest

import flame
from flame.core.errors import DeviceError, OutOfMemoryError, StateError
from flame.core.types import tensor_type
from flame.runtime.cuda import memory
from flame.runtime.cuda.graphs import capture
from flame.runtime.cuda.storage import CudaStorage
from flame.runtime.cuda.streams import Stream, current_handle, stream_context
from flame.runtime.storage import Storage
from flame.tensor import Tensor

from .fake import FakeDriver


def tensor(*shape: int, device: str = "cuda:0") -> Tensor:
    type_ = tensor_type(flame.float32, shape, None, device)
    storage = Storage.allocate(type_.span * 4, device)
    return Tensor.wrap(storage, storage.pointer, type_)


def test_statistics_follow_allocations(fake: FakeDriver) -> None:
    first = Storage.allocate(1000, "cuda:0")
    second = Storage.allocate(500, "cuda:0")
    elsewhere = Storage.allocate(7, "cuda:1")
    assert (first.device, elsewhere.device) == ("cuda:0", "cuda:1")
    found = memory.device_memory(0).statistics()
    assert (found.allocated, found.peak_allocated, found.live) == (1500, 1500, 2)
    del first
    found = memory.device_memory(0).statistics()
    assert (found.allocated, found.peak_allocated, found.live) == (500, 1500, 1)
    assert found.reserved == 1500  # the pool keeps what was freed
    memory.device_memory(0).reset_peak()
    assert memory.device_memory(0).statistics().peak_allocated == 500
    assert memory.device_memory(1).statistics().allocated == 7
    del second, elsewhere
    memory.empty_cache(0)
    assert fake.reserved(0) == 0


def test_memory_is_of_the_current_stream(fake: FakeDriver) -> None:
    other = Stream(0)
    with stream_context(other):
        storage = Storage.allocate(64, "cuda")
    assert fake.named("allocate")[-1] == ("allocate", 0, 64, other.cuda_stream)
    del storage  # freed where it was allocated, whichever stream is current
    assert fake.named("free")[-1][3] == other.cuda_stream


def test_room_for_code_is_made_by_a_trim(fake: FakeDriver) -> None:
    held = Storage.allocate(fake.total // 2, "cuda:0")
    memory.leave_room(0)
    assert not fake.named("trim")
    Storage.allocate(fake.total // 2, "cuda:0")  # freed at once, and kept by the pool
    memory.leave_room(0)
    assert fake.memory_info(0)[0] == fake.total - held.nbytes


def test_room_for_code_that_cannot_be_made_is_an_error(fake: FakeDriver) -> None:
    held = Storage.allocate(fake.total - memory.ROOM + 1, "cuda:0")
    with pytest.raises(OutOfMemoryError, match=r"about to be loaded.*no room for 64 MiB"):
        memory.leave_room(0)
    capture(0, lambda _: memory.leave_room(0))  # had to be seen to before
    del held
    memory.leave_room(0)


def test_a_shortage_is_met_by_a_trim(fake: FakeDriver) -> None:
    Storage.allocate(fake.total // 2, "cuda:0")  # freed at once, and kept by the pool
    assert fake.kept[0] == fake.total // 2
    large = Storage.allocate(fake.total // 4 * 3, "cuda:0")
    assert memory.device_memory(0).statistics().retries == 1
    names = [call[0] for call in fake.calls]
    assert names.index("synchronize_device") < names.index("trim")
    del large


def test_a_shortage_is_met_by_collecting_cycles(fake: FakeDriver) -> None:
    gc.disable()
    try:
        cycle: list[object] = [Storage.allocate(fake.total // 2, "cuda:0")]
        cycle.append(cycle)
        del cycle
        assert Storage.allocate(fake.total // 4 * 3, "cuda:0").nbytes == fake.total // 4 * 3
    finally:
        gc.enable()


def test_out_of_memory_lists_the_largest_tensors(fake: FakeDriver) -> None:
    held = [tensor(1024, 1024) for _ in range(3)] + [tensor(1 << 20, 100)]
    program = Storage.allocate(5000, "cuda:0")
    with pytest.raises(OutOfMemoryError) as caught:
        Storage.allocate(700 << 20, "cuda:0")
    text = str(caught.value)
    assert "cuda:0 (Fake) has no room for 700 MiB (734003200 bytes)" in text
    assert "412 MiB are in use by tensors" in text
    assert re.search(r"1 x float32 \(1048576, 100\): 400 MiB", text)
    assert re.search(r"3 x float32 \(1024, 1024\): 12 MiB", text)
    assert "1 x 4.883 KiB without a tensor" in text
    assert text.index("1048576, 100") < text.index("1024, 1024") < text.index("4.883 KiB")
    assert "Use a smaller batch" in text
    # The process goes on.
    del held, program
    assert Storage.allocate(700 << 20, "cuda:0").nbytes == 700 << 20


def test_memory_used_by_another_stream_is_freed_behind_it(fake: FakeDriver) -> None:
    first, second = Stream(0), Stream(0)
    storage = Storage.allocate(64, "cuda:0")
    home = current_handle(0)
    storage.record_stream(home)  # its own: nothing to wait for
    storage.record_stream(first.cuda_stream)
    storage.record_stream(second.cuda_stream)
    fake.calls.clear()
    del storage
    last = fake.named("free")[-1][3]
    assert last in (first.cuda_stream, second.cuda_stream)
    recorded = {call[2]: call[1] for call in fake.named("record_event")}
    assert set(recorded) == {home, first.cuda_stream, second.cuda_stream} - {last}
    waits = fake.named("wait_event")
    assert {(stream, event) for _, stream, event in waits} == {
        (last, event) for event in recorded.values()
    }
    assert fake.calls.index(waits[-1]) < fake.calls.index(fake.named("free")[-1])
    assert not fake.events  # destroyed again


def test_nothing_is_freed_or_allocated_while_a_graph_is_captured(fake: FakeDriver) -> None:
    held = [Storage.allocate(64, "cuda:0")]

    def work(stream: int) -> None:
        held.clear()  # the fake driver asserts that no call for it arrives
        assert memory.device_memory(0).statistics().allocated == 64

    graph = capture(0, work)
    assert memory.device_memory(0).statistics().allocated == 0
    graph.launch(current_handle(0))
    assert fake.named("launch_graph") == [("launch_graph", graph.handle, current_handle(0))]
    handle = graph.handle
    del graph
    assert fake.named("destroy_graph") == [("destroy_graph", handle)]
    with pytest.raises(StateError, match=r"allocating 64 B on cuda:0 cannot be a part of a capt"):
        capture(0, lambda stream: Storage.allocate(64, "cuda:0") and None)
    assert fake.capturing is None  # the failed capture was ended
    Storage.allocate(64, "cuda:0")


def test_numpy_is_refused(fake: FakeDriver) -> None:
    storage = Storage.allocate(64, "cuda:0")
    with pytest.raises(DeviceError, match=r"memory of cuda:0.*\.cpu\(\)"):
        storage.as_numpy(np.uint8, (64,), (1,))
    with pytest.raises(DeviceError, match=r"\.cpu\(\)"):
        np.asarray(storage)


def test_borrowed_memory_is_not_freed(fake: FakeDriver) -> None:
    owner = Storage.allocate(64, "cuda:0")
    borrowed = Storage.borrow(owner.pointer, 64, owner, "cuda:0")
    assert isinstance(borrowed, CudaStorage)
    assert borrowed.device_index == 0
    del borrowed
    assert not fake.named("free")


def test_a_device_that_is_not_there(fake: FakeDriver) -> None:
    with pytest.raises(DeviceError, match=r"no device cuda:2; this machine has cuda:0 to cuda:1"):
        Storage.allocate(64, "cuda:2")


def test_plain_functions(fake: FakeDriver) -> None:
    pointer = memory.allocate(1, 100)
    assert pointer % 256 == 0
    memory.free(1, pointer, 100)
    assert memory.device_memory(1).statistics().live == 0
