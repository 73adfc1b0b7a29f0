"""Updates run beside the rest of a step, and wait for what they need and what needs them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flame
from flame import nn, optim
from flame.compiler.gpu import blueprint
from flame.compiler.gpu import lanes as gpu_lanes
from flame.compiler.gpu.lanes import Work, waits_of
from flame.compiler.gpu.steps import CallSpec
from flame.compiler.schedule.memory import Place
from flame.kernel.library import ConvolutionProblem, MatmulProblem

from .emulation import EmulatedDriver


@pytest.fixture(autouse=True)
def small_ones_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_lanes, "LEAST", 0)
    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path))


def build(device: str) -> tuple[nn.Module, Any]:
    flame.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(24, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 5),
    ).to(device)  # fmt: skip
    return model, optim.AdamW(model.parameters(), lr=1e-2)


def losses(device: str, steps: int) -> tuple[list[float], Any]:
    model, optimizer = build(device)
    random = np.random.default_rng(0)

    def step(x: Any, y: Any) -> Any:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    compiled = flame.compile(step)
    found = []
    for _ in range(steps):
        x = flame.from_numpy(random.standard_normal((16, 24)).astype(np.float32)).to(device)
        y = flame.from_numpy(random.integers(0, 5, 16)).to(device)
        found.append(compiled(x, y).item())
    return found, compiled


def test_updates_run_beside_the_rest(emulated_cuda: EmulatedDriver) -> None:
    found, compiled = losses("cuda", 6)
    wanted, _ = losses("cpu", 6)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    program = compiled.program
    launches = program.blueprint.launches
    aside = [launch.spec.name for launch in launches if launch.beside]
    assert sum("adamw_update" in name for name in aside) >= 6
    assert not any("linear" in name for name in aside)
    assert any(launch.after >= 0 for launch in launches if launch.beside)


def test_the_emulation_tells_of_missing_waits(
    emulated_cuda: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blueprint, "waits_of", lambda works: [-1] * len(works))
    found, _ = losses("cuda", 6)
    wanted, _ = losses("cpu", 6)
    assert not np.allclose(found, wanted, rtol=1e-4)


def test_state_that_an_argument_shares_keeps_everything_in_order(
    emulated_cuda: EmulatedDriver,
) -> None:
    base = flame.zeros(64, device="cuda")
    weight = base[16:48]

    def step(x: Any) -> Any:
        weight.add_(1)
        return x * 2

    compiled = flame.compile(step)
    for count in range(4):
        np.testing.assert_array_equal(compiled(flame.ones(3, device="cuda")).cpu().numpy(), 2)
        assert weight.sum().item() == 32 * (count + 1)
    program = compiled.program
    assert not program._inputs_overlap()
    numbers = [i for i, t in enumerate(program.blueprint.input_types) if i in program.state]
    assert numbers
    argument = next(iter(program.arguments.values()))
    argument.pointer = program.state[numbers[0]] + 4
    assert program._inputs_overlap()


def test_convolutions_stay_in_one_lane(emulated_cuda: EmulatedDriver) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    ).cuda()
    optimizer = optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

    @flame.compile
    def step(x: Any) -> Any:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    step(flame.ones(2, 3, 6, 6, device="cuda"))
    launches = step.program.blueprint.launches
    assert any(launch.beside for launch in launches)
    calls = [launch for launch in launches if isinstance(launch.spec, CallSpec)]
    assert any(isinstance(launch.spec.problem, ConvolutionProblem) for launch in calls)
    for launch in calls:
        assert isinstance(launch.spec.problem, MatmulProblem) or not launch.beside


def test_what_is_little_stays_in_one_lane(
    emulated_cuda: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    _, compiled = losses("cuda", 1)
    assert not any(launch.beside for launch in compiled.program.blueprint.launches)


def random_works(random: np.random.Generator, count: int) -> list[Work]:
    def places(limit: int) -> tuple[tuple[Place, int], ...]:
        return tuple(
            (Place("arena", int(random.integers(2)), int(random.integers(40))),
             int(random.integers(1, 12)))
            for _ in range(random.integers(limit))
        )  # fmt: skip

    return [Work(2 * i + 1, bool(random.integers(2)), places(3), places(3)) for i in range(count)]


def conflict(first: Work, second: Work) -> bool:
    def meet(ours: Any, theirs: Any) -> bool:
        return any(
            (a.space, a.index) == (b.space, b.index)
            and a.offset < b.offset + m and b.offset < a.offset + n
            for (a, n), (b, m) in itertools.product(ours, theirs)
        )  # fmt: skip

    return (
        meet(first.writes, second.writes)
        or meet(first.writes, second.reads)
        or meet(first.reads, second.writes)
    )


@pytest.mark.parametrize("seed", range(20))
def test_waits_order_all_that_meets_in_memory(seed: int) -> None:
    """Against all pairs, one by one: what meets is ordered, and no wait is for nothing."""
    works = random_works(np.random.default_rng(seed), 40)
    after = waits_of(works)
    reached = {False: -1, True: -1}  # launches of the other lane that a lane has waited for
    for i, (work, launch) in enumerate(zip(works, after, strict=True)):
        before = [w.last for w in works[:i] if w.beside is not work.beside and conflict(w, work)]
        if launch >= 0:
            assert launch == max(before)
            reached[work.beside] = max(reached[work.beside], launch)
        assert max(before, default=-1) <= reached[work.beside]
