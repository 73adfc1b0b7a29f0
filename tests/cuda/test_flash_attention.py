"""The attention kernels, run on the host and compiled for GPUs."""

import ctypes
import functools
import io
import re

import numpy as np
import pytest

from flame.core import dtypes
from flame.core.errors import UnsupportedError
from flame.core.types import tensor_type
from flame.kernel.builder import BoundSource
from flame.kernel.library import AttentionProblem
from flame.kernels import source
from flame.kernels.attention import dropout_blocks, flash_attention, on_tensor_cores, takes

from .attention_cases import LIMITS, Case, Run, error, packed
from .host_compiler import HostLibrary

bfloat16, float16 = dtypes.bfloat16, dtypes.float16
float32, float64 = dtypes.float32, dtypes.float64
noise = np.random.default_rng(7)


@functools.cache
def library(text):
    return HostLibrary.of([text])


def launch(call, arrays, **options):
    pointers = [0 if a is None else a.ctypes.data for a in arrays]
    array, _keep = packed(call, pointers)
    library(call.text).launch(
        call.symbol, call.grid, call.block, call.shared, ctypes.addressof(array), **options
    )


def biases(*shape, dtype=np.float32):
    return noise.standard_normal(shape).astype(dtype)


def choices(*shape):
    made = noise.random(shape) > 0.3
    made[..., 0] = True  # no row without a key
    return made


def some_rows_empty(*shape):
    made = noise.random(shape) > 0.3
    made[..., 5, :] = False
    made[..., -1, :] = False
    return made


