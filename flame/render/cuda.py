"""Kernel -> CUDA C++ text and the launch of one call. Pure text: no device is needed.

Invariants: a team of threads (see `flame.kernel.geometry`) runs one iteration of the parallel loop
at a time; outside of vector loops its threads compute alike, and thread 0 alone stores; a vector
loop is shared out over them, and what it accumulates is folded in an order that the geometry alone
decides. Barriers stand in control flow that a team, or the block that is one, takes as a whole. The
text depends on the kernel and the geometry, never on sizes, so equal kernels share it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable

from flame.core.errors import CompileError
from flame.kernel import values
from flame.kernel.builder import BoundKernel
from flame.kernel.geometry import WARP, Geometry, KernelLaunch
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
    Target,
    Transpose,
    identity,
)
from flame.kernel.values import Buffer, Register
from flame.render import cuda_instructions as instructions
from flame.render.cuda_barriers import barriers, writes_of
from flame.render.cuda_folds import Folds
from flame.render.cuda_frame import frame
from flame.render.cuda_geometry import SHARED_BYTES, geometry_of, grid_of, scratch_bytes
from flame.render.cuda_index import carried, operands, walk
from flame.render.cuda_packs import Packs, item_bytes, packs_of
from flame.render.cuda_values import Scope, ValueWriter


def render(
    bound: BoundKernel, geometry: Geometry | None = None, *, by_pointer: bool = False
) -> KernelLaunch:
    """CUDA C++ of a kernel, with the launch of the call that it is bound to.

    geometry: teams and blocks, where not the ones that the sizes suggest. by_pointer: numbers of
    the call arrive as pointers to their words on the device; for the suggested geometry. Raises
    CompileError for calls of the processor's libraries, and for kernels that break the grammar.
    """
    if geometry is None:
        geometry = geometry_of(bound, by_pointer=by_pointer)
    private = scratch_bytes(bound.kernel) * geometry.teams
    if geometry.shared and private > SHARED_BYTES:
        raise CompileError(
            f"kernel {bound.kernel.name}: {private} bytes of scratch memory for {geometry.teams} "
            f"teams are more than the {SHARED_BYTES} of shared memory; use device memory instead"
        )
    body = Renderer(bound.kernel, geometry).text()
    digest = hashlib.sha256(body.encode()).hexdigest()[:20]
    symbol = f"flame_{re.sub(r'[^0-9A-Za-z_]', '_', bound.kernel.name)}_{digest}"
    blocks = grid_of(geometry, bound)
    return KernelLaunch(
        body.replace("@SYMBOL", symbol),
        symbol,
        (blocks, 1, 1),
        (geometry.block, 1, 1),
        shared=0,
        scratch=0 if geometry.shared else private * blocks,
    )


class Renderer(ValueWriter):
    """Writes one kernel; see `render`."""

    def __init__(self, kernel: Kernel, geometry: Geometry) -> None:
        everything = [kernel.body, *walk(kernel.body.body)]
        for statement in everything:
            operands(statement)  # raises for what has no form on a GPU
        written = {b for s in everything for b in writes_of(s)}
        super().__init__(kernel, written, wide=geometry.wide)
        self.geometry, self.team = geometry, geometry.team
        self.folds = Folds(geometry, self.helpers)
        self.barriers = barriers(kernel, folds=self.team > WARP) if self.team > 1 else set()
        self.in_vector = False
        self.packed: dict[Target, str] = {}  # the packs that targets are collected in

    def text(self) -> str:
        """All of the text; ``@SYMBOL`` stands for the kernel's name."""
        teams, index = self.geometry.teams, self.index_type
        first = f"({index})blockIdx.x"
        if teams > 1:
            first = f"{first} * {teams} + threadIdx.x / {self.team}"
        step = f"({index})gridDim.x" + (f" * {teams}" if teams > 1 else "")
        self._loop("p", first, "end", step, self.kernel.body.body)
        return frame(self.kernel, self.geometry, self.written, self, self.scopes[0].lines)

    # --- statements -------------------------------------------------------------------------------

    def statements(self, body: Iterable[Statement]) -> None:
        for statement in body:
            if statement in self.barriers:
                self.emit("__syncthreads();" if self.team > WARP else "__syncwarp(mates);")
            match statement:
                case Loop(kind=LoopKind.VECTOR):
                    self._vector_loop(statement)
                case Loop(var, extent, _, inner):
                    self._loop(var, "0", self.named(extent), "1", inner)
                case Declare(register, value):
                    text = instructions.bare(self.data(value, self.level_here))
                    self.registers[register] = register.name
                    self.emit(f"{instructions.C_TYPE[register.dtype]} {register.name} = {text};")
                    self.set_register(register)
                case Assign(register, value):
                    text = instructions.bare(self.data(value, self.level_here))
                    self._assign(register, text)
                case Accumulate(register, combine, value):
                    text = self.data(value, self.level_here)
                    name = self.registers[register]
                    self._assign(register, self.folds.combined(combine, register.dtype, name, text))
                case Store():
                    self._store(statement)
                case If():
                    self._if(statement)
                case Transpose():
                    self._transpose(statement)
                case Gemm() | SplitProduct():
                    raise CompileError(f"kernel {self.kernel.name}: a call of a CPU library")

    def _assign(self, register: Register, text: str) -> None:
        self.emit(f"{self.registers[register]} = {text};")
        self.set_register(register)

    def block(self, head: str, scope: Scope, around: Callable[[list[str]], list[str]]) -> None:
        """Close ``scope``: what it hoisted, then its lines inside of ``head { ... }``."""
        inner = [f"  {line}" for line in around(scope.lines)]
        self.scopes[-1].lines += [*scope.before, f"{head} {{", *inner, "}"]

    def _loop(
        self, var: str, begin: str, end: str, step: str, body: tuple[Statement, ...],
        *, lead: str = "",
    ) -> None:  # fmt: skip
        """Count ``var`` from begin to end. lead: the head of the loop, where it is another."""
        self._inside(Scope(var=var), body, lead or self._head(var, begin, end, step))

    def _head(self, var: str, begin: str, end: str, step: str) -> str:
        count = f"++{var}" if step == "1" else f"{var} += {step}"
        return f"for ({self.index_type} {var} = {begin}; {var} < {end}; {count})"

    def _inside(
        self, made: Scope, body: tuple[Statement, ...], head: str,
        around: Callable[[list[str]], list[str]] = lambda lines: lines,
        known: dict[values.Value, str] | None = None,
    ) -> None:  # fmt: skip
        changed = carried(body)
        with self.scope(made) as scope:
            for register in changed:
                self.set_register(register)
            self.forget_loads(self.written)
            scope.known.update(known or {})
            self.statements(body)
        self.block(head, scope, around)
        for register in changed:
            self.set_register(register)
        self.forget_loads(self.written)

    def _if(self, statement: If) -> None:
        condition = instructions.bare(self.value(statement.condition))
        self._inside(Scope(guards=True), statement.body, f"if ({condition})")

    # --- vector loops -----------------------------------------------------------------------------

    def _vector_loop(self, loop: Loop) -> None:
        if self.in_vector:
            raise CompileError(f"kernel {self.kernel.name}: nested vector loops")
        extent = self.named(loop.extent)
        parts = self._open_parts(loop)
        outer = {register: self.registers[register] for register in parts}
        self.registers.update({r: f"{r.name}_part" for r in parts})
        self.in_vector = True
        lane = "lane" if self.team > 1 else "0"
        packs = packs_of(loop) if self.team >= WARP else None
        if packs is not None:
            lane = self._packed_loop(loop, packs, extent)
        self._loop(loop.var, lane, extent, str(self.team), loop.body)
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

    def _packed_loop(self, loop: Loop, packs: Packs, extent: str) -> str:
        """The part of a loop that moves packs, where memory is aligned; returns where the rest
        begins."""
        index, width, number = self.index_type, packs.width, self.fresh("")
        starts = {place: self._address(*place) for place in packs.places()}
        aligned, begin, pack = f"aligned{number}", f"begin{number}", f"k{number}"
        self.emit(f"const bool {aligned} = {_alignment(starts, width)};")
        whole = f"{aligned} ? {extent} / {width} * {width} : 0"
        self.emit(f"const {index} {begin} = {whole};")
        loads, stores, known = [], [], {}
        for value, rest in packs.loads.items():
            name, type_ = f"{value.attr.name}_{self.fresh('pack')}", self._pack(value.attr, width)
            place = f"{starts[value.attr, rest]} + {pack}"
            loads.append(f"const {type_} {name} = *(const {type_}*)({place});")
            known[value] = instructions.from_memory(f"{name}.item[j]", value.dtype)
        opened = []
        for target, rest in packs.stores.items():
            name = f"{target.buffer.name}_{self.fresh('pack')}"
            type_ = self._pack(target.buffer, width)
            opened.append(f"{type_} {name};")
            stores.append(f"*({type_}*)({starts[target.buffer, rest]} + {pack}) = {name};")
            self.packed[target] = f"{name}.item[j]"

        def around(lines: list[str]) -> list[str]:
            inner = [f"  {line}" for line in lines]
            if any(re.search(rf"\b{loop.var}\b", line) for line in lines):
                inner.insert(0, f"  const {index} {loop.var} = {pack} + j;")
            each = ["#pragma unroll", f"for (int j = 0; j < {width}; ++j) {{", *inner, "}"]
            return [*loads, *opened, *each, *stores]

        head = self._head(pack, f"lane * {width}", begin, str(self.team * width))
        self._inside(Scope(var=loop.var), loop.body, head, around, known)
        self.packed.clear()
        return f"{begin} + lane"

    def _pack(self, buffer: Buffer, width: int) -> str:
        return f"{self.helpers.pack()}<{instructions.memory_type(buffer.dtype)}, {width}>"

    def _address(self, buffer: Buffer, offset: values.Value) -> str:
        if values.is_const(offset, 0):
            return buffer.name
        return f"{buffer.name} + {self.value(offset)}"

    # --- memory -----------------------------------------------------------------------------------

    def _store(self, statement: Store) -> None:
        lines = []
        for target in statement.targets:
            value = instructions.bare(self.data(target.value, self.level_here))
            if target in self.packed:
                lines.append(f"{self.packed[target]} = {value};")
                continue
            conditions = [] if self.in_vector or self.team == 1 else ["lane == 0"]
            if target.where is not None:
                conditions.append(self.value(target.where))
            guard = " && ".join(conditions)
            place = instructions.bare(self.value(target.index))
            guard = f"if ({instructions.bare(guard) if len(conditions) == 1 else guard}) "
            write = f"{target.buffer.name}[{place}] = {value};"
            lines.append(guard + write if conditions else write)
        for line in lines:
            self.emit(line)
        self.forget_loads({target.buffer for target in statement.targets})

    def _transpose(self, t: Transpose) -> None:
        """Element by element, neighbours of the source by neighbouring threads."""
        if self.in_vector:
            raise CompileError(f"kernel {self.kernel.name}: a transpose in a vector loop")
        rows, columns = self.named(t.rows), self.named(t.columns)
        source, target = (
            (m.buffer.name, self.named(m.offset), self.named(m.row_stride))
            for m in (t.source, t.target)
        )
        at, lane = self.fresh("e"), "lane" if self.team > 1 else "0"
        head = self._head(at, lane, f"{rows} * {columns}", str(self.team))
        row, column = f"{at} / {columns}", f"{at} % {columns}"
        read = f"{source[0]}[{source[1]} + {row} * {source[2]} + {column}]"
        write = f"{target[0]}[{target[1]} + {column} * {target[2]} + {row}]"
        self.emit(f"{head} {{")
        self.emit(f"  {write} = {read};")
        self.emit("}")
        self.forget_loads({t.target.buffer})


def _alignment(starts: dict[tuple[Buffer, values.Value], str], width: int) -> str:
    """Whether packs may be moved at all of these addresses."""
    by_size: dict[int, list[str]] = {}
    for (buffer, _), address in starts.items():
        nbytes = item_bytes(buffer.dtype) * width
        whole = address if address.isidentifier() else f"({address})"
        by_size.setdefault(nbytes, []).append(f"(unsigned long long){whole}")
    tests = []
    for nbytes, addresses in by_size.items():
        joined = " | ".join(addresses)
        tests.append(f"{f'({joined})' if len(addresses) > 1 else joined} % {nbytes} == 0")
    return " && ".join(tests)
