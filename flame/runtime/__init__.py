"""Devices at work: memory, text to machine code, launch."""

from __future__ import annotations

from flame.core.device import register_devices


def _locate_cuda(index: int | None) -> int:
    from flame.runtime.cuda.devices import check_exists, current_device

    found = current_device() if index is None else index
    check_exists(found)
    return found


register_devices("cuda", _locate_cuda)
