"""Streams, events, and what kernels found wrong."""

import ctypes
import gc
import threading

import pytest

from flame.core.errors import DeviceError, IndexRangeError, StateError, UnsupportedError
from flame.runtime.cuda import devices, errors
from flame.runtime.cuda.streams import (
    Event,
    ExternalStream,
    Stream,
    current_handle,
    current_stream,
    default_stream,
    set_stream,
    stream_context,
    synchronize,
)

from .fake import FakeDriver


def report(slot: errors.Slot, code: int) -> None:
    """What a kernel does that finds an error."""
    words = (ctypes.c_int64 * 2).from_address(slot.pointer)
    words[1] = code
    words[0] = 1


def test_current_streams_are_of_a_thread_and_a_device(fake: FakeDriver) -> None:
    assert current_stream() is default_stream() is default_stream("cuda:0")
    assert default_stream(1) is not default_stream(0)
    mine = Stream()
    with stream_context(mine):
        assert current_stream() is mine
        assert current_handle(0) == mine.cuda_stream
        assert current_stream(1) is default_stream(1)
        found: list[Stream] = []
        thread = threading.Thread(target=lambda: found.append(current_stream()))
        thread.start()
        thread.join()
        assert found == [default_stream(0)]
    assert current_stream() is default_stream()
    with stream_context(None):
        assert current_stream() is default_stream()


def test_a_stream_brings_its_device(fake: FakeDriver) -> None:
    there = Stream("cuda:1", priority=-1)
    assert fake.named("create_stream")[-1] == ("create_stream", 1, -1)
    assert (there.device, there.device.index) == ("cuda:1", 1)
    with stream_context(there):
        assert devices.current_device() == 1
        assert current_stream() is there
    assert devices.current_device() == 0
    set_stream(there)
    assert devices.current_device() == 1
    set_stream(default_stream(1))


def test_a_dropped_stream_is_used_again(fake: FakeDriver) -> None:
    first = Stream(0)
    handle = first.cuda_stream
    del first
    assert not fake.named("destroy_stream")
    assert Stream(0).cuda_stream == handle
    external = ExternalStream(handle + 8, 0)
    del external
    assert Stream(0).cuda_stream == handle


def test_waiting_for_streams_and_events(fake: FakeDriver) -> None:
    one, two = Stream(0), Stream(0)
    fake.calls.clear()
    one.wait_stream(two)
    event = fake.named("create_event")[0][3]
    assert fake.calls[1:] == [
        ("record_event", event, two.cuda_stream),
        ("wait_event", one.cuda_stream, event),
    ]
    made = two.record_event()
    one.wait_event(made)
    assert fake.calls[-1] == ("wait_event", one.cuda_stream, made.cuda_event)
    one.wait_stream(one)
    assert fake.calls[-1] == ("wait_event", one.cuda_stream, made.cuda_event)


def test_events(fake: FakeDriver) -> None:
    event = Event()
    assert event.query()  # as nothing was recorded
    event.wait()
    event.synchronize()
    assert event.device is None
    fake.pending = True
    event.record()
    assert not event.query()
    assert event.device == "cuda:0"
    event.synchronize()
    assert event.query()
    with pytest.raises(StateError, match="cannot be recorded on cuda:1"):
        event.record(Stream(1))
    begin, end = Event(enable_timing=True), Event(enable_timing=True)
    with pytest.raises(StateError, match="were recorded"):
        begin.elapsed_time(end)
    begin.record()
    end.record()
    assert begin.elapsed_time(end) > 0
    with pytest.raises(StateError, match="enable_timing"):
        event.elapsed_time(end)
    with pytest.raises(UnsupportedError, match="interprocess"):
        Event(interprocess=True)
    del event, begin, end
    gc.collect()
    assert not fake.events


def test_names_of_devices(fake: FakeDriver) -> None:
    assert [devices.device_index(d) for d in (None, "cuda", "cuda:1", 1, -1)] == [0, 0, 1, 1, 0]
    with pytest.raises(DeviceError, match="'cpu'"):
        devices.device_index("cpu")
    with pytest.raises(DeviceError, match="no device cuda:5"):
        Stream(5)


def test_errors_of_kernels_are_raised_at_the_next_wait(fake: FakeDriver) -> None:
    slot = errors.error_slot(0, lambda code: IndexRangeError(f"index {code} is out of range"))
    other = errors.error_slot(0, lambda code: IndexRangeError(f"another: {code}"))
    elsewhere = errors.error_slot(1, lambda code: IndexRangeError(f"elsewhere: {code}"))
    assert {slot.pointer % 16, other.pointer % 16} == {0}
    synchronize(0)
    report(slot, 17)
    report(other, 3)
    synchronize(1)
    with pytest.raises(IndexRangeError, match="index 17 is out of range"):
        current_stream(0).synchronize()
    synchronize(0)  # the first was raised, and all are forgotten
    report(other, -4)
    event = current_stream(0).record_event()
    with pytest.raises(IndexRangeError, match="another: -4"):
        event.synchronize()
    report(elsewhere, 1)
    with pytest.raises(IndexRangeError, match="elsewhere: 1"):
        synchronize("cuda:1")


def test_a_code_of_zero_is_an_error_too(fake: FakeDriver) -> None:
    slot = errors.error_slot(0, lambda code: IndexRangeError(f"index {code}"))
    report(slot, 0)
    with pytest.raises(IndexRangeError, match="index 0"):
        errors.check(0)


def test_a_released_slot_still_tells_and_is_reused_after_the_device_was_idle(
    fake: FakeDriver,
) -> None:
    slot = errors.error_slot(0, lambda code: IndexRangeError("of the first"))
    place = slot.pointer
    report(slot, 1)
    slot.release()
    slot.release()  # once is enough
    assert errors.error_slot(0, lambda code: IndexRangeError("second")).pointer != place
    with pytest.raises(IndexRangeError, match="of the first"):
        errors.check(0)
    assert errors.error_slot(0, lambda code: IndexRangeError("third")).pointer != place
    synchronize(0)
    # Those that were dropped above are free again, too.
    made = [errors.error_slot(0, lambda code: IndexRangeError("more")) for _ in range(3)]
    assert place in {s.pointer for s in made}


def test_more_slots_than_a_page_has(fake: FakeDriver) -> None:
    def maker(number: int) -> errors.Maker:
        return lambda code: IndexRangeError(f"slot {number}, code {code}")

    slots = [errors.error_slot(0, maker(i)) for i in range(600)]
    assert len({slot.pointer for slot in slots}) == 600
    report(slots[555], 9)
    with pytest.raises(IndexRangeError, match="slot 555, code 9"):
        synchronize(0)
    del slots
    assert len(fake.named("allocate_pinned")) == 3
    synchronize(0)
    kept = [errors.error_slot(0, maker(i)) for i in range(600)]
    assert len(kept) == 600
    assert len(fake.named("allocate_pinned")) == 3
