"""Column-major descriptions of products, against an emulation of cuBLASLt in NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from flame.core.dtypes import bfloat16, float16, float32, float64, int32
from flame.kernel.library import Batch, MatmulProblem
from flame.runtime.cuda.libraries.matmul_layout import Description, Layout, describe

ROWS, COLUMNS = "rows", "columns"


def strides(kind: str, rows: int, columns: int, pad: int) -> tuple[int, int]:
    return (columns + pad, 1) if kind == ROWS else (1, rows + pad)


def view(memory: np.ndarray, offset: int, shape: tuple[int, ...], steps: tuple[int, ...]):
    size = memory.itemsize
    return np.lib.stride_tricks.as_strided(
        memory[offset:], shape, tuple(step * size for step in steps)
    )


def columns_of(memory: np.ndarray, at: int, layout: Layout) -> np.ndarray:
    return view(memory, at, (layout.rows, layout.columns), (1, layout.leading))


def emulate(
    description: Description, a: np.ndarray, b: np.ndarray, d: np.ndarray, bias: np.ndarray | None
) -> None:
    """What cuBLASLt does with the description."""
    if description.idle:
        return
    if description.empty_sum:
        a, b = np.zeros(1 << 12), np.zeros(1 << 12)
    for of_a, of_b, of_d in description.offsets:
        for index in range(description.count):
            sides = ((b, of_b), (a, of_a)) if description.swapped else ((a, of_a), (b, of_b))
            first, second = (
                columns_of(memory, offset + index * layout.step, layout)
                for (memory, offset), layout in zip(
                    sides, (description.first, description.second), strict=True
                )
            )
            first = first.T if description.transpose_first else first
            second = second.T if description.transpose_second else second
            target = columns_of(d, of_d + index * description.result.step, description.result)
            product = first @ second
            if bias is not None:
                product = product + bias[:, None]
            target[...] = product + (target if description.accumulate else 0)


def check(problem: MatmulProblem, *, swapped: bool | None = None) -> Description:
    description = describe(problem)
    assert description is not None
    if swapped is not None:
        assert description.swapped is swapped
    generator = np.random.default_rng(0)
    sizes = tuple(batch.size for batch in problem.batch)
    memories, views = [], []
    for name, rows, columns in (
        ("a", problem.m, problem.k),
        ("b", problem.k, problem.n),
        ("d", problem.m, problem.n),
    ):
        shape = (*sizes, rows, columns)
        steps = (*(getattr(batch, name) for batch in problem.batch), *getattr(problem, name))
        span = 1 + sum((max(size, 1) - 1) * step for size, step in zip(shape, steps, strict=True))
        memory = generator.standard_normal(span)
        memories.append(memory)
        views.append(view(memory, 0, shape, steps))
    a, b, d = views
    bias = generator.standard_normal(problem.n) if problem.epilogue == "bias" else None
    expected = a @ b
    if bias is not None:
        expected = expected + bias
    if problem.accumulate:
        expected = expected + d
    untouched = memories[2].copy()
    emulate(description, *memories, bias)
    np.testing.assert_allclose(d, expected, atol=1e-12)
    # What lies between the elements of d is left as it was.
    d[...] = 0
    view(untouched, 0, d.shape, tuple(step // d.itemsize for step in d.strides))[...] = 0
    assert np.array_equal(memories[2], untouched)
    return description


@pytest.mark.parametrize("kinds", list(itertools.product((ROWS, COLUMNS), repeat=3)))
@pytest.mark.parametrize("sizes", [(7, 13, 5), (8, 16, 24), (1, 9, 4), (6, 1, 3), (4, 5, 1)])
@pytest.mark.parametrize("pad", [0, 3])
def test_all_layouts(kinds: tuple[str, ...], sizes: tuple[int, int, int], pad: int) -> None:
    m, n, k = sizes
    a, b, d = (
        strides(kind, rows, columns, pad)
        for kind, (rows, columns) in zip(kinds, ((m, k), (k, n), (m, n)), strict=True)
    )
    problem = MatmulProblem(m, n, k, (), float64, float64, a, b, d)
    check(problem)
    check(MatmulProblem(m, n, k, (), float64, float64, a, b, d, accumulate=True))


def test_random_batches() -> None:
    generator = np.random.default_rng(1)
    for _ in range(200):
        m, n, k = (int(size) for size in generator.integers(1, 6, 3))
        kinds = [ROWS if generator.random() < 0.5 else COLUMNS for _ in range(3)]
        shapes = ((m, k), (k, n), (m, n))
        matrices = [
            strides(kind, *shape, int(generator.integers(0, 3)))
            for kind, shape in zip(kinds, shapes, strict=True)
        ]
        steps = [
            1 + (rows - 1) * row + (columns - 1) * column
            for (rows, columns), (row, column) in zip(shapes, matrices, strict=True)
        ]
        batches: list[Batch] = []
        for _ in range(int(generator.integers(0, 4))):
            size = int(generator.integers(1, 4))
            shared = generator.random(2) < 0.3
            batches.insert(
                0, Batch(size, 0 if shared[0] else steps[0], 0 if shared[1] else steps[1], steps[2])
            )
            gap = int(generator.integers(0, 2))
            steps = [step * size + gap for step in steps]
        a, b, d = matrices
        check(MatmulProblem(m, n, k, tuple(batches), float64, float64, a, b, d))


def test_linear_is_one_product() -> None:
    """(B, T, K) @ (K, N) with a weight stored (N, K) is one product of B * T rows."""
    problem = MatmulProblem(
        5, 4, 6, (Batch(3, 30, 0, 20),), float64, float64, (6, 1), (1, 6), (4, 1), epilogue="bias"
    )
    description = check(problem, swapped=True)
    assert description.count == 1
    assert description.offsets == ((0, 0, 0),)
    assert description.first == Layout(6, 4, 6, 0)
    assert description.transpose_first
    assert description.second == Layout(6, 15, 6, 0)
    assert description.result == Layout(4, 15, 4, 0)
    assert description.flops == 2 * 15 * 4 * 6


def test_many_products_of_one_row_become_rows() -> None:
    problem = MatmulProblem(1, 4, 6, (Batch(3, 6, 0, 4),), float64, float64, (6, 1), (4, 1), (4, 1))
    assert check(problem).second.columns == 3


def test_outer_batches_are_looped_over() -> None:
    """Three heads of two sequences, that share a matrix: the larger dimension is the library's."""
    batch = (Batch(2, 300, 100, 200), Batch(3, 20, 0, 20))
    problem = MatmulProblem(4, 5, 4, batch, float64, float64, (4, 1), (1, 4), (5, 1))
    description = check(problem)
    assert description.count == 3
    assert description.offsets == ((0, 0, 0), (300, 100, 200))


