"""Scalar values as C++ expressions: where each one is computed, and under what name.

Invariants: a value is computed in the outermost scope in which all that it depends on is known;
values that are used once, where they are computed, stand inside the expression that uses them;
memory is read into a named constant, at once, so that no later write can change it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from flame.core import dtypes
from flame.core.errors import CompileError
from flame.kernel import values
from flame.kernel.program import Accumulate, Assign, Declare, Kernel, Store
from flame.kernel.values import Buffer, Register, Value
from flame.render import cuda_instructions as instructions
from flame.render.cuda_helpers import Helpers
from flame.render.cuda_index import Indices, every_value, operands, walk
from flame.render.cuda_instructions import C_TYPE
from flame.render.uses import Dependents, Uses, UsesOfValues

LONGEST: Final = 56  # characters of an expression inside another one
_INDEX_SIGNS: Final = {"add": "+", "sub": "-", "mul": "*"}


@dataclass
class Scope:
    """An open loop or condition. ``before`` holds what is computed in front of it."""

    guards: bool = False
    var: str | None = None
    before: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    known: dict[Value, str] = field(default_factory=dict)


class ValueWriter:
    """The part of the renderer that writes values."""

    def __init__(self, kernel: Kernel, written: set[Buffer], *, wide: bool) -> None:
        self.kernel, self.written, self.wide = kernel, written, wide
        self.index_type = "long long" if wide else "int"
        self.helpers = Helpers()
        self.indices = Indices(kernel)
        self.scopes = [Scope()]
        self.count = 0
        self.registers: dict[Register, str] = {}
        self.register_level: dict[Register, int] = {}
        self.uses = UsesOfValues()
        self.dependents: Dependents[Value] = Dependents()
        self.times: Counter[Value] = Counter()
        self.summed: set[Value] = set()  # what sums are, or may be, taken of
        self._count_uses()

    def _count_uses(self) -> None:
        read = {v.attr for v in every_value(self.kernel.body) if v.op == "load"}
        for statement in (self.kernel.body, *walk(self.kernel.body.body)):
            self.times.update(operands(statement))
            match statement:
                case Declare(_, value) | Assign(_, value) | Accumulate(_, "add", value):
                    self.summed.add(value)
                case Store(targets):
                    self.summed.update(t.value for t in targets if t.buffer in read)
        for value in every_value(self.kernel.body):
            self.times.update(value.args)
            if value.op in ("add", "sub", "neg"):
                self.summed.update(value.args)

    # --- scopes -----------------------------------------------------------------------------------

    @property
    def level_here(self) -> int:
        return len(self.scopes) - 1

    def fresh(self, prefix: str = "t") -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def emit(self, line: str, level: int | None = None) -> None:
        """Append a line where values of ``level`` live."""
        if level is None or level == self.level_here:
            self.scopes[-1].lines.append(line)
        else:
            self.scopes[level + 1].before.append(line)

    @contextmanager
    def scope(self, made: Scope) -> Iterator[Scope]:
        self.scopes.append(made)
        yield made
        self.scopes.pop()

    def set_register(self, register: Register, level: int | None = None) -> None:
        """Note that a register changed: what was made of its old value is not known any more."""
        self.register_level[register] = self.level_here if level is None else level
        self._forget((register,))

    def forget_loads(self, stored: Iterable[Buffer]) -> None:
        """Loads of these buffers are to be done anew."""
        self._forget(stored)

    def _forget(self, changed: Iterable[Register | Buffer]) -> None:
        for value in self.dependents.pop(changed):
            for scope in self.scopes:
                scope.known.pop(value, None)

    def know(self, value: Value, name: str, level: int) -> None:
        """``value`` has a name from here to the end of the scope ``level``, unless it changes."""
        self.scopes[level].known[value] = name
        self.dependents.add(value, self.uses(value))

    def know_all(self, names: Mapping[Value, str]) -> None:
        """`know` in the innermost scope."""
        for value, name in names.items():
            self.know(value, name, self.level_here)

    def level(self, value: Value) -> int:
        """The outermost scope in which ``value`` may be computed."""
        return self.level_of(self.uses(value))

    def level_of(self, uses: Uses) -> int:
        """The outermost scope in which all that a value depends on is known."""
        if uses.buffers & self.written:
            return self.level_here
        level = 0
        for depth in range(self.level_here, 0, -1):
            scope = self.scopes[depth]
            if scope.var in uses.names or (scope.guards and uses.buffers):
                level = depth
                break
        return max([level, *(self.register_level[r] for r in uses.registers)])

    # --- expressions ------------------------------------------------------------------------------

    def value(self, value: Value, at: int | None = None) -> str:
        """A name or an expression of ``value``, for text that stands in the scope ``at``."""
        if value.op == "const":
            return self._constant(value)
        if value.op == "read":
            return self.registers[value.attr]
        for scope in self.scopes:
            if value in scope.known:
                return scope.known[value]
        if value.op in ("var", "param"):
            return str(value.attr)
        level = self.level(value)
        text = self._written_out(value, level)
        here = self.level_here if at is None else at
        if value.op != "load" and level == here and self.times[value] == 1:
            if instructions.is_atom(text):
                return text
            if len(text) <= LONGEST:
                return f"({text})"
        return self.name(value, text, level)

    def name(self, value: Value, text: str, level: int) -> str:
        made = self.fresh()
        self.emit(f"const {self.type_of(value)} {made} = {text};", level)
        self.know(value, made, level)
        return made

    def named(self, value: Value) -> str:
        """As `value`, but what may change, or is long, gets a name now."""
        text = self.value(value)
        if value.op in ("const", "param", "var") or (text.isidentifier() and value.op != "read"):
            return text
        made = self.fresh()
        self.emit(f"const {self.type_of(value)} {made} = {text};")
        return made

    def type_of(self, value: Value) -> str:
        return self.index_type if value in self.indices else C_TYPE[value.dtype]

    def _constant(self, value: Value) -> str:
        number = values.number_of(value)
        if value in self.indices:
            return f"{number}LL" if self.wide else str(number)
        return instructions.literal(number, value.dtype)

    def data(self, value: Value, at: int) -> str:
        """``value`` in its own dtype: an index as 64 bits."""
        if value.op == "const":
            return instructions.literal(values.number_of(value), value.dtype)
        text = self.value(value, at)
        narrow = value in self.indices and not self.wide
        return f"(long long){text}" if narrow else text

    def _written_out(self, value: Value, level: int) -> str:
        if value.op == "load":
            return self._load(value, level)
        if value.dtype is dtypes.int64 and value in self.indices:
            return self._index(value, level)
        if value.op in values.COMPARE and all(arg in self.indices for arg in value.args):
            args = [self.value(arg, level) for arg in value.args]
        elif value.op == "cast":
            args = [self.value(value.args[0], level)]
        else:
            args = [self.data(arg, level) for arg in value.args]
        return instructions.instruction(
            self.helpers, value, args, exact=value in self.summed and value.op == "mul"
        )

    def _load(self, value: Value, level: int) -> str:
        buffer, index = value.attr, value.args[0]
        place = instructions.bare(self.value(index, level))
        text = instructions.from_memory(f"{buffer.name}[{place}]", buffer.dtype)
        if len(value.args) == 1:
            return text
        where, otherwise = (self.data(arg, level) for arg in value.args[1:])
        return f"{where} ? {text} : {otherwise}"

    def _index(self, value: Value, level: int) -> str:
        """Index arithmetic, which cannot overflow."""
        if value.op == "select":
            chosen = self.data(value.args[0], level)
            a, b = (self.value(arg, level) for arg in value.args[1:])
            return f"{chosen} ? {a} : {b}"
        args = [self.value(arg, level) for arg in value.args]
        if value.op in _INDEX_SIGNS:
            return f"{args[0]} {_INDEX_SIGNS[value.op]} {args[1]}"
        if value.op in ("udiv", "urem"):
            unsigned = "unsigned long long" if self.wide else "unsigned"
            a, b = (f"({unsigned}){arg}" for arg in args)
            return f"({self.index_type})({a} {'/' if value.op == 'udiv' else '%'} {b})"
        if value.op == "neg":
            return f"0 - {args[0]}"
        plain = ", ".join(map(instructions.bare, args))
        if value.op in ("min", "max"):
            return f"{value.op}({plain})"
        if value.op in ("floordiv", "mod"):
            return f"{self.helpers.division(value.op, self.index_type, signed=True)}({plain})"
        raise CompileError(f"kernel {self.kernel.name}: {value.op} of indices")
