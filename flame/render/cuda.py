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
from dataclasses import replace
from functools import lru_cache

from flame.core.errors import CompileError
from flame.kernel.builder import BoundKernel
from flame.kernel.geometry import WARP, Geometry, KernelLaunch
from flame.kernel.identity import Alike
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
)
from flame.kernel.values import Register
from flame.render import cuda_instructions as instructions
from flame.render.cuda_barriers import barriers, writes_of
from flame.render.cuda_frame import frame
from flame.render.cuda_geometry import (
    SHARED_BYTES,
    geometry_of,
    grid_of,
    scratch_bytes,
    without,
)
from flame.render.cuda_held import Held, held_of
from flame.render.cuda_index import carried, operands, walk
from flame.render.cuda_rounding import OPTIONS, divides_quickly
from flame.render.cuda_values import Scope
from flame.render.cuda_vectors import VectorWriter


def render(
    bound: BoundKernel, geometry: Geometry | None = None, *, by_pointer: bool = False
) -> KernelLaunch:
    """CUDA C++ of a kernel, with the launch of the call that it is bound to.

    geometry: teams and blocks, where not the ones that the sizes suggest. by_pointer: numbers of
    the call arrive as pointers to their words on the device; for the suggested geometry. Raises
    CompileError for calls of the processor's libraries, and for kernels that break the grammar.
    """
    alike = Alike.to(bound.kernel)
    return _render(alike, bound.sizes, bound.extent, geometry, by_pointer)


@lru_cache(maxsize=1024)
def _render(
    alike: Alike, sizes: tuple[int, ...], extent: int, geometry: Geometry | None, by_pointer: bool
) -> KernelLaunch:
    if geometry is None:
        bound = BoundKernel(alike.kernel, (), sizes, extent, grain=1)
        geometry = geometry_of(bound, by_pointer=by_pointer)
    kernel, text, symbol = _text(alike, geometry)
    private = scratch_bytes(kernel) * geometry.teams
    blocks = grid_of(geometry, kernel, extent)
    return KernelLaunch(
        text,
        symbol,
        (blocks, 1, 1),
        (geometry.block, 1, 1),
        shared=0,
        scratch=0 if geometry.shared else private * blocks,
    )


@lru_cache(maxsize=1024)
def _text(alike: Alike, geometry: Geometry) -> tuple[Kernel, str, str]:
    """The kernel without what registers hold of it, its text, and its symbol."""
    held = held_of(alike.kernel) if geometry.held else None
    if held is not None and geometry.width:
        held = replace(held, width=geometry.width)
    kernel = alike.kernel if held is None else without(alike.kernel, held)
    private = scratch_bytes(kernel) * geometry.teams
    if geometry.shared and private > SHARED_BYTES:
        raise CompileError(
            f"kernel {kernel.name}: {private} bytes of scratch memory for {geometry.teams} teams "
            f"are more than the {SHARED_BYTES} of shared memory; use device memory instead"
        )
    body = Renderer(kernel, geometry, held).text()
    if divides_quickly(kernel):
        body = f"{OPTIONS}\n{body}"
    digest = hashlib.sha256(body.encode()).hexdigest()[:20]
    symbol = f"flame_{re.sub(r'[^0-9A-Za-z_]', '_', alike.kernel.name)}_{digest}"
    return kernel, body.replace("@SYMBOL", symbol), symbol


class Renderer(VectorWriter):
    """Writes one kernel; see `render`."""

    def __init__(self, kernel: Kernel, geometry: Geometry, held: Held | None = None) -> None:
        everything = [kernel.body, *walk(kernel.body.body)]
        for statement in everything:
            operands(statement)  # raises for what has no form on a GPU
        written = {b for s in everything for b in writes_of(s)}
        super().__init__(kernel, written, geometry, held)
        own = frozenset() if held is None else held.local
        self.barriers = (
            barriers(kernel, folds=self.team > WARP, own=own) if self.team > 1 else set()
        )

    def text(self) -> str:
        """All of the text; ``@SYMBOL`` stands for the kernel's name."""
        teams, index = self.geometry.teams, self.index_type
        block, blocks = ("block", "blocks") if self.geometry.items else ("blockIdx.x", "gridDim.x")
        first = f"({index}){block}"
        if teams > 1:
            first = f"{first} * {teams} + threadIdx.x / {self.team}"
        step = f"({index}){blocks}" + (f" * {teams}" if teams > 1 else "")
        self.declare_held()
        self._loop("p", first, "end", step, self.kernel.body.body)
        return frame(self.kernel, self.geometry, self.written, self, self.scopes[0].lines)

    # --- statements -------------------------------------------------------------------------------

    def statements(self, body: Iterable[Statement]) -> None:
        for statement in body:
            if statement in self.barriers:
                self.emit("__syncthreads();" if self.team > WARP else "__syncwarp(mates);")
            match statement:
                case Loop(kind=LoopKind.VECTOR):
                    self.vector_loop(statement)
                case Loop(var, extent, _, inner):
                    self._loop(var, "0", self.named(extent), "1", inner)
                case Declare(register, value):
                    self.declare(register, instructions.bare(self.data(value, self.level_here)))
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

    def block(self, head: str, scope: Scope) -> None:
        """Close ``scope``: what it hoisted, then its lines inside of ``head { ... }``."""
        inner = [f"  {line}" for line in scope.lines]
        self.scopes[-1].lines += [*scope.before, f"{head} {{", *inner, "}"]

    def _loop(self, var: str, begin: str, end: str, step: str, body: tuple[Statement, ...]) -> None:
        """Count ``var`` from begin to end."""
        self._inside(Scope(var=var), body, self._head(var, begin, end, step))

    def _head(self, var: str, begin: str, end: str, step: str) -> str:
        count = f"++{var}" if step == "1" else f"{var} += {step}"
        return f"for ({self.index_type} {var} = {begin}; {var} < {end}; {count})"

    def _inside(
        self, made: Scope, body: tuple[Statement, ...], head: str,
        write: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        changed = carried(body)
        with self.scope(made) as scope:
            for register in changed:
                self.set_register(register)
            self.forget_loads(self.written)
            if write is None:
                self.statements(body)
            else:
                write()
        self.block(head, scope)
        for register in changed:
            self.set_register(register)
        self.forget_loads(self.written)

    def _if(self, statement: If) -> None:
        condition = instructions.bare(self.value(statement.condition))
        self._inside(Scope(guards=True), statement.body, f"if ({condition})")

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
