"""The files of a run are whole, and end where the checkpoint ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flame.core.errors import ArgumentError, CheckpointError
from flame.train.folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", "name", {"recipe": "name"})


def test_default_place_has_name_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (RunFolder.create(None, "name", {}) for _ in range(2))
    assert first.path.parent == second.path.parent == Path("runs")
    assert first.path != second.path
    assert first.path.name.startswith("name-2")


def test_config_comes_back(folder: RunFolder) -> None:
    assert RunFolder.open(folder.path).config() == {"recipe": "name"}


def test_a_second_run_needs_another_folder(folder: RunFolder) -> None:
    with pytest.raises(ArgumentError, match="already holds a run; go on with it by --resume"):
        RunFolder.create(folder.path, "name", {})


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="choose another one with --run-dir"):
        RunFolder.create(tmp_path / "file" / "run", "name", {})


def test_open_refuses_what_is_no_run(tmp_path: Path, folder: RunFolder) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArgumentError, match="not the folder of a run"):
            RunFolder.open(path)
    for text in ("{", "[]"):
        folder.config_file.write_text(text)
        with pytest.raises(CheckpointError, match="start a new run"):
            folder.config()


def test_rewind_drops_what_is_later_and_half_lines(folder: RunFolder) -> None:
    for step in range(1, 6):
        folder.append({"kind": "step", "step": step, "loss": 0.1 * step})
    with open(folder.metrics_file, "a") as file:
        file.write('{"kind": "step", "st')
    folder.rewind(3)
    assert [record["step"] for record in folder.records("step")] == [1, 2, 3]
    assert folder.records("epoch") == []
    lines = folder.metrics_file.read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.1, 0.2, 0.1 * 3]


FULL_DISK = """
import resource, sys
from pathlib import Path
from flame.core.errors import CheckpointError
from flame.train.folder import RunFolder

folder = RunFolder(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (250, 250))
try:
    for step in range(100):
        folder.append({"kind": "step", "step": step})
except CheckpointError as error:
    print(error)
"""


def test_a_full_disk_leaves_whole_lines(folder: RunFolder) -> None:
    told = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder.path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "free space, then go on with --resume" in told
    text = folder.metrics_file.read_text()
    assert text.endswith("}\n")
    steps = [json.loads(line)["step"] for line in text.splitlines()]
    assert steps == list(range(len(steps)))
    assert 5 < len(steps) < 12
