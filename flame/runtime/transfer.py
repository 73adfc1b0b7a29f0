"""Bytes from one device to another.

Invariant: source and target are dense and of one layout, so a move is one run of bytes.
"""

from __future__ import annotations

from typing import Any


def move(target: Any, source: Any) -> None:
    """Copy the memory of a tensor into that of one with the same type on another device.

    To the CPU it waits until the bytes are there; to a GPU and between GPUs it is queued.
    """
    from flame.runtime.cuda import transfer

    nbytes = target.type.span * target.type.dtype.itemsize
    if nbytes:
        transfer.copy(target.storage, target.pointer, source.storage, source.pointer, nbytes)
