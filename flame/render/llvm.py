"""Kernel -> LLVM IR text with explicit vectors, for the CPU.

Invariants: the text is in SSA form and final, so code generation needs no optimization passes; a value
is computed in the outermost loop in which all that it depends on is known; a vector loop is a loop over
full vectors and one masked vector for the rest, so there is no scalar remainder. No call to the C
library stands in a loop, but for the rare lanes of the ``libm`` instruction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import CompileError
from flame.kernel import values
from flame.kernel.program import (
    Accumulate, Assign, Declare, Gemm, If, Kernel, Loop, LoopKind, Statement, Store, Target, Transpose,
    identity,
)  # fmt: skip
from flame.kernel.values import Buffer, Register, Value
from flame.render import llvm_instructions as instructions
from flame.render.llvm_instructions import LLVM_TYPE, memory_type
from flame.render.llvm_transpose import transpose_function
from flame.render.math import expand


@dataclass(frozen=True)
class Source:
    """Text of one compiled function."""

    symbol: str
    text: str


@dataclass
class _Scope:
    """An open loop or condition. ``before`` holds what was hoisted in front of it."""

    guards: bool = False
    var: str | None = None
    before: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    known: dict[tuple[Value, int], str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Tail:
    """The last, partial vector of a loop: from ``begin`` to ``end``, in the scope ``level``."""

    level: int
    begin: str
    end: str


@dataclass(frozen=True)
class _Uses:
    """What a value depends on."""

    names: frozenset[str]
    registers: frozenset[Register]
    buffers: frozenset[Buffer]


def render(kernel: Kernel, vector_bytes: int = 64) -> Source:
    """The LLVM IR of a kernel for vectors of ``vector_bytes``; its symbol is made from its text."""
    body = _Renderer(kernel, vector_bytes).text()
    digest = hashlib.sha256(body.encode()).hexdigest()[:20]
    symbol = f"flame_{kernel.name}_{digest}"
    return Source(symbol, body.replace("@SYMBOL", f"@{symbol}"))


class _Renderer:
    def __init__(self, kernel: Kernel, vector_bytes: int) -> None:
        self.kernel, self.vector_bytes = kernel, vector_bytes
        self.scopes = [_Scope()]
        self.count = 0
        self.lanes = 1  # of the open vector loop
        self.vector_var: str | None = None
        self.mask: str | None = None  # lanes in use, inside the last vector of a loop
        self.tail: _Tail | None = None  # the last vector of a loop, while it is written
        self.registers: dict[Register, tuple[str, int]] = {}  # current name, lanes
        self.register_level: dict[Register, int] = {}
        self.counters: dict[str, str] = {}
        self.pointers: dict[Buffer, str] = {}
        self.declared: set[str] = set()
        self.functions: dict[str, str] = {}  # of this text's own, by name
        self.uses_of: dict[Value, _Uses] = {}
        self.written = {s.buffer for s in _stores(kernel.body)} | {
            g.c.buffer for g in _gemms(kernel.body)
        } | {t.target.buffer for t in _transposes(kernel.body)}

    # --- text -------------------------------------------------------------------------------------

    def text(self) -> str:
        self._arguments()
        self._serial_loop("p", "%begin", "%end", self.kernel.body.body)
        lines = "\n".join(f"  {line}" if not line.endswith(":") else line
                          for line in self.scopes[0].lines)  # fmt: skip
        head = "define void @SYMBOL(ptr %args, i64 %begin, i64 %end, i64 %worker) {"
        declares = "\n".join(self._declarations())
        return f"{head}\nentry:\n{lines}\n  ret void\n}}\n{declares}\n"

    def _declarations(self) -> Iterator[str]:
        """Declarations, each once, and the functions that come with the kernel."""
        lines = [line for text in self.functions.values() for line in text.split("\n")]
        own = {line for line in lines if line.startswith("declare ")}
        yield from sorted(self.declared | own)
        yield from (line for line in lines if line not in own)

    def _arguments(self) -> None:
        position = 0
        for operand in self.kernel.operands:
            if isinstance(operand, Buffer):
                self.pointers[operand] = self._argument(position, "ptr")
            else:
                name = self._argument(position, LLVM_TYPE[operand.dtype])
                self.scopes[0].known[operand, 1] = name
            position += 1
        for buffer, count in self.kernel.scratch:
            base = self._argument(position, "ptr")
            mine = self.emit(f"mul i64 %worker, {count * buffer.dtype.itemsize}", 0)
            self.pointers[buffer] = self.emit(f"getelementptr i8, ptr {base}, i64 {mine}", 0)
            position += 1
        for size in self.kernel.sizes:
            self.scopes[0].known[size, 1] = self._argument(position, "i64")
            position += 1

    def _argument(self, position: int, type_: str) -> str:
        address = self.emit(f"getelementptr i64, ptr %args, i64 {position}", 0)
        return self.emit(f"load {type_}, ptr {address}", 0)

    def fresh(self, prefix: str = "%t") -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def emit(self, instruction: str, level: int | None = None) -> str:
        """Append ``name = instruction`` where values of ``level`` live; returns the name."""
        name = self.fresh()
        self.emit_void(f"{name} = {instruction}", level)
        return name

    def emit_void(self, line: str, level: int | None = None) -> None:
        if level is None or level == len(self.scopes) - 1:
            self.scopes[-1].lines.append(line)
        else:
            self.scopes[level + 1].before.append(line)

    def declare(self, signature: str) -> None:
        self.declared.add(f"declare {signature}")

    @contextmanager
    def scope(self, made: _Scope) -> Iterator[_Scope]:
        self.scopes.append(made)
        yield made
        self.scopes.pop()

    # --- statements -------------------------------------------------------------------------------

    def statements(self, body: Iterable[Statement]) -> None:
        for statement in body:
            match statement:
                case Loop(kind=LoopKind.VECTOR):
                    if self.vector_var is not None:
                        raise CompileError(f"kernel {self.kernel.name}: nested vector loops")
                    self._vector_loop(statement)
                case Loop():
                    end = self.value(statement.extent, 1)
                    self._serial_loop(statement.var, "0", end, statement.body)
                case Declare(register, value):
                    lanes = self.lanes if self.vector_var is not None else 1
                    self._set(register, self.value(value, lanes), lanes)
                    self.register_level[register] = len(self.scopes) - 1
                case Assign(register, value):
                    lanes = self.registers[register][1]
                    new = self.value(value, lanes)
                    self._set(register, new, lanes)
                case Accumulate():
                    self._accumulate(statement)
                case Store():
                    self._store(statement)
                case If():
                    self._if(statement)
                case Gemm():
                    self._gemm(statement)
                case Transpose():
                    self._transpose(statement)

    def _set(self, register: Register, name: str, lanes: int) -> None:
        self.registers[register] = (name, lanes)
        self._forget(lambda uses: register in uses.registers)

    def _forget(self, stale: Callable[[_Uses], bool]) -> None:
        for scope in self.scopes:
            dead = [key for key in scope.known if stale(self.uses(key[0]))]
            for key in dead:
                del scope.known[key]

    def _accumulate(self, statement: Accumulate) -> None:
        register = statement.register
        name, lanes = self.registers[register]
        value = self.value(statement.value, lanes)
        new = self.combine(statement.combine, register.dtype, name, value, lanes)
        if self.mask is not None and lanes > 1:
            type_ = instructions.vector(LLVM_TYPE[register.dtype], lanes)
            new = self.emit(
                f"select <{lanes} x i1> {self.mask}, {type_} {new}, {type_} {name}"
            )  # fmt: skip
        self._set(register, new, lanes)

    def combine(self, op: str, dtype: DType, a: str, b: str, lanes: int) -> str:
        return instructions.binary(self, op, dtype, a, b, lanes, None)

    def _serial_loop(self, var: str, begin: str, end: str, body: tuple[Statement, ...]) -> None:
        carried = self._carried(body)
        label = self.fresh("loop")
        counter, following = f"%{label}.i", f"%{label}.next"
        outer_counter = self.counters.get(var)
        phis = {r: self.fresh() for r in carried}
        start = {r: self.registers[r] for r in carried}
        with self.scope(_Scope(var=var)) as scope:
            self.counters[var] = counter
            for r in carried:
                self._set(r, phis[r], start[r][1])
                self.register_level[r] = len(self.scopes) - 1
            self._forget(lambda uses: bool(uses.buffers & self.written))
            self.statements(body)
            ends = {r: self.registers[r][0] for r in carried}
        lines = [f"br label %{label}.hoist", f"{label}.hoist:", *scope.before]
        lines += [f"br label %{label}.pre", f"{label}.pre:", f"br label %{label}.head",
                  f"{label}.head:",
                  f"{counter} = phi i64 [ {begin}, %{label}.pre ], [ {following}, %{label}.latch ]"]  # fmt: skip
        for r in carried:
            type_ = instructions.vector(LLVM_TYPE[r.dtype], start[r][1])
            lines.append(
                f"{phis[r]} = phi {type_} [ {start[r][0]}, %{label}.pre ], [ {ends[r]}, %{label}.latch ]"
            )
        lines += [f"%{label}.go = icmp slt i64 {counter}, {end}",
                  f"br i1 %{label}.go, label %{label}.body, label %{label}.exit", f"{label}.body:",
                  *scope.lines, f"br label %{label}.latch", f"{label}.latch:",
                  f"{following} = add nsw i64 {counter}, 1", f"br label %{label}.head",
                  f"{label}.exit:"]  # fmt: skip
        self.scopes[-1].lines += lines
        self._leave(carried, phis, start)
        if outer_counter is not None:
            self.counters[var] = outer_counter

    def _leave(
        self,
        carried: list[Register],
        names: dict[Register, str],
        start: dict[Register, tuple[str, int]],
    ) -> None:
        for r in carried:
            self._set(r, names[r], start[r][1])
            self.register_level[r] = len(self.scopes) - 1
        self._forget(lambda uses: bool(uses.buffers & self.written))

    def _carried(self, body: tuple[Statement, ...]) -> list[Register]:
        """Registers from outside that ``body`` writes, in order of first write."""
        own = {s.register for s in _walk(body) if isinstance(s, Declare)}
        return [r for r in dict.fromkeys(_written_registers(body)) if r not in own]

    def _if(self, statement: If) -> None:
        if self.vector_var is not None:
            raise CompileError(f"kernel {self.kernel.name}: a condition inside a vector loop")
        condition = self.value(statement.condition, 1)
        self._branch(condition, lambda: self.statements(statement.body), statement.body)

    def _branch(
        self, condition: str, emit: Callable[[], None], body: tuple[Statement, ...]
    ) -> None:
        """Run ``emit`` where a scalar i1 holds, merging the registers that ``body`` writes."""
        carried = self._carried(body)
        label = self.fresh("if")
        start = {r: self.registers[r] for r in carried}
        with self.scope(_Scope(guards=True)) as scope:
            for r in carried:
                self.register_level[r] = len(self.scopes) - 1
            emit()
            ends = {r: self.registers[r][0] for r in carried}
        lines = [f"br label %{label}.hoist", f"{label}.hoist:", *scope.before,
                 f"br label %{label}.pre", f"{label}.pre:",
                 f"br i1 {condition}, label %{label}.then, label %{label}.join", f"{label}.then:",
                 *scope.lines, f"br label %{label}.last", f"{label}.last:",
                 f"br label %{label}.join", f"{label}.join:"]  # fmt: skip
        names = {}
        for r in carried:
            names[r] = self.fresh()
            type_ = instructions.vector(LLVM_TYPE[r.dtype], start[r][1])
            lines.append(
                f"{names[r]} = phi {type_} [ {start[r][0]}, %{label}.pre ], [ {ends[r]}, %{label}.last ]"
            )
        self.scopes[-1].lines += lines
        self._leave(carried, names, start)

    # --- vector loops -----------------------------------------------------------------------------

    def _vector_loop(self, loop: Loop) -> None:
        lanes = self._lanes(loop)
        extent = self.value(loop.extent, 1)
        carried = self._carried(loop.body)
        outer = {r: self.registers[r] for r in carried}
        ways = _combines(loop.body)
        for r in carried:
            if r not in ways:
                raise CompileError(
                    f"kernel {self.kernel.name}: register {r.name} is assigned across a vector loop"
                )
            neutral = values.const(identity(ways[r], r.dtype), r.dtype)
            self._set(r, instructions.constant(neutral, lanes), lanes)
        self.lanes, self.vector_var = lanes, loop.var
        whole = self._whole_vectors(extent, lanes)
        constant = int(values.number_of(loop.extent)) if values.is_const(loop.extent) else None
        if constant is None or constant >= lanes:
            self._full_vectors(loop, whole)
        if constant is None or constant % lanes:
            rest = self.emit(f"icmp slt i64 {whole}, {extent}")
            self._branch(rest, lambda: self._last_vector(loop, whole, extent), loop.body)
        self.lanes, self.vector_var = 1, None
        for r in carried:
            whole_vector = self.registers[r][0]
            total = instructions.reduce_vector(self, ways[r], r.dtype, whole_vector, lanes)
            self._set(r, self.combine(ways[r], r.dtype, outer[r][0], total, 1), 1)

    def _whole_vectors(self, extent: str, lanes: int) -> str:
        """The elements of ``extent`` that fill whole vectors."""
        if not lanes & (lanes - 1):
            return self.emit(f"and i64 {extent}, {-lanes}")
        rest = self.emit(f"urem i64 {extent}, {lanes}")
        return self.emit(f"sub i64 {extent}, {rest}")

    def _lanes(self, loop: Loop) -> int:
        widest = max((v.bits for v in _computed_dtypes(loop.body)), default=32)
        native = self.vector_bytes * 8 // (64 if widest == 64 else 32)
        return native * loop.unroll

    def _full_vectors(self, loop: Loop, whole: str) -> None:
        """The loop over full vectors: a serial loop in steps of ``lanes``."""
        carried = self._carried(loop.body)
        label = self.fresh("vec")
        counter = f"%{label}.i"
        phis = {r: self.fresh() for r in carried}
        start = {r: self.registers[r] for r in carried}
        with self.scope(_Scope(var=loop.var)) as scope:
            self.counters[loop.var] = counter
            for r in carried:
                self._set(r, phis[r], start[r][1])
                self.register_level[r] = len(self.scopes) - 1
            self._forget(lambda uses: bool(uses.buffers & self.written))
            self.statements(loop.body)
            ends = {r: self.registers[r][0] for r in carried}
        lines = [f"br label %{label}.hoist", f"{label}.hoist:", *scope.before,
                 f"br label %{label}.pre", f"{label}.pre:", f"br label %{label}.head",
                 f"{label}.head:",
                 f"{counter} = phi i64 [ 0, %{label}.pre ], [ %{label}.next, %{label}.latch ]"]  # fmt: skip
        for r in carried:
            type_ = instructions.vector(LLVM_TYPE[r.dtype], start[r][1])
            lines.append(
                f"{phis[r]} = phi {type_} [ {start[r][0]}, %{label}.pre ], [ {ends[r]}, %{label}.latch ]"
            )
        lines += [f"%{label}.go = icmp slt i64 {counter}, {whole}",
                  f"br i1 %{label}.go, label %{label}.body, label %{label}.exit", f"{label}.body:",
                  *scope.lines, f"br label %{label}.latch", f"{label}.latch:",
                  f"%{label}.next = add nsw i64 {counter}, {self.lanes}",
                  f"br label %{label}.head", f"{label}.exit:"]  # fmt: skip
        self.scopes[-1].lines += lines
        self._leave(carried, phis, start)

    def _last_vector(self, loop: Loop, whole: str, extent: str) -> None:
        """The rest of a vector loop: lanes beyond the extent neither load, store nor accumulate."""
        lanes = self.lanes
        self.scopes[-1].var = loop.var
        self.counters[loop.var] = whole
        rest = self.emit(f"sub i64 {extent}, {whole}")
        few = instructions.splat(self, "i32", self.emit(f"trunc i64 {rest} to i32"), lanes, None)
        numbers = instructions.lane_numbers("i32", lanes)
        self.mask = self.emit(f"icmp slt <{lanes} x i32> {numbers}, {few}")
        self.tail = _Tail(len(self.scopes) - 1, whole, extent)
        self.statements(loop.body)
        self.mask = self.tail = None

    # --- values -----------------------------------------------------------------------------------

    def uses(self, value: Value) -> _Uses:
        found = self.uses_of.get(value)
        if found is None:
            inner = [self.uses(arg) for arg in value.args]
            names = frozenset[str]().union(*(u.names for u in inner))
            registers = frozenset[Register]().union(*(u.registers for u in inner))
            buffers = frozenset[Buffer]().union(*(u.buffers for u in inner))
            if value.op == "var":
                names |= {value.attr}
            elif value.op == "read":
                registers |= {value.attr}
            elif value.op == "load":
                buffers |= {value.attr}
            found = self.uses_of[value] = _Uses(names, registers, buffers)
        return found

    def level(self, value: Value) -> int:
        """The outermost scope in which ``value`` may be computed."""
        uses = self.uses(value)
        if uses.buffers & self.written:
            return len(self.scopes) - 1
        level = 0
        for depth in range(len(self.scopes) - 1, 0, -1):
            scope = self.scopes[depth]
            if scope.var in uses.names or (scope.guards and uses.buffers):
                level = depth
                break
        return max([level, *(self.register_level[r] for r in uses.registers)])

    def varying(self, value: Value) -> bool:
        """Whether lanes of the open vector loop differ in ``value``."""
        if self.vector_var is None:
            return False
        uses = self.uses(value)
        return self.vector_var in uses.names or any(
            self.registers[r][1] > 1 for r in uses.registers
        )

    def value(self, value: Value, lanes: int) -> str:
        """The name of ``value`` as a scalar (lanes 1) or a vector."""
        if value.op == "const":
            return instructions.constant(value, lanes)
        for scope in self.scopes:
            found = scope.known.get((value, lanes))
            if found is not None:
                return found
        level = self.level(value)
        if lanes > 1 and not self.varying(value):
            scalar = self.value(value, 1)
            name = instructions.splat(self, LLVM_TYPE[value.dtype], scalar, lanes, level)
        else:
            name = self._compute(value, lanes, level)
        self.scopes[level].known[value, lanes] = name
        return name

    def _compute(self, value: Value, lanes: int, level: int) -> str:
        if value.op == "var":
            return self._counter(value, lanes, level)
        if value.op == "read":
            return self.registers[value.attr][0]
        if value.op == "load":
            return self._load(value, lanes, level)
        if value.op == "param":
            raise CompileError(f"kernel {self.kernel.name}: unknown parameter {value.attr}")
        if instructions.native(value):
            args = [self.value(arg, lanes) for arg in value.args]
            return instructions.instruction(self, value, args, lanes, level)
        return self.value(expand(value.op, value.args), lanes)

    def _counter(self, value: Value, lanes: int, level: int) -> str:
        counter = self.counters[value.attr]
        if lanes == 1:
            return counter
        if self.tail is not None and value.attr == self.vector_var:
            return self._clamped(self.tail, lanes)
        base = instructions.splat(self, "i64", counter, lanes, level)
        return self.emit(f"add <{lanes} x i64> {base}, {instructions.lane_numbers('i64', lanes)}", level)

    def _clamped(self, tail: _Tail, lanes: int) -> str:
        """The counters of the last vector, with unused lanes on the last element."""
        index, level = f"<{lanes} x i64>", tail.level
        base = instructions.splat(self, "i64", tail.begin, lanes, level)
        final = self.emit(f"sub i64 {tail.end}, 1", level)
        finals = instructions.splat(self, "i64", final, lanes, level)
        wanted = self.emit(f"add {index} {base}, {instructions.lane_numbers('i64', lanes)}", level)
        return instructions.call(self, "smin", dtypes.int64, [wanted, finals], lanes, level)

    # --- memory -----------------------------------------------------------------------------------

    def _slope(self, index: Value) -> int | None:
        """Elements between neighbouring lanes: 0, 1, or None where it is neither."""
        assert self.vector_var is not None
        if not self.varying(index):
            return 0
        line = values.linear(index, self.vector_var)
        if line is None or any(self.varying(part) for part in line):
            return None
        return 1 if values.is_const(line[0], 1) else None

    def address(self, buffer: Buffer, index: Value, level: int | None) -> str:
        """The address of an element, for the first lane."""
        assert self.vector_var is None or not self.varying(index) or self._slope(index) == 1
        type_ = memory_type(buffer.dtype)
        return self.emit(
            f"getelementptr {type_}, ptr {self.pointers[buffer]}, i64 {self._first(index, level)}",
            level,
        )

    def _first(self, index: Value, level: int | None) -> str:
        """``index`` in the first lane, as a scalar."""
        if self.vector_var is None or not self.varying(index):
            return self.value(index, 1)
        line = values.linear(index, self.vector_var)
        assert line is not None
        counter = self.counters[self.vector_var]
        if values.is_const(line[1], 0):
            return counter
        return self.emit(f"add i64 {counter}, {self.value(line[1], 1)}", level)

    def _addresses(self, buffer: Buffer, index: Value, lanes: int, level: int | None) -> str:
        type_, indices = memory_type(buffer.dtype), self.value(index, lanes)
        return self.emit(
            f"getelementptr {type_}, ptr {self.pointers[buffer]}, <{lanes} x i64> {indices}", level
        )

    def _load(self, value: Value, lanes: int, level: int) -> str:
        buffer, index = value.attr, value.args[0]
        where = value.args[1] if len(value.args) > 1 else None
        type_, align = memory_type(buffer.dtype), buffer.dtype.itemsize
        if lanes == 1 and where is None:
            raw = self.emit(f"load {type_}, ptr {self.address(buffer, index, level)}", level)
            return instructions.from_memory(self, buffer.dtype, raw, 1, level)
        if lanes == 1:
            return self._guarded_scalar(value, level)
        mask = self.mask
        otherwise = "poison"
        if where is not None:
            wanted = self.value(where, lanes)
            if mask is not None:
                wanted = self.emit(f"and <{lanes} x i1> {mask}, {wanted}", level)
            mask = wanted
            known = self.value(value.args[2], lanes)
            otherwise = instructions.to_memory(self, buffer.dtype, known, lanes, level)
        whole = f"<{lanes} x {type_}>"
        slope = self._slope(index)
        if slope == 1 and mask is None:
            address = self.address(buffer, index, level)
            raw = self.emit(f"load {whole}, ptr {address}, align {align}", level)
        elif slope == 1:
            raw = self._masked_load(self.address(buffer, index, level), whole, lanes, type_, align,
                                    str(mask), otherwise, level)  # fmt: skip
        else:
            # unused lanes of the last vector address its last element, so only `where` needs a mask
            chosen = "splat (i1 true)" if where is None else str(mask)
            raw = self._gather(
                self._addresses(buffer, index, lanes, level),
                whole, lanes, type_, align, chosen, otherwise, level,
            )  # fmt: skip
        return instructions.from_memory(self, buffer.dtype, raw, lanes, level)

    def _masked_load(
        self, address: str, whole: str, lanes: int, type_: str, align: int, mask: str,
        otherwise: str, level: int | None,
    ) -> str:  # fmt: skip
        name = f"@llvm.masked.load.v{lanes}{_suffix(type_)}.p0"
        self.declare(f"{whole} {name}(ptr, <{lanes} x i1>, {whole})")
        return self.emit(
            f"call {whole} {name}(ptr align {align} {address}, <{lanes} x i1> {mask}, {whole} {otherwise})",
            level,
        )

    def _gather(
        self, addresses: str, whole: str, lanes: int, type_: str, align: int, mask: str,
        otherwise: str, level: int | None,
    ) -> str:  # fmt: skip
        name = f"@llvm.masked.gather.v{lanes}{_suffix(type_)}.v{lanes}p0"
        self.declare(f"{whole} {name}(<{lanes} x ptr>, <{lanes} x i1>, {whole})")
        return self.emit(
            f"call {whole} {name}(<{lanes} x ptr> align {align} {addresses}, <{lanes} x i1> {mask}, "
            f"{whole} {otherwise})",
            level,
        )

    def _guarded_scalar(self, value: Value, level: int) -> str:
        """A load that must not be done where its condition fails, as a vector of one lane."""
        buffer, (index, where, otherwise) = value.attr, value.args
        type_, align = memory_type(buffer.dtype), buffer.dtype.itemsize
        address = self.address(buffer, index, level)
        condition = self.value(where, 1)
        mask = self.emit(f"insertelement <1 x i1> poison, i1 {condition}, i64 0", level)
        other = instructions.to_memory(self, buffer.dtype, self.value(otherwise, 1), 1, level)
        others = self.emit(f"insertelement <1 x {type_}> poison, {type_} {other}, i64 0", level)
        raw = self._masked_load(address, f"<1 x {type_}>", 1, type_, align, mask, others, level)
        scalar = self.emit(f"extractelement <1 x {type_}> {raw}, i64 0", level)
        return instructions.from_memory(self, buffer.dtype, scalar, 1, level)

    def _store(self, statement: Store) -> None:
        lanes = self.lanes if self.vector_var is not None else 1
        ready = []
        for target in statement.targets:
            name = self.value(target.value, lanes)
            ready.append(instructions.to_memory(self, target.buffer.dtype, name, lanes, None))
        for target, raw in zip(statement.targets, ready, strict=True):
            if lanes == 1:
                self._store_scalar(target, raw)
            else:
                self._store_vector(target, raw, lanes)
        stored = {target.buffer for target in statement.targets}
        self._forget(lambda uses: bool(uses.buffers & stored))

    def _store_scalar(self, target: Target, raw: str) -> None:
        type_ = memory_type(target.buffer.dtype)

        def write() -> None:
            address = self.address(target.buffer, target.index, None)
            self.emit_void(f"store {type_} {raw}, ptr {address}")

        if target.where is None:
            write()
        else:
            self._branch(self.value(target.where, 1), write, ())

    def _store_vector(self, target: Target, raw: str, lanes: int) -> None:
        buffer = target.buffer
        type_, align = memory_type(buffer.dtype), buffer.dtype.itemsize
        mask = self.mask
        if target.where is not None:
            wanted = self.value(target.where, lanes)
            mask = wanted if mask is None else self.emit(f"and <{lanes} x i1> {mask}, {wanted}")
        whole = f"<{lanes} x {type_}>"
        slope = self._slope(target.index)
        if slope == 1 and mask is None:
            address = self.address(buffer, target.index, None)
            self.emit_void(f"store {whole} {raw}, ptr {address}, align {align}")
        elif slope == 1:
            address = self.address(buffer, target.index, None)
            name = f"@llvm.masked.store.v{lanes}{_suffix(type_)}.p0"
            self.declare(f"void {name}({whole}, ptr, <{lanes} x i1>)")
            self.emit_void(
                f"call void {name}({whole} {raw}, ptr align {align} {address}, <{lanes} x i1> {mask})"
            )
        else:
            chosen = "splat (i1 true)" if mask is None else mask
            addresses = self._addresses(buffer, target.index, lanes, None)
            name = f"@llvm.masked.scatter.v{lanes}{_suffix(type_)}.v{lanes}p0"
            self.declare(f"void {name}({whole}, <{lanes} x ptr>, <{lanes} x i1>)")
            self.emit_void(
                f"call void {name}({whole} {raw}, <{lanes} x ptr> align {align} {addresses}, "
                f"<{lanes} x i1> {chosen})"
            )

    # --- vendor calls -----------------------------------------------------------------------------

    def _gemm(self, g: Gemm) -> None:
        dtype = g.c.buffer.dtype
        type_, name = LLVM_TYPE[dtype], {"float32": "flame_sgemm", "float64": "flame_dgemm"}[dtype.name]
        operands = {}
        for key, matrix in (("a", g.a), ("b", g.b), ("c", g.c)):
            address = self.address(matrix.buffer, matrix.offset, None)
            stride = self.emit(f"trunc i64 {self.value(matrix.row_stride, 1)} to i32")
            operands[key] = (address, stride)
        m, n, k = (self.emit(f"trunc i64 {self.value(x, 1)} to i32") for x in (g.m, g.n, g.k))
        beta = self.value(values.cast(g.beta, dtype), 1)
        one = instructions.constant(values.const(1, dtype), 1)
        ta, tb = (112 if x.transposed else 111 for x in (g.a, g.b))
        self.declare(
            f"void @{name}(i32, i32, i32, i32, i32, i32, {type_}, ptr, i32, ptr, i32, {type_}, ptr, i32)"
        )
        self.emit_void(
            f"call void @{name}(i32 101, i32 {ta}, i32 {tb}, i32 {m}, i32 {n}, i32 {k}, {type_} {one}, "
            f"ptr {operands['a'][0]}, i32 {operands['a'][1]}, ptr {operands['b'][0]}, "
            f"i32 {operands['b'][1]}, {type_} {beta}, ptr {operands['c'][0]}, i32 {operands['c'][1]})"
        )
        self._forget(lambda uses: g.c.buffer in uses.buffers)

    # --- matrices turned --------------------------------------------------------------------------

    def _transpose(self, t: Transpose) -> None:
        dtype = t.target.buffer.dtype
        if dtype.itemsize not in (4, 8) or t.source.buffer.dtype is not dtype:
            raise CompileError(f"kernel {self.kernel.name}: a transpose of {dtype.name} elements")
        name, text = transpose_function(LLVM_TYPE[dtype], self.vector_bytes // dtype.itemsize)
        self.functions[name] = text
        matrices = []
        for matrix in (t.source, t.target):
            address = self.address(matrix.buffer, matrix.offset, None)
            matrices.append(f"ptr {address}, i64 {self.value(matrix.row_stride, 1)}")
        rows, columns = self.value(t.rows, 1), self.value(t.columns, 1)
        self.emit_void(f"call void {name}({', '.join(matrices)}, i64 {rows}, i64 {columns})")
        self._forget(lambda uses: t.target.buffer in uses.buffers)


def _suffix(type_: str) -> str:
    return {"float": "f32", "double": "f64", "half": "f16"}.get(type_, type_)


def _walk(body: Iterable[Statement]) -> Iterator[Statement]:
    for statement in body:
        yield statement
        if isinstance(statement, (Loop, If)):
            yield from _walk(statement.body)


def _stores(loop: Loop) -> Iterator[Target]:
    for statement in _walk(loop.body):
        if isinstance(statement, Store):
            yield from statement.targets


def _gemms(loop: Loop) -> Iterator[Gemm]:
    return (s for s in _walk(loop.body) if isinstance(s, Gemm))


def _transposes(loop: Loop) -> Iterator[Transpose]:
    return (s for s in _walk(loop.body) if isinstance(s, Transpose))


def _written_registers(body: Iterable[Statement]) -> Iterator[Register]:
    for statement in _walk(body):
        if isinstance(statement, (Assign, Accumulate)):
            yield statement.register


def _combines(body: Iterable[Statement]) -> dict[Register, str]:
    """How each register that is only accumulated is combined."""
    ways: dict[Register, str] = {}
    assigned = {s.register for s in _walk(body) if isinstance(s, Assign)}
    for statement in _walk(body):
        if isinstance(statement, Accumulate) and statement.register not in assigned:
            ways[statement.register] = statement.combine
    return ways


def _computed_dtypes(body: Iterable[Statement]) -> Iterator[DType]:
    """Dtypes of the numbers that a vector loop works on; int64 addresses do not count."""
    seen: set[Value] = set()

    def visit(value: Value) -> Iterator[DType]:
        if value in seen:
            return
        seen.add(value)
        if value.op == "load":
            yield value.dtype
            for arg in value.args[1:]:
                yield from visit(arg)
            return
        if value.dtype is not dtypes.int64 and value.op not in ("const", "param"):
            yield value.dtype
        for arg in value.args:
            yield from visit(arg)

    for statement in _walk(body):
        match statement:
            case Store(targets):
                for t in targets:
                    yield t.buffer.dtype
                    yield from visit(t.value)
            case Declare(register, value) | Assign(register, value) | Accumulate(register, _, value):
                yield register.dtype
                yield from visit(value)
