"""Indexed writes on the emulated device, against the CPU's results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
from flame.core import dtypes
from flame.core.errors import IndexRangeError
from flame.ops.op import OPS
from flame.ops.writes_cuda import FEW, SIDE_BY_SIDE

from .test_scans import close
from .test_sorting import both, same

pytestmark = pytest.mark.usefixtures("eager_cuda")

RNG = np.random.default_rng(0)
WAYS = ["sum", "prod", "mean", "amax", "amin"]


def numbers(*shape: int) -> Any:
    return RNG.uniform(0.9, 1.1, shape).astype(np.float32)


@pytest.mark.parametrize("values", [1, 40])  # how many different indices there are
@pytest.mark.parametrize("columns", [1, 3, 50])
def test_index_add(values: int, columns: int) -> None:
    x, source, index = numbers(40, columns), numbers(300, columns), RNG.integers(0, values, 300)
    (a, b), (c, d), (i, j) = both(x), both(source), both(index)
    close(b.index_add(0, j, d), a.index_add(0, i, c), 1e-4)
    again = b.index_add(0, j, d)
    np.testing.assert_array_equal(again.cpu().numpy(), b.index_add(0, j, d).cpu().numpy())
    same(b.index_copy(0, j, d), a.index_copy(0, i, c))
    (a, b), (c, d) = both(x.T), both(source.T)
    close(b.index_add(1, j, d), a.index_add(1, i, c), 1e-4)


@pytest.mark.parametrize("reduce", WAYS)
def test_scatter_reduce(reduce: str) -> None:
    x, source, index = numbers(9, 40), numbers(7, 90), RNG.integers(0, 40, (7, 90))
    (a, b), (c, d), (i, j) = both(x), both(source), both(index)
    for keep in (True, False):
        got = b.scatter_reduce(1, j, d, reduce, include_self=keep)
        close(got, a.scatter_reduce(1, i, c, reduce, include_self=keep), 1e-3)


@pytest.mark.parametrize("size", [33, 257, 1025, 5000])
def test_sums_of_runs_about_as_long_as_tiles(size: int) -> None:
    for keys in (2, size):
        x, index = RNG.integers(-9, 10, (3, size)), RNG.integers(0, keys, (3, size))
        for dtype in (np.float64, np.int8):
            (c, d), (i, j) = both(x.astype(dtype)), both(index)
            a, b = (flame.zeros(3, keys, dtype=t.dtype, device=t.device) for t in (c, d))
            same(b.scatter_add(1, j, d), a.scatter_add(1, i, c))
            same(b.index_add(1, j[0], d), a.index_add(1, i[0], c))


def test_of_values_set_twice_the_last_stays() -> None:
    x, source, index = numbers(9, 40), numbers(7, 90), RNG.integers(0, 40, (7, 90))
    (a, b), (c, d), (i, j) = both(x), both(source), both(index)
    same(b.scatter(1, j, d), a.scatter(1, i, c))
    (a, b), (c, d) = both(x), both(numbers(90))
    for t, at, v in ((a, i[0], c), (b, j[0], d)):
        t[at % 9, at] = v
    same(b, a)


def test_integers_and_bools_are_exact() -> None:
    index = RNG.integers(0, 5, 700)
    for array in (RNG.integers(-100, 100, 700).astype(np.int8), RNG.random(700) < 0.3):
        (c, d), (i, j) = both(array), both(index)
        a, b = (flame.zeros(5, dtype=t.dtype, device=t.device) for t in (c, d))
        same(b.scatter_add(0, j, d), a.scatter_add(0, i, c))


def test_gradients_of_embedding_and_gather() -> None:
    weight, index = numbers(30, 40), RNG.integers(0, 30, (8, 25))
    grads = []
    for device in ("cpu", "cuda"):
        w = flame.from_numpy(weight).to(device).requires_grad_()
        i = flame.from_numpy(index).to(device)
        out = flame.nn.functional.embedding(i, w, padding_idx=3)
        (out * out).sum().backward()
        g = flame.from_numpy(weight).to(device).requires_grad_()
        (g.gather(1, i[:, :20].repeat(1, 2) % 7) ** 2).sum().backward()
        grads.append((w.grad, g.grad))
    for got, want in zip(grads[1], grads[0], strict=True):
        close(got, want, 1e-4)


def test_gradient_of_max_pooling() -> None:
    x = numbers(2, 3, 20, 20)
    grads = []
    for device in ("cpu", "cuda"):
        given = flame.from_numpy(x).to(device).requires_grad_()
        (flame.nn.functional.max_pool2d(given, 3, 1, 1) ** 2).sum().backward()
        grads.append(given.grad)
    close(grads[1], grads[0], 1e-4)


def test_half_widths_are_summed_in_float32() -> None:
    ones = flame.ones(600, dtype=dtypes.bfloat16, device="cuda")
    index = flame.zeros(600, dtype=dtypes.int64, device="cuda")
    total = flame.zeros(1, dtype=dtypes.bfloat16, device="cuda").index_add(0, index, ones)
    assert total.cpu().item() == 600


def test_negative_indices_and_bad_ones() -> None:
    (a, b), (i, j) = both(numbers(6, 3)), both(RNG.integers(-6, 6, 200))
    for x, at in ((a, i), (b, j)):
        made = x.index_put((at,), flame.ones(200, 3, device=x.device), accumulate=True)
        x.copy_(made)
    close(b, a, 1e-4)

    def add(*index: int) -> None:
        where = flame.tensor(index, device="cuda")
        b.index_add(0, where, flame.ones(len(index), 3, device="cuda"))
        flame.cuda.synchronize()

    with pytest.raises(IndexRangeError, match="77"):
        add(1, 77, 1)


def test_few_collisions_take_a_thread_for_each_place() -> None:
    op = OPS["put_at"]
    for rows, columns, generic in ((FEW, SIDE_BY_SIDE, True), (FEW + 1, SIDE_BY_SIDE, False)):
        source = flame.zeros(1, 1).expand(rows, columns).type
        index = flame.zeros(rows, columns, dtype=dtypes.int64).type
        attributes = {
            "axes": (-1, 1), "shape": (4, columns), "combine": "add", "wrap": False
        }  # fmt: skip
        types = (None, source, index)
        lowering = op.lower_cuda(types, (op.infer(types, **attributes),), **attributes)
        assert bool(lowering.kernels) is generic
