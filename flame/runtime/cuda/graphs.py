"""Work that was queued once and is launched again as a whole."""

from __future__ import annotations

from collections.abc import Callable

from flame.core.errors import CudaError
from flame.runtime.cuda.driver import Driver, Lifetime, driver
from flame.runtime.cuda.memory import capturing
from flame.runtime.cuda.streams import current_handle


class Graph:
    """An executable graph; made by `capture`. The memory that its kernels touch is the caller's to
    keep."""

    __slots__ = ("_driver", "handle")

    def __init__(self, made: Driver, handle: int) -> None:
        self._driver, self.handle = made, handle

    def launch(self, stream: int) -> None:
        """Queue all of it once more."""
        self._driver.launch_graph(self.handle, stream)

    # Bound as a default, as module globals may be gone when the interpreter exits.
    def __del__(self, _life: type[Lifetime] = Lifetime) -> None:
        if not _life.over:
            self._driver.destroy_graph(self.handle)


def capture(device: int, work: Callable[[int], None], stream: int | None = None) -> Graph:
    """What ``work(stream)`` queues on a stream (the current one), not run but as a graph.

    Nothing may be allocated, waited for or read back meanwhile; libraries are prepared before.
    Raises what ``work`` raises, the stream being as before.
    """
    made = driver()
    made.use(device)
    where = current_handle(device) if stream is None else stream
    with capturing():
        made.begin_capture(where)
        try:
            work(where)
        except BaseException:
            _abandon(made, where)
            raise
        return Graph(made, made.end_capture(where))


class Lanes:
    """Two streams of one capture, which wait for each other only where they are told to.

    stream: the captured one. aside: the one that runs beside it; None: there is one lane, and
    nothing to wait for. `close` after the capture has ended.
    """

    def __init__(self, device: int, stream: int, aside: int | None) -> None:
        self._driver, self._device = driver(), device
        self._streams = (stream, stream if aside is None else aside)
        self._several = aside is not None
        self._marks: dict[int, int] = {}  # number of a piece of work -> event behind it
        self._events: list[int] = []

    def stream(self, *, beside: bool) -> int:
        return self._streams[beside]

    def begin(self) -> None:
        """The second stream joins the capture."""
        if self._several:
            self._driver.wait_event(self._streams[1], self._event(0))

    def mark(self, number: int, *, beside: bool) -> None:
        """What was queued in a lane so far can be waited for under this number."""
        if self._several:
            self._marks[number] = self._event(beside)

    def wait(self, number: int, *, beside: bool) -> None:
        """What comes in a lane waits for what was marked so in the other."""
        if self._several:
            self._driver.wait_event(self._streams[beside], self._marks[number])

    def end(self) -> None:
        """The first stream waits for all of the second."""
        if self._several:
            self._driver.wait_event(self._streams[0], self._event(1))

    def _event(self, lane: int) -> int:
        event = self._driver.create_event(self._device, timing=False)
        self._events.append(event)
        self._driver.record_event(event, self._streams[lane])
        return event

    def close(self) -> None:
        for event in self._events:
            self._driver.destroy_event(event)
        self._events.clear()


def _abandon(made: Driver, stream: int) -> None:
    """End a capture whose work failed."""
    try:
        made.destroy_graph(made.end_capture(stream))
    except CudaError:
        return  # the failure may have broken the capture, which has ended all the same
