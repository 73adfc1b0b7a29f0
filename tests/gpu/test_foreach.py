"""Many calls in few launches on a GPU: bit for bit as one by one."""

from __future__ import annotations

from typing import Any

import pytest

import flame
from flame import optim
from tests.cuda.foreach_cases import OPTIMIZERS, bits, check_same, clipped, one_by_one

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bits_are_those_of_single_launches(name: str) -> None:
    check_same(OPTIMIZERS[name])


@pytest.mark.parametrize("dtype", [flame.float64, flame.bfloat16, flame.float16])
def test_dtypes(dtype: Any) -> None:
    check_same(OPTIMIZERS["AdamW"], dtypes=(dtype, flame.float32))


def test_large_and_small() -> None:
    shapes = ((1,), (5000, 1000), (3,), (700,), (1500, 1000), (768, 768))
    check_same(OPTIMIZERS["AdamW"], shapes=shapes)


def test_as_many_as_arguments_hold() -> None:
    check_same(OPTIMIZERS["AdamW"], steps=2, shapes=[(2 + i % 700,) for i in range(1000)])


def test_clipping() -> None:
    norm, together = clipped(2.0)
    with one_by_one():
        wanted, apart = clipped(2.0)
    assert bits([norm]) == bits([wanted])
    for a, b in zip(together, apart, strict=True):
        assert (a.grad is None and b.grad is None) or bits([a.grad]) == bits([b.grad])


def test_nothing_waits() -> None:
    parameters = [flame.ones(1 << 20, device="cuda").requires_grad_() for _ in range(64)]
    for p in parameters:
        p.grad = flame.ones_like(p)
    optimizer = optim.AdamW(parameters)
    optimizer.step()
    busy = flame.ones(8192, 8192, device="cuda")
    flame.cuda.synchronize()
    done = flame.cuda.Event()
    for _ in range(50):
        busy = busy @ busy
    optimizer.step()
    done.record()
    assert not done.query()
