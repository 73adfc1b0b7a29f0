"""Attention within packed sequences, run on the host and compiled for GPUs."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pytest

from flame.core import dtypes
from flame.kernel.builder import BoundSource
from flame.kernel.library import AttentionProblem, Sequences
from flame.kernels.attention import LONGEST_SEQUENCE, takes

from .attention_cases import LIMITS, error
from .packed_attention_cases import CASES, PackedCase, PackedRun, by_heads
from .test_flash_attention import SPILLS, cubin_of, launch


@pytest.mark.parametrize("case", CASES, ids=str)
def test_result_and_gradients(case: PackedCase) -> None:
    run = PackedRun(case)
    assert not run.forward(launch).any()
    assert not run.backward(launch).any()
    for name, made, expected in zip(
        ("result", "log_sum", "dq", "dk", "dv"), run.made(), run.expected(), strict=True
    ):
        assert error(made, expected) < LIMITS[case.dtype.name], name


@pytest.mark.parametrize("dtype", [dtypes.float16, dtypes.float32], ids=str)
def test_order_of_threads_does_not_matter(dtype: Any) -> None:
    case = PackedCase((140, 3), (150, 70), 2, 1, 64, dtype=dtype, left=60, right=9)
    runs = PackedRun(case), PackedRun(case)
    for run, descending in zip(runs, (False, True), strict=True):
        run.forward(functools.partial(launch, descending=descending))
        run.backward(functools.partial(launch, descending=descending))
    for one, other in zip(runs[0].made(), runs[1].made(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_launch_serves_other_lengths() -> None:
    """The texts and the sizes of a launch say nothing of the lengths: only arrays do."""
    case = PackedCase((64, 64, 64), (64, 64, 64), 2, 2, 64, right=0, spare=200)
    run, other = PackedRun(case), PackedRun(case)
    for starts in other.starts:
        starts[...] = (0, 150, 151, 192)
    assert [c.sizes for c in run.lowering(backward=True).calls if isinstance(c, BoundSource)] == [
        c.sizes for c in other.lowering(backward=True).calls if isinstance(c, BoundSource)
    ]
    other.forward(launch)
    other.backward(launch)
    for made, expected in zip(other.made(), other.expected(), strict=True):
        assert error(made, expected) < LIMITS["float16"]


WRONG = [  # places, and the sequences that are wrong
    ((0, 30, 20, 60), {1}),  # descending
    ((0, 10, 61, 60), {1, 2}),  # behind the end
    ((0, 10, 60, 60), {1}),  # longer than 40
    ((5, 10, 40, 60), {0}),  # rows before the first
    ((0, 10, 40, 50), {2}),  # rows behind the last
    ((0, -9, 40, 60), {0, 1}),  # before the start
]


@pytest.mark.parametrize("dtype", [dtypes.float16, dtypes.float32], ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["queries", "keys"])
@pytest.mark.parametrize(("places", "wrong"), WRONG, ids=str)
def test_wrong_places_are_reported(
    places: tuple[int, ...], wrong: set[int], which: int, dtype: Any
) -> None:
    """And nothing is written for them; sequences that are where they may be are computed."""
    run = PackedRun(PackedCase((20, 20, 20), (20, 20, 20), 1, 1, 64, dtype=dtype, spare=20))
    run.starts[which][...] = places
    failed, code = run.forward(launch)
    assert failed == 1
    assert code % 2 == which
    assert code // 2 in wrong
    written = np.zeros(60, bool)
    for n in {0, 1, 2} - wrong:
        written[slice(*run.starts[0][n : n + 2])] = True
    np.testing.assert_array_equal(~np.isnan(run.log_sum[0]), written)
    np.testing.assert_array_equal(~np.isnan(run.result[:, 0]).any(1), written)
    run.backward(launch)
    np.testing.assert_array_equal(~np.isnan(run.gradients[0][:, 0]).any(1), written)


def test_what_sequences_cannot_have_is_refused() -> None:
    run = PackedRun(PackedCase((5,), (5,), 2, 2, 64))
    one = by_heads(run.query)

    def reason(longest: int = 5, **options: Any) -> str:
        sequences = Sequences(1, longest, longest, -1, -1)
        known: dict[str, Any] = {"causal": False, "mask": None} | options
        problem = AttentionProblem(
            False, one, one, one, one, scale=0.1, sequences=sequences, **known
        )  # fmt: skip
        return takes(problem) or ""

    assert not reason()
    assert "causal" in reason(causal=True)
    assert "dropout" in reason(dropout=0.1)
    assert "2^29" in reason(longest=LONGEST_SEQUENCE + 1)
    assert "a mask of float16" in reason(mask=one)


# --- machine code ---------------------------------------------------------------------------------

VARIANTS = [
    PackedCase((64,), (64,), 2, 1, 64, dtype=dtypes.bfloat16, right=0),
    PackedCase((64,), (64,), 2, 1, 128, dtype=dtypes.bfloat16, right=0),
    PackedCase((64,), (64,), 2, 1, 128, dtype=dtypes.bfloat16, left=9, right=0, slopes=True),
    PackedCase((64,), (64,), 2, 1, 128, left=9, right=9),
    PackedCase((64,), (64,), 2, 1, 256, left=9, right=9),
    PackedCase((64,), (64,), 2, 1, 64, dtype=dtypes.float32, left=9, slopes=True),
]


def calls_of(case: PackedCase) -> list[BoundSource]:
    run = PackedRun(case)
    calls = (*run.lowering(backward=False).calls, *run.lowering(backward=True).calls)
    return [call for call in calls if isinstance(call, BoundSource)]


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_variants_compile_and_stay_in_registers(case: PackedCase) -> None:
    for call in calls_of(case):
        code, said = cubin_of(call.text, "sm_90a")
        assert call.symbol.encode() in code
        (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
        assert int(spilled) <= SPILLS, call.symbol


@pytest.mark.parametrize("case", [VARIANTS[2], VARIANTS[5]], ids=str)
def test_variants_compile_for_the_oldest_architecture(case: PackedCase) -> None:
    for call in calls_of(case):
        code, _ = cubin_of(call.text, "sm_80")
        assert call.symbol.encode() in code
