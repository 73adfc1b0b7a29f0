"""Streams and events. Invariants: each thread has a current stream on each device; the handle of a
stream is good until the process ends.

A device's default stream is a stream like any other, made at first use: CUDA's own default stream
could neither be captured nor run beside others. A stream that nobody holds any more goes into a
store for the next one, so that memory which was allocated on it can still be freed there.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flame.core.device import Device
from flame.core.errors import DTypeError, StateError, UnsupportedError
from flame.runtime.cuda import errors
from flame.runtime.cuda.devices import (
    check_exists,
    current_device,
    device_index,
    set_current_device,
)
from flame.runtime.cuda.driver import Driver, Lifetime, driver, per_driver


class _Store:
    """The streams of one driver."""

    def __init__(self, made: Driver) -> None:
        self.driver = made
        self.lock = threading.RLock()
        self.unused: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        self.defaults: dict[int, Stream] = {}
        self.local = threading.local()

    def take(self, device: int, priority: int) -> int:
        try:
            return self.unused[device, priority].pop()
        except IndexError:
            return self.driver.create_stream(device, priority)

    def default(self, device: int) -> Stream:
        with self.lock:
            found = self.defaults.get(device)
            if found is None:
                found = self.defaults[device] = Stream(device)
            return found

    def currents(self) -> dict[int, Stream]:
        """Device -> current stream, of this thread; what is missing is the default."""
        try:
            found: dict[int, Stream] = self.local.streams
        except AttributeError:
            found = self.local.streams = {}
        return found


_store = per_driver(_Store)


class Stream:
    """A queue of work on a device, done in order; different streams run beside one another.

    device: by number or name, None for the current one. priority: negative goes before others.
    """

    __slots__ = ("__weakref__", "_device", "_owner", "cuda_stream", "priority")

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        index = device_index(device)
        check_exists(index)
        store = _store()
        self._device = index
        self.priority = priority
        self.cuda_stream = store.take(index, priority)
        self._owner: _Store | None = store  # last: what failed before gives nothing back

    def __del__(self) -> None:
        owner = getattr(self, "_owner", None)
        if owner is not None:
            owner.unused[self._device, self.priority].append(self.cuda_stream)

    @property
    def device(self) -> Device:
        return Device("cuda", self._device)

    @property
    def device_index(self) -> int:
        return self._device

    def synchronize(self) -> None:
        """Wait until all work queued so far is done. Raises what kernels found wrong."""
        driver().synchronize(self.cuda_stream)
        errors.check(self._device)

    def query(self) -> bool:
        """Whether all work queued so far is done."""
        return driver().stream_done(self.cuda_stream)

    def wait_event(self, event: Event) -> None:
        """Work queued from now on waits for the event, on the device."""
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        """Work queued from now on waits for all that is queued in another stream so far."""
        wait(self.cuda_stream, stream.cuda_stream, stream._device)

    def record_event(self, event: Event | None = None) -> Event:
        """An event, or the given one, that happens when all work queued so far is done."""
        made = Event() if event is None else event
        made.record(self)
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.cuda_stream == other.cuda_stream

    def __hash__(self) -> int:
        return hash(self.cuda_stream)

    def __repr__(self) -> str:
        return f"<flame.cuda.Stream device={self.device} cuda_stream={self.cuda_stream:#x}>"


class ExternalStream(Stream):
    """A stream of another library by its address, which that library keeps alive."""

    __slots__ = ()

    def __init__(self, stream_ptr: int, device: Any = None) -> None:
        index = device_index(device)
        check_exists(index)
        self._owner = None
        self._device, self.priority, self.cuda_stream = index, 0, int(stream_ptr)


class Event:
    """A point in a stream's work, that others can wait for.

    enable_timing: whether `elapsed_time` can be asked.
    """

    __slots__ = ("__weakref__", "_device", "_driver", "_timing", "cuda_event")

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        if blocking or interprocess:
            raise UnsupportedError(
                "flame.cuda.Event has no blocking=True and interprocess=True; leave them out"
            )
        self._driver = driver()
        self._timing = enable_timing
        self._device = -1
        self.cuda_event = 0  # made when it is recorded, on the device of the stream

    # Bound as a default, as module globals may be gone when the interpreter exits.
    def __del__(self, _life: type[Lifetime] = Lifetime) -> None:
        if getattr(self, "cuda_event", 0) and not _life.over:
            self._driver.destroy_event(self.cuda_event)

    @property
    def device(self) -> Device | None:
        """Where it was recorded; None before."""
        return None if self._device < 0 else Device("cuda", self._device)

    def record(self, stream: Stream | None = None) -> None:
        """Let it happen when all work queued so far is done in ``stream`` (the current one)."""
        where = current_stream() if stream is None else stream
        if not self.cuda_event:
            self.cuda_event = self._driver.create_event(where._device, timing=self._timing)
            self._device = where._device
        elif where._device != self._device:
            raise StateError(
                f"an event of cuda:{self._device} cannot be recorded on cuda:{where._device}; make "
                "another one"
            )
        self._driver.record_event(self.cuda_event, where.cuda_stream)

    def wait(self, stream: Stream | None = None) -> None:
        """Let work queued from now on in ``stream`` (the current one) wait; a no-op before
        `record`."""
        where = current_stream() if stream is None else stream
        if self.cuda_event:
            self._driver.wait_event(where.cuda_stream, self.cuda_event)

    def query(self) -> bool:
        """Whether it has happened; true before `record`."""
        return not self.cuda_event or self._driver.event_done(self.cuda_event)

    def synchronize(self) -> None:
        """Wait until it has happened. Raises what kernels found wrong."""
        if self.cuda_event:
            self._driver.synchronize_event(self.cuda_event)
            errors.check(self._device)

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to ``end_event``; both have happened."""
        for event in (self, end_event):
            if not event._timing:
                raise StateError("elapsed_time needs events made with enable_timing=True")
            if not event.cuda_event:
                raise StateError("elapsed_time needs events that were recorded")
        return self._driver.elapsed(self.cuda_event, end_event.cuda_event)

    def __repr__(self) -> str:
        return f"<flame.cuda.Event {self.cuda_event:#x}>"


