"""The parent's end of a worker process (`gpu_worker.py`)."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("gpu_worker.py")


class Failed(Exception):
    """A worker that could not do what it was told; in words, its first the kind of failure."""


class Remote:
    """A worker for one kind and model; its caches are those in the folder ``caches``."""

    def __init__(
        self, kind: str, model: str, size: str, device: str, precision: str, caches: Path
    ) -> None:
        places = {
            "FLAME_CACHE_DIR": str(caches / "flame"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "torch"),
            "TRITON_CACHE_DIR": str(caches / "triton"),
        }
        self.errors = caches / f"errors-{uuid.uuid4().hex}"
        with self.errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER), kind, model, size, device, precision],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                bufsize=1,
                env={**os.environ, **places},
            )
        self.answers: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def send(self, command: str, **arguments: Any) -> None:
        """Give a command; its answer is still to be asked for."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # dead: the answer will say so
            self.process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
            self.process.stdin.flush()

    def answer(self, patience: float) -> dict[str, Any]:
        """The next answer. Raises Failed where it tells of an error, or none comes in time."""
        try:
            line = self.answers.get(timeout=patience)
        except queue.Empty:
            raise Failed(f"Timeout: no answer in {patience:.0f} s") from None
        if line is None:
            status = self.process.wait()
            words = self.said(1) or "it said nothing"
            raise Failed(f"Died: exit status {status}; {words[:300]}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise Failed(found["error"])
        return found

    def ask(self, command: str, patience: float, **arguments: Any) -> dict[str, Any]:
        self.send(command, **arguments)
        return self.answer(patience)

    def close(self) -> None:
        """End the process, by force where it does not end by itself; its device memory is free."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def said(self, lines: int = 40) -> str:
        """The end of what the process wrote to its standard error."""
        return "\n".join(self.errors.read_text(errors="replace").splitlines()[-lines:])
