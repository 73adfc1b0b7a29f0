"""What a scalar value depends on, which decides where a renderer may compute it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from flame.kernel.values import Buffer, Register, Value


@dataclass(frozen=True, eq=False)
class Uses:
    """The loop variables, registers and buffers that a value depends on."""

    names: frozenset[str] = frozenset()
    registers: frozenset[Register] = frozenset()
    buffers: frozenset[Buffer] = frozenset()

    def joined(self, other: Uses) -> Uses:
        """What either depends on: one of both where that is all, as it mostly is."""
        if other is self or other is NOTHING:
            return self
        if self is NOTHING:
            return other
        names = self.names | other.names
        registers = self.registers | other.registers
        buffers = self.buffers | other.buffers
        for one in (self, other):
            if (len(one.names), len(one.registers), len(one.buffers)) == (
                len(names), len(registers), len(buffers)
            ):  # fmt: skip
                return one
        return Uses(names, registers, buffers)


NOTHING: Final = Uses()


Key = TypeVar("Key")


class Dependents(Generic[Key]):
    """What becomes stale when a register or a buffer changes, found without a look at all else."""

    def __init__(self) -> None:
        self._of: dict[Register | Buffer, list[Key]] = {}

    def add(self, key: Key, uses: Uses) -> None:
        for changing in uses.registers | uses.buffers:
            self._of.setdefault(changing, []).append(key)

    def pop(self, changed: Iterable[Register | Buffer]) -> list[Key]:
        """What depends on any of these, and forget that it did."""
        return [key for one in changed for key in self._of.pop(one, ())]


class UsesOfValues:
    """``uses(value)``, with what was found kept: values share their parts."""

    def __init__(self) -> None:
        self._found: dict[Value, Uses] = {}

    def __call__(self, value: Value) -> Uses:
        found = self._found.get(value)
        if found is None:
            found = NOTHING
            if value.op == "var":
                found = Uses(names=frozenset((value.attr,)))
            elif value.op == "read":
                found = Uses(registers=frozenset((value.attr,)))
            elif value.op == "load":
                found = Uses(buffers=frozenset((value.attr,)))
            for arg in value.args:
                found = found.joined(self(arg))
            self._found[value] = found
        return found
