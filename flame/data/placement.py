"""Batches in page-locked memory, and on a GPU before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flame.core.device import check_device, device_index
from flame.data._arguments import whole_number
from flame.data._tensors import Tensor

__all__ = ["pinned", "prefetch_to_device"]


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
) -> Iterator[Any]:
    """The batches, with all their tensors on a device.

    On a GPU up to ``ahead`` of them are copied on a stream of their own, beside the work on those
    before. That takes pinned memory (``DataLoader(..., pin_memory=True)``); others are pinned here.
    A batch counts as handed out by a loader when it was copied, so that a resume in the middle of
    an epoch leaves out those that were copied ahead; save at the end of an epoch.
    """
    whole_number("prefetch_to_device", "ahead", ahead, least=1)
    place = check_device(device)
    if place == "cpu":
        return (each_tensor(batch, lambda t: t.cpu()) for batch in batches)
    return _prefetched(iter(batches), place, ahead)


def _prefetched(batches: Iterator[Any], place: str, ahead: int) -> Iterator[Any]:
    from flame.runtime.cuda.streams import Event, Stream, current_stream, stream_context

    side = Stream(device_index(place))
    waiting: deque[tuple[Any, Event]] = deque()

    def fill() -> None:
        while len(waiting) < ahead:
            try:
                batch = pinned(next(batches))
            except StopIteration:
                return
            with stream_context(side):
                moved = each_tensor(batch, lambda t: t.to(place, non_blocking=True))
                waiting.append((moved, side.record_event()))

    fill()
    while waiting:
        batch, copied = waiting.popleft()
        stream = current_stream(device_index(place))
        stream.wait_event(copied)
        _use_on(stream, batch)
        yield batch
        del batch  # the user alone decides how long it lives
        fill()


def _use_on(stream: Any, batch: Any) -> None:
    """Work of a stream uses the tensors of a batch."""

    def use(tensor: Tensor) -> Tensor:
        tensor.record_stream(stream)
        return tensor

    each_tensor(batch, use)
