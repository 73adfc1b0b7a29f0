"""Whole training steps on the CPU: FLAME beside PyTorch, in turns, in one run.

    python benchmarks/cpu_vs_torch.py [tiny mlp gpt resnet unet] [--turns 7] [--save]

Each turn times some steps of the one library, then as many of the other, so that a drift of the
machine
meets both; the ratio is that of the medians. A step is forward, loss, backward, AdamW. Each model
runs in a process of its own for each library too, to tell the peak memory of each.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from models import BENCHMARKS, Benchmark

Step = Callable[[], float]


def make_step(lib: Any, benchmark: Benchmark) -> Step:
    """A function that does one training step and returns its loss."""
    lib.manual_seed(0)
    model = benchmark.build(lib)
    optimizer = lib.optim.AdamW(model.parameters(), lr=1e-4)
    *inputs, target = [lib.from_numpy(a) for a in benchmark.batch(np.random.default_rng(0))]

    def step() -> float:
        optimizer.zero_grad()
        loss = benchmark.loss(lib, model(*inputs), target)
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


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


def timed(step: Step, steps: int) -> float:
    """Milliseconds a step."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps * 1e3


def compare(name: str, turns: int, threads: int) -> dict[str, float]:
    """Medians of both libraries in alternating turns."""
    benchmark = BENCHMARKS[name]
    steps, first = {}, {}
    for lib in ("flame", "torch"):
        loaded = library(lib, threads)
        start = time.perf_counter()
        steps[lib] = make_step(loaded, benchmark)
        steps[lib]()
        first[lib] = time.perf_counter() - start
        timed(steps[lib], max(2, benchmark.steps // 10))
    times: dict[str, list[float]] = {"flame": [], "torch": []}
    for _ in range(turns):
        for lib in times:
            times[lib].append(timed(steps[lib], benchmark.steps))
    medians = {lib: statistics.median(t) for lib, t in times.items()}
    return {
        "flame": medians["flame"],
        "torch": medians["torch"],
        "ratio": medians["flame"] / medians["torch"],
        "first": first["flame"],
        "torch_first": first["torch"],
    }


def peak_memory(name: str, lib: str, threads: int) -> float:
    """MiB that a process of its own grows by, from import to after three steps."""
    command = [sys.executable, __file__, name, "--alone", lib, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def alone(name: str, lib: str, threads: int) -> None:
    """Run three steps and print the growth of the peak resident memory in MiB."""
    loaded = library(lib, threads)
    before = peak_resident()
    step = make_step(loaded, BENCHMARKS[name])
    for _ in range(3):
        step()
    print(peak_resident() - before)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(BENCHMARKS))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--save", action="store_true", help="keep the table in benchmarks/results")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        alone(args.models[0], args.alone, args.threads)
        return
    lines = [
        heading(args.threads),
        "",
        "| model | FLAME ms | PyTorch ms | ratio | first step s (both) | peak MiB (both) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    for name in args.models:
        r = compare(name, args.turns, args.threads)
        memory = [peak_memory(name, lib, args.threads) for lib in ("flame", "torch")]
        row = (
            f"| {name} | {r['flame']:.2f} | {r['torch']:.2f} | {r['ratio']:.2f} "
            f"| {r['first']:.2f} / {r['torch_first']:.2f} | {memory[0]:.0f} / {memory[1]:.0f} |"
        )
        lines.append(row)
        print(row, flush=True)
    if args.save:
        target = Path(__file__).parent / "results" / "cpu_vs_torch.md"
        target.write_text("\n".join(["# Training steps on the CPU, eager", "", *lines, ""]))


if __name__ == "__main__":
    main()
