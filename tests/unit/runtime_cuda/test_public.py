"""flame.cuda over a fake driver."""

import pytest

import flame
from flame.core.errors import DeviceError
from flame.runtime.storage import Storage

from .fake import FakeDriver


def test_devices(fake: FakeDriver) -> None:
    assert flame.cuda.is_available()
    assert flame.cuda.is_initialized()
    assert flame.cuda.device_count() == 2
    assert flame.cuda.current_device() == 0
    flame.cuda.set_device("cuda:1")
    assert flame.cuda.current_device() == 1
    flame.cuda.set_device(-1)
    assert flame.cuda.current_device() == 1
    with flame.cuda.device(0):
        assert flame.cuda.current_device() == 0
        with flame.cuda.device(None):
            assert flame.cuda.current_device() == 0
    assert flame.cuda.current_device() == 1
    with pytest.raises(DeviceError, match="no device cuda:7"):
        flame.cuda.set_device(7)
    assert flame.cuda.get_device_name() == "Fake"
    assert flame.cuda.get_device_capability(flame.device("cuda:0")) == (9, 0)
    found = flame.cuda.get_device_properties(0)
    assert (found.major, found.minor, found.total_memory) == (9, 0, 1 << 30)
    assert flame.cuda.is_bf16_supported()


def test_memory(fake: FakeDriver) -> None:
    storage = Storage.allocate(3 << 20, "cuda")
    assert flame.cuda.memory_allocated() == 3 << 20
    assert flame.cuda.memory_allocated("cuda:1") == 0
    del storage
    assert flame.cuda.memory_allocated(0) == 0
    assert flame.cuda.max_memory_allocated() == 3 << 20
    flame.cuda.reset_peak_memory_stats()
    assert flame.cuda.max_memory_allocated() == 0
    assert flame.cuda.memory_reserved() == 3 << 20
    assert flame.cuda.mem_get_info() == ((1 << 30) - (3 << 20), 1 << 30)
    flame.cuda.empty_cache()
    assert flame.cuda.memory_reserved() == 0
    held = Storage.allocate(2 << 20, "cuda")
    stats = flame.cuda.memory_stats()
    assert stats["allocated_bytes.all.current"] == 2 << 20
    assert stats["allocation.all.allocated"] == 2
    assert stats["allocation.all.freed"] == 1
    text = flame.cuda.memory_summary()
    assert "in use      2 MiB, at most 2 MiB" in text
    assert "1 x 2 MiB without a tensor" in text
    del held


def test_streams(fake: FakeDriver) -> None:
    stream = flame.cuda.Stream()
    with flame.cuda.stream(stream):
        assert flame.cuda.current_stream() == stream
    assert flame.cuda.current_stream() == flame.cuda.default_stream() != stream
    flame.cuda.synchronize()
    assert fake.calls[-1] == ("synchronize_device", 0)


def test_seeds() -> None:
    flame.cuda.manual_seed(5)
    first = flame.rand(3).tolist()
    flame.manual_seed(5)
    assert flame.rand(3).tolist() == first
    flame.cuda.manual_seed_all(5)
    assert flame.rand(3).tolist() == first
