"""Attention within packed sequences on a real GPU, and at sizes of many tiles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import flame
from flame.core import dtypes
from flame.core.errors import DeviceError
from flame.nn.attention import varlen_attn
from tests.cuda import packed_attention_checks as packed
from tests.cuda.attention_cases import LIMITS, error
from tests.cuda.packed_attention_cases import CASES, PackedCase, PackedRun
from tests.gpu.test_flash_attention import Device

pytestmark = pytest.mark.gpu

LENGTHS, OTHERS = (700, 1, 0, 1500, 130), (900, 64, 5, 1500, 33)
LARGE = [
    PackedCase(LENGTHS, LENGTHS, 4, 2, 64, right=0),
    PackedCase(LENGTHS, OTHERS, 2, 1, 128, dtype=dtypes.bfloat16, right=0, spare=1000),
    PackedCase(LENGTHS, OTHERS, 2, 2, 128, left=200, right=30, slopes=True),
    PackedCase(LENGTHS, OTHERS, 2, 1, 256, dtype=dtypes.bfloat16, left=200, right=0),
    PackedCase(LENGTHS, OTHERS, 2, 1, 96, 40, right=0, slopes=True),
    PackedCase(LENGTHS, OTHERS, 2, 1, 64, dtype=dtypes.float32, left=100, slopes=True),
]


@pytest.fixture(scope="module")
def device() -> Device:
    try:
        return Device()
    except DeviceError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_result_and_gradients(case: PackedCase, device: Device) -> None:
    run = PackedRun(case)
    assert not run.forward(device.launch).any()
    assert not run.backward(device.launch).any()
    for name, made, expected in zip(
        ("result", "log_sum", "dq", "dk", "dv"), run.made(), run.expected(), strict=True
    ):
        assert error(made, expected) < LIMITS[case.dtype.name], name


def test_runs_agree_bit_by_bit(device: Device) -> None:
    case = LARGE[2]
    runs = PackedRun(case), PackedRun(case)
    for run in runs:
        run.forward(device.launch)
        run.backward(device.launch)
    for one, other in zip(runs[0].made(), runs[1].made(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("check", packed.CHECKS, ids=lambda c: c.__name__)
def test_packed(check: Callable[[], None]) -> None:
    check()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_is_that_of_the_operands(dtype: str) -> None:
    """One long sequence among many short ones, which would be padded to its length."""
    lengths = (4096, *[32] * 64)
    *leaves, grad = packed.operands("cuda", dtype, 4, 4, 64, sum(lengths))
    places = packed.starts(lengths)
    flame.cuda.synchronize()
    flame.cuda.reset_peak_memory_stats()
    before = flame.cuda.memory_allocated()
    varlen_attn(*leaves, places, None, 4096, 4096, window_size=(-1, 0)).backward(grad)
    flame.cuda.synchronize()
    own = grad.numel() * grad.element_size()
    assert flame.cuda.max_memory_allocated() - before < 6 * own  # result and three gradients
