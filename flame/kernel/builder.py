"""KernelBuilder: writes a kernel as nested ``with`` blocks, and binds it to the sizes at hand.

Invariant: strides of 0 and 1 and extents of 1 stand in the kernel's text, every other size is a
parameter. So equal texts serve tensors of all sizes, and the text alone is the key of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import CompileError
from flame.core.types import TensorType
from flame.kernel import values
from flame.kernel.library import Problem
from flame.kernel.program import (
    Accumulate,
    Assign,
    Declare,
    Gemm,
    If,
    Kernel,
    Loop,
    LoopKind,
    Matrix,
    SplitProduct,
    Statement,
    Store,
    Target,
    Transpose,
)
from flame.kernel.values import Buffer, Number, Register, Value, const

Role = Literal["input", "output", "temporary", "error", "constant"]
PARALLEL_WORK = 32768  # elementary steps below which a chunk is not worth a thread


@dataclass(frozen=True)
class Ref:
    """Which operand of the operation stands behind an operand of the kernel."""

    role: Role
    position: int


@dataclass(frozen=True, eq=False)
class BoundKernel:
    """A kernel with the sizes of one call: ``extent`` iterations in chunks of ``grain``."""

    kernel: Kernel
    operands: tuple[Ref, ...]
    sizes: tuple[int, ...]
    extent: int
    grain: int

    def over(self, places: Mapping[Ref, Ref]) -> BoundKernel:
        """The kernel on other operands: ``places`` says which, where they differ."""
        return replace(self, operands=tuple(places.get(r, r) for r in self.operands))


@dataclass(frozen=True, eq=False)
class BoundSource:
    """A hand-written CUDA kernel with the launch of one call.

    text: CUDA C++ (from `flame.kernels`, with its constants defined in front), symbol: the
    ``extern "C"`` kernel. operands: pointers, and numbers of the call, which arrive as pointers to
    int64 or float64 on the device; then ``sizes`` as int64 values. A Ref of an operand left out is
    a null pointer. shared: bytes of dynamic shared memory.
    """

    name: str
    text: str
    symbol: str
    operands: tuple[Ref, ...]
    sizes: tuple[int, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int = 0
    extent: int = 1  # 0: nothing to do


@dataclass(frozen=True, eq=False)
class BoundCall:
    """A call of a vendor's library; operands in the problem's order, None for one left out."""

    problem: Problem
    operands: tuple[Ref | None, ...]
    extent: int = 1

    @property
    def name(self) -> str:
        return type(self.problem).__name__.removesuffix("Problem").lower()


@dataclass(frozen=True, eq=False)
class BoundFill:
    """Sets all bytes of one operand."""

    operands: tuple[Ref, ...]
    nbytes: int
    byte: int = 0
    extent: int = 1
    name: str = "fill"


Bound = BoundKernel | BoundSource | BoundCall | BoundFill


@dataclass(frozen=True, eq=False)
class Lowering:
    """What one operation does: kernels in order, over temporaries of the given bytes.

    ``calls`` instead of kernels: what a GPU does, generated kernels among other things.
    ``host`` instead of kernels: a function of a CPU library that takes the operands as NumPy arrays
    (numbers as they are) and fills the outputs, for what loops do badly, as sorting.
    ``constants``: tables that kernels read, contiguous NumPy arrays.
    """

    kernels: tuple[BoundKernel, ...]
    temporaries: tuple[int, ...] = ()
    host: Callable[[Sequence[Any], Sequence[Any]], None] | None = None
    constants: tuple[Any, ...] = ()
    calls: tuple[Bound, ...] = ()

    @property
    def steps(self) -> tuple[Bound, ...]:
        """All that runs, in order."""
        return self.calls or self.kernels


class Operand:
    """A strided tensor in a kernel: ``operand[i, j]`` loads, `KernelBuilder.store` writes."""

    def __init__(self, buffer: Buffer, shape: tuple[int, ...], strides: tuple[Value, ...]) -> None:
        self.buffer, self.shape, self.strides = buffer, shape, strides
        self.dtype = buffer.dtype

    def at(self, index: Sequence[Value]) -> Value:
        """The offset of an element."""
        if len(index) != len(self.strides):
            raise CompileError(
                f"{self.buffer.name} has {len(self.strides)} dimensions, indexed with {len(index)}"
            )
        offset = const(0)
        for i, stride in zip(index, self.strides, strict=True):
            offset = offset + i * stride
        return offset

    def load(
        self, *index: Value, where: Value | None = None, otherwise: Value | None = None
    ) -> Value:
        return values.load(self.buffer, self.at(index), where, otherwise)

    def __getitem__(self, index: tuple[Value, ...] | Value) -> Value:
        return self.load(*(index if isinstance(index, tuple) else (index,)))

    def matrix(self, *index: Value, transposed: bool = False) -> Matrix:
        """The matrix of the last two dimensions whose first element is at ``index``.

        ``transposed``: its columns, not its rows, are contiguous in memory.
        """
        row = self.strides[-1] if transposed else self.strides[-2]
        return Matrix(self.buffer, self.at(index), row, transposed)


class KernelBuilder:
    """Collects statements; `finish` gives the Lowering of a one-kernel operation."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._operands: list[Buffer | Value] = []
        self._refs: list[Ref] = []
        self._scratch: list[tuple[Buffer, int]] = []
        self._local: list[tuple[Buffer, int]] = []
        self._size_params: list[Value] = []
        self._size_numbers: list[int] = []
        self._blocks: list[list[Statement]] = [[]]
        self._counter = 0
        self._extent = self._grain = -1
        self._parallel: Loop | None = None

    # --- operands ---------------------------------------------------------------------------------

    def tensor(self, role: Role, position: int, type_: TensorType) -> Operand:
        """An operand tensor. Dimensions of size 1 get stride 0, as their index is always 0."""
        name = f"{role[:3]}{position}"
        buffer = Buffer(name, type_.dtype, written=role not in ("input", "constant"))
        self._operands.append(buffer)
        self._refs.append(Ref(role, position))
        strides = tuple(
            const(0) if size == 1 else self.stride(stride)
            for size, stride in zip(type_.shape, type_.strides, strict=True)
        )
        return Operand(buffer, type_.shape, strides)

    def number(self, position: int, kind: type) -> Value:
        """A Python number operand: int64 for bool and int, float64 for float."""
        dtype = dtypes.float64 if kind is float else dtypes.int64
        value = values.param(f"num{position}", dtype)
        self._operands.append(value)
        self._refs.append(Ref("input", position))
        return value

    def scratch(self, dtype: DType, shape: tuple[int, ...]) -> Operand:
        """Row-major memory private to a worker; its sizes stand in the text."""
        return self._private("scratch", self._scratch, dtype, shape)

    def local(self, dtype: DType, shape: tuple[int, ...]) -> Operand:
        """As `scratch`, on the thread's stack: for a few KiB, which no caller has to provide."""
        return self._private("local", self._local, dtype, shape)

    def _private(
        self, name: str, kept: list[tuple[Buffer, int]], dtype: DType, shape: tuple[int, ...]
    ) -> Operand:
        count = 1
        strides: list[Value] = []
        for size in reversed(shape):
            strides.insert(0, const(count))
            count *= size
        buffer = Buffer(f"{name}{len(kept)}", dtype, written=True)
        kept.append((buffer, count))
        return Operand(buffer, shape, tuple(strides))

    def size(self, number: int) -> Value:
        """A size known at the call: a parameter, unless it is 0 or 1."""
        if number in (0, 1):
            return const(number)
        value = values.param(f"n{len(self._size_params)}")
        self._size_params.append(value)
        self._size_numbers.append(number)
        return value

    stride = size

    # --- statements -------------------------------------------------------------------------------

    def _emit(self, statement: Statement) -> None:
        self._blocks[-1].append(statement)

    def _name(self, prefix: str) -> str:
        self._counter += 1
        return f"{prefix}{self._counter}"

    @contextmanager
    def parallel(self, *extents: int, work: int = 1) -> Iterator[tuple[Value, ...]]:
        """The outermost loop, over the product of ``extents``; ``work`` steps an iteration.

        Yields one counter for each extent.
        """
        total = 1
        for extent in extents:
            total *= extent
        self._extent = total
        self._grain = max(1, -(-PARALLEL_WORK // max(work, 1)))
        counter = values.var("p")
        counters: list[Value] = []
        rest = counter
        for extent in reversed(extents[1:]):
            step = self.size(extent)
            counters.insert(0, values.binary("urem", rest, step))
            rest = values.binary("udiv", rest, step)
        counters.insert(0, rest if extents else const(0))
        self._blocks.append([])
        yield tuple(counters)
        body = tuple(self._blocks.pop())
        self._parallel = Loop("p", values.param("end"), LoopKind.PARALLEL, body)

    @contextmanager
    def loop(
        self, extent: Value | int, kind: LoopKind = LoopKind.SERIAL, unroll: int = 1
    ) -> Iterator[Value]:
        """A serial loop (or vector, see `vector`); an int extent stands in the text."""
        extent = const(extent) if isinstance(extent, int) else extent
        if values.is_const(extent, 1):
            yield const(0)
            return
        name = self._name("i" if kind is LoopKind.SERIAL else "v")
        self._blocks.append([])
        yield values.var(name)
        self._emit(Loop(name, extent, kind, tuple(self._blocks.pop()), unroll))

    @contextmanager
    def vector(self, extent: Value | int, unroll: int = 1) -> Iterator[Value]:
        """A loop whose iterations run side by side in vectors. Only `accumulate` crosses it."""
        with self.loop(extent, LoopKind.VECTOR, unroll) as counter:
            yield counter

    @contextmanager
    def nest(self, extents: Sequence[Value | int]) -> Iterator[tuple[Value, ...]]:
        """Nested serial loops, the first one outermost."""
        if not extents:
            yield ()
            return
        with self.loop(extents[0]) as outer, self.nest(extents[1:]) as inner:
            yield (outer, *inner)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Statements that run only where ``condition`` holds, for all lanes of a vector loop."""
        self._blocks.append([])
        yield
        self._emit(If(condition, tuple(self._blocks.pop())))

    def register(self, value: Value | Number, dtype: DType | None = None) -> Register:
        """A mutable scalar, set to ``value``."""
        if not isinstance(value, Value):
            value = const(value, dtype or dtypes.float32)
        elif dtype is not None:
            value = values.cast(value, dtype)
        made = Register(self._name("r"), value.dtype)
        self._emit(Declare(made, value))
        return made

    def assign(self, register: Register, value: Value) -> None:
        self._emit(Assign(register, values.cast(value, register.dtype)))

    def accumulate(self, register: Register, combine: str, value: Value) -> None:
        self._emit(Accumulate(register, combine, values.cast(value, register.dtype)))

    def store(
        self, target: Operand, index: Sequence[Value], value: Value, where: Value | None = None
    ) -> None:
        self.store_all([(target, index, value)], where)

    def store_all(
        self,
        writes: Sequence[tuple[Operand, Sequence[Value], Value]],
        where: Value | None = None,
    ) -> None:
        """Several writes; every value is computed before the first write."""
        self._emit(
            Store(
                tuple(
                    Target(t.buffer, t.at(index), values.cast(value, t.dtype), where)
                    for t, index, value in writes
                )
            )
        )

    def gemm(
        self,
        m: Value,
        n: Value,
        k: Value,
        a: Matrix,
        b: Matrix,
        c: Matrix,
        beta: Value | None = None,
    ) -> None:
        """c = a @ b + beta * c by the vendor's library; see `Gemm`."""
        self._emit(Gemm(m, n, k, a, b, c, const(0) if beta is None else beta))

    def transpose(self, rows: Value, columns: Value, source: Matrix, target: Matrix) -> None:
        """target[j, i] = source[i, j]; both of one dtype of 4 or 8 bytes, outside vector loops."""
        if values.is_const(rows, 0) or values.is_const(columns, 0):
            return
        self._emit(Transpose(rows, columns, source, target))

    def split_product(
        self, steps: Value, a: Matrix, b: Matrix, c: Matrix, add: Value,
        opening: tuple[Value, Value], products: int,
    ) -> None:  # fmt: skip
        """A product of packed panels by the matrix unit, outside vector loops; `SplitProduct`.

        ``opening``: whether to make the unit ready before, and to release it afterwards.
        """
        self._emit(SplitProduct(steps, a, b, c, add, *opening, products))

    # --- result -----------------------------------------------------------------------------------

    def bind(self) -> BoundKernel:
        """The finished kernel with its sizes."""
        if self._parallel is None or self._blocks != [[]]:
            raise CompileError(f"kernel {self.name} needs one outermost parallel loop")
        kernel = Kernel(
            self.name,
            tuple(self._operands),
            tuple(self._scratch),
            tuple(self._size_params),
            self._parallel,
            tuple(self._local),
        )
        return BoundKernel(
            kernel, tuple(self._refs), tuple(self._size_numbers), self._extent, self._grain
        )

    def finish(self) -> Lowering:
        return Lowering((self.bind(),))
