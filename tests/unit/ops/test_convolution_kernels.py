"""Winograd kernels and products of 1 x 1 convolutions against sums in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
from flame.ops.convolution import operation
from flame.ops.convolution.winograd_transforms import strided, strided_gradient, unstrided

# images, inputs, outputs, height, width, kernel, stride, padding
CASES = [
    (2, 64, 64, 8, 8, 3, 1, 1),
    (3, 20, 70, 7, 13, 3, 1, 1),
    (1, 96, 33, 6, 40, 3, 1, 2),
    (4, 144, 128, 4, 4, 3, 1, 1),
    (2, 32, 48, 9, 10, 3, 2, 1),
    (3, 80, 256, 8, 7, 3, 2, 1),
    (2, 16, 32, 7, 6, 3, 2, 0),
    (2, 64, 128, 9, 8, 1, 1, 0),
    (3, 20, 70, 7, 9, 1, 2, 0),
]


def _tensor(array: np.ndarray, *, last: bool) -> Any:
    if not last:
        return flame.from_numpy(array)
    moved = np.ascontiguousarray(array.transpose(0, 2, 3, 1))
    return flame.from_numpy(moved).permute(0, 3, 1, 2)


def _references(
    x: np.ndarray, w: np.ndarray, g: np.ndarray, stride: int, padding: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Result, input gradient and weight gradient in float64, tap by tap."""
    x, w, g = (a.astype(np.float64) for a in (x, w, g))
    kernel, (height, width) = w.shape[2], g.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    y, dx, dw = np.zeros(g.shape), np.zeros(padded.shape), np.zeros(w.shape)
    for i in range(kernel):
        for j in range(kernel):
            rows = slice(i, i + stride * (height - 1) + 1, stride)
            columns = slice(j, j + stride * (width - 1) + 1, stride)
            window = padded[:, :, rows, columns]
            y += np.einsum("nchw,oc->nohw", window, w[:, :, i, j])
            dx[:, :, rows, columns] += np.einsum("nohw,oc->nchw", g, w[:, :, i, j])
            dw[:, :, i, j] = np.einsum("nohw,nchw->oc", g, window)
    inner = slice(padding, padding + x.shape[2]), slice(padding, padding + x.shape[3])
    return y, dx[:, :, inner[0], inner[1]], dw


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_small(case: tuple[int, ...], last: bool) -> None:
    n, c, o, height, width, kernel, stride, padding = case
    rng = np.random.default_rng(0)
    size = tuple((s + 2 * padding - kernel) // stride + 1 for s in (height, width))
    shapes = (n, c, height, width), (o, c, kernel, kernel), (n, o, *size), (o,)
    x, w, g, b = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    options: dict[str, Any] = {
        "stride": (stride,) * 2,
        "padding": (padding,) * 2,
        "dilation": (1, 1),
        "groups": 1,
    }
    weight, bias = flame.from_numpy(w), flame.from_numpy(b)
    left, right = _tensor(x, last=last), _tensor(g, last=last)
    y = operation.convolution(left, weight, bias, size=size, **options)
    dx = operation.convolution_input_gradient(right, weight, None, size=(height, width), **options)
    dw = operation.convolution_weight_gradient(right, left, size=(kernel, kernel), **options)
    expected = _references(x, w, g, stride, padding)
    wanted = expected[0] + b[:, None, None], *expected[1:]
    for found, reference in zip((y, dx, dw), wanted, strict=True):
        assert np.abs(found.numpy() - reference).max() <= 1e-5 * np.abs(reference).max()
    if last:
        assert y.stride()[1] == 1
        assert dx.stride()[1] == 1


def test_zeros_stay_zeros() -> None:
    x = np.zeros((2, 32, 8, 8), np.float32)
    x[:, :, 6:, 6:] = 1e30
    w = np.ones((32, 32, 3, 3), np.float32)
    y = flame.nn.functional.conv2d(flame.from_numpy(x), flame.from_numpy(w), padding=1).numpy()
    assert (y[:, :, :4, :4] == 0).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_transforms_are_exact_algorithms(stride: int) -> None:
    rng = np.random.default_rng(0)
    t = unstrided() if stride == 1 else strided()
    d, w = rng.standard_normal(t.reach), rng.standard_normal(3)
    g = np.array([*t.g, *[t.g[-1]] * (t.size - t.weights)])
    found = np.array(t.a).T @ ((g @ w) * (np.array(t.b) @ d))
    expected = [d[stride * i : stride * i + 3] @ w for i in range(t.results)]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_transform_of_a_strided_input_gradient() -> None:
    rng = np.random.default_rng(0)
    t = strided_gradient()
    d, w = rng.standard_normal(t.reach), rng.standard_normal(3)
    g = np.array([*t.g, *[t.g[-1]] * (t.size - t.weights)])
    found = np.array(t.a).T @ ((g @ w) * (np.array(t.b) @ d))
    whole = np.zeros(2 * t.reach + 1)
    for i, value in enumerate(d):
        whole[2 * i : 2 * i + 3] += value * w
    np.testing.assert_allclose(found, whole[1:9], rtol=1e-12, atol=1e-12)