CASES = [  # few combinations of dtype, width and options, as each is compiled
    # lengths that are whole tiles, and not; longer than a tile on either side; nothing at all
    Case(1, 1, 1, 64, 64, 64, dtype=float16),
    Case(1, 1, 1, 1, 1, 64, dtype=float16),
    Case(1, 1, 1, 150, 70, 64, dtype=float16, causal=True, rows_first=True),
    Case(1, 2, 1, 5, 0, 64, dtype=float16),
    Case(1, 2, 1, 0, 5, 64, dtype=float16),
    # rows that are not aligned to 16 bytes
    Case(1, 2, 1, 40, 90, 64, dtype=float16, gap=3),
    # grouped heads: gradients by key head, and by query head
    Case(1, 4, 2, 20, 40, 64, dtype=float16, causal=True),
    Case(1, 4, 2, 20, 40, 64, dtype=float16, causal=True, gradient_heads=4),
    # widths: whole tiles, padded in one or both products, and wide
    Case(2, 2, 1, 37, 75, 32, shift=False),
    Case(1, 1, 1, 40, 70, 128),
    Case(1, 2, 1, 70, 140, 40, 24, dtype=float16, causal=True),
    Case(1, 1, 1, 20, 40, 256, dtype=float16),
    # masks with each broadcast
    Case(1, 2, 1, 40, 100, 64, dtype=float16, mask=biases(40, 100), causal=True),
    Case(2, 2, 2, 20, 66, 16, mask=choices(2, 1, 1, 66)),
    Case(2, 2, 1, 20, 30, 64, dtype=float16, mask=biases(1, 2, 20, 1, dtype=np.float16)),
    Case(2, 4, 2, 70, 90, 64, dtype=float16, mask=biases(1, 4, 1, 90), causal=True),  # ALiBi
    Case(2, 2, 1, 70, 90, 64, dtype=float16, mask=biases(1, 2, 70, 90), causal=True),
    Case(2, 2, 1, 70, 90, 64, dtype=float16, mask=biases(2, 1, 1, 90), causal=True),
    # dropout: whole groups of 64 columns, half a group, tiles for less shared memory
    Case(1, 2, 1, 30, 130, 64, dtype=float16, dropout=0.3),
    Case(1, 1, 1, 40, 100, 160, dtype=float16, dropout=0.3, causal=True),
    Case(1, 1, 1, 40, 100, 232, dtype=float16, dropout=0.3, shared_limit=101376),
    # plain arithmetic: widths and scales that tensor cores do not take, float32, float64
    Case(1, 2, 1, 40, 30, 12, dtype=float16),
    Case(1, 1, 1, 20, 30, 64, scale=-0.1, causal=True),
    Case(2, 2, 1, 70, 50, 48, dtype=float32, mask=choices(2, 1, 1, 50), causal=True),
    Case(1, 4, 2, 40, 50, 128, dtype=float32, dropout=0.2, rows_first=True),
    Case(1, 2, 1, 20, 50, 256, dtype=float64, causal=True, dropout=0.2),
    Case(1, 1, 1, 20, 50, 33, 7, dtype=float64, mask=biases(50, dtype=np.float64), gap=1),
    Case(2, 1, 1, 4, 3, 0, 2, dtype=float32),
    Case(2, 1, 1, 4, 0, 0, 2, dtype=float32),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_result_and_gradients(case):
    run = Run(case)
    run.forward(launch)
    run.backward(launch)
    for name, made, expected in zip(
        ("result", "log_sum", "dq", "dk", "dv"), run.made(), run.expected(), strict=True
    ):
        assert error(made, expected) < LIMITS[case.dtype.name], name


@pytest.mark.parametrize("dtype", [float16, float32], ids=str)
def test_rows_without_keys_give_zeros(dtype):
    mask = some_rows_empty(40, 30)
    run = Run(Case(1, 2, 1, 40, 30, 64, dtype=dtype, mask=mask))
    run.forward(launch)
    run.backward(launch)
    for made, expected in zip(run.made(), run.expected(), strict=True):
        assert error(made, expected) < LIMITS[dtype.name]
    empty = ~mask.any(-1)
    assert empty.sum() == 2
    assert not run.result[:, :, empty].any()
    assert not run.log_sum[:, :, empty].any()
    assert not run.gradients[0][:, :, empty].any()


@pytest.mark.parametrize("dtype", [float16, float32], ids=str)
def test_order_of_threads_does_not_matter(dtype):
    """Descending threads and blocks find barriers that are missing."""
    case = Case(1, 2, 1, 140, 150, 64, dtype=dtype, causal=True)
    runs = Run(case), Run(case)
    for run, descending in zip(runs, (False, True), strict=True):
        run.forward(functools.partial(launch, descending=descending))
        run.backward(functools.partial(launch, descending=descending))
    for one, other in zip(runs[0].made(), runs[1].made(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [float16, float32], ids=str)
def test_dropout_draws_the_bits_of_its_positions(dtype):
    """Values that are the unit matrix show each probability."""
    run = Run(Case(2, 3, 1, 37, 64, 64, dtype=dtype, dropout=0.25))
    run.value[...] = np.eye(64)
    run.forward(launch)
    kept = run.kept() != 0
    np.testing.assert_array_equal(run.result != 0, kept)
    assert abs(kept.mean() - 0.75) < 0.01
    assert len({row.tobytes() for row in kept.reshape(-1, 64)}) == 2 * 3 * 37
    assert dropout_blocks(run.problem(backward=False)) == 2 * 3 * 37 * 16


def test_gradients_agree_with_finite_differences():
    """Of one number made of result and log_sum, with dropout, in float64."""
    case = Case(1, 2, 1, 5, 7, 3, 2, dtype=float64, causal=True, dropout=0.3)
    run = Run(case)
    run.forward(launch)
    run.backward(launch)

    def loss():
        run.forward(launch)
        return (run.grad * run.result).sum() + (run.shift * run.log_sum).sum()

    for operand, gradient in zip((run.query, run.key, run.value), run.gradients, strict=True):
        direction = noise.standard_normal(operand.shape)
        start = operand.copy()
        operand[...] = start + 1e-5 * direction
        above = loss()
        operand[...] = start - 1e-5 * direction
        below = loss()
        operand[...] = start
        assert (above - below) / 2e-5 == pytest.approx((gradient * direction).sum(), abs=1e-8)


# --- what is taken --------------------------------------------------------------------------------


def problem_of(
    *, dtype=bfloat16, heads=4, key_heads=2, width=64, mask=None, scale=0.1, dropout=0.0
):
    query, key = (tensor_type(dtype, (2, h, 16, width)) for h in (heads, key_heads))
    return AttentionProblem(False, query, key, key, query, mask, False, scale, dropout)


def test_tensor_cores_serve_contiguous_rows_of_16_bits():
    assert on_tensor_cores(problem_of())
    assert not on_tensor_cores(problem_of(dtype=float32))
    assert not on_tensor_cores(problem_of(width=12))
    assert not on_tensor_cores(problem_of(scale=-1.0))
    strided = tensor_type(bfloat16, (2, 4, 16, 64), (4096, 1024, 1, 16))
    assert not on_tensor_cores(problem_of(), strided)
    for symbol, dtype in (("flash_attention_forward", float16), ("attention_forward", float32)):
        (call,) = flash_attention(problem_of(dtype=dtype)).calls
        assert isinstance(call, BoundSource)
        assert call.symbol == symbol


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (problem_of(width=264), "width 264"),
        (problem_of(heads=3), "3 query heads cannot share 2"),
        (problem_of(mask=tensor_type(float64, (16, 16))), "a mask of float64 for bfloat16"),
        (problem_of(dropout=1.0), "dropout of probability 1.0"),
        (problem_of(dtype=dtypes.int32), "int32"),
    ],
)
def test_refusals_say_why(problem, words):
    reason = takes(problem)
    assert reason is not None
    assert words in reason
    with pytest.raises(UnsupportedError, match="no kernel takes"):
        flash_attention(problem)


