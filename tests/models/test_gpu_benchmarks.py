"""The GPU benchmarks measure the same computation in both libraries: shown on the CPU, at their
tiny sizes.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flame
import flame.nn
import flame.optim

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_losses
import gpu_ops
import gpu_vs_torch
from gpu_cases import Case, memory_cases, product_cases
from gpu_models import BENCHMARKS, weights
from gpu_remote import Failed, Remote
from gpu_worker import make_step

torch = pytest.importorskip("torch")

STEPS = 3
CASES = {case.name: case for case in [*memory_cases("tiny"), *product_cases("tiny")]}
OPTIONS = gpu_vs_torch.Options(
    kinds=("torch eager", "flame compiled"),
    warm=True,
    size="tiny",
    device="cpu",
    precision="float32",
    turns=1,
    seconds=0.01,
    patience=120,
)


def losses(kind: str, name: str) -> list[float]:
    step = make_step(kind, BENCHMARKS[name]("tiny"), "cpu", mixed=False)
    return [float(step().item()) for _ in range(STEPS)]


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_every_library_trains_alike(name: str) -> None:
    expected = losses("torch eager", name)
    assert expected[0] > expected[1] > expected[2]  # it learns
    for kind in ("flame eager", "flame compiled"):
        np.testing.assert_allclose(losses(kind, name), expected, rtol=2e-5, err_msg=kind)


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_weights_go_over_by_name(name: str) -> None:
    benchmark = BENCHMARKS[name]("tiny")
    ours, theirs = benchmark.build(flame), benchmark.build(torch)
    state = {key: torch.from_numpy(value.numpy()) for key, value in ours.state_dict().items()}
    theirs.load_state_dict(state)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    given = weights(ours)
    assert all(np.array_equal(given[key], value) for key, value in weights(theirs).items())
    assert all(np.any(value) for key, value in given.items() if "num_batches" not in key)


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_full_size_has_the_structure_of_the_tiny_one(name: str) -> None:
    """Every kind of layer that is measured is checked above."""
    with torch.device("meta"):
        full, tiny = (BENCHMARKS[name](size).build(torch) for size in ("full", "tiny"))
    kinds = [{type(m).__qualname__ for m in model.modules()} for model in (full, tiny)]
    assert kinds[0] == kinds[1]


def test_sizes_are_those_of_the_papers() -> None:
    """Parameters in millions."""
    expected = {"gpt2": 124.5, "resnet": 25.6, "dit": 674.8, "unet": 420.4}
    for name, millions in expected.items():
        with torch.device("meta"):
            model = BENCHMARKS[name]("full").build(torch)
        count = sum(p.numel() for p in model.parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.1), name


def test_a_wrong_training_is_seen() -> None:
    right = [4.0, 3.9, 3.8]
    table = {
        "a": (right, True),
        "nearly": ([4.0001, 3.9001, 3.8002], True),
        "wrong loss": ([4.1, 4.0, 3.9], False),
        "wrong gradient": ([4.0, 3.98, 3.96], False),
        "not a number": ([4.0, 3.9, math.nan], False),
    }
    for what, (found, same) in table.items():
        assert gpu_losses.same(found, right, 5e-2 if "gradient" in what else 1e-3) is same, what
    verdict, notes = gpu_losses.agreement(
        {"torch eager": right, "flame compiled": table["wrong loss"][0]}, mixed=True
    )
    assert verdict == "**NO**: flame compiled"
    assert len(notes) == 2
    assert gpu_losses.agreement({"flame compiled": right}, mixed=True)[0] == "not compared"


def test_a_line_of_the_table(tmp_path: Path) -> None:
    versions: dict[str, str] = {}
    found = gpu_vs_torch.measure("mlp", OPTIONS, tmp_path, versions)
    assert versions == {"torch": torch.__version__, "flame": flame.__version__}
    assert set(found) == {"torch eager", "flame compiled", "flame warm"}
    assert not any(f.error for f in found.values())
    assert found["flame warm"].first < found["flame compiled"].first
    assert math.isnan(found["flame warm"].ms)
    line, notes = gpu_vs_torch.row("mlp", BENCHMARKS["mlp"]("tiny"), OPTIONS, found)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert len(cells) == len(gpu_vs_torch.columns(OPTIONS))
    assert cells[-1] == "yes"
    assert float(cells[3].strip("*")) == pytest.approx(
        found["flame compiled"].ms / found["torch eager"].ms, abs=0.01
    )
    assert len(notes) == 3


def test_a_failure_is_shown_in_its_cells() -> None:
    found = {
        "torch eager": gpu_vs_torch.Found(first=1.0, losses=[2.0, 1.0], times=[3.0, 5.0, 4.0]),
        "flame compiled": gpu_vs_torch.Found(error="OutOfMemoryError: 3 GiB"),
        "flame warm": gpu_vs_torch.Found(error="OutOfMemoryError: 3 GiB"),
    }
    line, notes = gpu_vs_torch.row("mlp", BENCHMARKS["mlp"]("tiny"), OPTIONS, found)
    assert line.startswith("| mlp | 4 | OutOfMemoryError | – |")
    assert "- mlp: flame compiled failed: OutOfMemoryError: 3 GiB" in notes


def test_a_worker_that_dies_says_why(tmp_path: Path) -> None:
    worker = Remote("flame eager", "no model", "tiny", "cpu", "float32", tmp_path)
    try:
        with pytest.raises(Failed, match=r"Died: exit status 1; KeyError: 'no model'"):
            worker.ask("start", 60)
    finally:
        worker.close()


def test_a_worker_that_is_late_is_told_so(tmp_path: Path) -> None:
    worker = Remote("flame eager", "tiny", "tiny", "cpu", "float32", tmp_path)
    try:
        with pytest.raises(Failed, match="Timeout"):
            worker.answer(0.01)
    finally:
        worker.close()


def results(case: Case, line: gpu_ops.Measured) -> tuple[Any, Any]:
    ours, theirs = (line.make(lib, "cpu")[0]() for lib in (flame, torch))
    return ours, theirs


@pytest.mark.parametrize("name", list(CASES))
def test_operations_agree(name: str) -> None:
    for line in gpu_ops.lines_of(CASES[name], compiled=False):
        error = gpu_ops.difference(line, *results(CASES[name], line))
        assert error <= (gpu_ops.ERROR if line.exact else 0.05), line.name


@pytest.mark.parametrize("name", ["gelu, tanh", "layer_norm", "linear 32 x 16 to 48"])
def test_compiled_operations_agree(name: str) -> None:
    lines = gpu_ops.lines_of(CASES[name], compiled=True)
    assert [line.name for line in lines] == [name, f"{name}: both"]
    for line in lines:
        assert gpu_ops.difference(line, *results(CASES[name], line)) <= gpu_ops.ERROR, line.name


@pytest.mark.parametrize("compiled", [False, True])
def test_optimizer_updates_agree(compiled: bool) -> None:
    line = gpu_ops.adamw_line("tiny", compiled=compiled)
    ours, theirs = (line.make(lib, "cpu")[0]() for lib in (flame, torch))
    assert gpu_ops.difference(line, ours, theirs) <= 1e-5


def test_a_wrong_operation_is_seen() -> None:
    line = gpu_ops.lines_of(CASES["add"], compiled=False)[0]
    right = torch.arange(8.0)
    assert gpu_ops.difference(line, right, right) == 0
    assert gpu_ops.difference(line, right * 1.1, right) > gpu_ops.ERROR
    assert gpu_ops.difference(line, right / 0, right) == math.inf
