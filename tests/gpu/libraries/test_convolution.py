"""cuDNN's convolutions on a GPU against NumPy in float64: shapes, layouts, dtypes, directions."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from flame.core.determinism import use_deterministic_algorithms
from flame.core.dtypes import DType, bfloat16, float16, float32, float64
from flame.core.errors import CudnnError
from flame.core.precision import choose_float32_matmul_precision
from flame.core.types import tensor_type
from flame.kernel.library import ConvolutionProblem
from flame.runtime.cpu.cache import Entry
from flame.runtime.cuda import libraries
from flame.runtime.cuda.libraries import cudnn, pointwise, prepare, tuning
from flame.runtime.cuda.libraries.cudnn_graphs import channels_last, row_major

DIRECTIONS = ("forward", "input_gradient", "weight_gradient")
TOLERANCES = {float64: 1e-12, float32: 5e-6, float16: 1.5e-3, bfloat16: 8e-3}


@dataclass(frozen=True)
class Window:
    x: tuple[int, ...]
    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def y(self) -> tuple[int, ...]:
        space = tuple(
            (size + 2 * pad - (kernel - 1) * dilation - 1) // stride + 1
            for size, pad, kernel, dilation, stride in zip(
                self.x[2:], self.padding, self.kernel, self.dilation, self.stride, strict=True
            )
        )
        return (self.x[0], self.channels, *space)

    def weight(self) -> tuple[int, ...]:
        return (self.channels, self.x[1] // self.groups, *self.kernel)


CORE = {
    "3x3": Window((2, 16, 12, 12), 32, (3, 3), (1, 1), (1, 1), (1, 1)),
    "1x1": Window((2, 32, 9, 7), 64, (1, 1), (1, 1), (0, 0), (1, 1)),
    "strided": Window((2, 16, 12, 11), 32, (3, 3), (2, 2), (1, 1), (1, 1)),
    "dilated": Window((2, 16, 14, 13), 16, (3, 3), (1, 1), (2, 2), (2, 2)),
}
MORE = {
    "few channels": Window((2, 3, 12, 12), 10, (3, 3), (1, 1), (1, 1), (1, 1)),
    "one channel": Window((2, 1, 12, 12), 8, (5, 5), (1, 1), (2, 2), (1, 1)),
    "asymmetric": Window((3, 16, 13, 10), 24, (5, 3), (2, 1), (2, 0), (1, 2)),
    "groups": Window((2, 32, 9, 9), 64, (3, 3), (1, 1), (1, 1), (1, 1), 4),
    "depthwise": Window((2, 16, 9, 9), 16, (3, 3), (1, 1), (1, 1), (1, 1), 16),
    "one dimension": Window((2, 16, 30), 32, (5,), (2,), (2,), (1,)),
    "three dimensions": Window((2, 8, 6, 7, 5), 16, (3, 3, 3), (1, 2, 1), (1, 1, 1), (1, 1, 1)),
    "one pixel": Window((2, 16, 1, 1), 32, (3, 3), (1, 1), (1, 1), (1, 1)),
}
WINDOWS = {**CORE, **MORE}


def problem_of(
    window: Window, direction: str, dtype: DType, *, last: bool = True, bias: bool = False
) -> ConvolutionProblem:
    layout = channels_last if last else row_major
    x, weight, y = (
        tensor_type(dtype, shape, layout(shape))
        for shape in (window.x, window.weight(), window.y())
    )
    return ConvolutionProblem(
        direction, x, weight, y, window.stride, window.padding, window.dilation, window.groups, bias
    )


def taps(window: Window, padded: np.ndarray) -> Any:
    """(index of the kernel, the view of x that it meets), one by one."""
    y = window.y()
    for at in itertools.product(*(range(size) for size in window.kernel)):
        places = [
            slice(i * d, i * d + (count - 1) * s + 1, s)
            for i, d, s, count in zip(at, window.dilation, window.stride, y[2:], strict=True)
        ]
        yield at, padded[(slice(None), slice(None), *places)]


def grouped(window: Window, array: np.ndarray) -> np.ndarray:
    """(N, groups, channels of a group, positions) of (N, C, ...)."""
    return array.reshape(array.shape[0], window.groups, -1, math.prod(array.shape[2:]))


def reference(window: Window, direction: str, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    space = [(pad, pad) for pad in window.padding]
    if direction == "input_gradient":
        padded = np.zeros(
            (*window.x[:2], *(s + 2 * p for s, p in zip(window.x[2:], window.padding, strict=True)))
        )
    else:
        x = first if direction == "forward" else second
        padded = np.pad(x, [(0, 0), (0, 0), *space])
    weight = np.zeros(window.weight()) if direction == "weight_gradient" else second
    y = np.zeros(window.y()) if direction == "forward" else first
    kernels = weight.reshape(window.groups, -1, *weight.shape[1:])  # (groups, K / groups, C, ...)
    for at, met in taps(window, padded):
        kernel = kernels[(slice(None), slice(None), slice(None), *at)]
        if direction == "forward":
            made = np.einsum("ngcp,gkc->ngkp", grouped(window, met), kernel)
            y += made.reshape(y.shape)
        elif direction == "input_gradient":
            made = np.einsum("ngkp,gkc->ngcp", grouped(window, y), kernel)
            met += made.reshape(met.shape)
        else:
            kernel += np.einsum("ngkp,ngcp->gkc", grouped(window, y), grouped(window, met))
    if direction == "forward":
        return y
    if direction == "weight_gradient":
        return weight
    inside = [slice(p, p + s) for s, p in zip(window.x[2:], window.padding, strict=True)]
    return padded[(slice(None), slice(None), *inside)]


class Case:
    def __init__(self, window: Window, problem: ConvolutionProblem) -> None:
        self.problem = problem
        generator = np.random.default_rng(3)
        types = {
            "forward": (problem.x, problem.weight, problem.y),
            "input_gradient": (problem.y, problem.weight, problem.x),
            "weight_gradient": (problem.y, problem.x, problem.weight),
        }[problem.direction]
        self.result = types[2]
        self.memories = [
            generator.standard_normal(type_.numel).astype(type_.dtype.numpy) for type_ in types
        ]
        values = [
            self.shaped(memory, type_).astype(np.float64)
            for memory, type_ in zip(self.memories, types, strict=True)
        ]
        self.expected = reference(window, problem.direction, values[0], values[1])
        if problem.bias:
            channels = self.result.shape[1]
            self.memories.append(
                generator.standard_normal(channels).astype(self.result.dtype.numpy)
            )
            shape = (1, channels, *(1 for _ in self.result.shape[2:]))
            self.expected = self.expected + self.memories[3].astype(np.float64).reshape(shape)

    @staticmethod
    def shaped(memory: np.ndarray, type_: Any) -> np.ndarray:
        steps = tuple(step * memory.itemsize for step in type_.strides)
        return np.lib.stride_tricks.as_strided(memory, type_.shape, steps)

    def run(self, nvidia: Any) -> np.ndarray | None:
        pointers = [nvidia.upload(memory) for memory in self.memories]
        if not nvidia.solve(self.problem, pointers):
            return None
        return self.shaped(nvidia.download(pointers[2], self.memories[2]), self.result)

    def error(self, found: np.ndarray) -> float:
        difference = np.linalg.norm(found.astype(np.float64) - self.expected)
        return float(difference / np.linalg.norm(self.expected))

    def why_not(self) -> str:
        graph = cudnn.describe(self.problem)
        assert graph is not None
        return cudnn.refusals[graph, 0]


def check(nvidia: Any, name: str, problem: ConvolutionProblem, *, needed: bool) -> None:
    case = Case(WINDOWS[name], problem)
    found = case.run(nvidia)
    if found is None:
        if needed:
            pytest.fail(f"refused: {problem}: {case.why_not()}")
        pytest.skip(f"cuDNN refuses: {case.why_not()[:200]}")
    assert case.error(found) < TOLERANCES[case.result.dtype], problem


@pytest.mark.parametrize("dtype", [bfloat16, float16, float32], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", list(WINDOWS))
def test_channels_last(nvidia: Any, name: str, direction: str, dtype: DType) -> None:
    check(nvidia, name, problem_of(WINDOWS[name], direction, dtype), needed=name in CORE)


@pytest.mark.parametrize("dtype", [bfloat16, float32], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ["3x3", "strided", "one dimension"])
def test_row_major(nvidia: Any, name: str, direction: str, dtype: DType) -> None:
    problem = problem_of(WINDOWS[name], direction, dtype, last=False)
    check(nvidia, name, problem, needed=dtype is float32 and name in CORE)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_float64(nvidia: Any, direction: str) -> None:
    for last in (True, False):
        problem = problem_of(CORE["3x3"], direction, float64, last=last)
        check(nvidia, "3x3", problem, needed=False)


@pytest.mark.parametrize("dtype", [bfloat16, float16, float32], ids=str)
@pytest.mark.parametrize("direction", ["forward", "input_gradient"])
@pytest.mark.parametrize("name", ["3x3", "1x1", "strided"])
def test_bias(nvidia: Any, name: str, direction: str, dtype: DType) -> None:
    problem = problem_of(WINDOWS[name], direction, dtype, bias=True)
    check(nvidia, name, problem, needed=direction == "forward" and dtype is not float32)


@pytest.mark.parametrize("dtype", [bfloat16, float16], ids=str)
def test_weight_gradient_in_float32(nvidia: Any, dtype: DType) -> None:
    problem = problem_of(CORE["3x3"], "weight_gradient", dtype)
    weight = tensor_type(float32, problem.weight.shape, problem.weight.strides)
    check(nvidia, "3x3", replace(problem, weight=weight), needed=False)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_precision_of_float32(nvidia: Any, direction: str) -> None:
    """Products are those of float32 unless something else was allowed."""
    window = Window((4, 64, 16, 16), 64, (3, 3), (1, 1), (1, 1), (1, 1))
    case = Case(window, problem_of(window, direction, float32))
    for precision, tolerance in (("highest", 5e-6), ("high", 2e-3), ("medium", 2e-2)):
        choose_float32_matmul_precision(precision)
        found = case.run(nvidia)
        assert found is not None, case.why_not()
        assert case.error(found) < tolerance, precision


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_deterministic(nvidia: Any, direction: str) -> None:
    use_deterministic_algorithms(True)
    window = Window((8, 64, 24, 24), 64, (3, 3), (1, 1), (1, 1), (1, 1))
    case = Case(window, problem_of(window, direction, bfloat16))
    first = case.run(nvidia)
    assert first is not None, case.why_not()
    for _ in range(3):
        again = case.run(nvidia)
        assert again is not None
        assert np.array_equal(first.view(np.uint16), again.view(np.uint16))


def test_plans_come_back_from_the_disk(
    nvidia: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path))
    case = Case(CORE["3x3"], problem_of(CORE["3x3"], "forward", bfloat16))
    pointers = [nvidia.upload(memory) for memory in case.memories]
    built: list[Any] = []
    monkeypatch.setattr(cudnn.Plan, "built", staticmethod(counted(cudnn.Plan.built, built)))
    results = []
    for _ in range(2):
        call = cudnn.prepare(case.problem, 0)
        assert call is not None
        nvidia.run(call, pointers)
        results.append(nvidia.download(pointers[2], case.memories[2]))
    assert len(built) == 1
    assert np.array_equal(results[0].view(np.uint16), results[1].view(np.uint16))
    # What the library does not take back is made anew, and written over.
    for path in (tmp_path / "cuda" / "plans").iterdir():
        key = path.stem
        cudnn._store._disk().write(key, Entry(b"nothing that cuDNN would write", ()))
    for count in (2, 2):
        assert cudnn.prepare(case.problem, 0) is not None
        assert len(built) == count


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_plans_are_tried_out(
    nvidia: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, direction: str
) -> None:
    """The fastest of several plans, and what comes back of it from the disk."""
    monkeypatch.setenv("FLAME_CUDA_TUNE", "1")
    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "SMALL_SECONDS", 0.0)
    tried: list[Any] = []
    monkeypatch.setattr(cudnn, "try_plans", counted(cudnn.try_plans, tried))
    window = Window((2, 64, 64, 64), 64, (3, 3), (1, 1), (1, 1), (1, 1))
    case = Case(window, problem_of(window, direction, bfloat16))
    for _ in range(2):
        libraries._prepared.clear()
        found = case.run(nvidia)
        assert found is not None, case.why_not()
        assert case.error(found) < TOLERANCES[bfloat16]
    assert len(tried) == 1


@pytest.mark.parametrize("dtype", [bfloat16, float16], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("faster", [0, 1], ids=["cuDNN", "cuBLASLt"])
def test_single_elements_by_either_library(
    nvidia: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, direction: str, dtype: DType,
    faster: int,
) -> None:  # fmt: skip
    monkeypatch.setenv("FLAME_CUDA_TUNE", "1")
    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "SMALL_SECONDS", 0.0)
    timed: list[Any] = []
    real = pointwise._faster

    def forced(*arguments: Any) -> int:
        timed.append(real(*arguments))
        return faster

    monkeypatch.setattr(pointwise, "_faster", forced)
    window = Window((2, 32, 9, 7), 64, (1, 1), (1, 1), (0, 0), (1, 1))
    for bias in (False, True)[: 1 + (direction == "forward")]:
        case = Case(window, problem_of(window, direction, dtype, bias=bias))
        libraries._prepared.clear()
        found = case.run(nvidia)
        assert found is not None, case.why_not()
        assert case.error(found) < TOLERANCES[dtype]
        # cuDNN refuses some of these; then there is nothing to choose
        assert len(timed) == 1 or cudnn.prepare(case.problem, 0) is None
        timed.clear()


def counted(function: Any, calls: list[Any]) -> Any:
    def counting(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    return counting


def test_captured_calls_replay(nvidia: Any) -> None:
    case = Case(CORE["3x3"], problem_of(CORE["3x3"], "forward", bfloat16))
    pointers = [nvidia.upload(memory) for memory in case.memories]
    prepared = prepare(case.problem, 0)
    assert prepared is not None
    workspace = nvidia.allocate(prepared.workspace)
    nvidia.replay(nvidia.capture(prepared, pointers, workspace))
    found = case.shaped(nvidia.download(pointers[2], case.memories[2]), case.result)
    assert case.error(found) < TOLERANCES[bfloat16]


def test_unaligned_operands_are_told(nvidia: Any) -> None:
    prepared = prepare(problem_of(CORE["3x3"], "forward", bfloat16), 0)
    assert prepared is not None
    with pytest.raises(CudnnError, match="aligned to 16 bytes"):
        prepared.enqueue((514, 512, 512), 0, nvidia.stream)
