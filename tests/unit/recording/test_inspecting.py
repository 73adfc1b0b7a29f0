"""Reports, profiles and replays of compiled functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flame
import flame.nn as nn
import flame.optim as optim
from flame.core.errors import StateError
from flame.nn import functional


def trained() -> tuple[Any, Any, Any, Any]:
    flame.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.GELU(), nn.Linear(16, 4))
    optimizer = optim.AdamW(model.parameters(), lr=0.01)

    @flame.compile
    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    x, y = flame.randn(32, 8), flame.randn(32, 4)
    return model, step, x, y


def test_a_report_names_what_runs() -> None:
    _, step, x, y = trained()
    with pytest.raises(StateError, match="before its first call"):
        step.report()
    step(x, y)
    text = step.report()
    assert "adamw_update" in text
    assert "planned peak" in text
    assert "define void" in step.program.source(0)
    assert "adamw_update" in str(step.graph)


def test_a_profile_tells_times_and_changes_nothing(tmp_path: Path) -> None:
    model, step, x, y = trained()
    with pytest.raises(StateError, match="call the function first"):
        step.profile(x, y)
    step(x, y)
    before = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    table = str(step.profile(x, y, runs=3))
    assert "GFLOP/s" in table
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name])
    step.program.trace(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_a_replay_finds_nothing_wrong_in_a_right_step() -> None:
    model, step, x, y = trained()
    step(x, y)
    before = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    found = step.replay(x, y)
    assert found.difference is None
    assert found.nan is None
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name])


def test_a_replay_names_the_line_of_the_first_nan() -> None:
    def step(x: Any) -> Any:
        y = x * 2
        z = flame.log(y - 10.0)  # here
        return (z + 1).sum()

    compiled = flame.compile(step)
    compiled(flame.tensor([1.0, 20.0]))
    found = compiled.replay(flame.tensor([1.0, 20.0]))
    assert found.nan is not None
    assert found.nan.node.op.name == "log"
    line = step.__code__.co_firstlineno + 2
    assert found.nan.node.line.endswith(f"test_inspecting.py:{line}")
