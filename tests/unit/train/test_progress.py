"""What a run shows: the same figures as a bar on a terminal, and as lines elsewhere."""

import io
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from flame.train.progress import ProgressReport
from flame.train.totals import Totals
from flame.train.trainer import Trainer

RECORD = {
    "epoch": 1,
    "train_loss": 0.5,
    "train_accuracy": 0.8125,
    "test_loss": 0.25,
    "test_accuracy": 0.9,
}


def shown(*, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """What an epoch of ten steps of 32 items in 0.1 seconds each, out of two epochs, prints."""
    seconds = iter(index * 0.1 for index in range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, highlight=False)
    report = ProgressReport(console)
    state: Any = SimpleNamespace(epoch=0, epochs=2, step=0, steps_per_epoch=10, totals=Totals())
    trainer = cast(Trainer, state)
    report.on_start(trainer)
    for _ in range(10):
        state.step += 1
        state.totals = Totals(items=32 * state.step, correct=16 * state.step, loss_sum=8.0)
        report.on_step(trainer)
    report._bar.refresh()
    state.epoch, state.totals = 1, Totals()
    report.on_epoch(trainer, RECORD)
    report.on_end(trainer)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())


def test_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(terminal=False, monkeypatch=monkeypatch) == (
        "epoch 1/2  loss 0.500  accuracy 81.2%  test loss 0.250  test accuracy 90.00%  "
        "320 items/s  0:01 left\n"
    )


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(terminal=True, monkeypatch=monkeypatch)
    assert re.search(r"epoch 1/2 .*loss 0\.025  accuracy 50\.0%  \d+ items/s left", text)
    assert "test accuracy 90.00%" in text
