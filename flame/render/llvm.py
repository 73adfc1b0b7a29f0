"""Kernel -> LLVM IR text with explicit vectors, for the CPU.

Invariants: the text is in SSA form and final, so code generation needs no optimization passes; a
value is computed in the outermost loop in which all that it depends on is known; a vector loop is a
loop over full vectors and masked vectors for the rest, so there is no scalar remainder. No call
to the C library stands in a loop, but for the rare lanes of the ``libm`` instruction.
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
    Accumulate,
    Assign,
    Declare,
    Gemm,
    If,
    Kernel,
    Loop,
    LoopKind,
    SplitProduct,
    Statement,
    Store,
    Transpose,
    identity,
)
from flame.kernel.values import Buffer, Register, Value
from flame.render import llvm_instructions as instructions
from flame.render.llvm_amx import split_product_function
from flame.render.llvm_analysis import (
    combines,
    computed_dtypes,
    gemms,
    split_products,
    stores,
    transposes,
    walk,
    written_registers,
)
from flame.render.llvm_instructions import LLVM_TYPE
from flame.render.llvm_memory import MemoryAccess
from flame.render.llvm_transpose import transpose_function
from flame.render.math import expand
from flame.render.uses import Dependents, Uses, UsesOfValues


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
    levels: dict[Uses, int] = field(default_factory=dict)  # found while this scope is the last


@dataclass(frozen=True)
class _Tail:
    """A partial vector of a loop: from ``begin`` to ``end``, in the scope ``level``."""

    level: int
    begin: str
    end: str


def render(kernel: Kernel, vector_bytes: int = 64) -> Source:
    """The LLVM IR of a kernel for vectors of ``vector_bytes``; its symbol is made from its text."""
    body = _Renderer(kernel, vector_bytes).text()
    digest = hashlib.sha256(body.encode()).hexdigest()[:20]
    symbol = f"flame_{kernel.name}_{digest}"
    return Source(symbol, body.replace("@SYMBOL", f"@{symbol}"))


class _Renderer(MemoryAccess):
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
        self.uses = UsesOfValues()
        self.expanded: dict[Value, Value] = {}
        self.constants: dict[tuple[Value, int], str] = {}
        self.dependents: Dependents[tuple[Value, int]] = Dependents()
        self.written = (
            {s.buffer for s in stores(kernel.body)}
            | {g.c.buffer for g in gemms(kernel.body)}
            | {t.target.buffer for t in transposes(kernel.body)}
            | {s.c.buffer for s in split_products(kernel.body)}
        )

    # --- text -------------------------------------------------------------------------------------

    def text(self) -> str:
        self._arguments()
        self._loop("p", "%begin", "%end", 1, self.kernel.body.body)
        lines = "\n".join(
            f"  {line}" if not line.endswith(":") else line for line in self.scopes[0].lines
        )
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
        for buffer, count in self.kernel.local:
            room = f"[{count * buffer.dtype.itemsize} x i8]"
            self.pointers[buffer] = self.emit(f"alloca {room}, align 64", 0)
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
                    self._loop(statement.var, "0", end, 1, statement.body)
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
                    self.store(statement)
                case If():
                    self._if(statement)
                case Gemm():
                    self._gemm(statement)
                case Transpose():
                    self._transpose(statement)
                case SplitProduct():
                    self._split_product(statement)

    def _set(self, register: Register, name: str, lanes: int) -> None:
        self.registers[register] = (name, lanes)
        self._forget((register,))

    def _forget(self, changed: Iterable[Register | Buffer]) -> None:
        for key in self.dependents.pop(changed):
            for scope in self.scopes:
                scope.known.pop(key, None)

    def forget_loads(self, stored: Iterable[Buffer]) -> None:
        """Loads of these buffers are to be done anew."""
        self._forget(stored)

    def _accumulate(self, statement: Accumulate) -> None:
        register = statement.register
        name, lanes = self.registers[register]
        value = self.value(statement.value, lanes)
        new = self.combine(statement.combine, register.dtype, name, value, lanes)
        if self.mask is not None and lanes > 1:
            type_ = instructions.vector(LLVM_TYPE[register.dtype], lanes)
            new = self.emit(f"select <{lanes} x i1> {self.mask}, {type_} {new}, {type_} {name}")
        self._set(register, new, lanes)

    def combine(self, op: str, dtype: DType, a: str, b: str, lanes: int) -> str:
        return instructions.binary(self, op, dtype, a, b, lanes, None)

    def _loop(
        self, var: str, begin: str, end: str, step: int, body: tuple[Statement, ...],
        emit: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Count ``var`` from begin to end; registers that ``body`` writes are carried along.

        emit: writes ``body`` in a way of its own.
        """
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
            self.forget_loads(self.written)
            if emit is None:
                self.statements(body)
            else:
                emit()
            ends = {r: self.registers[r][0] for r in carried}
        self.scopes[-1].lines += [
            f"br label %{label}.hoist",
            f"{label}.hoist:",
            *scope.before,
            f"br label %{label}.pre",
            f"{label}.pre:",
            f"br label %{label}.head",
            f"{label}.head:",
            f"{counter} = phi i64 [ {begin}, %{label}.pre ], [ {following}, %{label}.latch ]",
            *(_phi(r, phis[r], start[r], label, ends[r], "latch") for r in carried),
            f"%{label}.go = icmp slt i64 {counter}, {end}",
            f"br i1 %{label}.go, label %{label}.body, label %{label}.exit",
            f"{label}.body:",
            *scope.lines,
            f"br label %{label}.latch",
            f"{label}.latch:",
            f"{following} = add nsw i64 {counter}, {step}",
            f"br label %{label}.head",
            f"{label}.exit:",
        ]
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
        self.forget_loads(self.written)

    def _carried(self, body: tuple[Statement, ...]) -> list[Register]:
        """Registers from outside that ``body`` writes, in order of first write."""
        own = {s.register for s in walk(body) if isinstance(s, Declare)}
        return [r for r in dict.fromkeys(written_registers(body)) if r not in own]

    def _if(self, statement: If) -> None:
        if self.varying(statement.condition):
            raise CompileError(f"kernel {self.kernel.name}: a condition that differs by lane")
        condition = self.value(statement.condition, 1)
        self.branch(condition, lambda: self.statements(statement.body), statement.body)

    def branch(self, condition: str, emit: Callable[[], None], body: tuple[Statement, ...]) -> None:
        """Run ``emit`` where a scalar i1 holds, merging the registers that ``body`` writes."""
        carried = self._carried(body)
        label = self.fresh("if")
        start = {r: self.registers[r] for r in carried}
        with self.scope(_Scope(guards=True)) as scope:
            for r in carried:
                self.register_level[r] = len(self.scopes) - 1
            emit()
            ends = {r: self.registers[r][0] for r in carried}
        names = {r: self.fresh() for r in carried}
        self.scopes[-1].lines += [
            f"br label %{label}.hoist",
            f"{label}.hoist:",
            *scope.before,
            f"br label %{label}.pre",
            f"{label}.pre:",
            f"br i1 {condition}, label %{label}.then, label %{label}.join",
            f"{label}.then:",
            *scope.lines,
            f"br label %{label}.last",
            f"{label}.last:",
            f"br label %{label}.join",
            f"{label}.join:",
            *(_phi(r, names[r], start[r], label, ends[r], "last") for r in carried),
        ]
        self._leave(carried, names, start)

    # --- vector loops -----------------------------------------------------------------------------

    def _vector_loop(self, loop: Loop) -> None:
        lanes = self._lanes(loop)
        extent = self.value(loop.extent, 1)
        carried = self._carried(loop.body)
        outer = {r: self.registers[r] for r in carried}
        ways = combines(loop.body)
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
            self._loop(loop.var, "0", whole, lanes, loop.body)
        if constant is None or constant % lanes:
            self._rest(loop, whole, extent, carried)
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
        widest = max((v.bits for v in computed_dtypes(loop.body)), default=32)
        native = self.vector_bytes * 8 // (64 if widest == 64 else 32)
        return native * loop.unroll

    def _rest(self, loop: Loop, whole: str, extent: str, carried: list[Register]) -> None:
        """What does not fill a vector. An unrolled vector spans several of the processor's: the
        rest is done by one of those at a time, a quarter of the machine code to make, unless
        registers with a lane for each element of an unrolled one are carried on."""
        if loop.unroll == 1 or carried:
            some = self.emit(f"icmp slt i64 {whole}, {extent}")
            self.branch(some, lambda: self._masked_vector(loop, whole, extent), loop.body)
            return
        self.lanes //= loop.unroll

        def masked() -> None:
            self._masked_vector(loop, self.counters[loop.var], extent)

        self._loop(loop.var, whole, extent, self.lanes, loop.body, masked)

    def _masked_vector(self, loop: Loop, begin: str, extent: str) -> None:
        """A vector from ``begin``: lanes beyond the extent neither load, store nor accumulate."""
        lanes = self.lanes
        self.scopes[-1].var = loop.var
        self.counters[loop.var] = begin
        rest = self.emit(f"sub i64 {extent}, {begin}")
        few = instructions.splat(self, "i32", self.emit(f"trunc i64 {rest} to i32"), lanes, None)
        numbers = instructions.lane_numbers("i32", lanes)
        self.mask = self.emit(f"icmp slt <{lanes} x i32> {numbers}, {few}")
        self.tail = _Tail(len(self.scopes) - 1, begin, extent)
        self.statements(loop.body)
        self.mask = self.tail = None

    # --- values -----------------------------------------------------------------------------------

    def level(self, value: Value) -> int:
        """The outermost scope in which ``value`` may be computed."""
        uses = self.uses(value)
        levels = self.scopes[-1].levels
        level = levels.get(uses)
        if level is None:
            level = levels[uses] = self._level(uses)
        if uses.registers:
            return max([level, *(self.register_level[r] for r in uses.registers)])
        return level

    def _level(self, uses: Uses) -> int:
        """Of all but registers, whose levels change."""
        if uses.buffers & self.written:
            return len(self.scopes) - 1
        for depth in range(len(self.scopes) - 1, 0, -1):
            scope = self.scopes[depth]
            if scope.var in uses.names or (scope.guards and uses.buffers):
                return depth
        return 0

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
        key = (value, lanes)
        if value.op == "const":
            text = self.constants.get(key)
            if text is None:
                text = self.constants[key] = instructions.constant(value, lanes)
            return text
        for scope in self.scopes:
            found = scope.known.get(key)
            if found is not None:
                return found
        level = self.level(value)
        if lanes > 1 and not self.varying(value):
            scalar = self.value(value, 1)
            name = instructions.splat(self, LLVM_TYPE[value.dtype], scalar, lanes, level)
        else:
            name = self._compute(value, lanes, level)
        self.scopes[level].known[key] = name
        self.dependents.add(key, self.uses(value))
        return name

    def _compute(self, value: Value, lanes: int, level: int) -> str:
        if value.op == "var":
            return self._counter(value, lanes, level)
        if value.op == "read":
            return self.registers[value.attr][0]
        if value.op == "load":
            return self.load(value, lanes, level)
        if value.op == "param":
            raise CompileError(f"kernel {self.kernel.name}: unknown parameter {value.attr}")
        if instructions.native(value):
            args = [self.value(arg, lanes) for arg in value.args]
            return instructions.instruction(self, value, args, lanes, level)
        plain = self.expanded.get(value)
        if plain is None:  # else it was written for whole vectors, and is now for the rest
            plain = self.expanded[value] = expand(value.op, value.args)
        return self.value(plain, lanes)

    def _counter(self, value: Value, lanes: int, level: int) -> str:
        counter = self.counters[value.attr]
        if lanes == 1:
            return counter
        if self.tail is not None and value.attr == self.vector_var:
            return self._clamped(self.tail, lanes)
        base = instructions.splat(self, "i64", counter, lanes, level)
        return self.emit(
            f"add <{lanes} x i64> {base}, {instructions.lane_numbers('i64', lanes)}", level
        )

    def _clamped(self, tail: _Tail, lanes: int) -> str:
        """The counters of the last vector, with unused lanes on the last element."""
        index, level = f"<{lanes} x i64>", tail.level
        base = instructions.splat(self, "i64", tail.begin, lanes, level)
        final = self.emit(f"sub i64 {tail.end}, 1", level)
        finals = instructions.splat(self, "i64", final, lanes, level)
        wanted = self.emit(f"add {index} {base}, {instructions.lane_numbers('i64', lanes)}", level)
        return instructions.call(self, "smin", dtypes.int64, [wanted, finals], lanes, level)

    # --- vendor calls -----------------------------------------------------------------------------

    def _gemm(self, g: Gemm) -> None:
        dtype = g.c.buffer.dtype
        type_, name = (
            LLVM_TYPE[dtype],
            {"float32": "flame_sgemm", "float64": "flame_dgemm"}[dtype.name],
        )
        operands = {}
        for key, matrix in (("a", g.a), ("b", g.b), ("c", g.c)):
            address = self.address(matrix.buffer, matrix.offset, None)
            stride = self.emit(f"trunc i64 {self.value(matrix.row_stride, 1)} to i32")
            operands[key] = (address, stride)
        m, n, k = (self.emit(f"trunc i64 {self.value(x, 1)} to i32") for x in (g.m, g.n, g.k))
        beta = self.value(values.cast(g.beta, dtype), 1)
        one = instructions.constant(values.const(1, dtype), 1)
        pieces = [
            "i32 101",
            *(f"i32 {112 if x.transposed else 111}" for x in (g.a, g.b)),
            *(f"i32 {x}" for x in (m, n, k)),
            f"{type_} {one}",
            *(
                f"{kind} {x}"
                for key in "ab"
                for kind, x in zip(("ptr", "i32"), operands[key], strict=True)
            ),
            f"{type_} {beta}",
            *(f"{kind} {x}" for kind, x in zip(("ptr", "i32"), operands["c"], strict=True)),
        ]
        self.declare(f"void @{name}({', '.join(p.split()[0] for p in pieces)})")
        self.emit_void(f"call void @{name}({', '.join(pieces)})")
        self.forget_loads((g.c.buffer,))

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
        self.forget_loads((t.target.buffer,))

    def _split_product(self, s: SplitProduct) -> None:
        name, text = split_product_function(s.products)
        self.functions[name] = text
        pieces = [f"ptr {self.address(x.buffer, x.offset, None)}" for x in (s.a, s.b, s.c)]
        pieces += [f"i64 {self.value(x, 1)}" for x in (s.c.row_stride, s.steps)]
        pieces += [f"i1 {self.value(x, 1)}" for x in (s.add, s.open, s.close)]
        self.emit_void(f"call void {name}({', '.join(pieces)})")
        self.forget_loads((s.c.buffer,))


def _phi(
    register: Register, name: str, start: tuple[str, int], label: str, end: str, last: str
) -> str:
    """A register where control joins: as it was before ``label``, or as its last block left it."""
    type_ = instructions.vector(LLVM_TYPE[register.dtype], start[1])
    return f"{name} = phi {type_} [ {start[0]}, %{label}.pre ], [ {end}, %{label}.{last} ]"
