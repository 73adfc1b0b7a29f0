"""What kernels find wrong, told at the next synchronisation.

A kernel that meets an index out of range writes a flag and a code (two int64) into a slot of host
memory; whoever waits for the device looks at the slots afterwards. So bad data raises without a
round trip of its own. Invariants: slots of a device are zero after `check`; a slot that was
released is used again only after the whole device was waited for, as kernels that know its address
may still be running.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Final

from flame.core.errors import FlameError
from flame.runtime.cuda.driver import Driver, per_driver

SLOT_BYTES: Final = 16
_SLOTS: Final = 256  # of a page
_PAGE_BYTES: Final = SLOT_BYTES * _SLOTS
_CLEAN: Final = bytes(_PAGE_BYTES)

Maker = Callable[[int], FlameError]


class _Page:
    """Slots that lie together in pinned memory, which is kept until the process ends."""

    def __init__(self, driver: Driver) -> None:
        self.pointer = driver.allocate_pinned(_PAGE_BYTES)
        ctypes.memset(self.pointer, 0, _PAGE_BYTES)
        self.content = (ctypes.c_char * _PAGE_BYTES).from_address(self.pointer)
        self.words = (ctypes.c_int64 * (2 * _SLOTS)).from_address(self.pointer)
        self.makers: list[Maker | None] = [None] * _SLOTS


class Slot:
    """One kernel's place for an error, at ``pointer``, until `release` or the object's end."""

    __slots__ = ("_board", "_place", "pointer")

    def __init__(self, board: _Board, place: tuple[int, int], pointer: int) -> None:
        self._board: _Board | None = board
        self._place = place
        self.pointer = pointer

    def release(self) -> None:
        """No kernel will be launched with this slot any more."""
        board, self._board = self._board, None
        if board is not None:
            board.released.append(self._place)

    __del__ = release


class _Board:
    """The slots of one device."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.pages: list[_Page] = []
        self.free: list[tuple[int, int]] = []
        self.released: list[tuple[int, int]] = []
        self.lock = threading.RLock()

    def slot(self, make: Maker) -> Slot:
        with self.lock:
            if not self.free:
                self.pages.append(_Page(self.driver))
                number = len(self.pages) - 1
                self.free = [(number, place) for place in reversed(range(_SLOTS))]
            number, place = self.free.pop()
            page = self.pages[number]
            page.makers[place] = make
            return Slot(self, (number, place), page.pointer + SLOT_BYTES * place)

    def check(self, *, idle: bool) -> None:
        for page in self.pages:
            if page.content.raw != _CLEAN:
                self._raise()
        if idle and self.released:
            with self.lock:
                while self.released:
                    number, place = self.released.pop()
                    self.pages[number].makers[place] = None
                    self.free.append((number, place))

    def _raise(self) -> None:
        found: list[tuple[Maker, int]] = []
        with self.lock:
            for page in self.pages:
                words = list(page.words)
                ctypes.memset(page.pointer, 0, _PAGE_BYTES)
                for place, make in enumerate(page.makers):
                    if words[2 * place] and make is not None:
                        found.append((make, words[2 * place + 1]))
        if found:
            make, code = found[0]
            raise make(code)


@per_driver
def _boards(driver: Driver) -> dict[int, _Board]:
    return {device: _Board(driver) for device in range(driver.device_count())}


def error_slot(device: int, make: Maker) -> Slot:
    """A slot for the errors of one kernel or program: ``make(code)`` is the error to raise."""
    return _boards()[device].slot(make)


def check(device: int, *, idle: bool = False) -> None:
    """Raise the first error that kernels of a device have left, and forget all. To be called after
    any wait for the device; ``idle``: all of its streams were waited for."""
    _boards()[device].check(idle=idle)
