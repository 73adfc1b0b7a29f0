"""cuBLASLt on a GPU against NumPy in float64: all layouts, dtypes, epilogues and batches."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flame.core.dtypes import DType, bfloat16, float16, float32, float64
from flame.core.errors import CublasError
from flame.kernel.library import Batch, MatmulProblem
from flame.runtime.cuda import libraries
from flame.runtime.cuda.libraries import cublaslt, prepare
from flame.runtime.cuda.libraries.cublaslt_plan import WORKSPACE_LIMIT

ROWS, COLUMNS = "rows", "columns"
PAIRS = [
    (float64, float64),
    (float32, float32),
    (float16, float16),
    (bfloat16, bfloat16),
    (float16, float32),
    (bfloat16, float32),
]
TOLERANCES = {float64: 1e-13, float32: 3e-6, float16: 1e-3, bfloat16: 6e-3}
SIZES = [(7, 13, 5), (64, 96, 128), (1, 9, 4), (6, 1, 3), (4, 5, 1), (1, 1, 33), (130, 257, 33)]


def strides(kind: str, rows: int, columns: int, pad: int) -> tuple[int, int]:
    return (columns + pad, 1) if kind == ROWS else (1, rows + pad)


def strided(memory: np.ndarray, shape: tuple[int, ...], steps: tuple[int, ...]) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(
        memory, shape, tuple(step * memory.itemsize for step in steps)
    )


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3)))


def gelu_derivative(x: np.ndarray) -> np.ndarray:
    t = np.tanh(0.7978845608 * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608 * (1 + 0.134145 * x * x)


class Case:
    """Operands of a problem on the host, and what d has to become."""

    def __init__(self, problem: MatmulProblem) -> None:
        generator = np.random.default_rng(7)
        self.problem = problem
        sizes = tuple(batch.size for batch in problem.batch)
        self.memories: list[np.ndarray] = []
        self.views: list[np.ndarray] = []

        def operand(name: str, rows: int, columns: int, dtype: DType) -> np.ndarray:
            shape = (*sizes, rows, columns)
            steps = (*(getattr(batch, name) for batch in problem.batch), *getattr(problem, name))
            reach = sum((max(size, 1) - 1) * step for size, step in zip(shape, steps, strict=True))
            memory = generator.standard_normal(reach + 1).astype(dtype.numpy)
            self.memories.append(memory)
            self.views.append(strided(memory, shape, steps))
            return self.views[-1].astype(np.float64)

        a = operand("a", problem.m, problem.k, problem.dtype)
        b = operand("b", problem.k, problem.n, problem.dtype)
        d = operand("d", problem.m, problem.n, problem.result)
        expected = a @ b
        self.aux: np.ndarray | None = None
        if problem.epilogue in ("bias", "relu_bias", "gelu_bias", "gelu_aux_bias"):
            self.memories.append(generator.standard_normal(problem.n).astype(problem.result.numpy))
            expected = expected + self.memories[-1].astype(np.float64)
        if problem.epilogue in ("gelu_aux_bias", "dgelu"):
            aux = operand("d", problem.m, problem.n, problem.result)
        if problem.epilogue == "relu_bias":
            expected = np.maximum(expected, 0)
        elif problem.epilogue == "gelu_aux_bias":
            self.aux = expected
            expected = gelu(expected)
        elif problem.epilogue == "gelu_bias":
            expected = gelu(expected)
        elif problem.epilogue == "dgelu":
            expected = expected * gelu_derivative(aux)
        self.expected = expected + (d if problem.accumulate else 0)

    def check(self, nvidia: Any, offset: int = 0) -> str | None:
        """What is wrong, "refused", or None."""
        pointers = [
            nvidia.upload(memory, offset * memory.itemsize if index < 3 else 0)
            for index, memory in enumerate(self.memories)
        ]
        if not nvidia.solve(self.problem, pointers):
            return "refused"
        wrong = self._compare(nvidia, pointers[2], 2, self.expected)
        if wrong is None and self.aux is not None:
            wrong = self._compare(nvidia, pointers[-1], -1, self.aux)
        nvidia.release()
        return wrong

    def _compare(self, nvidia: Any, pointer: int, at: int, expected: np.ndarray) -> str | None:
        memory = nvidia.download(pointer, self.memories[at])
        view = self.views[at]
        found = strided(memory, view.shape, tuple(step // view.itemsize for step in view.strides))
        error = np.linalg.norm(found.astype(np.float64) - expected)
        scale = np.linalg.norm(expected) + 1e-6
        tolerance = TOLERANCES[self.problem.result]
        if self.problem.dtype is float32:
            tolerance = {"highest": 3e-6, "high": 2e-3, "medium": 2e-2}[self.problem.precision]
        if not error <= tolerance * scale:
            return f"error {error / scale:.2e} of {self.problem}"
        before = self.memories[at].copy()
        found[...] = 0
        strided(before, view.shape, tuple(step // view.itemsize for step in view.strides))[...] = 0
        if not np.array_equal(memory.view(np.uint8), before.view(np.uint8)):
            return f"wrote between the rows, of {self.problem}"
        return None


def all_right(nvidia: Any, problems: list[MatmulProblem], offset: int = 0) -> None:
    found = [(problem, Case(problem).check(nvidia, offset)) for problem in problems]
    wrong = [f"{verdict}: {problem}" for problem, verdict in found if verdict is not None]
    assert not wrong, "\n".join(wrong)


def plain(
    sizes: tuple[int, int, int], pair: tuple[DType, DType], kinds: Any = (ROWS,) * 3, pad: int = 0
) -> MatmulProblem:
    m, n, k = sizes
    a, b, d = (
        strides(kind, rows, columns, pad)
        for kind, (rows, columns) in zip(kinds, ((m, k), (k, n), (m, n)), strict=True)
    )
    return MatmulProblem(m, n, k, (), *pair, a, b, d)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("kinds", list(itertools.product((ROWS, COLUMNS), repeat=3)), ids="-".join)
def test_layouts(nvidia: Any, pair: Any, kinds: tuple[str, ...]) -> None:
    all_right(nvidia, [plain(s, pair, kinds, pad) for s in SIZES for pad in (0, 3, 8)])


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_unaligned_operands(nvidia: Any, pair: Any) -> None:
    problems = [plain(sizes, pair) for sizes in SIZES]
    all_right(nvidia, problems + [replace(p, epilogue="bias") for p in problems], offset=1)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_accumulation(nvidia: Any, pair: Any) -> None:
    problems = [plain(sizes, pair, (COLUMNS, ROWS, ROWS)) for sizes in SIZES]
    all_right(nvidia, [replace(problem, accumulate=True) for problem in problems])


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_batches(nvidia: Any, pair: Any) -> None:
    batches = [
        (Batch(3, 200, 300, 400),),
        (Batch(3, 64, 0, 96),),
        (Batch(3, 0, 96, 192),),
        (Batch(2, 1024, 0, 2048), Batch(3, 100, 101, 333)),
        (Batch(2, 0, 3000, 4096), Batch(3, 96, 200, 1200), Batch(2, 960, 800, 512)),
        (Batch(2, 961, 803, 517),),
    ]
    sizes = (8, 12, 8)
    problems = [replace(plain(sizes, pair), batch=batch) for batch in batches]
    more = [replace(problem, epilogue="bias") for problem in problems]
    all_right(nvidia, problems + more + [replace(p, accumulate=True) for p in problems])


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("epilogue", ["bias", "relu_bias", "gelu_bias", "gelu_aux_bias", "dgelu"])
def test_epilogues(nvidia: Any, pair: Any, epilogue: str) -> None:
    sizes = [(64, 96, 32), (5, 16, 24), (256, 8, 64)]
    if "aux" not in epilogue and epilogue != "dgelu":
        sizes += [(7, 13, 5), (6, 1, 3)]
    problems = [replace(plain(s, pair), epilogue=epilogue) for s in sizes]
    batch = (Batch(3, 64 * 32, 32 * 96, 64 * 96),)
    problems.append(replace(problems[0], batch=batch))
    problems.append(replace(problems[0], batch=(Batch(2, 0, 1 << 14, 1 << 16), *batch)))
    found = [(problem, Case(problem).check(nvidia)) for problem in problems]
    wrong = [f"{verdict}: {problem}" for problem, verdict in found if verdict is not None]
    needed = epilogue in ("bias", "relu_bias") or pair[0] is pair[1] is not float64
    if epilogue.startswith(("gelu", "dgelu")) and pair[1] in (float32, float64):
        needed = False
    if not needed and wrong and all(text.startswith("refused") for text in wrong):
        pytest.skip(f"cuBLASLt has no {epilogue} for {pair}: {len(wrong)} of {len(found)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precision(nvidia: Any, precision: str) -> None:
    problem = replace(plain((256, 256, 512), (float32, float32)), precision=precision)
    all_right(nvidia, [problem])
    case = Case(problem)
    pointers = [nvidia.upload(memory) for memory in case.memories]
    nvidia.solve(problem, pointers)
    found = nvidia.download(pointers[2], case.views[2])
    error = np.linalg.norm(found - case.expected) / np.linalg.norm(case.expected)
    # What is allowed to be faster is: it rounds the factors.
    assert bool(error > 3e-5) is (precision != "highest")


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_empty_products(nvidia: Any, pair: Any) -> None:
    whole = MatmulProblem(6, 5, 0, (), *pair, (1, 1), (5, 1), (9, 1))
    batched = replace(whole, batch=(Batch(3, 0, 0, 64),))
    problems = [
        *(whole, batched),
        *(replace(problem, epilogue="bias") for problem in (whole, batched)),
        *(replace(problem, accumulate=True) for problem in (whole, batched)),
        replace(whole, epilogue="bias", accumulate=True),
        replace(plain((4, 5, 3), pair), m=0),
        replace(plain((4, 5, 3), pair), batch=(Batch(0, 12, 15, 20),)),
    ]
    all_right(nvidia, problems)


def test_captured_calls_replay(nvidia: Any) -> None:
    case = Case(replace(plain((64, 96, 128), (bfloat16, bfloat16)), epilogue="bias"))
    pointers = [nvidia.upload(memory) for memory in case.memories]
    prepared = prepare(case.problem, 0)
    assert prepared is not None
    workspace = nvidia.allocate(prepared.workspace)
    graph = nvidia.capture(prepared, pointers, workspace)
    before = nvidia.download(pointers[2], case.memories[2])
    assert np.array_equal(before, case.memories[2])
    nvidia.replay(graph)
    found = nvidia.download(pointers[2], case.views[2]).astype(np.float64)
    assert np.linalg.norm(found - case.expected) < 6e-3 * np.linalg.norm(case.expected)


def test_choices_are_kept_on_disk(
    nvidia: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("FLAME_CUDA_TUNE", "1")
    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path))
    problem = plain((2048, 2048, 2048), (bfloat16, bfloat16))
    timed = []
    time = cublaslt._time

    def counted(plan: Any) -> int:
        timed.append(plan)
        return time(plan)

    monkeypatch.setattr(cublaslt, "_time", counted)
    first = cublaslt.prepare(problem, 0)
    second = cublaslt.prepare(problem, 0)
    assert len(timed) == 1
    assert isinstance(first, cublaslt.Matmul)
    assert isinstance(second, cublaslt.Matmul)
    assert first._call.algorithm["algo"] == second._call.algorithm["algo"]
    all_right(nvidia, [problem])


def test_planning_during_a_capture(
    nvidia: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("FLAME_CUDA_TUNE", "1")
    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path))
    case = Case(plain((1536, 1536, 1536), (bfloat16, bfloat16)))
    pointers = [nvidia.upload(memory) for memory in case.memories]
    workspace = nvidia.allocate(WORKSPACE_LIMIT)
    libraries._prepared.clear()

    class Late:
        """Prepared in the middle of the capture."""

        def enqueue(self, pointers: Any, workspace: int, stream: int) -> None:
            prepared = prepare(case.problem, 0)
            assert prepared is not None
            prepared.enqueue(pointers, workspace, stream)

    nvidia.replay(nvidia.capture(Late(), pointers, workspace))
    found = nvidia.download(pointers[2], case.views[2]).astype(np.float64)
    assert np.linalg.norm(found - case.expected) < 6e-3 * np.linalg.norm(case.expected)


def test_errors_name_the_status(nvidia: Any) -> None:
    problem = replace(plain((64, 96, 128), (bfloat16, bfloat16)), epilogue="dgelu")
    prepared = prepare(problem, 0)
    assert prepared is not None
    memory = nvidia.allocate(1 << 20)
    with pytest.raises(CublasError, match="matmul: CUBLAS_STATUS"):
        # A workspace that is none, and an aux that is not aligned.
        prepared.enqueue((memory, memory, 0, memory + 2), 0, nvidia.stream)
