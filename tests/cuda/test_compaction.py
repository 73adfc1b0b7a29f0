"""Results whose size depends on the data, eagerly on the emulated device, against the CPU's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
from flame.core import dtypes
from flame.core.errors import ArgumentError, DTypeError

from .test_sorting import both, draw, same

pytestmark = pytest.mark.usefixtures("eager_cuda")


def masks() -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = ((1,), (7,), (3, 50), (2, 3, 4), (9000,), (0,), (0, 3), ())
    return [rng.random(s) < p for s in shapes for p in (0.0, 0.4, 1.0)]


def test_nonzero() -> None:
    for mask in masks():
        here, there = both(np.asarray(mask))
        same(there.nonzero(), here.nonzero())
        for got, want in zip(
            there.nonzero(as_tuple=True), here.nonzero(as_tuple=True), strict=True
        ):
            same(got, want)
    here, there = both(np.array([[0.0, -0.0, 2.0], [np.nan, 0.0, -1.0]], np.float32))
    same(there.nonzero(), here.nonzero())


def test_nonzero_static() -> None:
    here, there = both(np.array([[0, 3, 0], [1, 0, 2]]))
    for size in (0, 2, 3, 5):
        want = flame.nonzero_static(here, size=size, fill_value=-7)
        same(flame.nonzero_static(there, size=size, fill_value=-7), want)


def test_masks_as_subscripts() -> None:
    here, there = both(draw(dtypes.float32, (6, 5)))
    for mask in (here > 0, (here > 0)[:, 0]):
        same(there[mask.to("cuda")], here[mask])
    same(there.masked_select(there > 0), here.masked_select(here > 0))
    for x in (here, there):
        x[x[:, 0] > 0, 1:3] = 5.0
        x[x < 0] = flame.zeros(int((x < 0).sum()), device=x.device)
    same(there, here)


def test_subscripts_of_the_host() -> None:
    here, there = both(draw(dtypes.float32, (6, 5)))
    same(there[[1, 3]], here[[1, 3]])
    same(there[np.array([4, 0]), 1:], here[np.array([4, 0]), 1:])
    same(there[:, flame.tensor([0, -1])], here[:, flame.tensor([0, -1])])


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_unique(dim: int | None) -> None:
    x = np.random.default_rng(0).integers(0, 3, (30, 3))
    x[5] = x[4]
    here, there = both(x)
    for name in ("unique", "unique_consecutive"):
        function = getattr(flame, name)
        options: Any = {"return_inverse": True, "return_counts": True, "dim": dim}
        for got, want in zip(function(there, **options), function(here, **options), strict=True):
            same(got, want)
    same(flame.unique(there, dim=dim), flame.unique(here, dim=dim))


def test_unique_of_one_slice() -> None:
    here, there = both(draw(dtypes.float32, (2, 1, 3)))
    for name in ("unique", "unique_consecutive"):
        function = getattr(flame, name)
        options: Any = {"return_inverse": True, "return_counts": True, "dim": 1}
        for got, want in zip(function(there, **options), function(here, **options), strict=True):
            same(got, want)


def test_unique_of_special_numbers() -> None:
    for size in (0, 1, 300):
        here, there = both(draw(dtypes.float32, (size,)))
        values, inverse = flame.unique(there, return_inverse=True)
        same(values, flame.unique(here))
        same(values[inverse], here)  # each NaN is a value of its own, in any order


def test_repeat_interleave() -> None:
    here, there = both(draw(dtypes.float32, (4, 3)))
    counts = flame.tensor([2, 0, 3, 1])
    same(
        there.repeat_interleave(counts.to("cuda"), 0), here.repeat_interleave(counts, 0)
    )  # fmt: skip
    same(there.repeat_interleave([2, 0, 3, 1], 0), here.repeat_interleave(counts, 0))
    same(flame.repeat_interleave(counts.to("cuda")), flame.repeat_interleave(counts))
    same(there.repeat_interleave(2, 1), here.repeat_interleave(2, 1))
    with pytest.raises(ArgumentError, match="negative"):
        there.repeat_interleave(flame.tensor([1, -1, 1, 1], device="cuda"), 0)


def test_bincount() -> None:
    here, there = both(np.random.default_rng(0).integers(0, 9, 500))
    same(flame.bincount(there, minlength=20), flame.bincount(here, minlength=20))
    weights = flame.arange(500).to(dtypes.float64)
    same(flame.bincount(there, weights.to("cuda")), flame.bincount(here, weights))
    same(flame.bincount(there[:0]), flame.bincount(here[:0]))
    with pytest.raises(ArgumentError, match="negative"):
        flame.bincount(there - 5)


def test_one_hot() -> None:
    here, there = both(np.array([[0, 4], [2, 2]]))
    same(flame.nn.functional.one_hot(there), flame.nn.functional.one_hot(here))
    with pytest.raises(DTypeError):
        flame.nn.functional.one_hot(there.to(dtypes.float32))
