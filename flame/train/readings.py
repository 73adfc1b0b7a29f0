"""Numbers that a device computes step by step, read by the host without stopping the device.

A value that is asked for at once makes the host wait for the GPU, and then the GPU for the host's
next call. Here the host reads what was queued some steps ago, on a stream that waits for that step
alone, while the GPU has the steps after it to do.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from flame import cuda
from flame.tensor import Tensor

T = TypeVar("T")
BEHIND = 8  # steps that the host may be ahead of the device


class Readings(Generic[T]):
    """A queue of tensors (K,) on ``device``, each with a note of the host's; read in order.

    On the CPU a tensor is ready when it is there, so all is read at once.
    """

    def __init__(self, device: str, *, behind: int = BEHIND) -> None:
        self._on_gpu = device != "cpu"
        self._behind = behind if self._on_gpu else 0
        self._device = device
        self._waiting: deque[tuple[T, Tensor, Any]] = deque()
        self._reader: Any = None

    def put(self, note: T, values: Tensor) -> None:
        """``values`` were queued on the current stream just now."""
        written = cuda.current_stream(self._device).record_event() if self._on_gpu else None
        self._waiting.append((note, values, written))

    def take(self, *, everything: bool = False) -> Iterator[tuple[T, list[float]]]:
        """What the device has done, and what is further behind than may be, which is waited for;
        or ``everything``. Raises what kernels found wrong."""
        while self._waiting:
            note, values, written = self._waiting[0]
            due = everything or len(self._waiting) > self._behind
            if not (due or written.query()):
                return
            self._waiting.popleft()
            yield note, self._read(values, written)

    def _read(self, values: Tensor, written: Any) -> list[float]:
        if written is None:
            return [float(value) for value in values.tolist()]
        if self._reader is None:
            self._reader = cuda.Stream(self._device)
        with cuda.stream(self._reader):
            self._reader.wait_event(written)
            return [float(value) for value in values.tolist()]
