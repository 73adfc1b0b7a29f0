"""Page-locked host memory, which a device reads and writes at full speed and beside other work.

Having it from the system takes milliseconds, so blocks are kept, by powers of two. A block that is
freed may still be read by a copy under way: it is given out again when the events say so.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from typing import Final

from flame.core.errors import OutOfMemoryError
from flame.runtime.cuda.driver import Driver, Lifetime, per_driver

SMALLEST: Final = 4096
# Bytes from the system beyond which a busy block is waited for rather than another one added.
PATIENCE: Final = 1 << 29


def rounded(nbytes: int) -> int:
    """The size of the block for ``nbytes``."""
    return max(SMALLEST, 1 << max(nbytes - 1, 0).bit_length())


class PinnedMemory:
    """The pinned blocks of one driver."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.lock = threading.RLock()
        self.held = 0  # bytes from the system
        self._free: defaultdict[int, deque[tuple[int, list[int]]]] = defaultdict(deque)

    def allocate(self, nbytes: int) -> int:
        """Raises OutOfMemoryError where the system gives no more."""
        size = rounded(nbytes)
        with self.lock:
            blocks = self._free[size]
            for _ in range(min(len(blocks), 2)):  # the oldest are done first
                pointer, events = blocks.popleft()
                if self._done(events):
                    return pointer
                blocks.append((pointer, events))
            if blocks and self.held + size > PATIENCE:
                pointer, events = blocks.popleft()
                for event in events:
                    self.driver.synchronize_event(event)
                    self.driver.destroy_event(event)
                return pointer
            try:
                pointer = self.driver.allocate_pinned(size)
            except OutOfMemoryError:
                self.empty_cache()
                pointer = self.driver.allocate_pinned(size)
            self.held += size
            return pointer

    def _done(self, events: list[int]) -> bool:
        while events:
            if not self.driver.event_done(events[-1]):
                return False
            self.driver.destroy_event(events.pop())
        return True

    def free(self, pointer: int, nbytes: int, uses: set[tuple[int, int]]) -> None:
        """Take back a block; ``uses``: (device, stream) pairs with copies that may be under way."""
        if Lifetime.over:
            return
        events = []
        for device, stream in uses:
            event = self.driver.create_event(device, timing=False)
            self.driver.record_event(event, stream)
            events.append(event)
        with self.lock:
            self._free[rounded(nbytes)].append((pointer, events))

    def empty_cache(self) -> None:
        """Give unused blocks back to the system."""
        with self.lock:
            for size, blocks in self._free.items():
                for _ in range(len(blocks)):
                    pointer, events = blocks.popleft()
                    if self._done(events):
                        self.driver.free_pinned(pointer)
                        self.held -= size
                    else:
                        blocks.append((pointer, events))


@per_driver
def pinned_memory(driver: Driver) -> PinnedMemory:
    """The pinned blocks of this process's driver."""
    return PinnedMemory(driver)
