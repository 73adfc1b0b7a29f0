"""Batches in page-locked memory, and on a GPU before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flame.core.device import check_device, device_index
from flame.core.errors import StateError
from flame.data._arguments import whole_number
from flame.data._tensors import Tensor

__all__ = ["DevicePrefetcher", "pinned", "prefetch_to_device"]


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure of dicts, tuples and lists with its tensors changed; all else as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: each_tensor(entry, change) for key, entry in value.items()}
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return value
    parts = [each_tensor(entry, change) for entry in value]
    if isinstance(value, tuple):
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return parts


def pinned(batch: Any) -> Any:
    """A batch with its tensors in page-locked memory. Raises DeviceError where there is no GPU."""
    return each_tensor(batch, lambda t: t if t.is_cuda else t.pin_memory())


def prefetch_to_device(
    batches: Iterable[Any], device: Any = "cuda", *, ahead: int = 2
) -> DevicePrefetcher:
    """The batches, with all their tensors on a device.

    On a GPU up to ``ahead`` of them are copied on a stream of their own, beside the work on those
    before. That takes pinned memory (``DataLoader(..., pin_memory=True)``); others are pinned here.
    """
    return DevicePrefetcher(batches, device, ahead=ahead)


class DevicePrefetcher:
    """What `prefetch_to_device` gives: iterated like the loader that it takes the batches from.

    Its ``state_dict`` is the loader's as it was when the latest batch was handed out here, so that
    those copied ahead are made again after a resume.
    """

    def __init__(self, batches: Iterable[Any], device: Any = "cuda", *, ahead: int = 2) -> None:
        whole_number("prefetch_to_device", "ahead", ahead, least=1)
        self.batches = batches
        self.device = check_device(device)
        self.ahead = ahead
        self._state: Any = None  # the loader's, where it has gone on already

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # Python's own error where it has none

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        self._state = None
        if self.device == "cpu":
            return (each_tensor(batch, lambda t: t.cpu()) for batch in batches)
        self._state = self._present()
        return self._prefetched(batches)

    def state_dict(self) -> dict[str, Any]:
        """See the class. Raises StateError where the batches are not a loader's."""
        state = self._present() if self._state is None else self._state
        if state is None:
            raise StateError(
                f"prefetch_to_device: {type(self.batches).__name__} has no state_dict; prefetch "
                "from a DataLoader to save where an epoch stands"
            )
        return dict(state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next iteration go on where ``state_dict()`` stood. Raises StateError."""
        load = getattr(self.batches, "load_state_dict", None)
        if load is None:
            raise StateError(
                f"prefetch_to_device: {type(self.batches).__name__} has no load_state_dict"
            )
        load(state_dict)
        self._state = None

    def _present(self) -> Any:
        """The loader's state; None where it keeps none."""
        ask = getattr(self.batches, "state_dict", None)
        return None if ask is None else ask()

    def _prefetched(self, batches: Iterator[Any]) -> Iterator[Any]:
        from flame.runtime.cuda.streams import Event, Stream, current_stream, stream_context

        index = device_index(self.device)
        side = Stream(index)
        waiting: deque[tuple[Any, Event, Any]] = deque()

        def fill() -> None:
            while len(waiting) < self.ahead:
                try:
                    batch = pinned(next(batches))
                except StopIteration:
                    return
                with stream_context(side):
                    moved = each_tensor(batch, lambda t: t.to(self.device, non_blocking=True))
                    waiting.append((moved, side.record_event(), self._present()))

        fill()
        while waiting:
            batch, copied, self._state = waiting.popleft()
            stream = current_stream(index)
            stream.wait_event(copied)
            _use_on(stream, batch)
            yield batch
            del batch  # the user alone decides how long it lives
            fill()
        self._state = None


def _use_on(stream: Any, batch: Any) -> None:
    """Work of a stream uses the tensors of a batch."""

    def use(tensor: Tensor) -> Tensor:
        tensor.record_stream(stream)
        return tensor

    each_tensor(batch, use)