def test_epilogue_needs_rows_of_the_result() -> None:
    arguments = (4, 5, 3, (), float32, float32, (3, 1), (5, 1))
    assert describe(MatmulProblem(*arguments, (1, 4), epilogue="bias")) is None
    assert describe(MatmulProblem(*arguments, (1, 4))) is not None
    one_column = MatmulProblem(4, 1, 3, (), float32, float32, (3, 1), (1, 1), (1, 4))
    assert describe(one_column) is not None


@pytest.mark.parametrize("epilogue", ["gelu_aux_bias", "dgelu"])
def test_aux_needs_a_leading_dimension_of_eights(epilogue: str) -> None:
    def problem(n: int) -> MatmulProblem:
        return MatmulProblem(
            4, n, 3, (), bfloat16, bfloat16, (3, 1), (n, 1), (n, 1), epilogue=epilogue
        )

    assert describe(problem(12)) is None
    assert describe(problem(16)) is not None


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(float16, bfloat16), (int32, int32), (float32, float64), (float32, float16)],
)
def test_other_dtypes_are_refused(dtype: object, result: object) -> None:
    problem = MatmulProblem(2, 2, 2, (), dtype, result, (2, 1), (2, 1), (2, 1))
    assert describe(problem) is None


def test_strides_that_are_no_leading_dimension_are_refused() -> None:
    fits = ((3, 1), (5, 1), (5, 1))
    for index, bad in itertools.product(range(3), [(10, 2), (0, 1), (1, 0), (2, 1)]):
        a, b, d = (bad if at == index else strides for at, strides in enumerate(fits))
        assert describe(MatmulProblem(4, 5, 3, (), float32, float32, a, b, d)) is None
    overlap = MatmulProblem(4, 5, 3, (Batch(2, 12, 15, 0),), float32, float32, *fits)
    assert describe(overlap) is None


@pytest.mark.parametrize("epilogue", ["relu_bias", "gelu_bias", "dgelu"])
def test_accumulation_does_not_pass_an_epilogue(epilogue: str) -> None:
    fits = ((8, 1), (8, 1), (8, 1))
    problem = MatmulProblem(
        8, 8, 8, (), float32, float32, *fits, epilogue=epilogue, accumulate=True
    )
    assert describe(problem) is None


def test_empty_products() -> None:
    for m, n, batch in ((0, 5, 1), (4, 0, 1), (4, 5, 0)):
        batches = (Batch(batch, 12, 15, 20),)
        problem = MatmulProblem(m, n, 3, batches, float32, float32, (3, 1), (5, 1), (5, 1))
        description = describe(problem)
        assert description is not None
        assert description.idle


@pytest.mark.parametrize("epilogue", ["none", "bias"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_empty_sums(epilogue: str, accumulate: bool) -> None:
    problem = MatmulProblem(
        4, 5, 0, (Batch(3, 0, 0, 20),), float64, float64, (0, 1), (5, 1), (5, 1),
        epilogue=epilogue, accumulate=accumulate,
    )  # fmt: skip
    description = check(problem)
    assert description.idle is (accumulate and epilogue == "none")
    assert description.empty_sum


def test_alignment_is_what_all_matrices_have() -> None:
    def alignment(batch: tuple[Batch, ...]) -> int:
        problem = MatmulProblem(2, 2, 2, batch, bfloat16, float32, (8, 1), (1, 8), (8, 1))
        description = describe(problem)
        assert description is not None
        return description.alignment

    assert alignment(()) == 16
    assert alignment((Batch(2, 16, 16, 16),)) == 16
    assert alignment((Batch(2, 12, 16, 16),)) == 8
    assert alignment((Batch(2, 16, 17, 16),)) == 2
    assert alignment((Batch(3, 16, 16, 17),)) == 4
    assert alignment((Batch(2, 50, 48, 48), Batch(3, 16, 16, 16))) == 4
