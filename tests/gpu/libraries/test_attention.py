"""cuDNN's attention on a GPU against NumPy in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flame.core.determinism import use_deterministic_algorithms
from flame.core.dtypes import DType, bfloat16, float16, float32
from flame.core.types import TensorType, tensor_type
from flame.kernel.library import AttentionProblem
from flame.runtime.cuda.libraries import cudnn

TOLERANCES = {float16: 2e-3, bfloat16: 8e-3}


def heads_inside(dtype: DType, batch: int, heads: int, length: int, width: int) -> TensorType:
    """(B, H, L, E) that lies in memory as (B, L, H, E)."""
    strides = (length * heads * width, width, heads * width, 1)
    return tensor_type(dtype, (batch, heads, length, width), strides)


def problem_of(
    *,
    batch: int = 2,
    heads: int = 4,
    groups: int = 4,
    queries: int = 128,
    keys: int = 128,
    width: int = 64,
    value_width: int | None = None,
    dtype: DType = bfloat16,
    causal: bool = True,
    mask: tuple[int, ...] | None = None,
    dropout: float = 0.0,
    rows: bool = False,
) -> AttentionProblem:
    def made(count: int, length: int, size: int) -> TensorType:
        if rows:
            return tensor_type(dtype, (batch, count, length, size))
        return heads_inside(dtype, batch, count, length, size)

    value_width = value_width or width
    return AttentionProblem(
        False,
        made(heads, queries, width),
        made(groups, keys, width),
        made(groups, keys, value_width),
        made(heads, queries, value_width),
        None if mask is None else tensor_type(dtype, mask),
        causal,
        width**-0.5,
        dropout,
    )


class Case:
    """Operands, and what result, log_sum and the gradients have to be (without dropout)."""

    def __init__(self, problem: AttentionProblem) -> None:
        self.problem = problem
        generator = np.random.default_rng(5)

        def drawn(type_: TensorType) -> np.ndarray:
            return generator.standard_normal(type_.span).astype(type_.dtype.numpy)

        self.query, self.key, self.value = map(drawn, (problem.query, problem.key, problem.value))
        self.grad = drawn(problem.result)
        self.mask = None if problem.mask is None else drawn(problem.mask)
        self._solve()

    def _wide(self, memory: np.ndarray, type_: TensorType) -> np.ndarray:
        return shaped(memory, type_).astype(np.float64)

    def _solve(self) -> None:
        problem = self.problem
        repeats = problem.query.shape[1] // problem.key.shape[1]
        query = self._wide(self.query, problem.query)
        key = np.repeat(self._wide(self.key, problem.key), repeats, 1)
        value = np.repeat(self._wide(self.value, problem.value), repeats, 1)
        grad = self._wide(self.grad, problem.result)
        scores = query @ key.swapaxes(-1, -2) * problem.scale
        if self.mask is not None:
            scores = scores + self.mask.astype(np.float64).reshape(problem.mask.shape)
        if problem.causal:
            allowed = np.tril(np.ones(scores.shape[-2:], bool))
            scores = np.where(allowed, scores, -np.inf)
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        self.log_sum = (top + np.log(total))[..., 0]
        weights = weights / total
        self.result = weights @ value
        of_weights = grad @ value.swapaxes(-1, -2)
        inner = (grad * self.result).sum(-1, keepdims=True)
        of_scores = weights * (of_weights - inner) * problem.scale

        def over_groups(array: np.ndarray) -> np.ndarray:
            batch, heads, *rest = array.shape
            return array.reshape(batch, heads // repeats, repeats, *rest).sum(2)

        self.gradients = (
            of_scores @ key,
            over_groups(of_scores.swapaxes(-1, -2) @ query),
            over_groups(weights.swapaxes(-1, -2) @ grad),
        )

    def forward(self, nvidia: Any, seed: int = 0) -> dict[str, int] | None:
        problem = self.problem
        batch, heads, length, _ = problem.query.shape
        at = {
            "q": nvidia.upload(self.query),
            "k": nvidia.upload(self.key),
            "v": nvidia.upload(self.value),
            "mask": 0 if self.mask is None else nvidia.upload(self.mask),
            "o": nvidia.allocate(self.grad.nbytes),
            "lse": nvidia.allocate(4 * batch * heads * length),
            "seed": nvidia.upload(np.array([seed], np.int64)),
            "offset": nvidia.upload(np.array([16], np.int64)),
        }
        pointers = [at[name] for name in ("q", "k", "v", "mask", "o", "lse")]
        if problem.dropout:
            pointers += [at["seed"], at["offset"]]
        return at if nvidia.solve(problem, pointers) else None

    def backward(self, nvidia: Any, at: dict[str, int]) -> list[np.ndarray] | None:
        types = (self.problem.query, self.problem.key, self.problem.value)
        memories = (self.query, self.key, self.value)
        made = [nvidia.allocate(memory.nbytes) for memory in memories]
        pointers = [nvidia.upload(self.grad), 0]
        pointers += [at[name] for name in ("q", "k", "v", "mask", "o", "lse")] + made
        if self.problem.dropout:
            pointers += [at["seed"], at["offset"]]
        if not nvidia.solve(replace(self.problem, backward=True), pointers):
            return None
        return [
            shaped(nvidia.download(pointer, memory), type_)
            for pointer, memory, type_ in zip(made, memories, types, strict=True)
        ]

    def found_result(self, nvidia: Any, at: dict[str, int]) -> np.ndarray:
        return shaped(nvidia.download(at["o"], self.grad), self.problem.result)


def shaped(memory: np.ndarray, type_: TensorType) -> np.ndarray:
    steps = tuple(step * memory.itemsize for step in type_.strides)
    return np.lib.stride_tricks.as_strided(memory, type_.shape, steps)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    difference = np.linalg.norm(found.astype(np.float64) - expected)
    return float(difference / np.linalg.norm(expected))


def refusal(problem: AttentionProblem) -> str:
    graph = cudnn.describe(problem)
    return "it has no form there" if graph is None else cudnn.refusals[graph, 0]


NEEDED: dict[str, dict[str, Any]] = {
    "causal": {},
    "float16": {"dtype": float16},
    "all keys": {"causal": False},
    "rows": {"rows": True},
    "groups": {"groups": 2},
    "wide": {"width": 128},
    "odd length": {"queries": 77, "keys": 77},
    "cross": {"queries": 64, "keys": 200, "causal": False},
    "one sequence": {"batch": 1, "heads": 1, "groups": 1},
}
OFFERED: dict[str, dict[str, Any]] = {
    "narrow": {"width": 16},
    "very wide": {"width": 256},
    "wider values": {"width": 64, "value_width": 128},
    "causal cross": {"queries": 64, "keys": 128},
    "mask": {"mask": (2, 4, 128, 128), "causal": False},
    "shared mask": {"mask": (128, 128), "causal": False},
    "mask of keys": {"mask": (2, 1, 1, 128), "causal": False},
    "mask, causal": {"mask": (1, 4, 128, 128)},
    "odd mask": {"mask": (77, 77), "queries": 77, "keys": 77, "causal": False},
}


@pytest.mark.parametrize("name", [*NEEDED, *OFFERED])
def test_both_directions(nvidia: Any, name: str) -> None:
    problem = problem_of(**{**NEEDED, **OFFERED}[name])
    case = Case(problem)
    at = case.forward(nvidia)
    if at is None:
        text = f"cuDNN refuses forward: {refusal(problem)[:300]}"
        (pytest.fail if name in NEEDED else pytest.skip)(text)
    assert at is not None
    tolerance = TOLERANCES[problem.query.dtype]
    assert relative(case.found_result(nvidia, at), case.result) < tolerance
    log_sum = nvidia.download(at["lse"], np.empty(case.log_sum.shape, np.float32))
    np.testing.assert_allclose(log_sum, case.log_sum, atol=2e-2, rtol=1e-3)
    gradients = case.backward(nvidia, at)
    if gradients is None:
        text = f"cuDNN refuses backward: {refusal(replace(problem, backward=True))[:300]}"
        (pytest.fail if name in NEEDED else pytest.skip)(text)
    assert gradients is not None
    errors = [relative(*pair) for pair in zip(gradients, case.gradients, strict=True)]
    assert max(errors) < 2 * tolerance, f"dq, dk, dv: {errors}"


def test_packed_operands(nvidia: Any) -> None:
    """q, k and v inside one tensor (B, L, 3, H, E)."""
    batch, length, heads, width = 2, 128, 4, 64
    strides = (3 * length * heads * width, width, 3 * heads * width, 1)
    packed = tensor_type(bfloat16, (batch, heads, length, width), strides)
    problem = replace(problem_of(), query=packed, key=packed, value=packed)
    case = Case(problem)
    at = case.forward(nvidia)
    assert at is not None, refusal(problem)
    assert relative(case.found_result(nvidia, at), case.result) < TOLERANCES[bfloat16]


def test_deterministic_gradients(nvidia: Any) -> None:
    use_deterministic_algorithms(True)
    case = Case(problem_of(queries=512, keys=512))
    at = case.forward(nvidia)
    assert at is not None
    first = case.backward(nvidia, at)
    again = case.backward(nvidia, at)
    assert first is not None
    assert again is not None
    for left, right in zip(first, again, strict=True):
        assert np.array_equal(left.view(np.uint16), right.view(np.uint16))


def test_dropout(nvidia: Any) -> None:
    """The same seed drops the same weights, in both directions; another one drops others."""
    case = Case(problem_of(dropout=0.25, causal=False))
    at = case.forward(nvidia, seed=1)
    if at is None:
        pytest.skip(f"cuDNN refuses dropout: {refusal(case.problem)[:300]}")
    result = case.found_result(nvidia, at)
    again, other = case.forward(nvidia, seed=1), case.forward(nvidia, seed=2)
    assert again is not None
    assert other is not None
    assert np.array_equal(result.view(np.uint16), case.found_result(nvidia, again).view(np.uint16))
    assert relative(case.found_result(nvidia, other), case.result) > 0.05
    assert 0.05 < relative(result, case.result) < 1
    gradients = case.backward(nvidia, at)
    if gradients is None:
        pytest.skip(f"cuDNN refuses: {refusal(replace(case.problem, backward=True))[:300]}")
    # The result is linear in v for given weights, so <do, o> = <dv, v> where both drop alike.
    grad = shaped(case.grad, case.problem.result).astype(np.float64)
    value = shaped(case.value, case.problem.value).astype(np.float64)
    forward = (grad * result.astype(np.float64)).sum()
    backward = (gradients[2].astype(np.float64) * value).sum()
    scale = np.linalg.norm(grad) * np.linalg.norm(result.astype(np.float64))
    assert abs(forward - backward) < 3e-4 * scale


def test_float32_is_not_taken(nvidia: Any) -> None:
    from flame.runtime.cuda.libraries import prepare

    assert prepare(problem_of(dtype=float32), 0) is None
