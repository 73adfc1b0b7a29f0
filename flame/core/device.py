"""Devices by name."""

from __future__ import annotations

from typing import Any, Self

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


def check_device(device: Any) -> str:
    """The name of a device that exists. Raises DeviceError for others."""
    name = "cpu" if device is None else str(device)
    if name not in ("cpu", "cpu:0"):
        raise DeviceError(f"device {name!r} is not available in this build; use device='cpu'")
    return "cpu"
