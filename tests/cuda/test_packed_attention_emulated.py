"""`varlen_attn` on the emulated GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import flame
from flame.nn.attention import varlen_attn
from flame.runtime.cuda.driver import driver

from . import packed_attention_checks as packed

pytestmark = pytest.mark.usefixtures("eager_cuda")


@pytest.mark.parametrize("check", packed.CHECKS, ids=lambda c: c.__name__)
def test_packed(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    ("dtype", "family"), [("float16", "flash_attention"), ("float32", "attention")]
)
def test_nothing_is_padded(dtype: str, family: str) -> None:
    """The kernels of attention are all that runs."""
    *leaves, grad = packed.operands("cuda", dtype)
    places = packed.starts(packed.LENGTHS)
    flame.cuda.synchronize()
    launches = driver().launches
    before = len(launches)
    varlen_attn(*leaves, places, None, 64, 64, window_size=(-1, 0)).backward(grad)
    flame.cuda.synchronize()
    passes = [f"{family}_forward", "attention_delta", *[f"{family}_backward"] * 2]
    assert launches[before:] == passes
