"""How plans are chosen, kept and found again, against libraries that are not there."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flame.core.determinism import use_deterministic_algorithms
from flame.core.dtypes import bfloat16, float16, float32
from flame.core.errors import CublasError, CudnnError, DeviceError
from flame.core.precision import choose_float32_matmul_precision
from flame.core.types import tensor_type
from flame.kernel.library import Batch, ConvolutionProblem, MatmulProblem
from flame.runtime.cuda import libraries
from flame.runtime.cuda.libraries import cublaslt, cublaslt_plan, cudnn, pointwise, tuning
from flame.runtime.cuda.libraries import device as gpu
from flame.runtime.cuda.libraries.cudnn_graphs import ConvolutionGraph, Graph
from flame.runtime.cuda.libraries.matmul_layout import Description, describe
from flame.runtime.cuda.libraries.store import Store

RESULT = np.dtype(
    [
        ("algo", [("data_", "<u8", (8,))]),
        ("workspace_size", "<u8"),
        ("state", "<i4"),
        ("waves_count", "<f4"),
        ("reserved", "<i4", (4,)),
    ]
)
LARGE = MatmulProblem(4096, 4096, 4096, (), bfloat16, bfloat16, (4096, 1), (4096, 1), (4096, 1))
SMALL = MatmulProblem(64, 64, 64, (), bfloat16, bfloat16, (64, 1), (64, 1), (64, 1))


class Failure(Exception):
    status = 7


class FakeLt:
    """nvmath.bindings.cublasLt as far as calls need it; counts what is queued."""

    cuBLASLtError = Failure  # the library's name
    matmul_heuristic_result_dtype = RESULT
    MatmulDescAttribute = SimpleNamespace(BIAS_POINTER=8, EPILOGUE_AUX_POINTER=11)

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.pointers: list[tuple[int, int]] = []
        self.fails = False

    def matmul(self, *arguments: Any) -> None:
        if self.fails:
            raise Failure
        self.calls.append(arguments)

    def matmul_desc_set_attribute(self, _: int, attribute: int, at: int, size: int) -> None:
        assert size == 8
        self.pointers.append((attribute, ctypes.c_int64.from_address(at).value))

    def get_status_name(self, status: int) -> str:
        return f"CUBLAS_STATUS_{status}"


class FakePlan:
    """A plan with three algorithms; those of the disk are refused where ``stale``."""

    def __init__(self, library: Any, description: Description, limit: int) -> None:
        self.library, self.description = library, description
        self.descriptor, self.first, self.second, self.result = 1, 2, 3, 4
        self.alpha = self.beta = np.ones(1, np.float32)
        self.candidates = np.zeros(3, RESULT)
        self.candidates["algo"]["data_"][:, 0] = [10, 11, 12]
        self.candidates["workspace_size"] = [0, 512, 1024]

    def check(self, packed: bytes) -> Any:
        if self.library.stale or len(packed) != RESULT.itemsize:
            return None
        return np.frombuffer(packed, RESULT).copy()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """cuBLASLt of a device that is not there; the second algorithm is the fastest."""
    lt = FakeLt()
    library = SimpleNamespace(
        lt=lt, handle=99, device=0, device_name="Fake", version=1, stale=False, timed=[]
    )
    library.failure = lambda name, error: CublasError(f"cublasLt {name}: {error.status}")

    def timed(plan: FakePlan) -> int:
        library.timed.append(plan.description)
        return 1

    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FLAME_CUDA_TUNE", raising=False)
    monkeypatch.setattr(cublaslt, "library", lambda device: library)
    monkeypatch.setattr(cublaslt, "Plan", FakePlan)
    monkeypatch.setattr(cublaslt, "_time", timed)
    monkeypatch.setattr(gpu, "on_device", lambda device: contextlib.nullcontext())
    libraries._prepared.clear()
    yield library
    libraries._prepared.clear()
    use_deterministic_algorithms(False)
    choose_float32_matmul_precision("highest")


def algorithm(prepared: Any) -> int:
    return int(prepared._call.algorithm["algo"]["data_"][0, 0])


def test_the_fastest_algorithm_is_kept_on_disk(fake: SimpleNamespace) -> None:
    assert algorithm(cublaslt.prepare(LARGE, 0)) == 11
    assert algorithm(cublaslt.prepare(LARGE, 0)) == 11
    assert len(fake.timed) == 1
    fake.version = 2  # another library times anew
    assert algorithm(cublaslt.prepare(LARGE, 0)) == 11
    assert len(fake.timed) == 2


def test_a_choice_that_the_library_refuses_is_made_anew(fake: SimpleNamespace) -> None:
    cublaslt.prepare(LARGE, 0)
    fake.stale = True
    assert algorithm(cublaslt.prepare(LARGE, 0)) == 11
    assert len(fake.timed) == 2


def test_when_nothing_is_timed(fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert algorithm(cublaslt.prepare(SMALL, 0)) == 10
    use_deterministic_algorithms(True)
    assert algorithm(cublaslt.prepare(LARGE, 0)) == 10
    use_deterministic_algorithms(False)
    monkeypatch.setenv("FLAME_CUDA_TUNE", "0")
    assert algorithm(cublaslt.prepare(LARGE, 0)) == 10
    assert not fake.timed


def test_plans_are_made_once_for_each_setting(fake: SimpleNamespace) -> None:
    first = libraries.prepare(LARGE, 0)
    assert libraries.prepare(replace(LARGE), 0) is first
    assert libraries.prepare(LARGE, 1) is not first
    use_deterministic_algorithms(True)
    assert libraries.prepare(LARGE, 0) is not first
    use_deterministic_algorithms(False)
    choose_float32_matmul_precision("high")
    assert libraries.prepare(LARGE, 0) is not first
    assert libraries.prepare(replace(LARGE, result=float16), 0) is None


def test_operands_change_places_for_rows(fake: SimpleNamespace) -> None:
    prepared = cublaslt.prepare(SMALL, 0)
    assert prepared is not None
    assert prepared.workspace == 0
    prepared.enqueue((256, 512, 768), 0, 5)
    (call,) = fake.lt.calls
    assert (call[0], call[3], call[5], call[8], call[10], call[15]) == (99, 512, 256, 768, 768, 5)


def test_bias_and_aux_are_set_when_they_change(fake: SimpleNamespace) -> None:
    batch = (Batch(2, 1 << 14, 1 << 14, 1 << 14), Batch(3, 4096, 8192, 4096))
    problem = replace(SMALL, batch=batch, epilogue="gelu_aux_bias")
    prepared = cublaslt.prepare(problem, 0)
    assert prepared is not None
    for _ in range(2):
        prepared.enqueue((1 << 20, 2 << 20, 3 << 20, 4 << 20, 5 << 20), 0, 0)
    # The inner dimension is the library's, the outer one two calls.
    assert [call[8] - (3 << 20) for call in fake.lt.calls] == [0, 2 << 14, 0, 2 << 14]
    aux = [pointer - (5 << 20) for attribute, pointer in fake.lt.pointers if attribute == 11]
    assert aux == [0, 2 << 14, 0, 2 << 14]
    assert [pointer for attribute, pointer in fake.lt.pointers if attribute == 8] == [4 << 20]


def test_unaligned_operands_get_a_plan_of_their_own(fake: SimpleNamespace) -> None:
    prepared = cublaslt.prepare(SMALL, 0)
    assert isinstance(prepared, cublaslt.Matmul)
    prepared.enqueue((256, 512, 770), 0, 0)
    assert prepared._unaligned is not None
    assert prepared._unaligned.plan.description.alignment == 2
    prepared.enqueue((256, 512, 768), 0, 0)
    assert fake.lt.calls[0][12] != fake.lt.calls[1][12]


def test_sums_of_nothing_are_products_of_zeros(
    fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared = []
    monkeypatch.setattr(gpu, "checked", lambda *arguments: cleared.append(arguments))
    prepared = cublaslt.prepare(replace(SMALL, m=300, k=0, a=(1, 1), epilogue="bias"), 0)
    assert prepared is not None
    assert prepared.workspace == 768 + 256
    prepared.enqueue((0, 0, 1 << 20, 2 << 20), 4096, 5)
    assert cleared == [("cuMemsetD8Async", 4096, 0, 1024, 5)]
    (call,) = fake.lt.calls
    assert (call[3], call[5]) == (4096 + 768, 4096)  # b, then a


def test_failures_name_the_problem(fake: SimpleNamespace) -> None:
    prepared = cublaslt.prepare(SMALL, 0)
    assert prepared is not None
    fake.lt.fails = True
    with pytest.raises(CublasError, match=r"matmul: 7, of MatmulProblem\(m=64"):
        prepared.enqueue((256, 512, 768), 0, 0)


def test_nothing_is_queued_for_an_empty_product(fake: SimpleNamespace) -> None:
    prepared = libraries.prepare(replace(SMALL, m=0), 0)
    assert prepared is not None
    prepared.enqueue((0, 0, 0), 0, 0)
    assert not fake.lt.calls


def test_guess_of_the_time() -> None:
    large, small = describe(LARGE), describe(SMALL)
    assert large is not None
    assert small is not None
    assert cublaslt.seconds(small) < tuning.SMALL_SECONDS < cublaslt.seconds(large) < 1e-3
    spans = cublaslt.operand_spans(large)
    assert spans == (1 << 24, 1 << 24, 1 << 24)


# --- cuDNN ----------------------------------------------------------------------------------------
class FakeGraphPlan:
    """cuDNN's plan of a graph: what would run, and the bytes that it is kept as."""

    def __init__(self, library: Any, uids: list[int]) -> None:
        self.library, self.uids, self.index = library, uids, (0,)
        self.lowered = SimpleNamespace(_execute_with_raw_ptrs=self.execute)
        self.ran: list[tuple[Any, ...]] = []

    def execute(self, address: int, count: int, *rest: int) -> None:
        if self.library.broken:
            raise RuntimeError("CUDNN_STATUS_EXECUTION_FAILED")
        pointers = (ctypes.c_int64 * count).from_address(address)
        self.ran.append((list(pointers), *rest))

    def serialized(self) -> bytes:
        return bytes(self.uids)


