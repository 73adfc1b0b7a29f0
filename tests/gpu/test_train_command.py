"""``flame train --device cuda`` learns what it learns on a CPU, and goes on bitwise."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import flame

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not flame.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

WAYS = pytest.mark.parametrize(
    ("precision", "eager"),
    [("float32", False), ("bf16", False), ("fp16", False), ("float32", True), ("bf16", True)],
    ids=["compiled-float32", "compiled-bf16", "compiled-fp16", "eager-float32", "eager-bf16"],
)


def start(*words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flame.cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    return out


def records(run: Path) -> list[dict[str, object]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{**json.loads(line), "time": 0} for line in lines]


def words_of(precision: str, *, eager: bool) -> tuple[str, ...]:
    way = ("--eager",) if eager else ()
    return ("train", "fashion-cnn", "--device", "cuda", "--precision", precision, *way)


@WAYS
def test_it_reaches_its_accuracy(tmp_path: Path, precision: str, eager: bool) -> None:
    run = tmp_path / "run"
    out = finish(start(*words_of(precision, eager=eager), "--run-dir", run))
    assert flame.cuda.get_device_name() in out
    assert records(run)[-1]["test_accuracy"] >= 0.89
    config = json.loads((run / "config.json").read_text())
    assert config["device"] == flame.cuda.get_device_name()
    assert config["settings"]["precision"] == precision
    told = f"test accuracy {records(run)[-1]['test_accuracy']:.2%}"
    assert told in finish(start("eval", run))
    accuracy = finish(start("eval", run, "--device", "cpu", "--precision", "float32")).split()[2]
    assert (
        abs(float(accuracy.rstrip("%")) / 100 - float(str(records(run)[-1]["test_accuracy"])))
        < 0.01
    )


@WAYS
def test_an_interrupted_run_ends_bitwise_the_same(
    tmp_path: Path, precision: str, eager: bool
) -> None:
    words = (*words_of(precision, eager=eager), "--epochs", "8", "--limit", "4000")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(start(*words, "--run-dir", whole))
    process = start(*words, "--run-dir", cut)
    metrics = cut / "metrics.jsonl"
    while not (metrics.exists() and '"step": 20,' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    assert f"--resume {cut}" in finish(process, code=130)
    last = records(cut)[-1]["step"]
    assert isinstance(last, int)
    assert 20 <= last < 248  # so the interruption came before the end
    finish(start("train", "fashion-cnn", "--resume", cut))
    ours, theirs = (path / "checkpoint.safetensors" for path in (cut, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    assert records(cut) == records(whole)


def test_a_run_goes_on_on_the_cpu(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = ("--epochs", "2", "--limit", "1280", "--batch-size", "64")
    finish(start(*words_of("float32", eager=False), *small, "--run-dir", run))
    config = json.loads((run / "config.json").read_text())
    config["settings"]["epochs"] = 3  # as if the run had not come to its end
    (run / "config.json").write_text(json.dumps(config))
    out = finish(start("train", "fashion-cnn", "--resume", run, "--device", "cpu"))
    assert "and goes on with device cpu" in out
    assert records(run)[-1]["epoch"] == 3


def test_a_compiled_step_takes_prefetched_batches() -> None:
    """Batches come at other addresses from step to step, and their memory is given to others."""
    from flame.data import DataLoader, TensorDataset, prefetch_to_device

    images, labels = flame.randn(640, 64, 64), flame.arange(640)
    loader = DataLoader(TensorDataset(images, labels), 32, num_workers=2, pin_memory=True)
    weight = flame.randn(64, 64, device="cuda")

    @flame.compile
    def step(x: flame.Tensor, y: flame.Tensor) -> flame.Tensor:
        for _ in range(16):  # long enough for copies to overtake it if nothing held them back
            x = flame.tanh(x @ weight)
        return x.sum((1, 2)) + y

    ours = [step(x, y) for x, y in prefetch_to_device(loader, "cuda", ahead=3)]
    for first, made in zip(range(0, 640, 32), ours, strict=True):
        x, y = (part[first : first + 32].cuda() for part in (images, labels))
        assert flame.equal(made, step(x, y)), first
