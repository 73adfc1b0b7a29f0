"""The command line: what it makes, and one clear message for everything that goes wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from flame.cli import main
from flame.core.errors import DeviceError
from flame.train.progress import ProgressReport
from flame.train.trainer import Trainer

SMALL = ("--epochs", "1", "--limit", "64", "--batch-size", "16")


def call(*words: str | Path) -> int:
    """Runs the command in this process; its exit code."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    assert isinstance(left.value.code, int)
    return left.value.code


def flame(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "flame.cli", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )


def interrupting(step: int) -> Callable[[ProgressReport, Trainer], None]:
    """`ProgressReport.on_step`, with a Ctrl-C after a step."""
    on_step = ProgressReport.on_step

    def changed(self: ProgressReport, trainer: Trainer) -> None:
        on_step(self, trainer)
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return changed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    assert call("train", "fashion-cnn", *SMALL, "--run-dir", path) == 0
    return path


def test_a_run_leaves_its_files(run: Path) -> None:
    assert {file.name for file in run.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoint.safetensors",
        "curves.png",
        "predictions.png",
    }
    settings = json.loads((run / "config.json").read_text())["settings"]
    assert settings["epochs"] == 1
    assert settings["limit"] == 64
    assert settings["lr"] > 0
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert epochs[-1]["kind"] == "epoch"
    assert epochs[-1]["step"] == 4
    for name in ("curves.png", "predictions.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_eval_reports_the_accuracy_of_the_run(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert call("eval", run) == 0
    assert f"test accuracy {last['test_accuracy']:.2%}" in capsys.readouterr().out


def test_eval_draws_missing_pictures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "predictions.png").unlink()
    assert call("eval", run) == 0
    assert "predictions.png" in capsys.readouterr().out
    assert (run / "predictions.png").exists()


def test_a_missing_plot_extra_is_told(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (run / "predictions.png").rename(run / "kept.png")
    try:
        assert call("eval", run) == 0
    finally:
        (run / "kept.png").rename(run / "predictions.png")
    told = capsys.readouterr().out
    assert "No pictures were drawn" in told
    assert "pip install 'flame-engine[plot]'" in told


def test_a_finished_run_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "fashion-cnn", "--resume", run) == 0
    assert "is finished: 1 of 1 epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("train", "nothing"), "there is no recipe 'nothing'; the recipes are: fashion-cnn"),
        (("train", "fashion-cnn", "--device", "tpu"), "'tpu' names no device; use 'cpu', 'cuda'"),
        (("train", "fashion-cnn", "--device", "cuda:x"), "'cuda:x' names no device"),
        (("train", "fashion-cnn", "--precision", "fp8"), "--precision must be one of float32, bf"),
        (("train", "fashion-cnn", "--epochs", "0"), "--epochs must be an integer >= 1, got 0"),
        (("train", "fashion-cnn", "--batch-size", "-3"), "--batch-size must be an integer >= 1"),
        (("train", "fashion-cnn", "--lr", "nan"), "--lr must be a positive number, got nan"),
        (("train", "fashion-cnn", "--lr", "-1"), "--lr must be a positive number, got -1.0"),
        (("train", "fashion-cnn", "--seed", "-1"), "--seed must be an integer >= 0"),
        (("train", "fashion-cnn", "--limit", "16"), "--batch-size"),
        (("train", "fashion-cnn", "--data", "/nowhere"), "/nowhere"),
        (("train", "fashion-cnn", "--resume", "/nowhere"), "is not the folder of a run"),
        (("train", "fashion-cnn", "--run-dir", "/proc/run"), "cannot create the run folder"),
        (("eval", "/nowhere"), "is not the folder of a run"),
    ],
)
def test_errors_are_one_message(
    words: tuple[str, ...],
    told: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*words) == 1
    error = capsys.readouterr().err
    assert error.startswith("flame: ")
    assert told in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def driver() -> NoReturn:
        raise DeviceError("CUDA needs NVIDIA's display driver, which is not on this machine.")

    monkeypatch.setattr("flame.runtime.cuda.devices.driver", driver)


