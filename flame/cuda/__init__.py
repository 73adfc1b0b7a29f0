"""NVIDIA GPUs, by PyTorch's names: devices, streams, events, memory, and kernels of your own.

Nothing of CUDA is loaded before something here is asked for. Without a GPU `is_available` is False
and `device_count` 0; everything else raises DeviceError, which says what to install.
"""

from flame.cuda._devices import (
    DeviceProperties,
    current_device,
    device,
    device_count,
    get_device_capability,
    get_device_name,
    get_device_properties,
    is_available,
    is_bf16_supported,
    is_initialized,
    manual_seed,
    manual_seed_all,
    set_device,
)
from flame.cuda._memory import (
    empty_cache,
    max_memory_allocated,
    mem_get_info,
    memory_allocated,
    memory_reserved,
    memory_stats,
    memory_summary,
    reset_peak_memory_stats,
)
from flame.cuda._raw_kernel import RawKernel
from flame.cuda._raw_op import raw_op
from flame.runtime.cuda.streams import (
    Event,
    ExternalStream,
    Stream,
    current_stream,
    default_stream,
    set_stream,
    synchronize,
)
from flame.runtime.cuda.streams import stream_context as stream

__all__ = [
    "DeviceProperties",
    "Event",
    "ExternalStream",
    "RawKernel",
    "Stream",
    "current_device",
    "current_stream",
    "default_stream",
    "device",
    "device_count",
    "empty_cache",
    "get_device_capability",
    "get_device_name",
    "get_device_properties",
    "is_available",
    "is_bf16_supported",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "memory_summary",
    "raw_op",
    "reset_peak_memory_stats",
    "set_device",
    "set_stream",
    "stream",
    "synchronize",
]
