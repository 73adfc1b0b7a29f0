"""The loop: what it tells its observers, what it refuses, and that it goes on exactly."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

import flame
from flame.core.errors import CheckpointError, FlameError
from flame.recipes import find
from flame.train.folder import Record, RunFolder
from flame.train.task import Task
from flame.train.trainer import Trainer


class Log:
    """An observer that keeps what it was told."""

    def __init__(self, stop: Callable[[Trainer], None] = lambda trainer: None) -> None:
        self.events: list[str] = []
        self._stop = stop

    def on_start(self, trainer: Trainer) -> None:
        self.events.append("start")

    def on_step(self, trainer: Trainer) -> None:
        self.events.append(f"step {trainer.step}")
        self._stop(trainer)

    def on_epoch(self, trainer: Trainer, record: Record) -> None:
        self.events.append(f"epoch {record['epoch']}")

    def on_end(self, trainer: Trainer) -> None:
        self.events.append("end")


def task(epochs: int = 2) -> Task:
    recipe = find("fashion-cnn")
    options = {"epochs": epochs, "limit": 32, "batch_size": 8}
    return recipe.build(recipe.defaults.with_options(options))


def trainer(path: Path, log: Log | None = None) -> Trainer:
    return Trainer(
        task(), RunFolder.create(path, "test", {}), epochs=2, observers=[log] if log else []
    )


def test_observers_are_told_in_order(tmp_path: Path) -> None:
    log = Log()
    assert trainer(tmp_path / "run", log).fit()
    assert log.events == [
        "start",
        *(f"step {step}" for step in (1, 2, 3, 4)),
        "epoch 1",
        *(f"step {step}" for step in (5, 6, 7, 8)),
        "epoch 2",
        "end",
    ]


@pytest.mark.parametrize("cut", [1, 4, 6, 8])
def test_a_cut_run_goes_on_exactly(tmp_path: Path, cut: int) -> None:
    import os
    import signal

    whole = trainer(tmp_path / "whole")
    whole.fit()

    def stop(running: Trainer) -> None:
        if running.step == cut:
            os.kill(os.getpid(), signal.SIGINT)

    first = trainer(tmp_path / "cut", Log(stop))
    assert first.fit() == (cut == 8)
    assert first.step == cut
    flame.manual_seed(999)  # nothing may depend on what happens between the two
    second = Trainer(task(), RunFolder.open(first.folder.path), epochs=2)
    second.load_state_dict(second.folder.load())
    assert second.step == cut
    assert second.fit()
    assert second.folder.checkpoint_file.read_bytes() == whole.folder.checkpoint_file.read_bytes()
    for kind in ("step", "epoch"):
        ours, theirs = (
            [{**record, "time": 0} for record in run.folder.records(kind)]
            for run in (second, whole)
        )
        assert ours == theirs


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    running = trainer(tmp_path / "run")
    with flame.no_grad():
        next(iter(running.task.model.parameters())).fill_(math.nan)
    log = Log()
    running._observers = (log,)
    with pytest.raises(FlameError, match=r"the loss is nan at step 1.* smaller --lr"):
        running.fit()
    assert log.events[-1] == "end"
    assert not running.folder.checkpoint_file.exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    running = trainer(tmp_path / "run")
    state = running.state_dict()
    del state["model"]["0.weight"]
    with pytest.raises(CheckpointError, match=r"(?s)does not fit the run: .*0\.weight"):
        running.load_state_dict(state)
    with pytest.raises(CheckpointError, match="does not fit the run"):
        running.load_state_dict({"epoch": 1})
