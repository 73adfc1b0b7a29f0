"""Matrix products by cuBLASLt: a plan for a `MatmulProblem`, and its launch.

Invariant: a plan holds no address of an operand but those that its descriptor has to carry (bias,
aux), which every call sets under the plan's lock; so plans are shared by streams and threads.

Several algorithms can solve a problem, and the heuristic's first is often not the fastest: by up
to a fifth on an H200. A problem with enough work times them once, on operands of its own, and the
choice is kept on disk. FLAME_CUDA_TUNE=0 takes the first, and so does a wish for deterministic
algorithms, as a choice by time may differ between two machines.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flame.core.determinism import are_deterministic_algorithms_enabled
from flame.core.dtypes import DType, bfloat16, float16, float32, float64
from flame.core.errors import CublasError, DeviceError, OutOfMemoryError
from flame.kernel.library import MatmulProblem
from flame.runtime.cuda.libraries import device as gpu
from flame.runtime.cuda.libraries.matmul_layout import (
    NEEDS_AUX,
    NEEDS_BIAS,
    Description,
    Layout,
    describe,
)
from flame.runtime.cuda.libraries.store import Store

WORKSPACE_LIMIT = 64 << 20
CANDIDATES = 8
SMALL_SECONDS = 20e-6  # below it, what timing could win is less than a launch costs

# cudaDataType of library_types.h.
DATA_TYPES = {float32: 0, float64: 1, float16: 2, bfloat16: 14}
COMPUTE = {
    "highest": "COMPUTE_32F",
    "high": "COMPUTE_32F_FAST_TF32",
    "medium": "COMPUTE_32F_FAST_16BF",
}
EPILOGUES = {
    "none": "DEFAULT",
    "bias": "BIAS",
    "relu_bias": "RELU_BIAS",
    "gelu_bias": "GELU_BIAS",
    "gelu_aux_bias": "GELU_AUX_BIAS",
    "dgelu": "DGELU",
}
# Rough rates of an H100, for a guess at how long a product takes: FLOP/s, and bytes/s.
_RATES = {float64: 50e12, float32: 45e12, float16: 600e12, bfloat16: 600e12}
_BANDWIDTH = 3e12


class Library:
    """cuBLASLt on one device: its handle, and the calls that take numbers by address."""

    def __init__(self, device: int) -> None:
        gpu.load_library("cudart")
        gpu.load_library("cublasLt")
        try:
            from nvmath.bindings import cublas, cublasLt
        except ImportError as error:
            raise DeviceError(
                f"matrix products need the package nvmath-python ({error}): {gpu.INSTALL}"
            ) from error
        self.lt: Any = cublasLt
        self.compute_types: Any = cublas.ComputeType
        self.device = device
        with gpu.on_device(device):
            self.device_name = gpu.device_name(device)
            self.handle = self.call("create")
        self.version = int(self.call("get_version"))

    def call(self, name: str, *arguments: Any) -> Any:
        """A call of the library. Raises CublasError with the status."""
        try:
            return getattr(self.lt, name)(*arguments)
        except self.lt.cuBLASLtError as error:
            raise self.failure(name, error) from error

    def failure(self, name: str, error: Any) -> CublasError:
        status = self.lt.get_status_name(error.status)
        return CublasError(f"cublasLt {name}: {status}")

    def set(self, kind: str, target: int, attribute: str, value: int) -> None:
        """Set an attribute of a "matmul_desc", "matrix_layout" or "matmul_preference"."""
        enums = {
            "matmul_desc": self.lt.MatmulDescAttribute,
            "matrix_layout": self.lt.MatrixLayoutAttribute,
            "matmul_preference": self.lt.MatmulPreferenceAttribute,
        }
        number = getattr(enums[kind], attribute)
        dtype = getattr(self.lt, f"get_{kind}_attribute_dtype")(number)
        held = np.array([value], dtype)
        self.call(f"{kind}_set_attribute", target, number, held.ctypes.data, held.nbytes)


class Plan:
    """Descriptor and layouts of a description, and the algorithms that solve it."""

    def __init__(self, library: Library, description: Description, limit: int) -> None:
        self.library, self.description = library, description
        double = description.dtype is float64
        compute = "COMPUTE_64F" if double else COMPUTE[description.precision]
        scale = DATA_TYPES[float64 if double else float32]
        compute_type = getattr(library.compute_types, compute)
        self.descriptor: int = library.call("matmul_desc_create", int(compute_type), scale)
        self.alpha = np.ones(1, np.float64 if double else np.float32)
        self.beta = np.full(1, int(description.accumulate), self.alpha.dtype)
        self._describe_operation()
        self.first = self._layout(description.first, description.dtype)
        self.second = self._layout(description.second, description.dtype)
        self.result = self._layout(description.result, description.result_dtype)
        self.candidates = self._search(limit)

    def _describe_operation(self) -> None:
        library, description = self.library, self.description

        def put(attribute: str, value: int) -> None:
            library.set("matmul_desc", self.descriptor, attribute, value)

        put("TRANSA", int(description.transpose_first))
        put("TRANSB", int(description.transpose_second))
        epilogue = description.epilogue
        put("EPILOGUE", int(getattr(library.lt.Epilogue, EPILOGUES[epilogue])))
        if epilogue in NEEDS_BIAS:
            put("BIAS_DATA_TYPE", DATA_TYPES[description.result_dtype])
            # The heuristic asks for some address; calls set their own.
            put("BIAS_POINTER", placeholder(self.alpha))
        if epilogue in NEEDS_AUX:
            put("EPILOGUE_AUX_POINTER", placeholder(self.alpha))
            put("EPILOGUE_AUX_LD", description.result.leading)
            if description.count > 1:
                put("EPILOGUE_AUX_BATCH_STRIDE", description.result.step)

    def _layout(self, layout: Layout, dtype: DType) -> int:
        library = self.library
        made: int = library.call(
            "matrix_layout_create", DATA_TYPES[dtype], layout.rows, layout.columns, layout.leading
        )
        if self.description.count > 1:
            library.set("matrix_layout", made, "BATCH_COUNT", self.description.count)
            library.set("matrix_layout", made, "STRIDED_BATCH_OFFSET", layout.step)
        return made

    def _search(self, limit: int) -> Any:
        """The heuristic's results, best first; none where the library has no algorithm."""
        library, description = self.library, self.description
        preference = library.call("matmul_preference_create")
        try:
            library.set("matmul_preference", preference, "MAX_WORKSPACE_BYTES", limit)
            factor = max(description.alignment, description.dtype.itemsize)
            result = max(description.alignment, description.result_dtype.itemsize)
            for operand, bytes_ in (("A", factor), ("B", factor), ("C", result), ("D", result)):
                attribute = f"MIN_ALIGNMENT_{operand}_BYTES"
                library.set("matmul_preference", preference, attribute, bytes_)
            found: Any = np.zeros(CANDIDATES, library.lt.matmul_heuristic_result_dtype)
            count = np.zeros(1, np.int32)
            try:
                library.lt.matmul_algo_get_heuristic(
                    library.handle,
                    self.descriptor,
                    self.first,
                    self.second,
                    self.result,
                    self.result,
                    preference,
                    CANDIDATES,
                    found.ctypes.data,
                    count.ctypes.data,
                )
            except library.lt.cuBLASLtError as error:
                # An epilogue that does not go with the dtypes is called an invalid value.
                refusals = ["CUBLAS_STATUS_NOT_SUPPORTED"]
                if description.epilogue != "none":
                    refusals.append("CUBLAS_STATUS_INVALID_VALUE")
                if library.lt.get_status_name(error.status) in refusals:
                    return found[:0]
                raise library.failure("matmul_algo_get_heuristic", error) from error
        finally:
            library.call("matmul_preference_destroy", preference)
        usable = found[: int(count[0])]
        return usable[usable["state"] == 0]

    def check(self, packed: bytes) -> Any:
        """An algorithm from the disk as this library's result; None where it is refused."""
        library = self.library
        known: Any = np.zeros(1, library.lt.matmul_heuristic_result_dtype)
        if len(packed) != known.nbytes:
            return None
        known[:] = np.frombuffer(packed, known.dtype)
        checked: Any = np.zeros(1, known.dtype)
        try:
            library.lt.matmul_algo_check(
                library.handle,
                self.descriptor,
                self.first,
                self.second,
                self.result,
                self.result,
                known.ctypes.data,
                checked.ctypes.data,
            )
        except library.lt.cuBLASLtError:
            return None
        if int(checked["state"][0]) or int(checked["workspace_size"][0]) > WORKSPACE_LIMIT:
            return None
        known["workspace_size"] = checked["workspace_size"]
        return known


