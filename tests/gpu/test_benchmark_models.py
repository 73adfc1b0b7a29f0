"""What the GPU benchmarks measure is, at their tiny sizes, what PyTorch computes on the GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import flame
import flame.nn
import flame.optim

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_ops
from gpu_cases import memory_cases, product_cases
from gpu_losses import same
from gpu_models import BENCHMARKS
from gpu_worker import make_step

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

CASES = {case.name: case for case in [*memory_cases("tiny"), *product_cases("tiny")]}


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["flame eager", "flame compiled"])
@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_trains_as_pytorch(name: str, kind: str, mixed: bool) -> None:
    benchmark = BENCHMARKS[name]("tiny")
    found = {}
    for each in (kind, "torch eager"):
        step = make_step(each, benchmark, "cuda", mixed=mixed)
        found[each] = [float(step().item()) for _ in range(3)]
    assert same(found[kind], found["torch eager"], 1e-2 if mixed else 1e-3), found


# PyTorch's, in threads of its backward pass that are new
@pytest.mark.filterwarnings(
    "ignore:Attempting to run cuBLAS, but there was no current CUDA context"
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", list(CASES))
def test_operations_agree(name: str, compiled: bool) -> None:
    for line in gpu_ops.lines_of(CASES[name], compiled=compiled):
        ours, theirs = (line.make(lib, "cuda")[0]() for lib in (flame, torch))
        error = gpu_ops.difference(line, ours, theirs)
        assert error <= (gpu_ops.ERROR if line.exact else 0.05), line.name


def test_a_burst_is_timed_by_events() -> None:
    line = gpu_ops.lines_of(CASES["add"], compiled=False)[0]
    for lib in (flame, torch):
        clock, calls = gpu_ops.Clock(lib, "cuda"), line.make(lib, "cuda")
        assert 0 < clock.burst(calls, clock.prepare(calls)) < 1000
