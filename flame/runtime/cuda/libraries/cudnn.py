"""Convolutions and attention by cuDNN: plans for graphs, kept on disk, and their launch.

Invariants: a plan belongs to a device, not to a stream or a thread; a device has one handle, whose
stream is set under its lock where it differs from that of the call before; a plan from the disk is
used only where the library takes it back, and is made anew otherwise.

Building a plan of attention compiles at run time, up to a second; from the disk it is milliseconds.
A convolution with enough work tries the first few plans that the heuristics offer, under the same
settings as `cublaslt` (FLAME_CUDA_TUNE=0 takes the first); the choice is what is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import struct
import threading
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from flame.core.determinism import are_deterministic_algorithms_enabled
from flame.core.dtypes import DType, bfloat16, float16, float32, float64, int64
from flame.core.errors import CudnnError, DeviceError, OutOfMemoryError
from flame.core.precision import get_float32_matmul_precision
from flame.kernel.library import AttentionProblem, ConvolutionProblem
from flame.runtime.cuda.libraries import device as gpu
from flame.runtime.cuda.libraries import tuning
from flame.runtime.cuda.libraries.cudnn_graphs import (
    WIDEST,
    AttentionGraph,
    ConvolutionGraph,
    Graph,
    Tensor,
    attention_graph,
    convolution_graph,
)
from flame.runtime.cuda.libraries.store import Store
from flame.runtime.cuda.packages import INSTALL, load_library

CANDIDATES = 4  # building one may compile
DATA_TYPES = {
    float16: "HALF",
    bfloat16: "BFLOAT16",
    float32: "FLOAT",
    float64: "DOUBLE",
    int64: "INT64",
}
# Statuses by which the library says that it has no way to do something.
_REFUSALS = ("NOT_SUPPORTED", "BAD_PARAM", "No valid", "No execution plans", "No suitable")


class Refused(Exception):
    """The library does not take a graph; the text is its reason."""


class Library:
    """cuDNN on one device."""

    def __init__(self, device: int) -> None:
        load_library("cudart")
        load_library("nvrtc")
        load_library("cublasLt")
        load_library("cudnn")
        try:
            import cudnn
        except ImportError as error:
            raise DeviceError(
                "convolution and attention need the package nvidia-cudnn-frontend "
                f"({error}): {INSTALL}"
            ) from error
        self.cudnn: Any = cudnn
        self.device = device
        self.failures = (RuntimeError, ValueError, cudnn.cudnnGraphNotSupportedError)
        with gpu.on_device(device):
            self.device_name = gpu.device_name(device)
            try:
                self.handle: Any = cudnn.create_handle()
            except self.failures as error:
                raise CudnnError(f"cudnnCreate: {error}") from error
        # Before 1.28 a handle is a number, and raw calls take no index of a plan.
        self.indexed = hasattr(self.handle, "backend_handle")
        self.raw_handle: int = self.handle.backend_handle if self.indexed else self.handle
        self.lock = threading.RLock()
        self.stream: int | None = None
        self.version = f"cudnn {cudnn.backend_version()} frontend {cudnn.__version__}"

    def set_stream(self, stream: int) -> None:
        """Under the lock. Calls of the handle go to ``stream`` from now on."""
        self.cudnn.set_stream(handle=self.handle, stream=stream)
        self.stream = stream

    def data_type(self, dtype: DType) -> Any:
        return getattr(self.cudnn.data_type, DATA_TYPES[dtype])

    def new_graph(self, dtype: DType) -> Any:
        """A graph whose tensors are of ``dtype``, computed in float32, or in float64 if that is."""
        wide = self.data_type(float64 if dtype is float64 else float32)
        return self.cudnn.pygraph(
            handle=self.handle,
            io_data_type=self.data_type(dtype),
            intermediate_data_type=wide,
            compute_data_type=wide,
        )

    def tensor(self, graph: Any, tensor: Tensor) -> Any:
        return graph.tensor(
            dim=list(tensor.dims),
            stride=list(tensor.strides),
            data_type=self.data_type(tensor.dtype),
            uid=tensor.uid,
            name=f"operand{tensor.uid}",
        )

    def output(self, made: Any, tensor: Tensor) -> None:
        """Let what an operation gives be an operand of the call."""
        made.set_output(True).set_uid(tensor.uid).set_dim(list(tensor.dims))
        made.set_stride(list(tensor.strides)).set_data_type(self.data_type(tensor.dtype))


def convolution(library: Library, description: ConvolutionGraph) -> Any:
    """The library's graph of a convolution."""
    graph = library.new_graph(description.first.dtype)
    first = library.tensor(graph, description.first)
    second = library.tensor(graph, description.second)
    window = {
        "padding": list(description.padding),
        "stride": list(description.stride),
        "dilation": list(description.dilation),
    }
    if description.direction == "forward":
        made = graph.conv_fprop(image=first, weight=second, **window)
    elif description.direction == "input_gradient":
        made = graph.conv_dgrad(loss=first, filter=second, **window)
    else:
        made = graph.conv_wgrad(image=second, loss=first, **window)
    if description.bias is not None:
        made.set_dim(list(description.result.dims)).set_stride(list(description.result.strides))
        made = graph.bias(input=made, bias=library.tensor(graph, description.bias))
    library.output(made, description.result)
    return graph


