"""Devices: how many, which one, what they can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flame.core.errors import DeviceError
from flame.ops.random import manual_seed as _manual_seed
from flame.runtime.cuda import devices
from flame.runtime.cuda.driver import driver, has_driver


@dataclass(frozen=True)
class DeviceProperties:
    """What a device is: sizes in bytes."""

    name: str
    major: int
    minor: int
    total_memory: int
    multi_processor_count: int
    shared_memory_per_block_optin: int
    L2_cache_size: int


def is_available() -> bool:
    """Whether there is a GPU that FLAME can use, with the packages that it takes. Does not raise;
    `flame doctor` says what is missing."""
    return device_count() > 0


def is_initialized() -> bool:
    """Whether this process uses CUDA already."""
    return has_driver()


def device_count() -> int:
    """The number of GPUs; 0 where CUDA is not available."""
    try:
        return driver().device_count()
    except DeviceError:
        return 0


def current_device() -> int:
    """The number of this thread's current device."""
    driver()
    return devices.current_device()


def set_device(device: Any) -> None:
    """Make a device (number, name or `flame.device`) this thread's current one, which ``cuda``
    without a number means. A negative number changes nothing."""
    if isinstance(device, int) and device < 0:
        return
    devices.set_current_device(devices.device_index(device))


class device:
    """Context manager: a device is the current one inside the block.

    device: number, name or `flame.device`; None or a negative number changes nothing.
    """

    def __init__(self, device: Any) -> None:
        nothing = device is None or (isinstance(device, int) and device < 0)
        self.index = -1 if nothing else devices.device_index(device)
        self.before: list[int] = []

    def __enter__(self) -> None:
        driver()
        self.before.append(devices.current_device())
        set_device(self.index)

    def __exit__(self, *_: object) -> None:
        devices.set_current_device(self.before.pop())


def _index(device: Any) -> int:
    index = devices.device_index(device)
    devices.check_exists(index)
    return index


def get_device_name(device: Any = None) -> str:
    """A device's name, such as ``NVIDIA H200``."""
    return driver().properties(_index(device)).name


def get_device_capability(device: Any = None) -> tuple[int, int]:
    """A device's compute capability: (major, minor)."""
    return driver().properties(_index(device)).capability


def get_device_properties(device: Any = None) -> DeviceProperties:
    """What a device is."""
    known = driver().properties(_index(device))
    return DeviceProperties(
        name=known.name,
        major=known.capability[0],
        minor=known.capability[1],
        total_memory=known.total_memory,
        multi_processor_count=known.multiprocessor_count,
        shared_memory_per_block_optin=known.shared_memory_per_block,
        L2_cache_size=known.l2_cache_size,
    )


def is_bf16_supported(including_emulation: bool = True) -> bool:
    """Whether the current device computes with bfloat16: all that FLAME uses do."""
    return get_device_capability() >= (8, 0)


def manual_seed(seed: int) -> None:
    """As `flame.manual_seed`: one generator serves all devices, and gives the same numbers on
    each."""
    _manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    """As `flame.manual_seed`: one generator serves all devices, and gives the same numbers on
    each."""
    _manual_seed(seed)
