"""What the threads of a team accumulated, folded into registers.

Invariants: every thread gets the same total; the order depends on the team's size alone. A team of
more than a warp meets at one barrier, with two sets of slots in turn: a thread that writes one set
again has passed the barrier of the other, so all have read the first.
"""

from __future__ import annotations

from collections.abc import Iterator

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.kernel.geometry import WARP, Geometry
from flame.kernel.values import Register
from flame.render import cuda_instructions as instructions
from flame.render.cuda_helpers import Helpers
from flame.render.cuda_instructions import C_TYPE, HALF_WIDTH


class Folds:
    """Writes the folds of one kernel."""

    def __init__(self, geometry: Geometry, helpers: Helpers) -> None:
        self.geometry, self.helpers = geometry, helpers
        self.slots: dict[str, int] = {}  # by type: the most that one fold needs

    def combined(self, combine: str, dtype: DType, a: str, b: str) -> str:
        """Two values of a register's dtype combined."""
        if dtype in HALF_WIDTH:
            a, b = (instructions.widened(instructions.bare(x), dtype) for x in (a, b))
            made = instructions.binary(self.helpers, combine, dtypes.float32, a, b)
            return instructions.narrowed(made, dtype)
        if combine == "mul" and dtype.kind == "f":
            return instructions.product(dtype, a, b)
        return instructions.binary(self.helpers, combine, dtype, a, b)

    def fold(self, parts: dict[Register, str]) -> Iterator[str]:
        """The lines that fold the parts of these registers, each in its way."""
        if not parts:
            return
        if self.geometry.team == 1:
            for register, way in parts.items():
                yield self._folded_in(register, way, f"{register.name}_part")
        elif self.geometry.team <= WARP:
            for register, way in parts.items():
                part = self._wide(f"{register.name}_part", register.dtype)
                yield self._folded_in(register, way, self._across(register, way, part))
        else:
            yield from self._through_slots(parts)

    def _folded_in(self, register: Register, way: str, total: str) -> str:
        made = self.combined(way, register.dtype, register.name, total)
        return f"{register.name} = {made};"

    def _across(self, register: Register, way: str, part: str, lanes: int = 0) -> str:
        """The total over the lanes of a warp."""
        type_ = _fold_type(register.dtype)
        whole = {"add": "or", "max": "or", "mul": "and", "min": "and"}
        step = whole.get(way, way) if register.dtype.kind == "b" else way
        text = instructions.binary(self.helpers, step, type_, "a", "b")
        name = self.helpers.fold(step, C_TYPE[type_], text)
        lanes = lanes or self.geometry.team
        mates = "mates" if self.geometry.team <= WARP else "0xffffffffu"
        return self._narrow(f"{name}<{lanes}>({part}, {mates})", register.dtype)

    def _wide(self, part: str, dtype: DType) -> str:
        if dtype in HALF_WIDTH:
            return instructions.widened(part, dtype)
        return part

    def _narrow(self, total: str, dtype: DType) -> str:
        if dtype in HALF_WIDTH:
            return instructions.narrowed(total, dtype)
        if dtype.kind == "b":
            return f"({total} != 0)"
        return f"({C_TYPE[dtype]}){total}" if dtype.bits < 32 else total

    def _through_slots(self, parts: dict[Register, str]) -> Iterator[str]:
        warps = self.geometry.team // WARP
        used: dict[str, int] = {}
        slot_of: dict[Register, str] = {}
        yield "turn ^= 1;"
        for register, way in parts.items():
            part = self._wide(f"{register.name}_part", register.dtype)
            yield f"{register.name}_part = {self._across(register, way, part, WARP)};"
            type_ = C_TYPE[_fold_type(register.dtype)]
            number = used[type_] = used.get(type_, -1) + 1
            self.slots[type_] = max(self.slots.get(type_, 0), number + 1)
            slot_of[register] = f"{slots_name(type_)}[turn][{number}]"
        yield f"if (lane % {WARP} == 0) {{"
        for register, slot in slot_of.items():
            part = self._wide(f"{register.name}_part", register.dtype)
            yield f"  {slot}[lane / {WARP}] = {part};"
        yield "}"
        yield "__syncthreads();"
        for register, way in parts.items():
            mine = f"{slot_of[register]}[lane % {warps}]"
            yield self._folded_in(register, way, self._across(register, way, mine, warps))


def slots_name(type_: str) -> str:
    return f"folds_{type_.replace(' ', '_')}"


def _fold_type(dtype: DType) -> DType:
    """What lanes exchange: small integers and bool as int, half-width floats as float."""
    if dtype in HALF_WIDTH:
        return dtypes.float32
    return dtypes.int32 if dtype.bits < 32 else dtype