def attention(library: Library, description: AttentionGraph) -> Any:
    """The library's graph of attention, or of its gradients."""
    graph = library.new_graph(description.query.dtype)
    options: dict[str, Any] = {"attn_scale": description.scale}
    if description.causal:
        options["use_causal_mask"] = True
    if description.mask is not None:
        options["bias"] = library.tensor(graph, description.mask)
    if description.random:
        seed, offset = (library.tensor(graph, tensor) for tensor in description.random)
        options["dropout"] = (description.dropout, seed, offset)
    for name, tensor in (
        ("q", description.query),
        ("k", description.key),
        ("v", description.value),
    ):
        options[name] = library.tensor(graph, tensor)
    if description.result_gradient is None:
        result, log_sum = graph.sdpa(generate_stats=True, name="attention", **options)
        library.output(result, description.result)
        library.output(log_sum, description.log_sum)
        return graph
    gradients = graph.sdpa_backward(
        o=library.tensor(graph, description.result),
        dO=library.tensor(graph, description.result_gradient),
        stats=library.tensor(graph, description.log_sum),
        use_deterministic_algorithm=description.deterministic,
        name="attention_backward",
        **options,
    )
    for made, tensor in zip(gradients, description.gradients, strict=True):
        library.output(made, tensor)
    return graph


def unwanted_notes(library: Library, description: ConvolutionGraph) -> list[Any]:
    """Numerical notes of engines that must not run: those that round more than was asked for, and
    where one set of bits is wanted, those that add up in no fixed order."""
    notes = library.cudnn.numerical_note
    unwanted = [notes.DOWN_CONVERT_INPUTS, notes.REDUCED_PRECISION_REDUCTION]
    if description.exact:
        unwanted.append(notes.TENSOR_CORE)
    if description.deterministic:
        unwanted.append(notes.NONDETERMINISTIC)
    return unwanted


