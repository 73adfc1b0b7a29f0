"""Vector loops: shared out over the threads of a team, whole packs at a time where memory allows.

Invariant: a thread does the packs of a loop run by run (see `cuda_packs`); registers declared in
the loop are arrays of a pack's width there, indexed by constants alone once the loops over ``j``
are unrolled, so that they stay registers.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from flame.core.errors import CompileError
from flame.kernel import values
from flame.kernel.geometry import Geometry
from flame.kernel.program import (
    Accumulate,
    Assign,
    Declare,
    If,
    Kernel,
    Loop,
    Statement,
    Store,
    Target,
    identity,
)
from flame.kernel.values import Buffer, Register, Value
from flame.render import cuda_instructions as instructions
from flame.render.cuda_folds import Folds
from flame.render.cuda_held import Held, Key
from flame.render.cuda_index import carried, walk
from flame.render.cuda_packs import (
    BYTES,
    Packs,
    Place,
    Simple,
    item_bytes,
    loads_of,
    packs_of,
    runs_of,
)
from flame.render.cuda_values import Scope, ValueWriter
from flame.render.uses import Uses

AHEAD: Final = 8  # packs on their way in a serial loop
AHEAD_MANY: Final = 4  # the same where it stores, or adds up several sums


class VectorWriter(ValueWriter):
    """The part of the renderer that writes vector loops."""

    def __init__(
        self, kernel: Kernel, written: set[Buffer], geometry: Geometry, held: Held | None
    ) -> None:
        super().__init__(kernel, written, wide=geometry.wide)
        self.geometry, self.team = geometry, geometry.team
        self.folds = Folds(geometry, self.helpers)
        self.in_vector = False
        self.packed: dict[Target, str] = {}  # the packs that targets are collected in
        self.arrays: list[str] | None = None  # declarations of a run's registers
        self.many: set[Register] = set()  # registers that are arrays now
        self.width = 1
        self.held = held
        self.rows: dict[Key, str] = {}  # the arrays of held operands
        self.kept: dict[Value, str] = {}  # what stands for a load in the loop at hand

    @abstractmethod
    def statements(self, body: Iterable[Statement]) -> None: ...

    @abstractmethod
    def _head(self, var: str, begin: str, end: str, step: str) -> str: ...

    @abstractmethod
    def _inside(
        self, made: Scope, body: tuple[Statement, ...], head: str,
        write: Callable[[], None] | None = None,
    ) -> None: ...  # fmt: skip

    def declare(self, register: Register, text: str) -> None:
        """Make a register, set to ``text``."""
        type_, name = instructions.C_TYPE[register.dtype], register.name
        if self.arrays is None:
            self.registers[register] = name
            self.many.discard(register)
            self.emit(f"{type_} {name} = {text};")
        else:
            self.registers[register] = f"{name}[j]"
            self.many.add(register)
            self.arrays.append(f"{type_} {name}[{self.width}];")
            self.emit(f"{name}[j] = {text};")
        self.set_register(register)

    def level_of(self, uses: Uses) -> int:
        if self.many and not self.many.isdisjoint(uses.registers):
            return self.level_here
        return super().level_of(uses)

    # --- loops ------------------------------------------------------------------------------------

    def vector_loop(self, loop: Loop) -> None:
        if self.in_vector:
            raise CompileError(f"kernel {self.kernel.name}: nested vector loops")
        extent = self.named(loop.extent)
        parts = self._open_parts(loop)
        outer = {register: self.registers[register] for register in parts}
        self.registers.update({r: f"{r.name}_part" for r in parts})
        self.in_vector = True
        lane = "lane" if self.team > 1 else "0"
        packs = packs_of(loop)
        if self.held is not None and loop in self.held.loops:
            self._held_loop(loop, self.held, extent, lane)
        else:
            if packs is not None:
                lane = self._packed_loop(loop, packs, extent, lane)
            head = self._head(loop.var, lane, extent, str(self.team))
            self._inside(Scope(var=loop.var), loop.body, head)
        self.in_vector = False
        self.registers.update(outer)
        for line in self.folds.fold(parts):
            self.emit(line)
        for register in parts:
            self.set_register(register)

    def _open_parts(self, loop: Loop) -> dict[Register, str]:
        """What each thread accumulates alone, and how; it starts from what changes nothing."""
        ways: dict[Register, str] = {}
        for register in carried(loop.body):
            found = {
                s.combine if isinstance(s, Accumulate) else None
                for s in walk(loop.body)
                if isinstance(s, (Assign, Accumulate)) and s.register is register
            }
            (way,) = found if len(found) == 1 else (None,)
            if way is None:
                raise CompileError(
                    f"kernel {self.kernel.name}: register {register.name} is assigned across a "
                    "vector loop"
                )
            ways[register] = way
            neutral = instructions.literal(identity(way, register.dtype), register.dtype)
            type_ = instructions.C_TYPE[register.dtype]
            self.emit(f"{type_} {register.name}_part = {neutral};")
        return ways

    def _packed_loop(self, loop: Loop, packs: Packs, extent: str, lane: str) -> str:
        """The part of a loop that moves packs, where memory is aligned; returns where the rest
        begins."""
        self.width = width = packs.width
        index, number = self.index_type, self.fresh("")
        aligned, begin, pack = f"aligned{number}", f"begin{number}", f"k{number}"
        self.emit(f"const bool {aligned} = {self._alignment(packs)};")
        whole = f"{aligned} ? {extent} / {width} * {width} : 0"
        self.emit(f"const {index} {begin} = {whole};")
        first = lane if lane == "0" else f"{lane} * {width}"
        head = self._head(pack, first, begin, str(self.team * width))
        self._inside(
            Scope(), loop.body, head, write=lambda: self._runs(loop, loop.body, packs, pack)
        )
        return begin if lane == "0" else f"{begin} + {lane}"

    # --- held rows --------------------------------------------------------------------------------

    def declare_held(self) -> None:
        """The registers of held buffers."""
        if self.held is not None:
            size = self.geometry.held * self.held.width
            for buffer in sorted(self.held.local, key=lambda b: b.name):
                self.emit(f"{instructions.memory_type(buffer.dtype)} {buffer.name}[{size}];")

    def _held_loop(self, loop: Loop, held: Held, extent: str, lane: str) -> None:
        """A loop whose packs a thread takes in fixed turns: whole packs, or element by element."""
        self.width = width = held.width
        packs = packs_of(loop, width) or Packs(width)
        keys = held.keys.get(loop, {})
        mine = {v: p for v, p in packs.loads.items() if v not in keys and v.attr not in held.local}
        stores = {t: p for t, p in packs.stores.items() if t.buffer not in held.local}
        moved = Packs(width, mine, stores)
        fills = [key for key, first in held.first.items() if first is loop]
        for key in fills:
            name = self.rows[key] = f"{key[0].name}_held{self.fresh('')}"
            self.emit(f"{self._pack(key[0])} {name}[{self.geometry.held}];")
        self.kept = {value: f"{self.rows[key]}[c].item[j]" for value, key in keys.items()}
        counter = values.var(loop.var)
        for buffer in held.local:
            item = f"{buffer.name}[c * {width} + j]"
            self.kept[values.load(buffer, counter)] = instructions.from_memory(item, buffer.dtype)
        own = {
            t: f"{t.buffer.name}[c * {width} + j]"
            for s in loop.body if isinstance(s, Store) for t in s.targets
            if t.buffer in held.local
        }  # fmt: skip
        places = [*moved.places(), *(self._start(key) for key in fills)]
        tests = self._alignment_of(places)
        whole = self.fresh("whole")
        self.emit(f"const bool {whole} = {' && '.join((*tests, f'{extent} % {width} == 0'))};")
        self.packed.update(own)
        self._inside(
            Scope(), loop.body, f"if ({whole})",
            write=lambda: self._held_packs(loop, moved, fills, extent, lane),
        )  # fmt: skip
        self.packed.update(own)
        self._inside(
            Scope(), loop.body, "else",
            write=lambda: self._held_elements(loop, fills, extent, lane),
        )  # fmt: skip
        self.kept = {}
        for target in own:
            self.packed.pop(target, None)

    def _start(self, key: Key) -> Place:
        return Place(key[0], key[1], key[1], ())

    def _turns(self, body: tuple[Statement, ...], lane: str, write: Callable[[], None]) -> None:
        """Statements for each pack ``k`` of a thread."""
        first = "c" if lane == "0" else f"(c * {self.team} + lane)"

        def inner() -> None:
            self.emit(f"const {self.index_type} k = {first} * {self.width};")
            write()

        self.emit("#pragma unroll")
        head = f"for (int c = 0; c < {self.geometry.held}; ++c)"
        self._inside(Scope(), body, head, write=inner)

    def _held_packs(
        self, loop: Loop, packs: Packs, fills: list[Key], extent: str, lane: str
    ) -> None:
        starts = {key: self._address(*key) for key in fills}

        def fill() -> None:
            for key in fills:
                type_ = self._pack(key[0])
                place = f"*(const {type_}*)({starts[key]} + k)"
                self.emit(f"if (k < {extent}) {self.rows[key]}[c] = {place};")

        if fills:
            self._turns((), lane, fill)
        self._turns(
            loop.body, lane,
            lambda: self._inside(
                Scope(guards=True), loop.body, f"if (k < {extent})",
                write=lambda: self._runs(loop, loop.body, packs, "k"),
            ),
        )  # fmt: skip

    def _held_elements(self, loop: Loop, fills: list[Key], extent: str, lane: str) -> None:
        """As `_held_packs`, where packs cannot be moved."""
        starts = {key: self.value(key[1]) for key in fills}

        def one() -> None:
            for key in fills:
                place = f"{key[0].name}[{starts[key]} + {loop.var}]"
                self.emit(f"{self.rows[key]}[c].item[j] = {place};")
            self.know_all(self.kept)
            self.statements(loop.body)

        def each() -> None:
            self.emit(f"const {self.index_type} {loop.var} = k + j;")
            guard = Scope(guards=True, var=loop.var)
            self._inside(guard, loop.body, f"if ({loop.var} < {extent})", write=one)

        def elements() -> None:
            self.emit("#pragma unroll")
            head = f"for (int j = 0; j < {self.width}; ++j)"
            self._inside(Scope(), loop.body, head, write=each)

        self._turns(loop.body, lane, elements)

    # --- runs -------------------------------------------------------------------------------------

    def _runs(self, loop: Loop, body: tuple[Statement, ...], packs: Packs, pack: str) -> None:
        loaded: dict[Value, str] = {}  # an output may be an input's memory, so it stays as it was
        for part in runs_of(body):
            if isinstance(part, If):
                condition = instructions.bare(self.value(part.condition))
                inner = part.body
                self._inside(
                    Scope(guards=True), inner, f"if ({condition})",
                    write=lambda inner=inner: self._runs(loop, inner, packs, pack),  # type: ignore[misc]
                )  # fmt: skip
            elif isinstance(part, Loop):
                self._serial(loop, part, packs, pack)
            else:
                self._run(loop, part, packs, pack, loaded)

    def _serial(self, loop: Loop, part: Loop, packs: Packs, pack: str) -> None:
        """A serial loop, the packs of several steps loaded first, so that they are on their way
        together; stores between them would forbid the compiler to do so."""
        extent = self.named(part.extent)
        ahead = _ahead(loop, part, packs)
        if not ahead:
            self._inside(
                Scope(var=part.var), part.body, self._head(part.var, "0", extent, "1"),
                write=lambda: self._runs(loop, part.body, packs, pack),
            )  # fmt: skip
            return
        storing = any(isinstance(s, Store) for s in part.body)
        many = storing or len(carried(part.body)) > 1  # registers are few
        steps = max(1, (AHEAD_MANY if many else AHEAD) // len(ahead))
        first, step = f"{part.var}_first", self.fresh("u")

        def several() -> None:
            names = {}
            for value, place in ahead.items():
                names[value] = f"{place.buffer.name}_{self.fresh('pack')}"
                self.emit(f"{self._pack(place.buffer)} {names[value]}[{steps}];")

            def load() -> None:
                for value, place in ahead.items():
                    type_, start = (
                        self._pack(place.buffer),
                        self._address(place.buffer, place.index),
                    )
                    self.emit(f"{names[value]}[{step}] = *(const {type_}*)({start} + {pack});")

            def work() -> None:
                self.kept = {
                    value: instructions.from_memory(f"{name}[{step}].item[j]", value.dtype)
                    for value, name in names.items()
                }
                self._runs(loop, part.body, packs, pack)
                self.kept = {}

            for body, write in (((), load), (part.body, work)):
                self._each_step(body, part.var, first, step, steps, extent, write)

        head = self._head(first, "0", extent, str(steps))
        self._inside(Scope(), part.body, head, write=several)

    def _each_step(
        self, body: tuple[Statement, ...], var: str, first: str, step: str, steps: int,
        extent: str, write: Callable[[], None],
    ) -> None:  # fmt: skip
        """Statements for each of several steps of a serial loop, as far as there are any."""

        def one() -> None:
            self.emit(f"const {self.index_type} {var} = {first} + {step};")
            guard = Scope(guards=True, var=var)
            self._inside(guard, body, f"if ({var} < {extent})", write=write)

        self.emit("#pragma unroll")
        self._inside(Scope(), body, f"for (int {step} = 0; {step} < {steps}; ++{step})", write=one)

    def _run(
        self, loop: Loop, run: Sequence[Simple], packs: Packs, pack: str, loaded: dict[Value, str]
    ) -> None:
        """Loads of packs, a loop over their elements, then a store of packs."""
        width = packs.width
        known = {**loaded, **self.kept}
        for value in dict.fromkeys(v for s in run for v in loads_of(s)):
            if (
                value in packs.loads
                and value not in known
                and not any(value in s.known for s in self.scopes)
            ):
                known[value] = loaded[value] = self._load_pack(value, packs.loads[value], pack)
        stores = []
        for target in (t for s in run if isinstance(s, Store) for t in s.targets):
            if target in packs.stores and target not in self.packed:
                type_ = self._pack(target.buffer)
                name = f"{target.buffer.name}_{self.fresh('pack')}"
                place = self._address(target.buffer, packs.stores[target].index)
                self.emit(f"{type_} {name};")
                stores.append(f"*({type_}*)({place} + {pack}) = {name};")
                self.packed[target] = f"{name}.item[j]"
        arrays: list[str] = []
        self.arrays = arrays
        with self.scope(Scope(var=loop.var)) as made:
            self.know_all(known)
            self.statements(run)
        self.arrays = None
        lines = [f"  {line}" for line in made.lines]
        if any(re.search(rf"\b{loop.var}\b", line) for line in lines):
            lines.insert(0, f"  const {self.index_type} {loop.var} = {pack} + j;")
        self.scopes[-1].lines += [
            *made.before, *arrays, "#pragma unroll", f"for (int j = 0; j < {width}; ++j) {{",
            *lines, "}", *stores,
        ]  # fmt: skip
        for statement in run:
            if isinstance(statement, Store):
                for target in statement.targets:
                    self.packed.pop(target, None)
                gone = {t.buffer for t in statement.targets}
                self.forget_loads(gone)
                for value in [v for v in loaded if v.attr in gone]:
                    del loaded[value]
            else:
                self.set_register(statement.register)

    def _load_pack(self, value: Value, place: Place, pack: str) -> str:
        """Load a pack; the text of its element ``j``."""
        buffer, type_ = place.buffer, self._pack(place.buffer)
        name = f"{buffer.name}_{self.fresh('pack')}"
        address = f"*(const {type_}*)({self._address(buffer, place.index)} + {pack})"
        item = instructions.from_memory(f"{name}.item[j]", value.dtype)
        if len(value.args) == 1:
            self.emit(f"const {type_} {name} = {address};")
            return item
        where, otherwise = self.named(value.args[1]), value.args[2]
        self.emit(f"{type_} {name} = {{}};")
        self.emit(f"if ({where}) {name} = {address};")
        if values.is_const(otherwise, 0):
            return item
        return f"({where} ? {item} : {self.data(otherwise, self.level_here)})"

    def _pack(self, buffer: Buffer) -> str:
        return f"{self.helpers.pack()}<{instructions.memory_type(buffer.dtype)}, {self.width}>"

    def _address(self, buffer: Buffer, offset: Value) -> str:
        if values.is_const(offset, 0):
            return buffer.name
        return f"{buffer.name} + {self.value(offset)}"

    def _alignment(self, packs: Packs) -> str:
        """Whether packs may be moved at all of their places."""
        return " && ".join(self._alignment_of(packs.places()))

    def _alignment_of(self, places: Iterable[Place]) -> list[str]:
        tests: dict[str, None] = {}
        by_size: dict[int, dict[str, None]] = {}
        for place in places:
            nbytes = min(item_bytes(place.buffer.dtype) * self.width, BYTES)
            address = self._address(place.buffer, place.start)
            whole = address if address.isidentifier() else f"({address})"
            by_size.setdefault(nbytes, {})[f"(unsigned long long){whole}"] = None
            unit = nbytes // item_bytes(place.buffer.dtype)
            for step in place.steps:
                if not values.is_const(step) or int(values.number_of(step)) % unit:
                    tests[f"{self.value(step)} % {unit} == 0"] = None
        found = []
        for nbytes, addresses in by_size.items():
            joined = " | ".join(addresses)
            found.append(f"{f'({joined})' if len(addresses) > 1 else joined} % {nbytes} == 0")
        return [*found, *tests]


def _ahead(loop: Loop, part: Loop, packs: Packs) -> dict[Value, Place]:
    """The packs that a serial loop can load some steps ahead: of what is not stored.

    An output may be the memory of an input: of the same element, which is loaded before.
    """
    if any(not isinstance(s, (Declare, Assign, Accumulate, Store)) for s in part.body):
        return {}
    inner = [s for s in walk(loop.body) if isinstance(s, Store)]
    stored = {t.buffer for s in inner for t in s.targets}
    if values.is_const(part.extent):
        return {}  # the compiler unrolls it
    return {
        value: packs.loads[value]
        for s in part.body
        if isinstance(s, (Declare, Assign, Accumulate, Store))
        for value in loads_of(s)
        if value in packs.loads and value.attr not in stored and len(value.args) == 1
        and values.depends(value, part.var)
    }  # fmt: skip
