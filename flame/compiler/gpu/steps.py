"""What a lowering asks of a GPU: as plain data, which the disk can keep, and ready to launch.

Invariant: a step depends on kernels and sizes alone; addresses are given with every launch, as one
64-bit word for each operand, so a step serves eager calls and the capture of a graph alike.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from flame.core.errors import UnsupportedError
from flame.kernel.builder import Bound, BoundCall, BoundFill, BoundKernel, Ref
from flame.kernel.library import Problem, operands_of
from flame.render.cuda import render
from flame.runtime.cuda import modules
from flame.runtime.cuda.driver import Dim, driver
from flame.runtime.cuda.memory import leave_room
from flame.runtime.storage import Storage

Refs = tuple[Ref | None, ...]


# --- plain data -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelSpec:
    """A kernel's text and launch. Arguments: operands, the address of ``scratch`` bytes of device
    memory if that is not 0, then ``sizes``. by_pointer: numbers arrive as pointers to words."""

    name: str
    operands: Refs
    text: str
    symbol: str
    grid: Dim
    block: Dim
    shared: int
    scratch: int
    sizes: tuple[int, ...]
    by_pointer: bool


@dataclass(frozen=True)
class CallSpec:
    """A call of a library."""

    name: str
    operands: Refs
    problem: Problem
    by_pointer: bool = True


@dataclass(frozen=True)
class FillSpec:
    """Bytes that are all set alike."""

    name: str
    operands: Refs
    nbytes: int
    byte: int
    by_pointer: bool = True


Spec = KernelSpec | CallSpec | FillSpec


def specs_of(lowered: Iterable[Bound], *, by_pointer: bool) -> list[Spec]:
    """Kernels and calls in order, without those that have nothing to do.

    by_pointer: whether generated kernels get numbers of the call as pointers to their words; others
    always do.
    """
    return [_spec(bound, by_pointer=by_pointer) for bound in lowered if bound.extent]


def _spec(bound: Bound, *, by_pointer: bool) -> Spec:
    if isinstance(bound, BoundKernel):
        made = render(bound, by_pointer=by_pointer)
        return KernelSpec(
            bound.kernel.name, bound.operands, made.text, made.symbol, made.grid, made.block,
            made.shared, made.scratch, (*bound.sizes, bound.extent), by_pointer,
        )  # fmt: skip
    if isinstance(bound, BoundCall):
        return CallSpec(bound.name, bound.operands, bound.problem)
    if isinstance(bound, BoundFill):
        return FillSpec(bound.name, bound.operands, bound.nbytes, bound.byte)
    return KernelSpec(
        bound.name, bound.operands, bound.text, bound.symbol, bound.grid, bound.block,
        bound.shared, 0, bound.sizes, by_pointer=True,
    )  # fmt: skip


# --- ready to launch ------------------------------------------------------------------------------


class GpuStep(Protocol):
    """One launch. ``name``: for reports; ``scratch``: bytes of device memory it needs while it
    runs; ``text``: its CUDA C++, empty for a library call."""

    name: str
    scratch: int
    text: str

    def enqueue(self, words: Sequence[int], scratch: int, stream: int) -> None:
        """Queue it: a word (pointer or number; 0 for what is left out) for each operand, and the
        address of scratch."""


class KernelStep:
    """A kernel on a device."""

    def __init__(self, spec: KernelSpec, function: int) -> None:
        self.name, self.text, self.scratch = spec.name, spec.text, spec.scratch
        self._count = len(spec.operands)
        tail = [*([0] if spec.scratch else []), *spec.sizes]
        words: Any = (ctypes.c_int64 * max(self._count + len(tail), 1))()
        words[self._count : self._count + len(tail)] = tail
        base = ctypes.addressof(words)
        self._words = words
        self._addresses = (ctypes.c_void_p * len(words))(*[base + 8 * i for i in range(len(words))])
        self._arguments = ctypes.addressof(self._addresses)
        self._launch = driver().launch
        self._fixed = (function, spec.grid, spec.block, spec.shared)
        self._lock = threading.Lock()  # the words are read when the launch returns

    def enqueue(self, words: Sequence[int], scratch: int, stream: int) -> None:
        with self._lock:
            count = self._count
            self._words[:count] = words
            if self.scratch:
                self._words[count] = scratch
            self._launch(*self._fixed, stream, self._arguments)


class CallStep:
    """A library's plan on a device."""

    text = ""

    def __init__(self, spec: CallSpec, device: int) -> None:
        leave_room(device)  # for kernels that are tried out
        prepared = driver().prepare(spec.problem, device)
        if prepared is None:
            raise UnsupportedError(
                f"no library takes this {spec.name} on a GPU, and it has no kernel of its own: "
                f"{spec.problem}"
            )
        self.name, self.scratch = prepared.name, prepared.workspace
        self._prepared, self._device = prepared, device
        self._enqueue: Callable[[Sequence[int], int, int], None] = self._first
        self._mask: int = getattr(prepared, "alignment", 1) - 1
        self._operands = operands_of(spec.problem) if self._mask else ()

    def misplaced(self, words: Sequence[int]) -> list[tuple[int, int, bool]]:
        """(number, bytes, whether it is written) of dense operands whose address does not suit the
        library."""
        return [
            (i, type_.span * type_.dtype.itemsize, written)
            for i, (type_, written) in enumerate(self._operands)
            if type_ is not None and words[i] & self._mask and (type_.dense or not written)
        ]

    def enqueue(self, words: Sequence[int], scratch: int, stream: int) -> None:
        self._enqueue(words, scratch, stream)

    def _first(self, words: Sequence[int], scratch: int, stream: int) -> None:
        """The first call loads kernels."""
        leave_room(self._device)
        self._enqueue = self._prepared.enqueue
        self._enqueue(words, scratch, stream)


