"""Scans on the emulated device, against the CPU's results."""

from __future__ import annotations

import itertools

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


SEAMS = [1, 9, 31, 33, 255, 257, 511, 513, 1024, 1025, 2047, 2049, 4104]  # lengths, about tiles
NUMBERS = [getattr(dtypes, name) for name in (
    "float32", "int8", "float64", "float16", "bfloat16", "int64", "int32", "int16", "uint8",
    "bool_",
)]  # fmt: skip


def whole(dtype: DType, shape: tuple[int, ...]) -> tuple[flame.Tensor, flame.Tensor]:
    """Small whole numbers, of which sums are exact, on the CPU and on the device."""
    values = np.random.default_rng(0).integers(-1 if dtype.kind in "if" else 0, 2, shape)
    return both(values.astype(dtype.numpy))


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


@pytest.mark.parametrize("size", SEAMS)
def test_lines_about_as_long_as_tiles(size: int) -> None:
    op = OPS["cumsum"]
    for dtype in NUMBERS if size in (33, 4104) else NUMBERS[:2]:
        here, there = whole(dtype, (5, size + 1))
        for start in (0, 1):  # 1: few lines, if any, begin where a pack may
            a, b = (t[:, start : start + size] for t in (here, there))
            for reverse in (False, True):
                same(op(b, dim=1, reverse=reverse), op(a, dim=1, reverse=reverse))


@pytest.mark.parametrize("size", [7, 2049])
@pytest.mark.parametrize("name", ["cumprod", "logcumsumexp", "recurrence"])
def test_other_folds_about_as_long_as_tiles(name: str, size: int) -> None:
    for dtype, tolerance in ((dtypes.float32, 1e-4), (dtypes.float16, 1e-2)):
        values = np.random.default_rng(0).uniform(0.98, 1.02, (5, size + 1)).astype(dtype.numpy)
        here, there = both(values)
        for start in (0, 1):
            for reverse in (False, True):
                got, want = (_folded(name, t[:, start:], reverse) for t in (there, here))
                close(got, want, tolerance * 10)


@pytest.mark.parametrize("size", [7, 2049])
def test_extremes_about_as_long_as_tiles(size: int) -> None:
    for dtype in (dtypes.float32, dtypes.float16):
        here, there = whole(dtype, (5, size + 1))
        for start in (0, 1):
            for name in ("cummin", "cummax"):
                pairs = zip(*(getattr(t[:, start:], name)(1) for t in (there, here)), strict=True)
                for got, want in pairs:
                    same(got, want)


def _folded(name: str, x: flame.Tensor, reverse: bool) -> flame.Tensor:
    if name == "recurrence":
        return OPS[name](x, x * 0.9, dim=1, reverse=reverse)
    return OPS[name](x, dim=1, reverse=reverse)


@pytest.mark.parametrize("size", [9, 300, 2600])
def test_a_scan_may_overwrite_what_it_reads(size: int) -> None:
    for dtype in (dtypes.float32, dtypes.bfloat16, dtypes.int64):
        for dim, reverse in itertools.product((0, 1), (False, True)):
            here, there = whole(dtype, (6, size) if dim else (size, 6))
            for t in (here, there):
                OPS["cumsum"].into((t,), t, dim=dim, reverse=reverse)
            same(there, here)


@pytest.mark.parametrize("size", [300, 1000, 2600])
def test_the_place_of_a_line_does_not_change_its_bits(size: int) -> None:
    values = np.random.default_rng(0).standard_normal((4, size + 3)).astype(np.float32)
    _, there = both(values)
    for start in (1, 2):
        shifted = there[:, start : start + size]
        same(shifted.cumsum(1), shifted.contiguous().cumsum(1).cpu())


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