@pytest.mark.usefixtures("no_gpu")
def test_a_missing_gpu_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is missing and the way out; a run of a GPU goes on, and is tested, on the CPU."""
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    config["settings"] |= {"device": "cuda", "epochs": 2}
    config["device"] = "NVIDIA H100"
    (copy / "config.json").write_text(json.dumps(config))
    for words in (
        ("train", "fashion-cnn", "--device", "cuda"),
        ("train", "fashion-cnn", "--resume", copy),
        ("eval", copy),
        ("eval", run, "--device", "cuda"),
    ):
        assert call(*words) == 1
        error = capsys.readouterr().err
        for told in ("cannot use --device cuda: CUDA needs", "doctor", "--device cpu"):
            assert told in error
        assert list(tmp_path.iterdir()) == [copy]
    assert call("eval", copy, "--device", "cpu") == 0
    assert call("train", "fashion-cnn", "--resume", copy, "--device", "cpu") == 0
    told = capsys.readouterr().out
    assert "began with device NVIDIA H100 and goes on with device cpu" in told
    assert "test accuracy" in told


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("eager", [(), ("--eager",)])
def test_a_run_in_less_precision_goes_on_bitwise(
    tmp_path: Path,
    precision: str,
    eager: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("--epochs", "2", *SMALL[2:], "--precision", precision, *eager)
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert call("train", "fashion-cnn", *words, "--run-dir", whole) == 0
    assert f", {precision}\n" in capsys.readouterr().out
    config = json.loads((whole / "config.json").read_text())
    assert config["settings"]["precision"] == precision
    assert config["settings"]["device"] == config["device"] == "cpu"

    with monkeypatch.context() as patched:
        patched.setattr(ProgressReport, "on_step", interrupting(5))
        assert call("train", "fashion-cnn", *words, "--run-dir", half) == 130
    assert call("train", "fashion-cnn", "--resume", half) == 0
    ours, theirs = (path / "checkpoint.safetensors" for path in (half, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    assert call("eval", half) == 0
    assert call("eval", half, "--precision", "float32") == 0


def test_wrong_usage_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "fashion-cnn", "--epoch", "3") == 2
    assert "--epochs" in capsys.readouterr().err
    assert call("train", "fashion-cnn", "--epochs", "many") == 2
    assert call("dance") == 2


@pytest.mark.parametrize("option", ["--lr", "--epochs", "--seed", "--batch-size"])
def test_resume_keeps_the_settings(
    run: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", "fashion-cnn", "--resume", run, option, "7") == 1
    error = capsys.readouterr().err
    assert f"{option} cannot change on --resume" in error
    assert "Only --device and --data can" in error


def test_resume_and_run_dir_exclude_each_other(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", "fashion-cnn", "--resume", run, "--run-dir", "elsewhere") == 1
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "resume"])
def test_damaged_checkpoints_are_told(
    run: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.json").write_bytes((run / "config.json").read_bytes())
    words = ("eval", copy) if command == "eval" else ("train", "fashion-cnn", "--resume", copy)
    assert call(*words) == 1
    assert "checkpoint.safetensors is not there" in capsys.readouterr().err
    whole = (run / "checkpoint.safetensors").read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:-1], b"x" + whole):
        (copy / "checkpoint.safetensors").write_bytes(damaged)
        assert call(*words) == 1
        assert "damaged" in capsys.readouterr().err
    (copy / "config.json").write_text("{}")
    assert call(*words) == 1
    assert "start a new run" in capsys.readouterr().err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from flame.core.errors import ArgumentError

    with pytest.raises(ArgumentError):
        main(["train", "nothing", "--debug"])
    monkeypatch.setenv("FLAME_DEBUG", "1")
    with pytest.raises(ArgumentError):
        main(["train", "nothing"])


def test_wrong_image_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    words = ("train", "fashion-cnn", *SMALL, "--data", data, "--run-dir", tmp_path / "run")

    def refused() -> str:
        assert call(*words) == 1
        assert not (tmp_path / "run").exists()
        error = capsys.readouterr().err
        assert error.startswith("flame: ")
        assert str(data) in error
        return error

    refused()
    for part in ("train", "test"):
        (data / part / "shirt").mkdir(parents=True)
    refused()
    for part in ("train", "test"):
        for index in range(20):
            (data / part / "shirt" / f"{index}.png").write_bytes(b"no picture")
    refused()


def test_an_image_folder_trains(tmp_path: Path) -> None:
    from PIL import Image

    for part, count in (("train", 24), ("test", 8)):
        for index in range(count):
            for name, grey in (("dark", 30), ("light", 220)):
                place = tmp_path / "data" / part / name
                place.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 30), (grey, grey, index)).save(place / f"{index}.png")
    run = tmp_path / "run"
    words = ("--epochs", "3", "--batch-size", "8", "--data", tmp_path / "data", "--run-dir", run)
    assert call("train", "fashion-cnn", *words) == 0
    assert json.loads((run / "config.json").read_text())["classes"] == ["dark", "light"]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["test_accuracy"] > 0.9
    assert call("eval", run) == 0


def test_an_unwritable_kernel_cache_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = flame(
        "train",
        "fashion-cnn",
        *SMALL,
        "--run-dir",
        tmp_path / "run",
        FLAME_CACHE_DIR=str(tmp_path / "file" / "cache"),
    )
    assert done.returncode == 0, done.stderr
    assert "flame: warning: cannot write compiled kernels to" in done.stderr
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_doctor_names_what_is_there_and_what_is_missing() -> None:
    done = flame("doctor")
    assert done.returncode == 0, done.stderr
    for word in ("cpu", "threads", "kernel cache", "python", "flame-engine", "extra plot"):
        assert word in done.stdout


def test_importing_flame_loads_nothing_heavy() -> None:
    code = (
        "import sys, flame;"
        "heavy = {'matplotlib', 'PIL', 'rich', 'tyro', 'safetensors', 'torch', 'cuda'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_resuming_with_other_threads_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("train", "fashion-cnn", "--epochs", "2", *SMALL[2:], "--run-dir", run)
    assert flame(*words, FLAME_NUM_THREADS="2").returncode == 0
    config = json.loads((run / "config.json").read_text())
    config["settings"]["epochs"] = 3  # as if the run had not come to its end
    (run / "config.json").write_text(json.dumps(config))
    resumed = ("train", "fashion-cnn", "--resume", run)
    done = flame(*resumed, FLAME_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "began with threads 2 and goes on with threads 1" in done.stdout
