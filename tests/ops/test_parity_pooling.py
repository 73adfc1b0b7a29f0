"""Pooling, interpolation and sliding blocks against PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import flame
from flame.core.errors import ArgumentError, DTypeError, FlameError, IndexRangeError, ShapeError
from flame.nn import functional as F
from flame.ops import interpolation, pooling

from .entries import cases, check_errors, check_first, check_second
from .parity import agree, draw

pytestmark = [pytest.mark.ops, pytest.mark.filterwarnings("ignore")]
TF = torch.nn.functional

POOLS = [
    f"nn.functional.{kind}{r}d"
    for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "max_unpool")
    for r in (1, 2, 3)
]
SIZES = ["interpolate", "unfold", "pixel_shuffle", "pixel_unshuffle", "upsample_nearest",
         "upsample_bilinear"]  # fmt: skip
ENTRIES = [*POOLS, *(f"nn.functional.{name}" for name in SIZES)]


def _function(entry: Any) -> Any:
    name = entry.name.rpartition(".")[2]
    return getattr(pooling, name, None) or getattr(interpolation, name)


@pytest.mark.parametrize("entry", cases(ENTRIES))
def test_first_order(entry: Any) -> None:
    check_first(entry, _function(entry))


@pytest.mark.parametrize("entry", cases(ENTRIES))
def test_second_order(entry: Any) -> None:
    check_second(entry, _function(entry))


@pytest.mark.parametrize(
    "entry", [case for case in cases(POOLS) if case.values[0].error_inputs_func is not None]
)
def test_errors(entry: Any) -> None:
    check_errors(entry, _function(entry))


def test_nan_wins_and_indices_agree() -> None:
    x = draw(2, 3, 9, 7, grad=False)
    x[0, 1, 2, 3] = x[0, 1, 3, 3] = float("nan")
    x[1, 2] = float("-inf")
    options: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1, "return_indices": True}
    values, index = F.max_pool2d(flame.from_numpy(x.numpy()), **options)
    wanted, places = TF.max_pool2d(x, **options)
    np.testing.assert_array_equal(values.numpy(), wanted.numpy())
    np.testing.assert_array_equal(index.numpy(), places.numpy())
    assert index.dtype is flame.int64


def test_infinities_outside_a_window_do_not_matter() -> None:
    x = draw(1, 1, 8, 8, grad=False)
    x[0, 0, 4] = float("inf")
    options: dict[str, Any] = {"kernel_size": 3, "padding": 1, "ceil_mode": True}
    found = F.avg_pool2d(flame.from_numpy(x.numpy()), **options).numpy()
    np.testing.assert_allclose(found, TF.avg_pool2d(x, **options).numpy(), rtol=1e-12)


@pytest.mark.parametrize("norm", [1.0, 2.0, 3.0])
def test_lp_pool(norm: float) -> None:
    agree(
        lambda x: pooling.lp_pool2d(x.abs() + 0.1, norm, 3, 2, ceil_mode=True),
        lambda x: TF.lp_pool2d(x.abs() + 0.1, norm, 3, 2, ceil_mode=True),
        draw(2, 3, 8, 9),
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_fold_undoes_unfold(stride: int, dilation: int) -> None:
    options = {"kernel_size": (3, 2), "stride": stride, "dilation": dilation, "padding": 1}
    agree(
        lambda x: interpolation.fold(interpolation.unfold(x, **options), (8, 7), **options),
        lambda x: TF.fold(TF.unfold(x, **options), (8, 7), **options),
        draw(2, 3, 8, 7),
    )


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic", "area"])
@pytest.mark.parametrize("size", [(5, 17), (16, 3), (1, 1), (8, 9)])
def test_interpolate(mode: str, size: tuple[int, int]) -> None:
    agree(
        lambda x: F.interpolate(x, size, mode=mode),
        lambda x: TF.interpolate(x, size, mode=mode),
        draw(2, 3, 8, 9),
    )


@pytest.mark.parametrize("factor", [0.4, 1.7, 2, (2.0, 0.5)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_scale_factors(factor: Any, recompute: bool, mode: str) -> None:
    options = {"scale_factor": factor, "mode": mode, "recompute_scale_factor": recompute}
    agree(
        lambda x: F.interpolate(x, **options),
        lambda x: TF.interpolate(x, **options),
        draw(1, 2, 7, 11),
    )


def test_interpolates_bytes() -> None:
    x = np.arange(24, dtype=np.uint8).reshape(1, 2, 3, 4)
    found = F.interpolate(flame.from_numpy(x), scale_factor=2).numpy()
    np.testing.assert_array_equal(found, TF.interpolate(torch.from_numpy(x), scale_factor=2))


def _zeros(*shape: int) -> Any:
    return flame.from_numpy(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: F.max_pool2d(_zeros(1, 1, 4, 4), 5), ShapeError),
        (lambda: F.max_pool2d(_zeros(1, 1, 4, 4), 2, padding=2), ArgumentError),
        (lambda: F.max_pool2d(_zeros(4, 4), 2), ShapeError),
        (lambda: F.max_pool2d(_zeros(1, 1, 0, 4), 2), ShapeError),
        (lambda: F.avg_pool2d(_zeros(1, 1, 4, 4), 2, divisor_override=0), ArgumentError),
        (lambda: F.avg_pool2d(_zeros(1, 1, 4, 4), 0), ArgumentError),
        (lambda: F.adaptive_avg_pool2d(_zeros(1, 1, 4, 4), (1, 2, 3)), ShapeError),
        (lambda: F.interpolate(_zeros(1, 1, 4, 4)), ArgumentError),
        (lambda: F.interpolate(_zeros(1, 1, 4, 4), 3, mode="linear"), ShapeError),
        (lambda: F.interpolate(_zeros(1, 1, 4, 4), 3, mode="cubic"), ArgumentError),
        (lambda: F.interpolate(_zeros(1, 1, 4, 4), 3, align_corners=True), ArgumentError),
        (lambda: F.interpolate(_zeros(1, 1, 4, 4).long(), 3, mode="bilinear"), DTypeError),
        (lambda: F.pixel_shuffle(_zeros(1, 3, 4, 4), 2), ShapeError),
        (lambda: F.pixel_unshuffle(_zeros(1, 3, 5, 4), 2), ShapeError),
        (lambda: interpolation.unfold(_zeros(1, 3, 2, 2), 3), ShapeError),
        (lambda: interpolation.fold(_zeros(1, 7, 4), (3, 3), 2), ShapeError),
        (
            lambda: F.max_unpool2d(_zeros(1, 1, 2, 2), _zeros(1, 1, 2, 2).long() + 99, 2),
            IndexRangeError,
        ),
    ],
)
def test_refusals(call: Any, error: type[FlameError]) -> None:
    with pytest.raises(error, match=r"\S"):
        call()