def test_less_shared_memory_gives_smaller_tiles_or_a_reason():
    problem = problem_of(width=128)
    backward = AttentionProblem(
        True, problem.query, problem.key, problem.value, problem.result, None, False, 0.1
    )
    shared = 101376  # of a GeForce
    assert max(call.shared for call in flash_attention(backward).calls) > shared
    small = flash_attention(backward, shared_limit=shared)
    assert max(call.shared for call in small.calls) <= shared
    wide = problem_of(dtype=float64, width=256)
    assert takes(wide) is None
    assert "shared memory" in (takes(wide, 48 << 10) or "")


# --- machine code ---------------------------------------------------------------------------------

VARIANTS = [
    Case(1, 2, 1, 64, 64, 64, causal=True),
    Case(1, 2, 1, 64, 64, 128),
    Case(1, 2, 1, 64, 64, 128, causal=True),
    Case(1, 2, 1, 64, 64, 96, dtype=float16, mask=biases(64, 64)),
    Case(1, 2, 1, 64, 64, 64, mask=choices(64, 64), dropout=0.1),
    Case(1, 2, 1, 64, 64, 256),
    Case(1, 2, 1, 64, 64, 64, dtype=float32),
    Case(1, 2, 1, 64, 64, 64, dtype=float64, causal=True, dropout=0.1),
]
SPILLS = 64  # bytes: a few values that the main loop only reads; an accumulator tile has 128


def calls_of(case):
    run = Run(case)
    return (*run.lowering(backward=False).calls, *run.lowering(backward=True).calls)


def cubin_of(text, architecture):
    """Machine code and what the assembler says of registers."""
    core = pytest.importorskip("cuda.core", reason="NVRTC is not installed")
    said = io.StringIO()
    options = core.ProgramOptions(std="c++17", arch=architecture, ptxas_options=["-v"])
    made = core.Program(text, "c++", options).compile("cubin", logs=said)
    return bytes(made.code), said.getvalue()


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_variants_compile_and_stay_in_registers(case):
    for call in calls_of(case):
        code, said = cubin_of(call.text, "sm_90a")
        assert call.symbol.encode() in code
        (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
        assert int(spilled) <= SPILLS, call.symbol


@pytest.mark.parametrize("case", [VARIANTS[0], VARIANTS[6]], ids=str)
def test_variants_compile_for_the_oldest_architecture(case):
    for call in calls_of(case):
        code, _ = cubin_of(call.text, "sm_80")
        assert call.symbol.encode() in code


def test_source_inlines_each_header_once():
    text = source("flash_attention_backward", ELEMENT=1)
    assert text.startswith("#define ELEMENT 1\n")
    assert "#include" not in text
    assert text.count("struct Words {") == 1
