"""Products by the processor's matrix unit against float64, and against sums in float32."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import flame
from flame.ops.contraction import tiles_amx
from flame.ops.op import interpreter
from flame.runtime.cpu import amx
from flame.tensor import Tensor
from tests.unit.ops.test_products_kernels import laid_out

pytestmark = pytest.mark.skipif(not amx.available(), reason=f"no matrix unit: {amx.status()}")
Array = np.ndarray[Any, Any]
UNIT = 2.0**-24


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every product that can, uses the unit, however small."""
    monkeypatch.setattr(tiles_amx, "pays", lambda cut, products: True)
    forget()
    yield
    forget()


def forget() -> None:
    interpreter().forget_plans()


def by_vectors(a: Tensor, b: Tensor) -> Array:
    """The product by the kernels that other processors have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles_amx, "products_for", lambda *_: 0)
        patch.setattr("flame.ops.contraction.lowering.products_for", lambda *_: 0)
        forget()
        made = (a @ b).numpy()
    forget()
    return made


def serial_sums(a: Array, b: Array) -> Array:
    """Each sum by fused multiplications and additions in float32, one after the other."""
    total = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for k in range(a.shape[1]):
        total = (a[:, k : k + 1].astype(np.float64) * b[k : k + 1] + total).astype(np.float32)
    return total


def errors(made: Array, a: Array, b: Array) -> Array:
    """In units of the last place of the sums of absolute products."""
    exact = a.astype(np.longdouble) @ b.astype(np.longdouble)
    size = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)
    return np.asarray(np.abs(made - exact) / size / UNIT, np.float64)


NUMBERS = {
    "normal": lambda rng, *shape: rng.standard_normal(shape),
    "uniform": lambda rng, *shape: rng.uniform(size=shape),
    "wide": lambda rng, *shape: rng.standard_normal(shape) * np.exp(8 * rng.standard_normal(shape)),
    "third": lambda rng, *shape: np.full(shape, 1 / 3),
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("depth", [32, 100, 256, 1000, 4096])
def test_as_exact_as_float32(kind: str, depth: int) -> None:
    rng = np.random.default_rng(0)
    a = NUMBERS[kind](rng, 64, depth).astype(np.float32)
    b = NUMBERS[kind](rng, depth, 96).astype(np.float32)
    made = errors((flame.from_numpy(a) @ flame.from_numpy(b)).numpy(), a, b)
    plain = errors(serial_sums(a, b), a, b)
    assert made.max() <= 1.5 * plain.max() + 0.5
    assert np.sqrt((made**2).mean()) <= 1.5 * np.sqrt((plain**2).mean())


def test_what_the_precisions_mean() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.uniform(1, 2, (128, 128)).astype(np.float32) for _ in range(2))
    worst = {}
    assert flame.get_float32_matmul_precision() == "highest"
    try:
        for precision in ("highest", "high", "medium"):
            flame.set_float32_matmul_precision(precision)
            assert flame.get_float32_matmul_precision() == precision
            made = (flame.from_numpy(a) @ flame.from_numpy(b)).numpy()
            worst[precision] = errors(made, a, b).max() * UNIT
    finally:
        flame.set_float32_matmul_precision("highest")
    assert worst["highest"] < 1e-6 < worst["high"] < 2.0**-16 < worst["medium"] < 2.0**-7
    with pytest.raises(flame.core.errors.ArgumentError, match="'exact' is none of highest, high"):
        flame.set_float32_matmul_precision("exact")


def test_compiled_steps_notice_another_precision() -> None:
    rng = np.random.default_rng(1)
    a, b = (flame.from_numpy(rng.uniform(1, 2, (128, 128)).astype(np.float32)) for _ in range(2))
    product = flame.compile(lambda x, y: x @ y)
    try:
        made = {}
        for precision in ("highest", "medium", "highest"):
            flame.set_float32_matmul_precision(precision)
            made.setdefault(precision, []).append(product(a, b).numpy())
            np.testing.assert_array_equal(made[precision][-1], (a @ b).numpy())
    finally:
        flame.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(*made["highest"])
    assert (made["highest"][0] != made["medium"][0]).any()
    assert product.recordings == 2


LAYOUTS = ("plain", "transposed", "sliced", "strided")


@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)))
@pytest.mark.parametrize("dtype", [flame.float32, flame.float16, flame.bfloat16])
def test_layouts_and_odd_sizes(layouts: tuple[str, str], dtype: flame.DType) -> None:
    tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype.name]
    rng = np.random.default_rng(2)
    for m, depth, n in ((32, 32, 32), (33, 35, 63), (100, 300, 70), (70, 513, 130)):
        a = laid_out(rng.standard_normal((m, depth)), layouts[0], dtype)
        b = laid_out(rng.standard_normal((depth, n)), layouts[1], dtype)
        left, right = (x.to(flame.float64).numpy() for x in (a, b))
        made = (a @ b).to(flame.float64).numpy()
        error = np.abs(made - left @ right) / (np.abs(left) @ np.abs(right))
        assert error.max() < tolerance


def test_batches_and_shared_factors() -> None:
    rng = np.random.default_rng(3)
    shapes = [((3, 40, 64), (3, 64, 50)), ((2, 1, 40, 64), (3, 64, 50)), ((4, 40, 64), (64, 50))]
    for left, right in shapes:
        a, b = (rng.standard_normal(s).astype(np.float32) for s in (left, right))
        made = (flame.from_numpy(a) @ flame.from_numpy(b)).numpy()
        np.testing.assert_allclose(made, a.astype(np.float64) @ b, atol=1e-4)


@pytest.mark.parametrize("layouts", [("plain", "plain"), ("transposed", "transposed")])
def test_infinite_huge_and_no_numbers(layouts: tuple[str, str]) -> None:
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((100, 300)), rng.standard_normal((300, 70))
    a[0, 1], a[50, 299], a[97, 3], a[40, 40] = np.nan, np.inf, -np.inf, 3.4028e38
    b[2, 3], b[299, 69], b[5, 60], b[3, 12] = -np.inf, 0.0, np.nan, 0.0
    left, right = laid_out(a, layouts[0], flame.float32), laid_out(b, layouts[1], flame.float32)
    made, expected = (left @ right).numpy(), by_vectors(left, right)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.where(finite, 0, made), np.where(finite, 0, expected))
    np.testing.assert_allclose(made[finite], expected[finite], rtol=1e-4, atol=1e-4)


def test_zeros_and_whole_numbers_are_exact() -> None:
    rng = np.random.default_rng(5)
    a, b = (rng.integers(-99, 100, s).astype(np.float32) for s in ((64, 500), (500, 64)))
    a[:, ::3] = 0
    np.testing.assert_array_equal((flame.from_numpy(a) @ flame.from_numpy(b)).numpy(), a @ b)


@pytest.mark.parametrize("poisoned", [False, True])
def test_results_do_not_depend_on_threads(poisoned: bool) -> None:
    rng = np.random.default_rng(6)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((700, 600), (600, 1100)))
    if poisoned:
        a[130, 20] = b[400, 900] = np.nan
    before = flame.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 3):
            flame.set_num_threads(threads)
            forget()
            made.append((flame.from_numpy(a) @ flame.from_numpy(b)).numpy())
    finally:
        flame.set_num_threads(before)
    for other in made[1:]:
        np.testing.assert_array_equal(made[0].view(np.uint32), other.view(np.uint32))


def test_epilogues_and_gradients() -> None:
    rng = np.random.default_rng(7)
    x, w, bias = (
        flame.from_numpy(rng.standard_normal(s).astype(np.float32)).requires_grad_()
        for s in ((70, 90), (50, 90), (50,))
    )

    def step(x: Tensor, w: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y = flame.nn.functional.gelu(flame.nn.functional.linear(x, w, bias)) * 2
        return (y, *flame.autograd.grad(y.square().sum(), (x, w, bias)))

    exact = step(*(t.detach().to(flame.float64).requires_grad_() for t in (x, w, bias)))
    for made in (step(x, w, bias), flame.compile(step)(x, w, bias)):
        for ours, theirs in zip(made, exact, strict=True):
            expected = theirs.detach().numpy()
            scale = np.abs(expected).max()
            np.testing.assert_allclose(ours.detach().numpy(), expected, atol=2e-6 * scale)


def test_the_environment_turns_the_unit_off() -> None:
    text = (
        "import flame, numpy as np; from flame.runtime.cpu import amx; print(amx.status());"
        "a = flame.from_numpy(np.full((256, 256), 1 / 3, np.float32)); print((a @ a).numpy()[0, 0])"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", text],
            env={**os.environ, "FLAME_CPU_AMX": value},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")
        for value in ("1", "0")
    ]
    assert [lines[0] for lines in found] == ["", "turned off by FLAME_CPU_AMX=0"]
    numbers = [float(lines[1]) for lines in found]
    assert numbers[0] != numbers[1]  # sums in another order
    assert numbers == pytest.approx([256 / 9] * 2, rel=1e-5)
