"""CUDA devices by number. Invariant: each thread has a current device of its own, 0 at first."""

from __future__ import annotations

import functools
import threading
from typing import Any

from flame.core.device import Device
from flame.core.errors import DeviceError
from flame.runtime.cuda.driver import driver


class _Current(threading.local):
    device = 0


_current = _Current()


def current_device() -> int:
    """The number of this thread's current device."""
    return _current.device


def set_current_device(device: int) -> None:
    """Make an existing device this thread's current one."""
    made = driver()
    check_exists(device)
    made.use(device)
    _current.device = device


def check_exists(device: int) -> None:
    """Raises DeviceError where the machine has no such device."""
    count = driver().device_count()
    if not 0 <= device < count:
        names = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise DeviceError(f"there is no device cuda:{device}; this machine has {names}")


def device_name(device: int) -> str:
    """``cuda:<number>``"""
    return f"cuda:{device}"


@functools.cache
def _parse(name: str) -> int:
    """The number in a device's name; -1 for plain ``cuda``."""
    parsed = Device(name)
    if parsed.type != "cuda":
        raise DeviceError(f"a CUDA device is meant here, got {name!r}; say 'cuda' or 'cuda:0'")
    return -1 if parsed.index is None else parsed.index


def device_index(device: Any = None) -> int:
    """The number of a device: None and ``cuda`` are the current one. Raises DeviceError for what is
    no CUDA device; whether it exists is not looked at."""
    if device is None:
        return _current.device
    if isinstance(device, int) and not isinstance(device, bool):
        return device if device >= 0 else _current.device
    number = _parse(str(device))
    return _current.device if number < 0 else number
