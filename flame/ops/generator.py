"""Generator: a seed, and how many random blocks were taken under it.

Invariant: the state is these two numbers; every draw reserves its range of blocks before it runs,
so no two draws of a generator share a block.
"""

from __future__ import annotations

import os
import struct
import threading
from typing import TYPE_CHECKING, Any, Final, Self

from flame.core.device import Device, check_device
from flame.core.errors import ArgumentError, DTypeError, StateError
from flame.ops.op import constant, interpreter

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["Generator", "default_generator", "get_rng_state", "initial_seed", "manual_seed", "seed",
           "set_rng_state"]  # fmt: skip

_STATE: Final = struct.Struct("<QQ")
_WORD: Final = 2**64


class Generator:
    """A source of random numbers, see `flame.ops.philox`. ``device``: where it draws."""

    def __init__(self, device: Any = "cpu") -> None:
        self.device = Device(check_device(device))
        self._seed, self._offset = 0, 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Generator(seed={self._seed}, offset={self._offset})"

    def manual_seed(self, seed: int) -> Self:
        """Start again under ``seed``, from -2**63 to 2**64 - 1. Raises ArgumentError for others."""
        if not isinstance(seed, int):
            raise DTypeError(f"a seed is an integer, got {type(seed).__name__}")
        if not -(2**63) <= seed < _WORD:
            raise ArgumentError(f"a seed has at most 64 bits, got {seed}")
        self._go_to(int(seed) % _WORD, 0)
        return self

    def _go_to(self, seed: int, offset: int) -> None:
        """Go on from a place; so does each step that is compiled."""
        before = [(0, 0)]

        def go() -> None:
            with self._lock:
                before[0] = self._seed, self._offset
                self._seed, self._offset = seed, offset

        def back() -> None:
            with self._lock:
                self._seed, self._offset = before[0]

        interpreter().repeat(go, undo=back)

    def initial_seed(self) -> int:
        """The seed of the last `manual_seed` (0 before it)."""
        return self._seed

    def seed(self) -> int:
        """Start again under a seed from the operating system, which is returned."""
        interpreter().refuse("a seed of the operating system")
        made = int.from_bytes(os.urandom(8), "little")
        self.manual_seed(made)
        return made

    def get_state(self) -> Tensor:
        """The state as a uint8 tensor of 16 elements, for `set_state`."""
        interpreter().refuse("the state of a generator")
        import numpy as np

        with self._lock:
            packed = _STATE.pack(self._seed, self._offset)
        return constant(np.frombuffer(packed, np.uint8).copy())

    def set_state(self, new_state: Tensor) -> Self:
        """Go on from a state of `get_state`. Raises StateError for another tensor."""
        if new_state.dtype.name != "uint8" or new_state.shape != (_STATE.size,):
            raise StateError(
                f"a generator's state is a uint8 tensor of shape ({_STATE.size},), got "
                f"{new_state.dtype.name} {new_state.shape}"
            )
        self._go_to(*_STATE.unpack(new_state.cpu().numpy().tobytes()))
        return self

    def reserve(self, blocks: int) -> tuple[int, int]:
        """(seed, offset) of the next ``blocks`` blocks, as signed 64-bit numbers."""

        def take() -> tuple[int, int]:
            with self._lock:
                offset = self._offset
                self._offset = (offset + blocks) % _WORD
                return _signed(self._seed), _signed(offset)

        def put_back() -> None:
            with self._lock:
                self._offset = (self._offset - blocks) % _WORD

        return interpreter().repeat(take, undo=put_back)

    def mark(self) -> list[int]:
        """The present place, to come back to by `rewind`; a compiled step marks anew each time."""
        place: list[int] = []

        def take() -> None:
            with self._lock:
                place[:] = self._seed, self._offset

        interpreter().repeat(take)
        return place

    def rewind(self, place: list[int]) -> None:
        """Go on from where `mark` was called."""

        def back() -> None:
            with self._lock:
                self._seed, self._offset = place

        interpreter().repeat(back)


def _signed(number: int) -> int:
    return number - _WORD if number >= _WORD // 2 else number


def _make_default() -> Generator:
    made = Generator.__new__(Generator)  # the device's name needs no look-up this early
    made.device = "cpu"  # type: ignore[assignment]
    made._seed, made._offset, made._lock = 0, 0, threading.Lock()
    return made


default_generator: Final = _make_default()


def manual_seed(seed: int) -> Generator:
    """Start the default generator again under ``seed``; returns it."""
    return default_generator.manual_seed(seed)


def initial_seed() -> int:
    """The seed of the default generator."""
    return default_generator.initial_seed()


def seed() -> int:
    """Start the default generator again under a seed of the operating system; returns the seed."""
    return default_generator.seed()


def get_rng_state() -> Tensor:
    """The state of the default generator, a uint8 tensor."""
    return default_generator.get_state()


def set_rng_state(new_state: Tensor) -> None:
    """Set the state of the default generator. Raises StateError for what is no state."""
    default_generator.set_state(new_state)