def placeholder(held: Any) -> int:
    """Some address aligned to 16 bytes that is not 0."""
    return (int(held.ctypes.data) + 15) & ~15


class Call:
    """A plan with one algorithm, ready to be queued."""

    def __init__(self, plan: Plan, algorithm: Any) -> None:
        library, description = plan.library, plan.description
        self.plan = plan
        self.algorithm = np.array(algorithm).reshape(1)  # its own memory, one element
        self.workspace = int(self.algorithm["workspace_size"][0])
        factor, result = description.dtype.itemsize, description.result_dtype.itemsize
        self._offsets = tuple(
            (a * factor, b * factor, d * result) for a, b, d in description.offsets
        )
        self.run = self._runner()
        self._set = library.lt.matmul_desc_set_attribute
        self._lock = threading.Lock()
        self._number = np.zeros(1, np.int64)
        self._address = self._number.ctypes.data
        attributes = library.lt.MatmulDescAttribute
        self._bias_attribute = int(attributes.BIAS_POINTER)
        self._aux_attribute = int(attributes.EPILOGUE_AUX_POINTER)
        self._bias_set = self._aux_set = -1

    def _runner(self) -> Callable[[int, int, int, int, int], None]:
        """One call of the library with pointers a, b, d, of the workspace, and the stream; raises
        the library's own error. A closure: attributes looked up would cost as much again."""
        plan, library = self.plan, self.plan.library
        matmul, handle, descriptor = library.lt.matmul, library.handle, plan.descriptor
        alpha, beta = plan.alpha.ctypes.data, plan.beta.ctypes.data
        of_first, of_second, result = plan.first, plan.second, plan.result
        algorithm, room = self.algorithm.ctypes.data, self.workspace

        def rows(a: int, b: int, d: int, workspace: int, stream: int) -> None:
            matmul(
                handle, descriptor, alpha, b, of_first, a, of_second, beta, d, result, d, result,
                algorithm, workspace, room, stream,
            )  # fmt: skip

        def columns(a: int, b: int, d: int, workspace: int, stream: int) -> None:
            matmul(
                handle, descriptor, alpha, a, of_first, b, of_second, beta, d, result, d, result,
                algorithm, workspace, room, stream,
            )  # fmt: skip

        return rows if plan.description.swapped else columns

    def run_all(self, pointers: Sequence[int], workspace: int, stream: int) -> None:
        """All calls of the problem, with bias and aux. Raises the library's own error."""
        a, b, d = pointers[0], pointers[1], pointers[2]
        epilogue = self.plan.description.epilogue
        if epilogue == "none":
            for of_a, of_b, of_d in self._offsets:
                self.run(a + of_a, b + of_b, d + of_d, workspace, stream)
            return
        bias = pointers[3] if epilogue in NEEDS_BIAS else 0
        aux = pointers[-1] if epilogue in NEEDS_AUX else 0
        with self._lock:
            if bias and bias != self._bias_set:
                self._put(self._bias_attribute, bias)
                self._bias_set = bias
            for of_a, of_b, of_d in self._offsets:
                if aux and aux + of_d != self._aux_set:
                    self._put(self._aux_attribute, aux + of_d)
                    self._aux_set = aux + of_d
                self.run(a + of_a, b + of_b, d + of_d, workspace, stream)

    def _put(self, attribute: int, pointer: int) -> None:
        self._number[0] = pointer
        self._set(self.plan.descriptor, attribute, self._address, 8)


