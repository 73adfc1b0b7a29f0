"""The folder of one run, and the only place that knows the names of its files.

Invariants: ``config.json``, the checkpoint and the pictures are whole or absent; ``metrics.jsonl``
holds whole lines, and after `rewind` none that is later than the checkpoint.
"""

import contextlib
import errno
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flame import checkpoint
from flame.checkpoint.atomic import written_beside
from flame.core.errors import ArgumentError, CheckpointError

Record = dict[str, Any]


class RunFolder:
    """Use `RunFolder.create` for a new run and `RunFolder.open` for one that exists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoint_file = path / "checkpoint.safetensors"
        self.curves_file = path / "curves.png"
        self.predictions_file = path / "predictions.png"

    @classmethod
    def create(cls, path: Path | None, name: str, config: Mapping[str, Any]) -> "RunFolder":
        """A new folder at ``path``, or at ``runs/<name>-<time>``, with its ``config.json``.

        Raises ArgumentError where a run is already there, CheckpointError where the folder
        cannot be written.
        """
        folder = cls(path if path is not None else _unused(name))
        if folder.config_file.exists():
            raise ArgumentError(
                f"{folder.path} already holds a run; go on with it by --resume {folder.path}, "
                "or choose another --run-dir"
            )
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot create the run folder {folder.path}: {error.strerror}; "
                "choose another one with --run-dir"
            ) from error
        with written_beside(folder.config_file) as file:
            file.write(json.dumps(config, indent=2).encode() + b"\n")
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The folder of a run that was started before. Raises ArgumentError where there is none."""
        folder = cls(path)
        if not folder.config_file.is_file():
            raise ArgumentError(f"{path} is not the folder of a run: it has no config.json")
        return folder

    def config(self) -> dict[str, Any]:
        """The resolved configuration. Raises CheckpointError where it cannot be read."""
        try:
            config = json.loads(self.config_file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot read {self.config_file}: {error}; restore it, or start a new run"
            ) from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.config_file} holds no settings; start a new run")
        return config

    def append(self, record: Record) -> None:
        """One line of ``metrics.jsonl``; on a full disk CheckpointError, the file as before."""
        line = json.dumps(record).encode() + b"\n"
        try:
            with open(self.metrics_file, "ab", buffering=0) as file:
                size = file.tell()
                try:
                    if file.write(line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.metrics_file}: {error.strerror}; free space, then go on with "
                f"--resume {self.path}"
            ) from error

    def records(self, kind: str) -> list[Record]:
        """The lines of ``metrics.jsonl`` that are whole and of one kind: "step" or "epoch"."""
        return [record for record in self._lines() if record.get("kind") == kind]

    def rewind(self, step: int) -> None:
        """Drops what a run wrote after the checkpoint of ``step`` before it was cut off."""
        kept = [record for record in self._lines() if record.get("step", 0) <= step]
        with written_beside(self.metrics_file) as file:
            file.write(b"".join(json.dumps(record).encode() + b"\n" for record in kept))

    def _lines(self) -> list[Record]:
        records = []
        text = self.metrics_file.read_text("utf-8") if self.metrics_file.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError):  # the last line of a run that was cut off
                records.append(json.loads(line))
        return records

    def save(self, state: object) -> None:
        """Writes the checkpoint over the previous one."""
        checkpoint.save(state, self.checkpoint_file)

    def load(self) -> Any:
        """The state in the checkpoint. Raises CheckpointError."""
        return checkpoint.load(self.checkpoint_file)


def _unused(name: str) -> Path:
    stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, copies = stem, 1
    while path.exists():
        copies += 1
        path = stem.with_name(f"{stem.name}-{copies}")
    return path
