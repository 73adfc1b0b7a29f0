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


def _abandon(made: Driver, stream: int) -> None:
    """End a capture whose work failed."""
    try:
        made.destroy_graph(made.end_capture(stream))
    except CudaError:
        return  # the failure may have broken the capture, which has ended all the same
