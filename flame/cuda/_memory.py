"""How much memory a device has, and who holds it. All sizes are in bytes."""

from __future__ import annotations

from typing import Any

from flame.runtime.cpu.allocator import readable
from flame.runtime.cuda import memory
from flame.runtime.cuda.devices import device_index
from flame.runtime.cuda.driver import driver
from flame.runtime.cuda.live import live_report
from flame.runtime.cuda.pinned import pinned_memory


def _memory(device: Any) -> memory.DeviceMemory:
    return memory.device_memory(device_index(device))


def memory_allocated(device: Any = None) -> int:
    """Bytes that tensors and programs hold."""
    return _memory(device).allocated


def max_memory_allocated(device: Any = None) -> int:
    """The most that `memory_allocated` was since `reset_peak_memory_stats`."""
    return _memory(device).peak


def memory_reserved(device: Any = None) -> int:
    """Bytes that the pool holds from the device, in use or not."""
    return _memory(device).statistics().reserved


def reset_peak_memory_stats(device: Any = None) -> None:
    """Count peaks from now on."""
    _memory(device).reset_peak()


def memory_stats(device: Any = None) -> dict[str, int]:
    """The counters, under PyTorch's names."""
    found = _memory(device).statistics()
    return {
        "allocated_bytes.all.current": found.allocated,
        "allocated_bytes.all.peak": found.peak_allocated,
        "reserved_bytes.all.current": found.reserved,
        "allocation.all.current": found.live,
        "allocation.all.allocated": found.allocations,
        "allocation.all.freed": found.allocations - found.live,
        "num_alloc_retries": found.retries,
    }


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """(free, total) bytes of the device, other processes' use counted."""
    return driver().memory_info(_memory(device).device)


def memory_summary(device: Any = None) -> str:
    """A text of several lines: the counters, and the tensors that hold most."""
    held = _memory(device)
    found = held.statistics()
    free, total = driver().memory_info(held.device)
    lines = [
        f"cuda:{held.device} ({driver().properties(held.device).name})",
        f"  in use      {readable(found.allocated)}, at most {readable(found.peak_allocated)}",
        f"  in the pool {readable(found.reserved)}",
        f"  free        {readable(free)} of {readable(total)}",
        f"  allocations {found.live} live of {found.allocations}, {found.retries} retried",
        f"  pinned      {readable(pinned_memory().held)} of the host",
    ]
    return "\n".join(lines) + live_report(held.device)


def empty_cache() -> None:
    """Give memory that is held and not used back: the pools' to the devices, pinned memory to the
    system. Waits for the devices. FLAME reuses it without this."""
    for device in range(driver().device_count()):
        memory.empty_cache(device)
    pinned_memory().empty_cache()