class Realigned:
    """A library's call with operands that do not lie at addresses that it takes: copied to memory
    of its own before, results copied out of it afterwards."""

    text = ""

    def __init__(self, step: CallStep, words: Sequence[int], device: str) -> None:
        self.step, self.name, self.scratch = step, step.name, step.scratch
        self._moved = [
            (i, Storage.allocate(nbytes, device), written)
            for i, nbytes, written in step.misplaced(words)
        ]
        self._copy = driver().copy_on_device

    def enqueue(self, words: Sequence[int], scratch: int, stream: int) -> None:
        placed = list(words)
        for i, storage, written in self._moved:
            if not written:
                self._copy(storage.pointer, words[i], storage.nbytes, stream)
            placed[i] = storage.pointer
        self.step.enqueue(placed, scratch, stream)
        for i, storage, written in self._moved:
            if written:
                self._copy(words[i], storage.pointer, storage.nbytes, stream)


def placed(step: GpuStep, words: Sequence[int], device: str) -> GpuStep:
    """The step, such that it takes these addresses."""
    if isinstance(step, CallStep) and step.misplaced(words):
        return Realigned(step, words, device)
    return step


class FillStep:
    """Sets bytes."""

    text = ""
    scratch = 0

    def __init__(self, spec: FillSpec) -> None:
        self.name = spec.name
        self._byte, self._nbytes = spec.byte, spec.nbytes
        self._fill = driver().fill

    def enqueue(self, words: Sequence[int], scratch: int, stream: int) -> None:
        self._fill(words[0], self._byte, self._nbytes, stream)


def load(specs: Sequence[Spec], device: int) -> list[GpuStep]:
    """Steps on a device. Kernels that neither cache has are compiled together, while libraries
    make their plans and try them."""
    kernels = [(s.text, s.symbol, s.shared) for s in specs if isinstance(s, KernelSpec)]
    calls = [s for s in specs if isinstance(s, CallSpec)]
    if kernels and calls:
        with ThreadPoolExecutor(1, "flame-kernels") as aside:
            wait = modules.meanwhile(aside, modules.compile_many, device, kernels)
            prepared = [CallStep(spec, device) for spec in calls]
            wait()
    else:
        prepared = [CallStep(spec, device) for spec in calls]
    functions, made = iter(modules.load_many(device, kernels)), iter(prepared)

    def step(spec: Spec) -> GpuStep:
        if isinstance(spec, KernelSpec):
            return KernelStep(spec, next(functions))
        return next(made) if isinstance(spec, CallSpec) else FillStep(spec)

    return [step(spec) for spec in specs]
