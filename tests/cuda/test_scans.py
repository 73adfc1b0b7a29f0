"""Scans on the emulated device, against the CPU's results."""

from __future__ import annotations

import numpy as np
import pytest

import flame
from flame.core import dtypes
from flame.core.dtypes import DType
from flame.ops.op import OPS
from flame.ops.scans_cuda import SHORT, SIDE_BY_SIDE

from .test_sorting import both, draw, same

pytestmark = pytest.mark.usefixtures("eager_cuda")

SHAPES = [((7,), 0), ((3, 70), 1), ((70, 3), 0), ((0, 3), 0), ((2, 5000), 1)]


def close(there: flame.Tensor, here: flame.Tensor, tolerance: float) -> None:
    assert there.shape == here.shape
    assert there.dtype is here.dtype
    got, want = (t.detach().cpu().to(dtypes.float64).numpy() for t in (there, here))
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("name", ["cumsum", "cumprod", "logcumsumexp"])
def test_running_folds(name: str, shape: tuple[int, ...], dim: int) -> None:
    x = np.random.default_rng(0).uniform(0.98, 1.02, shape)
    for dtype, tolerance in ((dtypes.float32, 1e-4), (dtypes.float64, 1e-10)):
        here, there = both(x.astype(dtype.numpy))
        function = getattr(flame, name)
        close(function(there, dim), function(here, dim), tolerance * 10)


@pytest.mark.parametrize("dtype", [dtypes.bool_, dtypes.int8, dtypes.int64], ids=str)
def test_sums_of_integers_are_exact(dtype: DType) -> None:
    here, there = both(draw(dtype, (3, 5000)))
    same(there.cumsum(1), here.cumsum(1))
    same(there.mT.cumsum(0), here.mT.cumsum(0))


@pytest.mark.parametrize("name", ["cummax", "cummin"])
def test_running_extremes(name: str) -> None:
    for dtype in (dtypes.float32, dtypes.bfloat16, dtypes.int8):
        for shape, dim in SHAPES:
            here, there = both(draw(dtype, shape))
            for got, want in zip(getattr(there, name)(dim), getattr(here, name)(dim), strict=True):
                same(got, want)


def test_a_scan_gives_the_same_bits_again() -> None:
    x = flame.from_numpy(np.random.default_rng(0).standard_normal(9000).astype(np.float32))
    first, second = (x.to("cuda").cumsum(0).cpu().numpy() for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_gradients() -> None:
    x = np.random.default_rng(0).uniform(0.5, 1.5, (2, 40))
    here, there = both(x)
    for name in ("cumsum", "cumprod", "logcumsumexp"):
        for t in (here, there):
            t.requires_grad_().grad = None
            weight = flame.arange(40, device=t.device).to(dtypes.float64)
            (getattr(t, name)(1) * weight).sum().backward()
        close(there.grad, here.grad, 1e-9)


def test_many_short_lines_take_a_thread_each() -> None:
    op = OPS["cumsum"]
    for shape, generic in (((SIDE_BY_SIDE, SHORT), True), ((4, SHORT), False)):
        x = flame.zeros(shape).type
        lowering = op.lower_cuda((x,), (op.infer((x,), dim=1),), dim=1, reverse=False)
        assert bool(lowering.kernels) is generic
