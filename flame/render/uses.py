"""What a scalar value depends on, which decides where a renderer may compute it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from flame.kernel.values import Buffer, Register, Value


@dataclass(frozen=True)
class Uses:
    """The loop variables, registers and buffers that a value depends on."""

    names: frozenset[str]
    registers: frozenset[Register]
    buffers: frozenset[Buffer]


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
            inner = [self(arg) for arg in value.args]
            names = frozenset[str]().union(*(u.names for u in inner))
            registers = frozenset[Register]().union(*(u.registers for u in inner))
            buffers = frozenset[Buffer]().union(*(u.buffers for u in inner))
            if value.op == "var":
                names |= {value.attr}
            elif value.op == "read":
                registers |= {value.attr}
            elif value.op == "load":
                buffers |= {value.attr}
            found = self._found[value] = Uses(names, registers, buffers)
        return found
