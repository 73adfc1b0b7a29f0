"""Sorting, scans and indexed writes on a real device: large, and the same bits on every run.

``python -m tests.gpu.test_sorting`` prints times beside PyTorch's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import flame

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not flame.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

RNG = np.random.default_rng(0)


def there(array: Any) -> flame.Tensor:
    return flame.from_numpy(np.ascontiguousarray(array)).to("cuda")


def back(tensor: flame.Tensor) -> Any:
    return tensor.cpu().numpy()


SHAPES = [(10_000_000,), (4096, 1000), (300_000, 7), (64, 50_257), (3, 1_000_001)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sort_is_stable(shape: tuple[int, ...]) -> None:
    x = RNG.integers(0, 1000, shape).astype(np.float32)
    for _ in range(3):
        np.testing.assert_array_equal(back(there(x).argsort(-1)), np.argsort(x, -1, "stable"))
    down = back(there(x).sort(-1, descending=True).values)
    np.testing.assert_array_equal(down, np.sort(x, -1)[..., ::-1])


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int8, np.float16])
def test_sort_of_dtypes(dtype: Any) -> None:
    x = (RNG.standard_normal((5, 100_003)) * 50).astype(dtype)
    np.testing.assert_array_equal(back(there(x).argsort(1)), np.argsort(x, 1, "stable"))
    np.testing.assert_array_equal(back(there(x.T).argsort(0)), np.argsort(x.T, 0, "stable"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 100])
def test_topk(shape: tuple[int, ...], k: int) -> None:
    k = min(k, shape[-1])
    x = RNG.integers(0, 5000, shape).astype(np.float32)
    got = back(there(x).topk(k).indices)
    order = np.argsort(-x, -1, "stable")[..., :k]
    np.testing.assert_array_equal(got, order)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scans(shape: tuple[int, ...]) -> None:
    whole = RNG.integers(-9, 9, shape)
    np.testing.assert_array_equal(back(there(whole).cumsum(-1)), np.cumsum(whole, -1))
    x = RNG.standard_normal(shape).astype(np.float32)
    first = back(there(x).cumsum(-1))
    np.testing.assert_array_equal(first, back(there(x).cumsum(-1)))
    exact = np.cumsum(x.astype(np.float64), -1)
    assert np.abs(first - exact).max() < 1e-4 * np.sqrt(shape[-1]) + 1e-5 * np.abs(exact).max()
    best = back(there(x).cummax(-1).values)
    np.testing.assert_array_equal(best, np.maximum.accumulate(x, -1))


@pytest.mark.parametrize("different", [1, 50, 50_000])
@pytest.mark.parametrize("columns", [1, 8, 768])
def test_writes_that_collide(different: int, columns: int) -> None:
    rows = 200_000 if columns < 100 else 20_000
    index = RNG.integers(0, different, rows)
    values = RNG.integers(-8, 8, (rows, columns)).astype(np.float32)  # sums are exact
    want = np.zeros((different, columns), np.float32)
    np.add.at(want, index, values)
    start = flame.zeros(different, columns, device="cuda")
    for _ in range(3):
        got = start.index_add(0, there(index), there(values))
        np.testing.assert_array_equal(back(got), want)
    noise = there(RNG.standard_normal((rows, columns)).astype(np.float32))
    first, second = (back(start.index_add(0, there(index), noise)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_scatter_along_lines() -> None:
    index = RNG.integers(0, 100, (500, 3000))
    values = RNG.integers(-8, 8, index.shape).astype(np.float32)
    want = np.zeros((500, 100), np.float32)
    np.add.at(want, (np.arange(500)[:, None], index), values)
    got = flame.zeros(500, 100, device="cuda").scatter_add(1, there(index), there(values))
    np.testing.assert_array_equal(back(got), want)


def test_sizes_that_depend_on_data() -> None:
    x = RNG.integers(0, 100_000, 3_000_000)
    values, inverse, counts = flame.unique(there(x), return_inverse=True, return_counts=True)
    want = np.unique(x, return_inverse=True, return_counts=True)
    for got, expected in zip((values, inverse, counts), want, strict=True):
        np.testing.assert_array_equal(back(got), expected)
    mask = RNG.random((1000, 3000)) < 0.3
    np.testing.assert_array_equal(back(there(mask).nonzero()), np.argwhere(mask))
    np.testing.assert_array_equal(back(flame.bincount(there(x))), np.bincount(x))


@pytest.mark.parametrize(
    "shape", [(100_000, 64), (64, 100_000), (10_000_000,), (32, 64, 5000)], ids=str
)
def test_sums(shape: tuple[int, ...]) -> None:
    x = RNG.integers(-8, 8, shape).astype(np.float32)
    for dim in range(x.ndim):
        np.testing.assert_array_equal(back(there(x).sum(dim)), x.sum(dim))
    assert back(there(x).sum()) == x.astype(np.float64).sum()


def _milliseconds(function: Callable[[], Any], wait: Callable[[], Any]) -> float:
    function()
    wait()
    begin = time.perf_counter()
    for _ in range(10):
        function()
    wait()
    return (time.perf_counter() - begin) * 100


def _compare() -> None:
    import torch

    x = RNG.standard_normal(10_000_000).astype(np.float32)
    index = RNG.integers(0, 50_000, 16_384)
    wide = RNG.standard_normal((16_384, 768)).astype(np.float32)
    calls: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
        "sort 1e7": lambda lib, x, i, w: x.sort(),
        "sort 10000x1000": lambda lib, x, i, w: x.reshape(10_000, 1000).sort(-1),
        "topk 5 of 1e7": lambda lib, x, i, w: x.topk(5),
        "topk 50 of 200x50000": lambda lib, x, i, w: x.reshape(200, 50_000).topk(50),
        "cumsum 1e7": lambda lib, x, i, w: x.cumsum(0),
        "cumsum 10000x1000": lambda lib, x, i, w: x.reshape(10_000, 1000).cumsum(-1),
        "index_add 16384x768": lambda lib, x, i, w: lib.zeros(50_000, 768, device="cuda").index_add(
            0, i, w
        ),
        "unique 1e7": lambda lib, x, i, w: lib.unique((x * 1000).to(lib.int64)),
        "nonzero 1e7": lambda lib, x, i, w: (x > 0).nonzero(),
        "sum of columns": lambda lib, x, i, w: w.sum(0),
    }
    for name, call in calls.items():
        took = []
        for lib in (flame, torch):
            given = [lib.from_numpy(a).to("cuda") for a in (x, index, wide)]
            with lib.no_grad():
                took.append(_milliseconds(partial(call, lib, *given), lib.cuda.synchronize))
        print(f"{name:24} flame {took[0]:8.3f} ms   torch {took[1]:8.3f} ms")


if __name__ == "__main__":
    _compare()