@pytest.fixture
def dnn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    library = SimpleNamespace(
        device=0,
        device_name="Fake",
        version="cudnn 1",
        raw_handle=77,
        stream=None,
        streams=[],
        built=[],
        broken=False,
        refuses=False,
        lock=contextlib.nullcontext(),
        failures=(RuntimeError,),
    )

    def set_stream(stream: int) -> None:
        library.stream = stream
        library.streams.append(stream)

    def built(on: Any, description: Graph) -> tuple[FakeGraphPlan, int]:
        on.built.append(description)
        if on.refuses:
            raise cudnn.Refused("not today")
        return FakeGraphPlan(on, sorted(tensor.uid for tensor in description.tensors)), 4096

    def restored(on: Any, packed: bytes) -> tuple[FakeGraphPlan, int]:
        if packed == b"?":
            raise cudnn.Refused("what is this?")
        return FakeGraphPlan(on, list(packed)), 4096

    library.set_stream = set_stream
    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cudnn, "library", lambda device: library)
    monkeypatch.setattr(cudnn.Plan, "built", staticmethod(built))
    monkeypatch.setattr(cudnn.Plan, "restored", staticmethod(restored))
    monkeypatch.setattr(gpu, "on_device", lambda device: contextlib.nullcontext())
    yield library
    use_deterministic_algorithms(False)
    choose_float32_matmul_precision("highest")


