"""Devices by name.

Invariant: a TensorType's device is "cpu" or "cuda:N", never another spelling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Self

from flame.core.errors import DeviceError


class Device(str):
    """A device's name, such as ``cpu`` or ``cuda:0``; compares with plain strings."""

    __slots__ = ()

    def __new__(cls, type: Any, index: int | None = None) -> Self:
        name = str(type) if index is None else f"{type}:{index}"
        kind, _, number = name.partition(":")
        if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
            raise DeviceError(f"{name!r} names no device; use 'cpu', 'cuda' or 'cuda:0'")
        return super().__new__(cls, name)

    @property
    def type(self) -> str:
        return self.partition(":")[0]

    @property
    def index(self) -> int | None:  # type: ignore[override]  # not a search in the name
        number = self.partition(":")[2]
        return int(number) if number else None

    def __repr__(self) -> str:
        number = "" if self.index is None else f", index={self.index}"
        return f"device(type='{self.type}'{number})"


# kind -> the number of a device of that kind that exists, of the number asked for (None: the
# current one). The runtime enters what it has; it raises DeviceError for what is not there.
_locators: Final[dict[str, Callable[[int | None], int]]] = {}


def register_devices(kind: str, locate: Callable[[int | None], int]) -> None:
    """Let `check_device` know a kind of device beside the CPU."""
    _locators[kind] = locate


def check_device(device: Any) -> str:
    """The name of a device that exists: "cpu" or "cuda:N". Raises DeviceError for others."""
    if device is None:
        return "cpu"
    if isinstance(device, int) and not isinstance(device, bool):
        device = f"cuda:{device}"
    found = Device(device)
    if found.type == "cpu":
        if found.index:
            raise DeviceError(f"there is one CPU device, 'cpu', not {str(device)!r}")
        return "cpu"
    locate = _locators.get(found.type)
    if locate is None:
        raise DeviceError(f"device {str(device)!r} is not available in this build; use 'cpu'")
    return f"{found.type}:{locate(found.index)}"


def device_index(name: str) -> int:
    """N of "cuda:N"."""
    return int(name[5:])