def default_stream(device: Any = None) -> Stream:
    """The stream on which work of a device runs unless another is chosen."""
    index = device_index(device)
    check_exists(index)
    return _store().default(index)


def current_stream(device: Any = None) -> Stream:
    """The stream on which this thread's work on a device runs."""
    index = device_index(device)
    found = _store().currents().get(index)
    return default_stream(index) if found is None else found


def current_handle(device: int) -> int:
    """The handle of `current_stream`, for launches."""
    store = _store()
    try:
        found: Stream = store.local.streams[device]
    except (AttributeError, KeyError):
        found = store.currents()[device] = default_stream(device)
    return found.cuda_stream


def set_stream(stream: Stream) -> None:
    """Let this thread's work run on a stream, and make the stream's device the current one."""
    if not isinstance(stream, Stream):
        raise DTypeError(f"a flame.cuda.Stream is needed, got {type(stream).__name__}")
    set_current_device(stream._device)
    _store().currents()[stream._device] = stream


@contextmanager
def stream_context(stream: Stream | None) -> Iterator[None]:
    """Inside the block this thread's work runs on ``stream``, on its device; None changes
    nothing."""
    if stream is None:
        yield
        return
    device, before = current_device(), current_stream(stream._device)
    set_stream(stream)
    try:
        yield
    finally:
        _store().currents()[stream._device] = before
        set_current_device(device)


def wait(stream: int, other: int, other_device: int, made: Driver | None = None) -> None:
    """Let work queued from now on in a stream wait for all that is queued in another so far.

    made: the driver whose streams they are, if it need not be that of this process any more."""
    if stream == other:
        return
    made = driver() if made is None else made
    event = made.create_event(other_device, timing=False)
    try:
        made.record_event(event, other)
        made.wait_event(stream, event)
    finally:
        made.destroy_event(event)


def synchronize(device: Any = None) -> None:
    """Wait for all work on a device. Raises what kernels found wrong."""
    index = device_index(device)
    check_exists(index)
    driver().synchronize_device(index)
    errors.check(index, idle=True)
