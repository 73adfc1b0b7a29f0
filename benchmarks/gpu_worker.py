"""One library's training step of one model in a process of its own, driven over pipes.

The parent (`gpu_vs_torch.py`) writes one JSON object a line, {"do": NAME, ...}; each is answered by
one, which holds "error" where it failed. So memory and first steps are those of one library alone,
and the libraries' turns still alternate.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from gpu_models import BENCHMARKS, Benchmark, weights

KINDS = ("torch eager", "torch compiled", "flame eager", "flame compiled")
LEAD = 3  # untimed steps before each timed turn
GIB = 1 << 30

Step = Callable[[], Any]


def library(kind: str) -> Any:
    """Import what ``kind`` runs on."""
    if kind.startswith("torch"):
        import torch

        return torch
    import flame
    import flame.nn
    import flame.optim

    return flame


def synchronize(lib: Any, device: str) -> None:
    if device != "cpu":
        lib.cuda.synchronize()


def make_model(lib: Any, benchmark: Benchmark, device: str) -> Any:
    """The model with the weights that every library gets, on its device."""
    on_device = lib.device(device) if lib.__name__ == "torch" else contextlib.nullcontext()
    with on_device:  # PyTorch initializes there, which is faster
        model = benchmark.build(lib)
    given = {name: lib.from_numpy(array) for name, array in weights(model).items()}
    model.load_state_dict(given)
    if benchmark.channels_last:
        return model.to(device=device, memory_format=lib.channels_last)
    return model.to(device)


def make_batch(lib: Any, benchmark: Benchmark, device: str) -> list[Any]:
    """Inputs, then the target, on the device."""
    made = []
    for array in benchmark.batch(np.random.default_rng(0)):
        tensor = lib.from_numpy(array).to(device)
        if benchmark.channels_last and tensor.ndim == 4:
            tensor = tensor.to(memory_format=lib.channels_last)
        made.append(tensor)
    return made


def make_step(kind: str, benchmark: Benchmark, device: str, *, mixed: bool) -> Step:
    """A function that does one training step and gives its loss, a tensor."""
    lib, compiled = library(kind), kind.endswith("compiled")
    is_torch = lib.__name__ == "torch"
    model = make_model(lib, benchmark, device)
    fused = {"fused": True} if is_torch else {}
    optimizer = lib.optim.AdamW(model.parameters(), lr=1e-4, **fused)
    batch = make_batch(lib, benchmark, device)

    def autocast() -> Any:
        return lib.autocast(device, dtype=lib.bfloat16) if mixed else contextlib.nullcontext()

    def forward(*given: Any) -> Any:
        with autocast():
            return benchmark.loss(lib, model(*given[:-1]), given[-1])

    if compiled and is_torch:
        forward = lib.compile(forward, dynamic=False)

    def learn(*given: Any) -> Any:
        optimizer.zero_grad()
        loss = forward(*given)
        loss.backward()
        optimizer.step()
        return loss

    if compiled and not is_torch:
        learn = lib.compile(learn)
    return lambda: learn(*batch)


class Worker:
    """Answers the parent's commands; each method named below is one."""

    commands = ("start", "build", "first", "turn", "peak")

    def __init__(self, kind: str, model: str, size: str, device: str, *, mixed: bool) -> None:
        self.kind, self.device = kind, device
        self.benchmark = BENCHMARKS[model](size)
        self.mixed = mixed and self.benchmark.mixed
        self.lib: Any = None
        self.step: Step = lambda: None

    def start(self) -> dict[str, Any]:
        """Import the library; says which it is."""
        self.lib = library(self.kind)
        if self.kind.startswith("torch") and self.device != "cpu":
            self.lib.backends.cudnn.benchmark = True  # its fastest convolutions
        return {"library": self.lib.__name__, "version": str(self.lib.__version__)}

    def build(self) -> dict[str, Any]:
        """Make the model and its step, without running it."""
        start = time.perf_counter()
        self.step = make_step(self.kind, self.benchmark, self.device, mixed=self.mixed)
        synchronize(self.lib, self.device)
        return {"seconds": time.perf_counter() - start}

    def first(self, steps: int) -> dict[str, Any]:
        """The seconds of the first step, the losses of the first ``steps``, and the most memory
        that they took."""
        self._reset_peak()
        start = time.perf_counter()
        loss = self.step()
        synchronize(self.lib, self.device)
        seconds = time.perf_counter() - start
        losses = [float(loss.item())]
        losses += [float(self.step().item()) for _ in range(steps - 1)]
        peak = self.peak()["gib"]
        self._reset_peak()
        return {"seconds": seconds, "losses": losses, "gib": peak}

    def turn(self, seconds: float) -> dict[str, Any]:
        """Milliseconds a step, over as many as take ``seconds``."""
        estimate = self._timed(LEAD)
        milliseconds = self._timed(max(3, min(2000, math.ceil(seconds * 1e3 / estimate))))
        if self.kind.startswith("torch") and self.device != "cpu":
            self.lib.cuda.empty_cache()  # so that all fit on the card; the lead allocates again
        return {"ms": milliseconds}

    def peak(self) -> dict[str, Any]:
        """GiB that the library allocated at most since the first steps."""
        if self.device == "cpu":
            return {"gib": None}
        return {"gib": self.lib.cuda.max_memory_allocated() / GIB}

    def _timed(self, steps: int) -> float:
        synchronize(self.lib, self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize(self.lib, self.device)
        return (time.perf_counter() - start) / steps * 1e3

    def _reset_peak(self) -> None:
        if self.device != "cpu":
            self.lib.cuda.reset_peak_memory_stats()


def told(error: BaseException) -> str:
    """One line of an error."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def serve(worker: Worker, commands: TextIO, answers: TextIO) -> None:
    """Answer until the commands end."""
    for line in commands:
        command = json.loads(line)
        name = command.pop("do")
        if name not in worker.commands:
            raise ValueError(f"no command {name!r}; there are {', '.join(worker.commands)}")
        try:
            answer = getattr(worker, name)(**command)
        except Exception as error:  # noqa: BLE001 - every failure is the answer, and is shown
            import traceback

            traceback.print_exc()
            answer = {"error": told(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    kind, model, size, device, precision = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    worker = Worker(kind, model, size, device, mixed=precision == "mixed")
    serve(worker, sys.stdin, answers)


if __name__ == "__main__":
    main()