class Plan:
    """A graph that the library has planned, or one taken back from bytes."""

    def __init__(self, library: Library, graph: Any, index: int | None) -> None:
        self.library, self.graph = library, graph
        self.lowered = graph._lowered_graph
        self.index = ((-1 if index is None else index),) if library.indexed else ()
        self.lowered._prepare_variant_pack_template()
        self.uids: list[int] = list(self.lowered._get_variant_pack_uids_sorted())

    @staticmethod
    def built(library: Library, description: Graph) -> tuple[Plan, int]:
        """The plan that the heuristics like best, and its workspace. Raises Refused."""
        modes = library.cudnn.heur_mode
        try:
            if isinstance(description, ConvolutionGraph):
                graph = convolution(library, description)
            else:
                graph = attention(library, description)
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([modes.A, modes.FALLBACK])
            if isinstance(description, ConvolutionGraph):
                graph.deselect_numeric_notes(unwanted_notes(library, description))
            graph.check_support()
            if isinstance(description, ConvolutionGraph) and tuning.worth(seconds(description)):
                chosen = try_plans(library, graph._lowered_graph, description)
                size = graph._lowered_graph.get_workspace_size_plan_at_index(chosen)
                return Plan(library, graph, chosen), int(size)
            graph.build_plans()
            if getattr(graph, "selected_engine", None) is not None:
                raise Refused("the front end would run a kernel of its own")
            index = None
            if library.indexed:
                index = graph.plans[graph._plan_index].cpp_index
            return Plan(library, graph, index), int(graph.get_workspace_size())
        except library.failures as error:
            refused = isinstance(error, library.cudnn.cudnnGraphNotSupportedError)
            if refused or any(word in str(error) for word in _REFUSALS):
                raise Refused(str(error)) from error
            raise CudnnError(f"cuDNN cannot plan {description}: {error}") from error

    @staticmethod
    def restored(library: Library, packed: bytes) -> tuple[Plan, int]:
        """From `serialized`. Raises Refused."""
        try:
            graph = library.cudnn.pygraph(handle=library.handle)
            graph.deserialize(library.handle, list(packed))
            plan = Plan(library, graph, None)
            return plan, int(plan.lowered.get_workspace_size())
        except library.failures as error:
            raise Refused(str(error)) from error

    def serialized(self) -> bytes:
        return bytes(self.graph.serialize())


def seconds(description: ConvolutionGraph) -> float:
    """A guess at the time of a convolution, from its arithmetic and its memory."""
    tensors = {
        "forward": (description.result, description.second),
        "input_gradient": (description.first, description.second),
        "weight_gradient": (description.first, description.result),
    }
    y, weight = tensors[description.direction]
    flops = 2 * math.prod(y.dims) * math.prod(weight.dims[1:])
    nbytes = sum(math.prod(t.dims) * t.dtype.itemsize for t in description.tensors)
    return tuning.seconds(flops, nbytes, description.first.dtype, exact=description.exact)


def try_plans(library: Library, lowered: Any, description: ConvolutionGraph) -> int:
    """The index of the fastest of the first plans that can be built; that one is the graph's own
    afterwards. Raises Refused."""
    usable: list[int] = []
    for index in range(lowered.get_execution_plan_count()):
        try:
            lowered.build_plan_at_index(index)
        except library.failures:
            continue  # deselected, or not for this device
        usable.append(index)
        if len(usable) == CANDIDATES:
            break
    if not usable:
        raise Refused("none of the plans can be built")
    chosen = usable[0]
    if len(usable) > 1:
        # Where there is no room for operands to try with, the first is taken.
        with contextlib.suppress(OutOfMemoryError):
            chosen = _time(library, lowered, description, usable)
    lowered.build_plan_at_index(chosen)
    return chosen


def _time(library: Library, lowered: Any, description: ConvolutionGraph, usable: list[int]) -> int:
    sizes = [int(lowered.get_workspace_size_plan_at_index(index)) for index in usable]
    with gpu.Scratch() as scratch:
        pointers = {t.uid: scratch.random(t.dtype, math.prod(t.dims)) for t in description.tensors}
        workspace = scratch.allocate(max(sizes))

        def runner(index: int) -> Callable[[], None]:
            handle = library.raw_handle
            return lambda: lowered._execute_plan_at_index(pointers, workspace, index, handle)

        library.set_stream(scratch.stream)
        try:
            at = gpu.fastest(scratch, [runner(index) for index in usable], library.failures)
        finally:
            library.set_stream(0)  # the stream of the trial is about to end
    return usable[at]


