"""Whole training steps on the CPU: FLAME beside PyTorch, eager and compiled, in turns, in one run.

    python benchmarks/cpu_vs_torch.py [tiny mlp gpt resnet unet] [--turns 7] [--save]
    python benchmarks/cpu_vs_torch.py --eager          without the compilers

Each turn times some steps of each of the four, one after the other, so that a drift of the machine
meets all; times are medians over the turns. ``ratio`` is FLAME compiled over the faster one of
PyTorch's two. A step is forward, loss, backward, AdamW. PyTorch compiles forward, loss and backward
by `torch.compile`. The first step (with an empty cache, and again with a full one) and the peak
memory are those of processes of their own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from models import BENCHMARKS, Benchmark

Step = Callable[[], float]
KINDS = ("flame", "flame compiled", "torch", "torch compiled")


def make_step(lib: Any, benchmark: Benchmark, *, compiled: bool = False) -> Step:
    """A function that does one training step and returns its loss."""
    lib.manual_seed(0)
    model = benchmark.build(lib)
    optimizer = lib.optim.AdamW(model.parameters(), lr=1e-4)
    *inputs, target = [lib.from_numpy(a) for a in benchmark.batch(np.random.default_rng(0))]

    def forward(*given: Any) -> Any:
        return benchmark.loss(lib, model(*given[:-1]), given[-1])

    if compiled and lib.__name__ == "torch":
        lib._dynamo.reset()  # or shapes of the models before would make it compile for any shape
        forward = lib.compile(forward, dynamic=False)

    def learn(*given: Any) -> Any:
        optimizer.zero_grad()
        loss = forward(*given)
        loss.backward()
        optimizer.step()
        return loss

    if compiled and lib.__name__ == "flame":
        learn = lib.compile(learn)

    return lambda: float(learn(*inputs, target).item())


def library(name: str, threads: int) -> Any:
    """Import a library and give it this many threads."""
    if name == "torch":
        import torch

        torch.set_num_threads(threads)
        return torch
    import flame
    import flame.nn
    import flame.optim
    from flame.runtime.cpu import set_num_threads

    set_num_threads(threads)
    return flame


def step_of(kind: str, benchmark: Benchmark, threads: int) -> Step:
    name, _, mode = kind.partition(" ")
    return make_step(library(name, threads), benchmark, compiled=bool(mode))


def timed(step: Step, steps: int) -> float:
    """Milliseconds a step."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps * 1e3


def compare(name: str, kinds: tuple[str, ...], turns: int, threads: int) -> dict[str, float]:
    """Medians in alternating turns."""
    benchmark = BENCHMARKS[name]
    steps = {kind: step_of(kind, benchmark, threads) for kind in kinds}
    for step in steps.values():
        timed(step, max(3, benchmark.steps // 10))
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(turns):
        for kind, step in steps.items():
            times[kind].append(timed(step, benchmark.steps))
    return {kind: statistics.median(t) for kind, t in times.items()}


def alone(name: str, kind: str, threads: int, caches: Path) -> dict[str, float]:
    """First step and peak memory in a process of its own, with its caches in a folder."""
    command = [sys.executable, __file__, name, "--alone", kind, "--threads", str(threads)]
    places = {
        "FLAME_CACHE_DIR": str(caches / "flame"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "torch"),
    }
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **places}
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_alone(name: str, kind: str, threads: int) -> None:
    """Three steps; prints the seconds of the first and the growth of resident memory in MiB."""
    benchmark = BENCHMARKS[name]
    library(kind.partition(" ")[0], threads)
    before = peak_resident()
    start = time.perf_counter()
    step = step_of(kind, benchmark, threads)
    made = time.perf_counter()
    step()
    first = time.perf_counter() - made
    for _ in range(2):
        step()
    print(json.dumps({"first": first, "build": made - start, "peak": peak_resident() - before}))


def peak_resident() -> float:
    """The most memory, in MiB, that this process has held. (Linux: ru_maxrss counts its parent.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def heading(threads: int) -> str:
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return (
        f"{_processor()}, {threads} threads; PyTorch {torch.__version__}; "
        f"{datetime.date.today().isoformat()}, commit {commit}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def row(name: str, kinds: tuple[str, ...], turns: int, threads: int) -> str:
    """One line of the table."""
    first: dict[str, tuple[float, float]] = {}
    peak: dict[str, float] = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            cold = alone(name, kind, threads, Path(folder))
            warm = alone(name, kind, threads, Path(folder))
        first[kind], peak[kind] = (cold["first"], warm["first"]), warm["peak"]
    times = compare(name, kinds, turns, threads)
    ours, rivals = kinds[: len(kinds) // 2], kinds[len(kinds) // 2 :]
    best = min(times[kind] for kind in rivals)
    cells = [
        name,
        *(f"{times[kind]:.3g}" for kind in kinds),
        f"**{times[ours[-1]] / best:.2f}**",
        " / ".join(f"{first[kind][0]:.1f}" for kind in (ours[-1], rivals[-1])),
        " / ".join(f"{first[kind][1]:.1f}" for kind in (ours[-1], rivals[-1])),
        " / ".join(f"{peak[kind]:.0f}" for kind in kinds),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(BENCHMARKS))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--eager", action="store_true", help="leave the compilers out")
    parser.add_argument("--save", action="store_true", help="keep the table in benchmarks/results")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        run_alone(args.models[0], args.alone, args.threads)
        return
    kinds = tuple(kind for kind in KINDS if not args.eager or " " not in kind)
    columns = [
        "model",
        *(f"{kind} ms" for kind in kinds),
        "ratio",
        "first step s, cold",
        "warm",
        f"peak MiB, {' / '.join(kinds)}",
    ]
    lines = [
        heading(args.threads),
        "",
        f"| {' | '.join(columns)} |",
        f"| {' | '.join('---' for _ in columns)} |",
    ]
    print("\n".join(lines), flush=True)
    for name in args.models:
        lines.append(row(name, kinds, args.turns, args.threads))
        print(lines[-1], flush=True)
    if args.save:
        target = Path(__file__).parent / "results" / "cpu_vs_torch.md"
        target.write_text("\n".join(["# Training steps on the CPU", "", *lines, ""]))


if __name__ == "__main__":
    main()
