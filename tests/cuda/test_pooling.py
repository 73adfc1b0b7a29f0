"""Pooling and interpolation on the emulated device, against the CPU's results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
from flame.core import dtypes
from flame.nn import functional as F

from .test_image_norms import image
from .test_scans import close

pytestmark = pytest.mark.usefixtures("eager_cuda")

WAYS = {
    "windows that meet": lambda x: F.max_pool2d(x, 3, 2, 1),
    "windows side by side": lambda x: F.max_pool2d(x, 2),
    "windows apart": lambda x: F.max_pool2d(x, 2, 3),
    "dilated, of unequal sides": lambda x: F.max_pool2d(x, (2, 3), (3, 1), (1, 1), (3, 2)),
    "the last one reaches out": lambda x: F.max_pool2d(x, 3, 4, 1, ceil_mode=True),
    "adaptive": lambda x: F.adaptive_max_pool2d(x, (5, 3)),
    "means": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive means": lambda x: F.adaptive_avg_pool2d(x, (5, 3)),
    "one mean": lambda x: F.adaptive_avg_pool2d(x, 1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, size=(17, 9), mode="bilinear"),
}


def results(x: flame.Tensor, how: Any, device: str) -> list[flame.Tensor]:
    leaf = x.to(device).detach().requires_grad_()
    y = how(leaf)
    weights = np.random.default_rng(1).standard_normal(tuple(y.shape)).astype(np.float32)
    (y * flame.from_numpy(weights).to(y.dtype).to(device)).sum().backward()
    assert leaf.grad is not None
    return [y, leaf.grad]


@pytest.mark.parametrize("way", WAYS)
def test_both_layouts(way: str) -> None:
    rng = np.random.default_rng(0)
    for dtype, channels, tolerance in ((dtypes.float32, 40, 2e-5), (dtypes.bfloat16, 5, 3e-2)):
        x = image(rng, (2, channels, 11, 13), dtype)
        for given in (x, x.contiguous()):
            wanted = results(given, WAYS[way], "cpu")
            got = results(given, WAYS[way], "cuda")
            for a, b in zip(got, wanted, strict=True):
                close(a, b, tolerance)


def test_gradients_keep_channels_together() -> None:
    x = image(np.random.default_rng(0), (2, 8, 9, 9), dtypes.float32)
    for device in ("cpu", "cuda"):
        y, grad = results(x, WAYS["windows that meet"], device)
        assert y.stride()[1] == grad.stride()[1] == 1


def test_what_follows_the_gradient_joins_its_kernel() -> None:
    x = image(np.random.default_rng(0), (2, 8, 9, 9), dtypes.float32)

    def step(x: Any) -> Any:
        leaf = x.detach().requires_grad_()
        (F.max_pool2d(leaf.relu(), 3, 2, 1) ** 2).sum().backward()
        return leaf.grad

    compiled = flame.compile(step)
    there = x.to("cuda")
    close(compiled(there), step(x), 2e-5)
    assert "max_pool_backward_relu_backward" in compiled.report()