class Matmul:
    """`Prepared` of a matrix product."""

    def __init__(self, problem: MatmulProblem, call: Call) -> None:
        description = call.plan.description
        self.problem, self._call, self._library = problem, call, call.plan.library
        self._unaligned: Call | None = None
        self._lock = threading.Lock()
        self._mask = description.alignment - 1
        self._run, self._failed = call.run, call.plan.library.lt.cuBLASLtError
        self._plain = (
            description.epilogue == "none"
            and len(description.offsets) == 1
            and not description.empty_sum
        )
        self._zeros = zeros_bytes(description)
        self.workspace = call.workspace + sum(self._zeros)
        self.name = (
            f"cublasLt {problem.dtype.name} {problem.m}x{problem.n}x{problem.k} {problem.epilogue}"
        )

    def enqueue(self, pointers: Sequence[int], workspace: int, stream: int) -> None:
        """See `Prepared`. ``workspace`` is aligned to 256 bytes. Raises CublasError."""
        a, b, d = pointers[0], pointers[1], pointers[2]
        try:
            if self._plain and not (a | b | d) & self._mask:
                self._run(a, b, d, workspace, stream)
            else:
                self._enqueue(pointers, workspace, stream)
        except self._failed as error:
            failure = self._library.failure("matmul", error)
            raise CublasError(f"{failure}, of {self.problem}") from error

    def _enqueue(self, pointers: Sequence[int], workspace: int, stream: int) -> None:
        if self._call.plan.description.empty_sum:
            of_a, of_b = self._zeros
            gpu.checked("cuMemsetD8Async", workspace, 0, of_a + of_b, stream)
            pointers = (workspace, workspace + of_a, *pointers[2:])
            workspace += of_a + of_b
        bits = 0
        for pointer in pointers:
            bits |= pointer
        call = self._call if not bits & self._mask else self._fallback()
        call.run_all(pointers, workspace, stream)

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
    tune = os.environ.get("FLAME_CUDA_TUNE", "1") != "0"
    first = plan.candidates[0]
    if not tune or are_deterministic_algorithms_enabled() or len(plan.candidates) == 1:
        return first
    if seconds(plan.description) < SMALL_SECONDS:
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
    rate = _RATES[description.dtype] * (8 if description.precision != "highest" else 1)
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
    return max(description.flops / rate, calls * nbytes / _BANDWIDTH)


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
            return lambda: call.run_all(pointers, workspace, scratch.stream)

        return _fastest(scratch, calls, runner)


def _fastest(scratch: gpu.Scratch, calls: list[Call], runner: Any) -> int:
    """Of those that run: now and then the heuristic offers what the launch refuses."""
    working = []
    for index, call in enumerate(calls):
        try:
            runner(call)()
        except call.plan.library.lt.cuBLASLtError:
            continue
        working.append(index)
    if not working:
        return 0
    return working[gpu.fastest(scratch, [runner(calls[index]) for index in working])]


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