def convolution(**changes: Any) -> ConvolutionProblem:
    dtype = changes.pop("dtype", float32)
    x, weight, y = (
        tensor_type(dtype, shape) for shape in ((2, 4, 9, 9), (8, 4, 3, 3), (2, 8, 9, 9))
    )
    problem = ConvolutionProblem("forward", x, weight, y, (1, 1), (1, 1), (1, 1), 1)
    return replace(problem, **changes)


def test_plans_of_graphs_are_kept_on_disk(dnn: SimpleNamespace) -> None:
    assert cudnn.prepare(convolution(), 0) is not None
    assert cudnn.prepare(convolution(), 0) is not None
    assert len(dnn.built) == 1
    cudnn.prepare(convolution(bias=True), 0)
    assert len(dnn.built) == 2
    dnn.version = "cudnn 2"
    cudnn.prepare(convolution(), 0)
    choose_float32_matmul_precision("high")
    cudnn.prepare(convolution(), 0)
    use_deterministic_algorithms(True)
    cudnn.prepare(convolution(), 0)
    assert len(dnn.built) == 5


@pytest.mark.parametrize("content", [b"?", bytes([1, 2])], ids=["refused", "other operands"])
def test_what_the_library_refuses_is_made_anew(dnn: SimpleNamespace, content: bytes) -> None:
    cudnn.prepare(convolution(), 0)
    (path,) = (path for path in cudnn._store._disk().directory.iterdir())
    key = f"{dnn.version} {dnn.device_name} tried False {dnn.built[0]}"
    assert cudnn._store.read(key) == bytes([1, 2, 3])
    cudnn._store.write(key, content)
    for _ in range(2):
        assert cudnn.prepare(convolution(), 0) is not None
        assert len(dnn.built) == 2
    path.write_bytes(b"no entry at all")
    assert cudnn.prepare(convolution(), 0) is not None
    assert len(dnn.built) == 3


