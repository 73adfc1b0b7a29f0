"""A caching allocator. Invariant: every block is 64-byte aligned and belongs to one size class.

Sizes are rounded up to multiples of 64 bytes up to 512, then to eighths of a power of two (at most
12.5% more than asked). A freed block waits in its class's list, and is warm when it is reused. The
block of a size is given back to the system only by `empty_cache`, by a shortage, or when what is
reserved outgrows what was ever in use at one time.

The counters are plain attributes: under the GIL no other thread runs between reading and writing
one.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

from flame.core.errors import ArgumentError, OutOfMemoryError
from flame.runtime.cpu import memory

# What the cache may hold beyond the most that was ever in use, which size classes cannot avoid.
SLACK = 1 << 30


@dataclass(frozen=True)
class MemoryStatistics:
    """Bytes in use and bytes held from the system, now and at their peaks since `reset_peak`."""

    allocated: int
    reserved: int
    peak_allocated: int
    peak_reserved: int
    system_allocations: int


def rounded(nbytes: int) -> int:
    """The size class of `nbytes`."""
    if nbytes <= 512:
        return (nbytes + 63) & ~63 or 64
    shift = (nbytes - 1).bit_length() - 4
    return (((nbytes - 1) >> shift) + 1) << shift


class CachingAllocator:
    """Blocks of host memory with free lists by size class."""

    __slots__ = (
        "_allocated",
        "_free",
        "_high_water",
        "_peak_allocated",
        "_peak_reserved",
        "_reserved",
        "_slack",
        "_system_allocations",
    )

    def __init__(self, *, slack: int = SLACK) -> None:
        self._free: dict[int, list[int]] = {}
        self._slack = slack
        self._allocated = 0
        self._reserved = 0
        self._peak_allocated = 0
        self._peak_reserved = 0
        self._high_water = 0
        self._system_allocations = 0

    def allocate(self, nbytes: int) -> int:
        """The address of at least `nbytes` bytes (at least 64, so that 0 has an address too).

        Raises OutOfMemoryError where the system has no such block, cached blocks given back first.
        """
        # `rounded` written out: this is on the path of every operation.
        if nbytes <= 512:
            size = (nbytes + 63) & ~63 or 64
        else:
            shift = (nbytes - 1).bit_length() - 4
            size = (((nbytes - 1) >> shift) + 1) << shift
        try:
            pointer = self._free[size].pop()
        except (KeyError, IndexError):
            pointer = self._reserve(size, nbytes)
        allocated = self._allocated + size
        self._allocated = allocated
        if allocated > self._peak_allocated:
            self._peak_allocated = allocated
        return pointer

    def free(self, pointer: int, nbytes: int) -> None:
        """Take back what `allocate(nbytes)` gave."""
        if nbytes <= 512:
            size = (nbytes + 63) & ~63 or 64
        else:
            shift = (nbytes - 1).bit_length() - 4
            size = (((nbytes - 1) >> shift) + 1) << shift
        self._allocated -= size
        self._free[size].append(pointer)

    def _reserve(self, size: int, nbytes: int) -> int:
        if nbytes < 0:
            raise ArgumentError(f"allocate: the number of bytes must be at least 0, got {nbytes}")
        self._free.setdefault(size, [])
        self._high_water = max(self._high_water, self._peak_allocated, self._allocated + size)
        if self._reserved + size > self._high_water + self._slack:
            self._shrink(self._high_water + self._slack // 2 - size)
        pointer = memory.reserve(size)
        if pointer == 0:
            self.empty_cache()
            pointer = memory.reserve(size)
        if pointer == 0:
            # Tensors in reference cycles are garbage that nobody has collected yet.
            gc.collect()
            self.empty_cache()
            pointer = memory.reserve(size)
        if pointer == 0:
            raise OutOfMemoryError(
                f"the CPU has no block of {readable(nbytes)} ({nbytes} bytes); "
                f"{readable(self._allocated)} are in use by tensors and nothing is cached. "
                "Use a smaller batch, drop tensors you no longer need, or use a narrower dtype."
            )
        self._system_allocations += 1
        self._reserved += size
        self._peak_reserved = max(self._peak_reserved, self._reserved)
        return pointer

    def _shrink(self, target: int) -> None:
        """Give back cached blocks, largest first, until at most `target` bytes are reserved."""
        for size in sorted(self._free, reverse=True):
            blocks = self._free[size]
            while self._reserved > target:
                try:
                    pointer = blocks.pop()
                except IndexError:
                    break
                memory.release(pointer, size)
                self._reserved -= size

    def empty_cache(self) -> None:
        """Give every cached block back to the system."""
        self._shrink(0)
        self._high_water = self._allocated

    def reset_peak(self) -> None:
        """Count peaks from now on."""
        self._high_water = max(self._high_water, self._peak_allocated)
        self._peak_allocated = self._allocated
        self._peak_reserved = self._reserved

    def statistics(self) -> MemoryStatistics:
        """The counters as they stand."""
        return MemoryStatistics(
            allocated=self._allocated,
            reserved=self._reserved,
            peak_allocated=self._peak_allocated,
            peak_reserved=self._peak_reserved,
            system_allocations=self._system_allocations,
        )


def readable(nbytes: int) -> str:
    """`nbytes` in the unit that suits it."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


# The process's allocator; bound methods, as they are on the path of every operation.
ALLOCATOR = CachingAllocator()
allocate = ALLOCATOR.allocate
free = ALLOCATOR.free