class GraphCall:
    """`Prepared` of a graph. Operands are aligned to `alignment` bytes, seeds and offsets to 8."""

    alignment = WIDEST

    def __init__(self, description: Graph, plan: Plan, workspace: int, name: str) -> None:
        self.description, self.workspace, self.name = description, workspace, name
        self._plan, self._library = plan, plan.library
        self._array = (ctypes.c_uint64 * len(plan.uids))()
        numbers = {tensor.uid for tensor in description.tensors if tensor.dtype is int64}
        aligned = [uid - 1 for uid in plan.uids if uid not in numbers]
        # Operands by their places, in one call each: there are always more than one.
        self._pick = itemgetter(*(uid - 1 for uid in plan.uids))
        self._pick_aligned = itemgetter(*aligned)
        self._pack = struct.Struct(f"{len(plan.uids)}Q").pack_into
        self._execute = plan.lowered._execute_with_raw_ptrs
        self._head = (ctypes.addressof(self._array), len(plan.uids))
        self._tail = (plan.library.raw_handle, *plan.index)

    def enqueue(self, pointers: Sequence[int], workspace: int, stream: int) -> None:
        """See `Prepared`. ``workspace`` is aligned to 256 bytes. Raises CudnnError."""
        bits = 0
        for pointer in self._pick_aligned(pointers):
            bits |= pointer
        if bits & (WIDEST - 1):
            addresses = ", ".join(map(hex, self._pick_aligned(pointers)))
            raise CudnnError(
                f"{self.name}: cuDNN needs operands that are aligned to {WIDEST} bytes, got "
                f"{addresses}; copy what is a view with an offset"
            )
        library = self._library
        with library.lock:
            try:
                if library.stream != stream:
                    library.set_stream(stream)
                self._pack(self._array, 0, *self._pick(pointers))
                self._execute(*self._head, workspace, *self._tail)
            except library.failures as error:
                raise CudnnError(f"{self.name}: {error}, of {self.description}") from error


_libraries: dict[int, Library] = {}
_lock = threading.RLock()
_store = Store()
refusals: dict[tuple[Graph, int], str] = {}  # why, of what the library did not take


def library(device: int) -> Library:
    """cuDNN on a device. Raises DeviceError where packages are missing."""
    with _lock:
        if device not in _libraries:
            _libraries[device] = Library(device)
        return _libraries[device]


def describe(problem: ConvolutionProblem | AttentionProblem) -> Graph | None:
    """The problem as a graph, under the settings of the process; None where there is none."""
    deterministic = are_deterministic_algorithms_enabled()
    if isinstance(problem, ConvolutionProblem):
        precision = get_float32_matmul_precision()
        return convolution_graph(problem, precision=precision, deterministic=deterministic)
    return attention_graph(problem, deterministic=deterministic)


def prepare(problem: ConvolutionProblem | AttentionProblem, device: int) -> GraphCall | None:
    """A plan; None where there is no graph or the library refuses it (`refusals` says why).

    A convolution with a bias is one plan or none: where this gives None for it, the same problem
    without the bias may have one, and the bias is the caller's to add.
    """
    description = describe(problem)
    if description is None:
        return None
    on = library(device)
    with _lock, gpu.on_device(device), on.lock:
        return _prepare(description, on)


def _prepare(description: Graph, on: Library) -> GraphCall | None:
    tried = isinstance(description, ConvolutionGraph) and tuning.worth(seconds(description))
    key = f"{on.version} {on.device_name} tried {tried} {description}"
    wanted = sorted(tensor.uid for tensor in description.tensors)
    packed = _store.read(key)
    if packed is not None:
        try:
            plan, workspace = Plan.restored(on, packed)
        except Refused:
            pass  # written by another build of the library: made anew below, and written over
        else:
            if plan.uids == wanted:
                return GraphCall(description, plan, workspace, _name(description))
    try:
        plan, workspace = Plan.built(on, description)
    except Refused as reason:
        refusals[description, on.device] = str(reason)
        return None
    if plan.uids != wanted:
        raise CudnnError(
            f"cuDNN's plan of {description} wants the operands {plan.uids}, not {wanted}"
        )
    _store.write(key, plan.serialized())
    return GraphCall(description, plan, workspace, _name(description))


def _name(description: Graph) -> str:
    if isinstance(description, ConvolutionGraph):
        first, second = description.first, description.second
        sizes = f"{'x'.join(map(str, first.dims))} {'x'.join(map(str, second.dims))}"
        bias = " bias" if description.bias is not None else ""
        return f"cudnn convolution {description.direction}{bias} {first.dtype.name} {sizes}"
    query = description.query
    direction = "forward" if description.result_gradient is None else "backward"
    return f"cudnn attention {direction} {query.dtype.name} {'x'.join(map(str, query.dims))}"
