"""Matrix products by cuBLASLt: a plan for a `MatmulProblem`, and its launch.

Invariant: a plan holds no address of an operand but those that its descriptor has to carry (bias,
aux), which every call sets under the plan's lock; so plans are shared by streams and threads.

Several algorithms can solve a problem, and the heuristic's first is often not the fastest: by up
to a fifth on an H200. A problem with enough work times them once (see `tuning`), on operands of its
own, and the choice is kept on disk.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flame.core.errors import CublasError, OutOfMemoryError
from flame.kernel.library import MatmulProblem
from flame.runtime.cuda.libraries import device as gpu
from flame.runtime.cuda.libraries import tuning
from flame.runtime.cuda.libraries.cublaslt_plan import WORKSPACE_LIMIT, Library, Plan
from flame.runtime.cuda.libraries.matmul_layout import (
    NEEDS_AUX,
    NEEDS_BIAS,
    Description,
    describe,
)
from flame.runtime.cuda.libraries.store import Store

Queue = Callable[[Sequence[int], int, int], None]


class Call:
    """A plan with one algorithm. ``queue(pointers, workspace, stream)`` queues all calls of the
    problem, and raises the library's own error."""

    def __init__(self, plan: Plan, algorithm: Any) -> None:
        self.plan = plan
        self.algorithm = np.array(algorithm).reshape(1)  # its own memory, one element
        self.workspace = int(self.algorithm["workspace_size"][0])
        self.queue = self._queue()

    def _queue(self) -> Queue:
        """A closure, as attributes looked up at every call would cost more than all else here."""
        plan, library, room = self.plan, self.plan.library, self.workspace
        matmul, handle, descriptor = library.lt.matmul, library.handle, plan.descriptor
        alpha, beta = plan.alpha.ctypes.data, plan.beta.ctypes.data
        of_first, of_second, result = plan.first, plan.second, plan.result
        algorithm = self.algorithm.ctypes.data
        at_first, at_second = (1, 0) if plan.description.swapped else (0, 1)

        def one(
            pointers: Sequence[int],
            workspace: int,
            stream: int,
            by: tuple[int, int, int] = (0, 0, 0),
        ) -> None:
            d = pointers[2] + by[2]
            matmul(
                handle, descriptor, alpha, pointers[at_first] + by[at_first], of_first,
                pointers[at_second] + by[at_second], of_second, beta, d, result, d, result,
                algorithm, workspace, room, stream,
            )  # fmt: skip

        offsets = byte_offsets(plan.description)

        def each(pointers: Sequence[int], workspace: int, stream: int) -> None:
            for by in offsets:
                one(pointers, workspace, stream, by)

        if plan.description.epilogue in NEEDS_BIAS | NEEDS_AUX:
            return self._with_pointers(one, offsets)
        return one if len(offsets) == 1 else each

    def _with_pointers(
        self, one: Callable[..., None], offsets: tuple[tuple[int, int, int], ...]
    ) -> Queue:
        """Calls whose descriptor has to carry the bias and aux at hand."""
        plan = self.plan
        put, descriptor = plan.library.lt.matmul_desc_set_attribute, plan.descriptor
        attributes = plan.library.lt.MatmulDescAttribute
        at_bias, at_aux = int(attributes.BIAS_POINTER), int(attributes.EPILOGUE_AUX_POINTER)
        biased = plan.description.epilogue in NEEDS_BIAS
        kept = plan.description.epilogue in NEEDS_AUX
        bias_set = aux_set = -1
        number = ctypes.c_int64()
        address, lock = ctypes.addressof(number), threading.Lock()

        def queue(pointers: Sequence[int], workspace: int, stream: int) -> None:
            nonlocal bias_set, aux_set
            with lock:
                if biased and pointers[3] != bias_set:
                    number.value = bias_set = pointers[3]
                    put(descriptor, at_bias, address, 8)
                for by in offsets:
                    if kept and pointers[-1] + by[2] != aux_set:
                        number.value = aux_set = pointers[-1] + by[2]
                        put(descriptor, at_aux, address, 8)
                    one(pointers, workspace, stream, by)

        return queue


def byte_offsets(description: Description) -> tuple[tuple[int, int, int], ...]:
    """The description's offsets of a, b and d in bytes."""
    factor, result = description.dtype.itemsize, description.result_dtype.itemsize
    return tuple((a * factor, b * factor, d * result) for a, b, d in description.offsets)


