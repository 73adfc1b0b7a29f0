"""Matrix products: every way through the kernels against sums in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import flame
from flame.core.types import tensor_type
from flame.kernel.builder import Ref
from flame.ops.contraction import Factor, PlainStore, blocking, contract, lowering
from flame.ops.contraction.blocking import blocking_for, tile_for
from flame.ops.op import interpreter
from flame.tensor import Tensor

ODD = (1, 3, 13, 14, 15, 17, 31, 33, 65, 257)
TOLERANCE = {"float32": 3e-6, "float64": 1e-14, "float16": 2e-3, "bfloat16": 1.6e-2}
rng = np.random.default_rng(0)


def forget_plans() -> None:
    """Plans are made anew, as the test changes how they are made."""
    interpreter().forget_plans()


def laid_out(numbers: np.ndarray, layout: str, dtype: flame.DType) -> Tensor:
    """A tensor of these numbers whose memory between them, where there is any, is NaN."""
    *batch, rows, columns = numbers.shape
    if layout == "transposed":
        return flame.tensor(np.ascontiguousarray(numbers.swapaxes(-1, -2)), dtype=dtype).transpose(
            -1, -2
        )
    if layout == "sliced":
        wide = np.full((*batch, rows + 3, columns + 5), np.nan)
        wide[..., 1 : 1 + rows, 2 : 2 + columns] = numbers
        return flame.tensor(wide, dtype=dtype)[..., 1 : 1 + rows, 2 : 2 + columns]
    if layout == "strided":
        wide = np.full((*batch, 2 * rows, 3 * columns), np.nan)
        wide[..., ::2, 1::3] = numbers
        return flame.tensor(wide, dtype=dtype)[..., ::2, 1::3]
    return flame.tensor(numbers, dtype=dtype)


def check(
    a: tuple[int, ...], b: tuple[int, ...], layouts: tuple[str, str], dtype: flame.DType
) -> None:
    left = laid_out(rng.standard_normal(a), layouts[0], dtype)
    right = laid_out(rng.standard_normal(b), layouts[1], dtype)
    exact = left.to(flame.float64).numpy() @ right.to(flame.float64).numpy()
    made = flame.matmul(left, right)
    assert made.dtype is dtype
    assert made.shape == exact.shape
    error = np.abs(made.to(flame.float64).numpy() - exact) / (np.sqrt(a[-1]) + np.abs(exact))
    assert error.max(initial=0) < TOLERANCE[dtype.name]


@pytest.mark.parametrize("m", ODD)
@pytest.mark.parametrize("layouts", [("plain", "plain"), ("plain", "transposed")])
def test_odd_sizes(m: int, layouts: tuple[str, str]) -> None:
    for n, depth in itertools.product(ODD[::2], ODD[1::3]):
        check((m, depth), (depth, n), layouts, flame.float32)


@pytest.mark.parametrize("dtype", [flame.float32, flame.float64, flame.float16, flame.bfloat16])
def test_layouts(dtype: flame.DType) -> None:
    ways = ("plain", "transposed", "sliced", "strided")
    for layouts in itertools.product(ways, ways):
        check((20, 33), (33, 37), layouts, dtype)  # as it is
        check((90, 70), (70, 130), layouts, dtype)  # copied
        check((70, 600), (600, 70), layouts, dtype)  # in chunks of the depth
        check((3, 300), (300, 65), layouts, dtype)  # few rows


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((4, 20, 33), (33, 37)),
        ((4, 1, 33), (1, 33, 37)),
        ((2, 1, 90, 70), (3, 70, 130)),
        ((90, 70), (2, 70, 130)),
        ((2, 3, 1, 64), (2, 3, 64, 50)),
        ((3, 40, 64), (3, 64, 1)),
    ],
)
def test_batches(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    for layouts in itertools.product(("plain", "transposed", "sliced"), repeat=2):
        check(a, b, layouts, flame.float32)


def test_expanded_operands() -> None:
    x = flame.tensor(rng.standard_normal((1, 70)), dtype=flame.float32)
    y = flame.tensor(rng.standard_normal((70, 1)), dtype=flame.float32)
    made = x.expand(50, 70) @ y.expand(70, 40)
    expected = np.broadcast_to(x.numpy() @ y.numpy(), (50, 40))
    np.testing.assert_allclose(made.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("m", "depth", "n"), [(0, 5, 4), (5, 0, 4), (5, 4, 0), (0, 0, 0), (1, 0, 1)]
)
def test_nothing_to_sum(m: int, depth: int, n: int) -> None:
    made = flame.ones(m, depth) @ flame.ones(depth, n)
    assert made.shape == (m, n)
    assert (made.numpy() == 0).all()


@pytest.mark.parametrize("columns", ["plain", "transposed"])
@pytest.mark.parametrize(("m", "depth", "n"), [(5, 9, 7), (90, 70, 130), (2, 300, 70)])
def test_nan_and_infinity_reach_the_sums_they_are_in(
    m: int, depth: int, n: int, columns: str
) -> None:
    a, b = rng.standard_normal((m, depth)), rng.standard_normal((depth, n))
    a[0, 1], a[-1, -1], b[2, 3], b[depth - 1, n - 1] = np.nan, np.inf, -np.inf, 0.0
    with np.errstate(invalid="ignore"):
        expected = (a[:, :, None] * b[None]).sum(1)
    made = (flame.tensor(a) @ laid_out(b, columns, flame.tensor(a).dtype)).numpy()
    np.testing.assert_array_equal(np.isnan(made), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(made), np.isinf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(made[finite], expected[finite], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("columns", ["plain", "transposed"])
@pytest.mark.parametrize(
    ("m", "depth", "n"), [(300, 100, 200), (500, 700, 90), (2, 100_000, 2), (40, 40, 1000)]
)
def test_results_do_not_depend_on_threads(
    m: int, depth: int, n: int, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = laid_out(rng.standard_normal((m, depth)), "plain", flame.float32)
    b = laid_out(rng.standard_normal((depth, n)), columns, flame.float32)
    made = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(lowering, "get_num_threads", lambda threads=threads: threads)
        forget_plans()
        made.append((a @ b).numpy())
    np.testing.assert_array_equal(made[0], made[1])
    np.testing.assert_array_equal(made[0], made[2])


@pytest.mark.parametrize("width", [16, 32, 64])
def test_tiles_fit_the_registers(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "vector_bytes", lambda: width)
    registers = 32 if width == 64 else 16
    for m, n in itertools.product((1, 2, 7, 14, 30, 128, 1000), repeat=2):
        tile = tile_for(flame.float32, m, n)
        assert tile.rows <= m
        assert tile.rows * tile.vectors + 1 <= registers
        assert tile.lanes == tile.vectors * width // 4


def test_blocks_keep_threads_busy() -> None:
    cut = blocking_for(flame.float32, 2048, 1024, 256, 1, 8, deep=True)
    assert cut.row_blocks * cut.column_blocks >= 16
    small = blocking_for(flame.float32, 32, 32, 32, 1, 8, deep=True)
    assert small.row_blocks * small.column_blocks == 1


@pytest.mark.parametrize("width", [16, 32, 64])
def test_equal_kernels_serve_other_sizes(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "vector_bytes", lambda: width)

    def text(m: int, depth: int, n: int) -> list[str]:
        x, y = (tensor_type(flame.float32, s) for s in ((m, depth), (depth, n)))
        factors = Factor(Ref("input", 0), x, -2), Factor(Ref("input", 1), y, -1)
        made = contract(*factors, (m, n), PlainStore(tensor_type(flame.float32, (m, n))))
        return [str(bound.kernel) for bound in made.kernels]

    # Whole tiles of every width: of 6 or 14 rows, and at most 64 columns.
    assert text(84, 30, 192) == text(84, 40, 128) == text(168, 20, 64)
