"""What a lowering asks of a GPU, made ready to launch.

Invariant: a step depends on kernels and sizes alone; addresses are given with every launch, as one
64-bit word for each operand, so a step serves eager calls and the capture of a graph alike.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from flame.core.errors import CompileError, UnsupportedError
from flame.kernel.builder import Bound, BoundCall, BoundFill, BoundKernel, BoundSource, Ref
from flame.kernel.geometry import KernelLaunch
from flame.render.cuda import render
from flame.runtime.cuda import modules
from flame.runtime.cuda.driver import Dim, driver


class GpuStep(Protocol):
    """One launch. ``name``: for reports; ``scratch``: bytes of device memory it needs while it
    runs; ``text``: its CUDA C++, empty for a library call."""

    name: str
    scratch: int
    text: str
    operands: tuple[Ref | None, ...]

    def enqueue(self, words: Sequence[int], scratch: int, stream: int) -> None:
        """Queue it: a word (pointer or number; 0 for what is left out) for each operand, and the
        address of scratch."""


class KernelStep:
    """A kernel with its launch. Arguments: operands, scratch if any, sizes."""

    def __init__(
        self, name: str, text: str, function: int, operands: tuple[Ref, ...], launch: _Launch
    ) -> None:
        self.name, self.text = name, text
        self.operands: tuple[Ref | None, ...] = operands
        self.scratch: int = launch.scratch
        self._count = len(operands)
        tail: list[int] = ([0] if launch.scratch else []) + list(launch.sizes)
        self._words: Any = (ctypes.c_int64 * max(self._count + len(tail), 1))()
        self._words[self._count : self._count + len(tail)] = tail  # type: ignore[assignment]
        base = ctypes.addressof(self._words)
        self._addresses = (ctypes.c_void_p * max(len(self._words), 1))(
            *[base + 8 * i for i in range(len(self._words))]
        )
        self._arguments = ctypes.addressof(self._addresses)
        self._launch = driver().launch
        self._fixed = (function, launch.grid, launch.block, launch.shared)
        self._lock = threading.Lock()  # the words are read when the launch returns

    def enqueue(self, words: Sequence[int], scratch: int, stream: int) -> None:
        with self._lock:
            count = self._count
            self._words[:count] = words
            if self.scratch:
                self._words[count] = scratch
            self._launch(*self._fixed, stream, self._arguments)


class _Launch:
    """Grid, block and what is passed beside the operands."""

    def __init__(
        self, grid: Dim, block: Dim, shared: int, scratch: int, sizes: tuple[int, ...]
    ) -> None:
        self.grid, self.block, self.shared = grid, block, shared
        self.scratch, self.sizes = scratch, sizes


class CallStep:
    """A call of a library."""

    text = ""

    def __init__(self, bound: BoundCall, device: int) -> None:
        prepared = driver().prepare(bound.problem, device)
        if prepared is None:
            raise UnsupportedError(
                f"no library takes this {bound.name} on a GPU, and it has no kernel of its own: "
                f"{bound.problem}"
            )
        self.name, self.operands = prepared.name, bound.operands
        self.scratch = prepared.workspace
        self._enqueue = prepared.enqueue

    def enqueue(self, words: Sequence[int], scratch: int, stream: int) -> None:
        self._enqueue(words, scratch, stream)


class FillStep:
    """Sets bytes."""

    text = ""
    scratch = 0

    def __init__(self, bound: BoundFill) -> None:
        self.name = bound.name
        self.operands: tuple[Ref | None, ...] = bound.operands
        self._byte, self._nbytes = bound.byte, bound.nbytes
        self._fill = driver().fill

    def enqueue(self, words: Sequence[int], scratch: int, stream: int) -> None:
        self._fill(words[0], self._byte, self._nbytes, stream)


def steps_of(lowered: Iterable[Bound], device: int, *, by_pointer: bool) -> list[GpuStep]:
    """The steps of kernels and calls in order, compiled together where neither cache has them.

    by_pointer: whether generated kernels get numbers of the call as pointers to their words.
    """
    bounds = [b for b in lowered if b.extent]
    rendered = [
        render(b, by_pointer=by_pointer) if isinstance(b, BoundKernel) else None for b in bounds
    ]
    wanted: list[tuple[str, str, int]] = []
    for bound, launch in zip(bounds, rendered, strict=True):
        if launch is not None:
            wanted.append((launch.text, launch.symbol, launch.shared))
        elif isinstance(bound, BoundSource):
            wanted.append((bound.text, bound.symbol, bound.shared))
    functions = iter(modules.load_many(device, wanted))
    return [_step(b, launch, functions, device) for b, launch in zip(bounds, rendered, strict=True)]


def _step(bound: Bound, launch: KernelLaunch | None, functions: Any, device: int) -> GpuStep:
    if isinstance(bound, BoundKernel):
        assert launch is not None
        shape = _Launch(
            launch.grid, launch.block, launch.shared, launch.scratch, (*bound.sizes, bound.extent)
        )
        return KernelStep(bound.kernel.name, launch.text, next(functions), bound.operands, shape)
    if isinstance(bound, BoundSource):
        shape = _Launch(bound.grid, bound.block, bound.shared, 0, bound.sizes)
        return KernelStep(bound.name, bound.text, next(functions), bound.operands, shape)
    if isinstance(bound, BoundCall):
        return CallStep(bound, device)
    if isinstance(bound, BoundFill):
        return FillStep(bound)
    raise CompileError(f"a GPU cannot run {bound!r}")
