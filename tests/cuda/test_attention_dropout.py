"""Attention with dropout on the emulated GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import flame
from flame.nn.functional import scaled_dot_product_attention
from flame.runtime.cuda.driver import driver

from . import attention_dropout_checks as dropout

pytestmark = pytest.mark.usefixtures("eager_cuda")


@pytest.mark.parametrize("check", dropout.CHECKS, ids=lambda c: c.__name__)
def test_dropout(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    ("dtype", "family"), [("float16", "flash_attention"), ("float32", "attention")]
)
def test_own_kernels_do_all_of_it(dtype: str, family: str) -> None:
    *leaves, grad = dropout.operands("cuda", dtype)
    flame.cuda.synchronize()
    launches = driver().launches
    before = len(launches)
    made = scaled_dot_product_attention(*leaves, dropout_p=0.3)
    made.backward(grad)
    flame.cuda.synchronize()
    passes = [f"{family}_forward", "attention_delta", *[f"{family}_backward"] * 2]
    assert launches[before:] == passes
