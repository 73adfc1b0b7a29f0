"""Attention with dropout on a real GPU, and at sizes of many tiles."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import flame
from flame.nn.functional import scaled_dot_product_attention
from tests.cuda import attention_dropout_checks as dropout

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]


@pytest.mark.parametrize("check", dropout.CHECKS, ids=lambda c: c.__name__)
def test_dropout(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_many_tiles_agree_with_the_cpu(dtype: str) -> None:
    dropout.same_as_the_cpu(
        dtype, heads=4, key_heads=2, length=500, keys=640, width=64, is_causal=True,
        enable_gqa=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_probabilities_are_in_memory(dtype: str) -> None:
    *leaves, grad = dropout.operands("cuda", dtype, heads=4, length=4096, keys=4096, key_heads=4)
    flame.cuda.synchronize()
    flame.cuda.reset_peak_memory_stats()
    before = flame.cuda.memory_allocated()
    scaled_dot_product_attention(*leaves, dropout_p=0.1).backward(grad)
    flame.cuda.synchronize()
    probabilities = 2 * 4 * 4096 * 4096  # bytes, if each were one
    assert flame.cuda.max_memory_allocated() - before < probabilities / 2