class Matmul:
    """`Prepared` of a matrix product."""

    def __init__(self, problem: MatmulProblem, call: Call) -> None:
        description = call.plan.description
        self.problem, self._call, self._library = problem, call, call.plan.library
        self._unaligned: Call | None = None
        self._lock = threading.Lock()
        self._mask = description.alignment - 1
        self._queue, self._failed = call.queue, call.plan.library.lt.cuBLASLtError
        self._empty_sum = description.empty_sum
        self._zeros = zeros_bytes(description)
        self.workspace = call.workspace + sum(self._zeros)
        self.name = (
            f"cublasLt {problem.dtype.name} {problem.m}x{problem.n}x{problem.k} {problem.epilogue}"
        )

    def enqueue(self, pointers: Sequence[int], workspace: int, stream: int) -> None:
        """See `Prepared`. ``workspace`` is aligned to 256 bytes. Raises CublasError."""
        bits = 0
        for pointer in pointers:
            bits |= pointer
        try:
            if bits & self._mask or self._empty_sum:
                self._enqueue(pointers, workspace, stream)
            else:
                self._queue(pointers, workspace, stream)
        except self._failed as error:
            failure = self._library.failure("matmul", error)
            raise CublasError(f"{failure}, of {self.problem}") from error

    def _enqueue(self, pointers: Sequence[int], workspace: int, stream: int) -> None:
        if self._empty_sum:
            of_a, of_b = self._zeros
            gpu.checked("cuMemsetD8Async", workspace, 0, of_a + of_b, stream)
            pointers = (workspace, workspace + of_a, *pointers[2:])
            workspace += of_a + of_b
        bits = 0
        for pointer in pointers:
            bits |= pointer
        call = self._call if not bits & self._mask else self._fallback()
        call.queue(pointers, workspace, stream)

    def _fallback(self) -> Call:
        """The plan for pointers that are aligned to their elements only."""
        with self._lock:
            if self._unaligned is None:
                description = self._call.plan.description
                least = min(description.dtype.itemsize, description.result_dtype.itemsize)
                with gpu.on_device(self._library.device):
                    loose = replace(description, alignment=least)
                    plan = Plan(self._library, loose, self._call.workspace)
                if not len(plan.candidates):
                    raise CublasError(
                        f"cublasLt has no algorithm for operands aligned to {least} bytes, of "
                        f"{self.problem}; copy them to memory aligned to {self._mask + 1} bytes"
                    )
                self._unaligned = Call(plan, plan.candidates[0])
            return self._unaligned


class Nothing:
    """`Prepared` of a product that writes nothing."""

    workspace = 0
    name = "nothing"

    def enqueue(self, pointers: Sequence[int], workspace: int, stream: int) -> None:
        """Queues nothing."""


def zeros_bytes(description: Description) -> tuple[int, int]:
    """Bytes of the workspace that stand for a and b of a product with k = 0."""
    if not description.empty_sum:
        return 0, 0
    lengths = []
    for layout in (description.first, description.second):
        count = layout.rows * layout.columns
        lengths.append(-(-count * description.dtype.itemsize // 256) * 256)
    first, second = lengths
    return (second, first) if description.swapped else (first, second)


_libraries: dict[int, Library] = {}
_lock = threading.RLock()
_store = Store()


def library(device: int) -> Library:
    """cuBLASLt on a device. Raises DeviceError where packages are missing."""
    with _lock:
        if device not in _libraries:
            _libraries[device] = Library(device)
        return _libraries[device]


def prepare(problem: MatmulProblem, device: int) -> Matmul | Nothing | None:
    """A plan; None where `describe` has no form or the library no algorithm."""
    description = describe(problem)
    if description is None:
        return None
    if description.idle:
        return Nothing()
    on = library(device)
    with _lock, gpu.on_device(device):
        plan = Plan(on, description, WORKSPACE_LIMIT)
        if not len(plan.candidates):
            return None
        return Matmul(problem, Call(plan, _choose(plan)))


def _choose(plan: Plan) -> Any:
    """The algorithm: the stored choice, else the fastest, else the heuristic's first."""
    first = plan.candidates[0]
    if len(plan.candidates) == 1 or not tuning.worth(seconds(plan.description)):
        return first
    on = plan.library
    key = f"cublasLt {on.version} {on.device_name} {plan.description}"
    stored = _store.read(key)
    if stored is not None:
        known = plan.check(stored)
        if known is not None:
            return known[0]
    try:
        chosen = plan.candidates[_time(plan)]
    except OutOfMemoryError:
        return first  # no room for operands to try with; nothing is kept, so that a later run may
    _store.write(key, chosen.tobytes())
    return chosen


def seconds(description: Description) -> float:
    """A guess at the time of a product, from its arithmetic and its memory."""
    factor, result = description.dtype.itemsize, description.result_dtype.itemsize
    nbytes = sum(
        layout.rows * layout.columns * size
        for layout, size in (
            (description.first, factor),
            (description.second, factor),
            (description.result, result),
        )
    )
    calls = description.count * len(description.offsets)
    exact = description.precision == "highest"
    return tuning.seconds(description.flops, calls * nbytes, description.dtype, exact=exact)


def _time(plan: Plan) -> int:
    """The index of the fastest candidate, on operands made for the trial."""
    description = plan.description
    with gpu.Scratch() as scratch:
        spans = operand_spans(description)
        a, b = (scratch.random(description.dtype, span) for span in spans[:2])
        pointers = [a, b, scratch.random(description.result_dtype, spans[2])]
        if description.epilogue in NEEDS_BIAS:
            pointers.append(scratch.random(description.result_dtype, description.result.rows))
        if description.epilogue in NEEDS_AUX:
            pointers.append(scratch.random(description.result_dtype, spans[2]))
        calls = [Call(plan, candidate) for candidate in plan.candidates]
        workspace = scratch.allocate(max(call.workspace for call in calls))

        def runner(call: Call) -> Callable[[], None]:
            return lambda: call.queue(pointers, workspace, scratch.stream)

        failures = (plan.library.lt.cuBLASLtError,)
        return gpu.fastest(scratch, [runner(call) for call in calls], failures)


def operand_spans(description: Description) -> tuple[int, int, int]:
    """Elements from the first to the last of a, b and d, over all calls of the problem."""
    first, second = description.first, description.second
    a, b = (second, first) if description.swapped else (first, second)
    spans = []
    for index, layout in enumerate((a, b, description.result)):
        last = max(offsets[index] for offsets in description.offsets)
        last += (description.count - 1) * layout.step
        spans.append(last + (layout.columns - 1) * layout.leading + layout.rows)
    return spans[0], spans[1], spans[2]
