"""``flame train`` on an emulated GPU: small runs, interrupted and resumed, of every precision."""

import json
import os
import signal
from pathlib import Path

import pytest

from flame.cli import main
from flame.train.progress import ProgressReport
from flame.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("eager_cuda")

SMALL = ("--epochs", "2", "--limit", "24", "--batch-size", "8", "--device", "cuda")


def flame(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Ctrl-C after the second step, until it is undone."""
    on_step = ProgressReport.on_step

    def changed(self: ProgressReport, trainer: Trainer) -> None:
        on_step(self, trainer)
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ProgressReport, "on_step", changed)
    return monkeypatch


def records(run: Path) -> list[dict[str, object]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{**json.loads(line), "time": 0} for line in lines]


@pytest.mark.parametrize(
    ("precision", "eager"),
    [("float32", ()), ("fp16", ()), ("bf16", ("--eager",))],
    ids=["compiled-float32", "compiled-fp16", "eager-bf16"],
)
def test_a_run_is_trained_resumed_and_tested(
    tmp_path: Path,
    precision: str,
    eager: tuple[str, ...],
    cut: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("train", "fashion-cnn", *SMALL, "--precision", precision, *eager)
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert flame(*words, "--run-dir", half) == 130
    assert "Interrupted after step 2" in capsys.readouterr().out
    cut.undo()
    assert flame("train", "fashion-cnn", "--resume", half) == 0
    assert flame(*words, "--run-dir", whole) == 0
    ours, theirs = (path / "checkpoint.safetensors" for path in (half, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    assert records(half) == records(whole)

    config = json.loads((whole / "config.json").read_text())
    assert config["settings"]["device"] == "cuda"
    assert config["settings"]["precision"] == precision
    assert (whole / "predictions.png").exists()
    capsys.readouterr()
    told = f"test accuracy {records(whole)[-1]['test_accuracy']:.2%}"
    assert flame("eval", whole) == 0
    assert told in capsys.readouterr().out
    assert flame("eval", whole, "--device", "cpu") == 0
