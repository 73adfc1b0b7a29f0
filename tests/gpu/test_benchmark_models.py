"""The models of the GPU benchmarks train on the GPU as PyTorch's do there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gpu_losses import same
from gpu_models import BENCHMARKS
from gpu_worker import make_step

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)


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