class FakeLowered:
    """Five plans, of which the first cannot be built and the fourth is the fastest."""

    def __init__(self) -> None:
        self.built: list[int] = []
        self.ran: list[int] = []

    def get_execution_plan_count(self) -> int:
        return 7

    def build_plan_at_index(self, index: int) -> None:
        if index == 0:
            raise RuntimeError("Deselected")
        self.built.append(index)

    def get_workspace_size_plan_at_index(self, index: int) -> int:
        return 100 * index

    def _execute_plan_at_index(
        self, pointers: dict[int, int], workspace: int, index: int, handle: int
    ) -> None:
        assert sorted(pointers) == [1, 2, 3]
        assert (workspace, handle) == (400, 77)
        self.ran.append(index)


class FakeScratch:
    """Memory whose addresses are sizes."""

    stream = 9

    def __enter__(self) -> FakeScratch:
        return self

    def __exit__(self, *_: object) -> None: ...

    def random(self, dtype: Any, count: int) -> int:
        return int(dtype.itemsize * count)

    def allocate(self, nbytes: int) -> int:
        return nbytes


def test_the_fastest_convolution_is_built_last(
    dnn: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fastest(scratch: FakeScratch, runs: Any, failures: Any) -> int:
        assert dnn.streams == [scratch.stream]
        for run in runs:
            run()
        return 2

    monkeypatch.setattr(gpu, "Scratch", FakeScratch)
    monkeypatch.setattr(gpu, "fastest", fastest)
    graph, lowered = cudnn.describe(convolution()), FakeLowered()
    assert isinstance(graph, ConvolutionGraph)
    assert cudnn.try_plans(dnn, lowered, graph) == 3  # type: ignore[arg-type]
    assert lowered.built == [1, 2, 3, 4, 3]
    assert lowered.ran == [1, 2, 3, 4]
    assert dnn.streams == [9, 0]


def laid_out(dtype: Any, shape: tuple[int, ...], order: tuple[int, ...]) -> Any:
    """A type whose dimensions lie in this order, the last one densest."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim], step = step, step * shape[dim]
    return tensor_type(dtype, shape, tuple(strides))


def one_by_one(
    direction: Any, *, size: int = 128, channels: tuple[int, int] = (64, 256), bias: bool = False,
    last: bool = True,
) -> ConvolutionProblem:  # fmt: skip
    into, out = channels
    order = (0, 2, 3, 1) if last else (0, 1, 2, 3)
    x = laid_out(bfloat16, (16, into, size, size), order)
    y = laid_out(bfloat16, (16, out, size, size), order)
    weight = laid_out(bfloat16, (out, into, 1, 1), order)
    return ConvolutionProblem(direction, x, weight, y, (1, 1), (0, 0), (1, 1), 1, bias=bias)


@pytest.mark.parametrize("channels", [(3, 5), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("direction", ["forward", "input_gradient", "weight_gradient"])
def test_a_convolution_of_single_elements_is_a_product(
    direction: Any, channels: tuple[int, int]
) -> None:
    problem = one_by_one(direction, size=3, channels=channels)
    product = pointwise.product_of(problem)
    assert product is not None
    random = np.random.default_rng(0)
    memories = {
        name: random.standard_normal(getattr(problem, name).numel)
        for name in ("x", "weight", "y")
    }  # fmt: skip
    x, weight, y = (
        np.lib.stride_tricks.as_strided(memories[n], t.shape, tuple(8 * s for s in t.strides))
        for n, t in (("x", problem.x), ("weight", problem.weight), ("y", problem.y))
    )
    first, second, result, wanted = {
        "forward": ("x", "weight", y, np.einsum("nchw,kcij->nkhw", x, weight)),
        "input_gradient": ("y", "weight", x, np.einsum("nkhw,kcij->nchw", y, weight)),
        "weight_gradient": ("y", "x", weight, np.einsum("nkhw,nchw->kc", y, x)[..., None, None]),
    }[direction]
    sides = [
        np.lib.stride_tricks.as_strided(memories[n], shape, tuple(8 * s for s in strides))
        for n, shape, strides in (
            (first, (product.m, product.k), product.a), (second, (product.k, product.n), product.b)
        )
    ]  # fmt: skip
    target = np.lib.stride_tricks.as_strided(
        memories[{"forward": "y", "input_gradient": "x", "weight_gradient": "weight"}[direction]],
        (product.m, product.n), tuple(8 * s for s in product.d),
    )  # fmt: skip
    target[...] = sides[0] @ sides[1]
    np.testing.assert_allclose(result, wanted)


def test_which_convolutions_are_no_products() -> None:
    plain = one_by_one("forward")
    assert pointwise.product_of(plain) is not None
    assert pointwise.product_of(replace(plain, bias=True)).epilogue == "bias"  # type: ignore[union-attr]
    assert pointwise.product_of(one_by_one("forward", last=False)) is None
    assert pointwise.product_of(replace(plain, stride=(2, 2))) is None
    assert pointwise.product_of(replace(plain, padding=(1, 1))) is None
    assert pointwise.product_of(replace(plain, groups=2)) is None
    assert pointwise.product_of(convolution(dtype=bfloat16)) is None


@pytest.mark.parametrize("faster", [0, 1])
def test_the_faster_library_is_kept_on_disk(
    fake: SimpleNamespace, dnn: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, faster: int
) -> None:
    timed = []

    def fastest(scratch: FakeScratch, runs: Any, failures: Any) -> int:
        timed.append(len(runs))
        for run in runs:
            run()
        return faster

    monkeypatch.setattr(gpu, "Scratch", FakeScratch)
    monkeypatch.setattr(gpu, "fastest", fastest)
    kind = (cudnn.GraphCall, cublaslt.Matmul)[faster]
    for _ in range(2):
        libraries._prepared.clear()
        assert isinstance(libraries.prepare(one_by_one("forward"), 0), kind)
    assert timed == [2]
    assert fake.lt.calls
    assert dnn.streams[-1] == 0
    small = libraries.prepare(one_by_one("forward", size=2), 0)
    assert isinstance(small, cudnn.GraphCall)  # not worth a trial
    dnn.version = "cudnn 2"
    libraries._prepared.clear()
    libraries.prepare(one_by_one("forward"), 0)
    assert timed == [2, 2]


def test_a_convolution_that_one_library_refuses_is_the_other_s(
    fake: SimpleNamespace, dnn: SimpleNamespace
) -> None:
    dnn.refuses = True
    assert isinstance(libraries.prepare(one_by_one("forward"), 0), cublaslt.Matmul)
    assert libraries.prepare(convolution(), 0) is None


def test_the_fastest_run_is_found() -> None:
    times = {"slow": 3.0, "fast": 1.0, "middle": 2.0}

    def run(name: str) -> Any:
        def body() -> None:
            if name == "broken":
                raise Failure
            clock.append(times[name])

        return body

    clock: list[float] = []

    class Clock:
        def milliseconds(self, body: Any, repeats: int) -> float:
            clock.clear()
            for _ in range(repeats):
                body()
            return sum(clock) / repeats

    scratch: Any = Clock()
    runs = [run(name) for name in ("broken", "slow", "fast", "middle")]
    assert gpu.fastest(scratch, runs, (Failure,)) == 2
    assert gpu.fastest(scratch, runs[:1], (Failure,)) == 0


def test_pointers_go_where_their_uids_are(dnn: SimpleNamespace) -> None:
    call = cudnn.prepare(convolution(bias=True), 0)
    assert call is not None
    assert call.workspace == 4096
    for stream in (5, 5, 6):
        call.enqueue((16, 32, 48, 64), 256, stream)
    assert call._plan.ran == [([16, 32, 48, 64], 256, 77, 0)] * 3
    assert dnn.streams == [5, 6]
    with pytest.raises(CudnnError, match="aligned to 16 bytes"):
        call.enqueue((16, 34, 48, 64), 256, 5)
    dnn.broken = True
    with pytest.raises(CudnnError, match="CUDNN_STATUS_EXECUTION_FAILED, of ConvolutionGraph"):
        call.enqueue((16, 32, 48, 64), 256, 5)


def test_refusals_are_told(dnn: SimpleNamespace) -> None:
    dnn.refuses = True
    assert cudnn.prepare(convolution(), 0) is None
    graph = cudnn.describe(convolution())
    assert graph is not None
    assert cudnn.refusals[graph, 0] == "not today"


def test_numerical_notes() -> None:
    notes = SimpleNamespace(
        DOWN_CONVERT_INPUTS=1, REDUCED_PRECISION_REDUCTION=2, TENSOR_CORE=3, NONDETERMINISTIC=4
    )
    library: Any = SimpleNamespace(cudnn=SimpleNamespace(numerical_note=notes))

    def of(problem: ConvolutionProblem) -> list[int]:
        graph = cudnn.describe(problem)
        assert graph is not None
        return cudnn.unwanted_notes(library, graph)  # type: ignore[arg-type]

    try:
        assert of(convolution()) == [1, 2, 3]
        assert of(convolution(dtype=bfloat16)) == [1, 2]
        choose_float32_matmul_precision("high")
        assert of(convolution()) == [1, 2]
        use_deterministic_algorithms(True)
        assert of(convolution()) == [1, 2, 4]
    finally:
        use_deterministic_algorithms(False)
        choose_float32_matmul_precision("highest")


# --- what both stand on ---------------------------------------------------------------------------
def test_entries_are_found_by_their_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = Store()
    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path / "a"))
    store.write("one", b"1")
    assert (store.read("one"), store.read("two")) == (b"1", None)
    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path / "b"))
    assert store.read("one") is None


@pytest.mark.parametrize(
    ("module", "package"), [("nvmath.bindings", "nvmath-python"), ("cudnn", "cudnn-frontend")]
)
def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    library: Any = cublaslt_plan if "nvmath" in module else cudnn
    monkeypatch.setattr(library, "load_library", lambda name: None)
    with pytest.raises(DeviceError, match=rf"{package}.*pip install 'flame-engine\[cuda13\]'"):
        library.Library(0)


def test_nothing_is_loaded_before_it_is_needed() -> None:
    text = (
        "import sys, flame, flame.runtime.cuda.libraries;"
        "print([name for name in ('nvmath', 'cudnn', 'cuda') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
