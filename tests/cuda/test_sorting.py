"""Sorting and what builds on it, eagerly on the emulated device, against the CPU's results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
from flame.core import dtypes
from flame.core.dtypes import DType

DTYPES = (dtypes.float32, dtypes.float64, dtypes.bfloat16, dtypes.int64, dtypes.int8, dtypes.bool_)

pytestmark = pytest.mark.usefixtures("eager_cuda")


def draw(dtype: DType, shape: tuple[int, ...], seed: int = 0) -> Any:
    """Numbers with many equal ones; floats with NaN, infinities and both zeros."""
    rng = np.random.default_rng(seed)
    if dtype.kind == "f":
        values = rng.standard_normal(shape)
        values = np.where(rng.random(shape) < 0.3, np.round(values), values)
        for special in (np.nan, -np.inf, np.inf, -0.0):
            values = np.where(rng.random(shape) < 0.03, special, values)
        return values.astype(dtype.numpy)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    wide = rng.integers(-(1 << 40), 1 << 40, shape) if dtype.bits == 64 else 100
    return (wide if dtype.bits == 64 else rng.integers(-100, 100, shape)).astype(dtype.numpy)


def both(array: Any) -> tuple[Any, Any]:
    """The same numbers on the CPU and on the device."""
    here = flame.from_numpy(np.array(array))
    return here, here.to("cuda")


def same(there: Any, here: Any) -> None:
    assert there.is_cuda
    assert there.dtype is here.dtype
    assert there.shape == here.shape
    got, want = there.cpu(), here
    if here.dtype.kind == "f":  # NumPy knows NaN in its own floats only
        got, want = got.to(dtypes.float64), want.to(dtypes.float64)
    np.testing.assert_array_equal(got.numpy(), want.numpy())


SHAPES = [((1,), 0), ((7,), 0), ((2049,), 0), ((3, 300), 1), ((40, 9), 0), ((0, 3), 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_sort_both_ways(dtype: DType, shape: tuple[int, ...], dim: int) -> None:
    here, there = both(draw(dtype, shape))
    for descending in (False, True):
        want, got = (x.sort(dim, descending=descending) for x in (here, there))
        same(got.indices, want.indices)
        same(got.values, want.values)


@pytest.mark.parametrize("size", [2047, 2048, 4097, 9001])
def test_sort_of_long_lines(size: int) -> None:
    here, there = both(draw(dtypes.float32, (2, size)))
    same(there.argsort(1), here.argsort(1))
    same(there.T.argsort(0, descending=True), here.T.argsort(0, descending=True))


def test_sort_of_strided_lines() -> None:
    here, there = both(draw(dtypes.float32, (6, 5, 8)))
    for x, y in ((here[::2, 1:, ::3], there[::2, 1:, ::3]), (here.mT, there.mT)):
        for dim in range(3):
            same(y.argsort(dim), x.argsort(dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [False, True])
def test_topk(dtype: DType, largest: bool) -> None:
    for shape, k in (((5, 30), 4), ((9000,), 7), ((20000,), 3), ((3,), 0), ((2, 3000), 1500)):
        x = draw(dtype, shape)
        order = flame.from_numpy(x).argsort(-1, descending=largest)  # of equal ones the first
        got = flame.from_numpy(x).to("cuda").topk(k, largest=largest)
        same(got.indices, order[..., :k].contiguous())


def test_topk_of_many_long_lines() -> None:
    here, there = both(draw(dtypes.float32, (70, 2500)))
    same(there.topk(5).indices, here.argsort(1, descending=True)[:, :5].contiguous())


@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
def test_median_mode_kthvalue(dtype: DType) -> None:
    x = draw(dtype, (6, 33))
    here, there = both(x)
    for name in ("median", "nanmedian"):
        want, got = (getattr(t, name)(1) for t in (here, there))
        same(got.indices, want.indices)
    same(there.kthvalue(4, 0).indices, here.kthvalue(4, 0).indices)
    here, there = both(draw(dtypes.int8, (6, 33)) // 10)
    same(there.mode(0).indices, here.mode(0).indices)
    same(there.mode(1).values, here.mode(1).values)


@pytest.mark.parametrize("right", [False, True])
def test_searchsorted(right: bool) -> None:
    edges, x = np.sort(draw(dtypes.float32, (4, 20), 1), -1), draw(dtypes.float32, (4, 9), 2)
    (e, f), (a, b) = both(edges), both(x)
    same(flame.searchsorted(f, b, right=right), flame.searchsorted(e, a, right=right))
    same(flame.bucketize(b, f[0], right=right), flame.bucketize(a, e[0], right=right))
    whole = [1, 5, 2]
    got = flame.searchsorted(f[1], flame.tensor(whole, device="cuda"), right=right)
    same(got, flame.searchsorted(e[1], flame.tensor(whole), right=right))


def test_isin() -> None:
    here, there = both(draw(dtypes.float32, (5, 40)))
    tests = here.reshape(-1)[::3]
    for invert in (False, True):
        got = flame.isin(there, tests.to("cuda"), invert=invert)
        same(got, flame.isin(here, tests, invert=invert))
    same(flame.isin(there, flame.zeros(0, device="cuda")), flame.isin(here, flame.zeros(0)))


def test_gradient_of_sort_is_exact() -> None:
    here, there = both(np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32))
    for x in (here, there):
        x.requires_grad_()
        (x.sort(1).values * flame.arange(50, device=x.device)).sum().backward()
    same(there.grad, here.grad)
