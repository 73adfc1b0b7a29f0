"""Bytes from one device to another.

Invariant: source and target are dense and of one layout, so a move is one run of bytes.
"""

from __future__ import annotations

import ctypes
from typing import Any

from flame.runtime.storage import Storage


def move(target: Any, source: Any, *, non_blocking: bool = False) -> None:
    """Copy the memory of a tensor into that of one with the same type on another device.

    To the CPU it waits until the bytes are there; to a GPU and between GPUs it is queued.
    ``non_blocking``: what is read from pinned memory is not waited for, either.
    """
    nbytes = target.type.span * target.type.dtype.itemsize
    non_blocking = non_blocking and target.storage.device != "cpu"
    _copy(target.storage, target.pointer, source.storage, source.pointer, nbytes, non_blocking)


def _copy(
    target: Storage, to: int, source: Storage, of: int, nbytes: int, non_blocking: bool = False
) -> None:
    if target.device == "cpu" and source.device == "cpu":
        ctypes.memmove(to, of, nbytes)
        return
    from flame.runtime.cuda import transfer

    transfer.copy(target, to, source, of, nbytes, non_blocking=non_blocking)


def on_host(storage: Storage) -> Storage:
    """The same bytes in memory of the CPU: the storage itself if it is there."""
    if storage.device == "cpu":
        return storage
    made = Storage.allocate(storage.nbytes)
    _copy(made, made.pointer, storage, storage.pointer, storage.nbytes)
    return made


def duplicate(storage: Storage) -> Storage:
    """A copy on the same device."""
    made = Storage.allocate(storage.nbytes, storage.device)
    restore(made, storage)
    return made


def restore(storage: Storage, content: Storage) -> None:
    """Give a storage the bytes of another one of its size."""
    _copy(storage, storage.pointer, content, content.pointer, content.nbytes)
