"""grid_sample and affine_grid against PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as T

import flame
from flame.core.errors import ArgumentError, DTypeError, ShapeError
from flame.nn import functional as F

pytestmark = pytest.mark.ops


def pair(*shape: int, seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, flame.Tensor]:
    theirs = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    theirs = (theirs * scale).requires_grad_()
    return theirs, flame.from_numpy(theirs.detach().numpy().copy()).requires_grad_()


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize(
    ("mode", "sizes"),
    [
        ("bilinear", (5, 7)), ("nearest", (5, 7)), ("bicubic", (5, 7)), ("bilinear", (1, 4)),
        ("bicubic", (1, 3)), ("bilinear", (3, 4, 5)), ("nearest", (3, 1, 5)),
    ],
    ids=str,
)  # fmt: skip
def test_values_and_gradients(
    mode: str, sizes: tuple[int, ...], padding: str, corners: bool
) -> None:
    x, mine = pair(2, 3, *sizes)
    outputs = (4, 3, 2)[: len(sizes)]
    grid, places = pair(2, *outputs, len(sizes), seed=1, scale=1.2)  # far beyond the edges, too
    theirs = T.grid_sample(x, grid, mode, padding, corners)
    made = F.grid_sample(mine, places, mode, padding, corners)
    np.testing.assert_allclose(made.detach().numpy(), theirs.detach().numpy(), atol=1e-12)
    slope = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2)).double()
    theirs.backward(slope)
    made.backward(flame.from_numpy(slope.numpy()))
    np.testing.assert_allclose(mine.grad.numpy(), x.grad, atol=1e-12)
    np.testing.assert_allclose(places.grad.numpy(), grid.grad, atol=1e-11)


@pytest.mark.parametrize("shape", [(0, 3, 5, 6), (2, 0, 5, 6)], ids=str)
def test_nothing_is_read_from_nothing(shape: tuple[int, ...]) -> None:
    made = F.grid_sample(flame.ones(shape), flame.zeros(shape[0], 4, 3, 2))
    assert tuple(made.shape) == (*shape[:2], 4, 3)


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_places_that_are_no_numbers(mode: str, padding: str) -> None:
    x, mine = pair(1, 2, 4, 5)
    places = np.array([np.nan, np.inf, -np.inf, 1e30, 0.3])
    grid = np.stack(np.meshgrid(places, places), -1)[None]
    theirs = T.grid_sample(x.detach(), torch.from_numpy(grid), mode, padding, False)
    made = F.grid_sample(mine.detach(), flame.from_numpy(grid), mode, padding, False)
    if padding == "reflection":  # where a place of 1e30 is, is a matter of the last digit
        known = np.abs(grid[..., :, :, 0]) != 1e30
        known &= np.abs(grid[..., 1]) != 1e30
        np.testing.assert_allclose(made.numpy()[:, :, known[0]], theirs.numpy()[:, :, known[0]])
    else:
        np.testing.assert_allclose(made.numpy(), theirs.numpy(), atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*affine_grid behavior")
@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (2, 1, 1, 3), (2, 3, 4, 5, 2)], ids=str)
def test_affine_grid(size: tuple[int, ...], corners: bool) -> None:
    rank = len(size) - 2
    theta, mine = pair(2, rank, rank + 1)
    theirs = T.affine_grid(theta, list(size), corners)
    made = F.affine_grid(mine, size, corners)
    np.testing.assert_allclose(made.detach().numpy(), theirs.detach().numpy(), atol=1e-12)
    theirs.square().sum().backward()
    made.square().sum().backward()
    np.testing.assert_allclose(mine.grad.numpy(), theta.grad, atol=1e-11)


@pytest.mark.parametrize("dtype", [flame.float16, flame.bfloat16], ids=str)
def test_half_precision_reads_at_places_of_float32(dtype: flame.DType) -> None:
    _, x = pair(1, 2, 64, 64)
    _, grid = pair(1, 8, 8, 2, seed=1, scale=0.3)
    x, grid = x.detach().to(dtype), grid.detach().to(dtype)
    made = F.grid_sample(x, grid)
    assert made.dtype is dtype
    exact = F.grid_sample(x.double(), grid.double())
    np.testing.assert_allclose(made.double().numpy(), exact.numpy(), atol=2e-2)


def test_a_spatial_transformer_compiles() -> None:
    _, x = pair(2, 3, 6, 6)
    _, theta = pair(2, 2, 3, seed=3)

    def step(x: Any, theta: Any) -> Any:
        made = F.grid_sample(x, F.affine_grid(theta, x.shape), padding_mode="border")
        made.square().sum().backward()
        return made.detach(), theta.grad

    found = flame.compile(step)(x, theta)
    theta.grad = None
    for a, b in zip(found, step(x, theta), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-12, atol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    x, grid = flame.ones(2, 3, 4, 5), flame.zeros(2, 6, 7, 2)
    with pytest.raises(ShapeError, match=r"\(2, 3, 4, 5\) and grid \(2, 6, 2\)"):
        F.grid_sample(x, flame.zeros(2, 6, 2))
    with pytest.raises(ShapeError, match="2 images and 3 grids"):
        F.grid_sample(x, flame.zeros(3, 6, 7, 2))
    with pytest.raises(ShapeError, match="no elements to read"):
        F.grid_sample(flame.ones(2, 3, 0, 5), grid)
    with pytest.raises(DTypeError, match="float32 and grid float64"):
        F.grid_sample(x, grid.double())
    with pytest.raises(ArgumentError, match="mode must be"):
        F.grid_sample(x, grid, mode="linear")
    with pytest.raises(ArgumentError, match="mode must be"):
        F.grid_sample(flame.ones(1, 1, 2, 2, 2), flame.zeros(1, 2, 2, 2, 3), mode="bicubic")
    with pytest.raises(ArgumentError, match="padding_mode must be zeros"):
        F.grid_sample(x, grid, padding_mode="reflect")
    with pytest.raises(ShapeError, match=r"theta \(2, 3, 3\)"):
        F.affine_grid(flame.zeros(2, 3, 3), (2, 1, 4, 4))
    with pytest.raises(ShapeError, match="no places"):
        F.affine_grid(flame.zeros(2, 2, 3), (2, 1, 0, 4))
    with pytest.raises(DTypeError, match="theta must be floating"):
        F.affine_grid(flame.zeros(2, 2, 3, dtype=flame.int64), (2, 1, 4, 4))
