"""Normalizations of images whose channels lie side by side: the same numbers, the same layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
from flame.ops.norm_ops import (
    batch_norm_backward,
    batch_norm_op,
    group_norm_backward,
    group_norm_op,
)
from flame.runtime.cpu import get_num_threads, set_num_threads

SHAPES = [
    (8, 64, 32, 32),
    (2, 192, 9, 7),
    (3, 6, 5, 5),
    (2, 130, 4, 4),
    (1, 32, 9),
    (2, 70, 20, 20),
]
GROUPS = {64: 8, 192: 8, 6: 3, 130: 2, 32: 4, 70: 7}


def images(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, flame.Tensor, flame.Tensor]:
    """The same numbers as an array, row-major, and channels-last."""
    array = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * 2 + 1
    last = flame.from_numpy(np.ascontiguousarray(np.moveaxis(array, 1, -1))).movedim(-1, 1)
    return array, flame.from_numpy(array), last


def close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        scale = max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-5, atol=3e-6 * scale)


def parameters(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(9)
    return tuple(random.standard_normal(shape[1], dtype=np.float32) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("shape", SHAPES)
def test_group_norm(shape: tuple[int, ...]) -> None:
    rows = GROUPS[shape[1]]
    x, plain, last = images(shape, 0)
    g, plain_g, last_g = images(shape, 1)
    weight, bias = parameters(shape)
    w, b = flame.from_numpy(weight), flame.from_numpy(bias)
    wide = [a.astype(np.float64) for a in (x, g, weight, bias)]
    made = group_norm_op(last, w, b, 1e-5, rows=rows)
    assert made.stride() == last.stride()
    close([made], [group_norm_op.reference(wide[0], wide[2], wide[3], 1e-5, rows=rows)])
    expected = group_norm_backward.reference(wide[1], wide[0], wide[2], 1e-5, rows=rows)
    for grad, source in ((last_g, last), (plain_g, last), (last_g, plain)):
        close(group_norm_backward(grad, source, w, 1e-5, rows=rows), expected)
    bare = group_norm_backward(last_g, last, None, 1e-5, rows=rows)
    ones = np.ones_like(wide[2])
    close([bare], group_norm_backward.reference(wide[1], wide[0], ones, 1e-5, rows=rows)[:1])


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm(shape: tuple[int, ...]) -> None:
    x, _, last = images(shape, 0)
    g, plain_g, last_g = images(shape, 1)
    weight, bias = parameters(shape)
    w, b = flame.from_numpy(weight), flame.from_numpy(bias)
    wide = [a.astype(np.float64) for a in (x, g, weight, bias)]
    made = batch_norm_op(last, w, b, 1e-5)
    assert made[0].stride() == last.stride()
    expected = batch_norm_op.reference(wide[0], wide[2], wide[3], 1e-5)
    close(made, expected)
    _, mean, variance = expected
    statistics = [flame.from_numpy(s.astype(np.float32)) for s in (mean, variance)]
    expected = batch_norm_backward.reference(wide[1], wide[0], mean, variance, wide[2], 1e-5)
    for grad in (last_g, plain_g):
        close(batch_norm_backward(grad, last, *statistics, w, 1e-5), expected)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    _, _, x = images((8, 64, 32, 32), 0)
    _, _, g = images((8, 64, 32, 32), 1)
    w = flame.ones(64)
    before, found = get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            set_num_threads(threads)
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            made = (
                *group_norm_backward(g, x, w, 1e-5, rows=8),
                *batch_norm_backward(g, x, mean, variance, w, 1e-5),
            )
            found.append([t.numpy().tobytes() for t in made])
    finally:
        set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_max_pool_of_channels_last_images() -> None:
    _, plain, last = images((2, 20, 9, 11), 3)
    for options in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}):
        expected = flame.nn.functional.max_pool2d(plain, **options)
        np.testing.assert_array_equal(
            flame.nn.functional.max_pool2d(last, **options).numpy(), expected.numpy()
        )
