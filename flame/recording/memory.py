"""What a recorder knows of memory: which symbol a tensor is, and what was written into it.

Invariant: a storage has one symbol for its whole content at any time; a write gives it a new one,
and views are made anew from that. So the graph is pure, however the user's code writes.
"""

from __future__ import annotations

from typing import Any, NoReturn

from flame.core.errors import TraceError
from flame.core.types import TensorType, tensor_type
from flame.graph import Symbol
from flame.recording.lines import user_line


class RecordedStorage:
    """Memory that exists only in the graph: it has a size, and no bytes."""

    __slots__ = ("__weakref__", "device", "line", "nbytes", "owner", "pointer", "version")

    def __init__(self, nbytes: int, line: str) -> None:
        self.pointer = 0
        self.nbytes = nbytes
        self.owner = None
        self.version = 0
        self.device = "cpu"
        self.line = line

    def as_numpy(self, *_: Any) -> NoReturn:
        raise TraceError(
            f"{user_line()}: the value of a tensor was asked for while the step was recorded "
            "(.item(), print, float(), bool() in an if, .numpy(), or a shape that depends on "
            "data), but nothing runs yet; return the tensor and look at it after the call, use "
            "flame.where in place of an if, or leave that part out of the compiled function"
        )

    @property
    def __array_interface__(self) -> dict[str, Any]:
        self.as_numpy()


def is_recorded(tensor: Any) -> bool:
    """Whether a tensor exists only in the graph."""
    return isinstance(tensor.storage, RecordedStorage)


class Memory:
    """The symbols of one storage.

    ``whole``: its content, None while nothing was written; ``begin``: address of its first byte;
    ``views``: symbols by (byte offset, type), valid until the next write. ``given``: the graph's
    input that it was at first, for memory that exists outside.
    """

    __slots__ = ("begin", "first", "given", "storage", "type", "views", "whole")

    def __init__(self, storage: Any, type_: TensorType, given: Symbol | None) -> None:
        # recorded memory is found by its storage, which must not be kept alive by what is known
        self.storage: Any = None if isinstance(storage, RecordedStorage) else storage
        self.begin: int = storage.pointer
        self.type = type_
        self.given = given
        self.whole = self.first = given  # `first`: its content when it was met
        self.views: dict[tuple[int, TensorType], Symbol] = {}
        if given is not None:
            self.views[0, type_] = given

    def write(self, symbol: Symbol) -> None:
        """New content of the whole."""
        self.whole = symbol
        self.views = {(0, self.type): symbol}


def whole_type(tensor: Any) -> TensorType:
    """The type under which a tensor's whole storage is known: its own if it fills it."""
    storage, type_ = tensor.storage, tensor.type
    item = type_.dtype.itemsize
    if tensor.pointer == storage.pointer and type_.dense and type_.span * item == storage.nbytes:
        return tensor.type  # type: ignore[no-any-return]
    return tensor_type(type_.dtype, (storage.nbytes // item,), None, type_.device)
