"""What a call costs beside its arithmetic: FLAME and PyTorch in turns, in one run.

    python benchmarks/cpu_overhead.py [--save]

Times of small calls are medians of turns of many calls. The last lines are FLAME's own: making a
kernel that no cache knows, loading it from the disk, and a parallel region of an empty kernel.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("FLAME_CACHE_DIR", tempfile.mkdtemp())  # so that kernels are made anew

import numpy as np
from cpu_vs_torch import heading

import flame

CALLS = 2000
TURNS = 9


def microseconds(call: Callable[[], object], calls: int = CALLS) -> float:
    """Time of one call, over many in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def cases(lib: object) -> dict[str, Callable[[], object]]:
    """Small calls, by name, for ``flame`` or ``torch``."""
    array = np.random.default_rng(0).standard_normal((32, 32), dtype=np.float32)
    x = lib.from_numpy(array)  # type: ignore[attr-defined]
    w = lib.from_numpy(array.copy()).requires_grad_()  # type: ignore[attr-defined]

    def step() -> None:
        (x * w).sum().backward()
        w.grad = None

    return {
        "x + x": lambda: x + x,
        "x + w, with tape": lambda: x + w,
        "tanh(w), with tape": lambda: w.tanh(),
        "x * 2.5": lambda: x * 2.5,
        "x.permute(1, 0)": lambda: x.permute(1, 0),
        "x.sum(1)": lambda: x.sum(1),
        "x @ x": lambda: x @ x,
        "(x * w).sum().backward()": step,
    }


def compare() -> list[str]:
    """Rows of the table of calls."""
    import torch

    mine, theirs = cases(flame), cases(torch)
    rows = [
        "| call on (32, 32) float32 | FLAME µs | PyTorch µs | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name in mine:
        times: list[list[float]] = [[], []]
        for _ in range(TURNS):
            times[0].append(microseconds(mine[name]))
            times[1].append(microseconds(theirs[name]))
        ours, rival = (statistics.median(t) for t in times)
        rows.append(f"| `{name}` | {ours:.2f} | {rival:.2f} | {ours / rival:.2f} |")
    return rows


def kernel_costs() -> list[str]:
    """Milliseconds to make and to load a kernel, microseconds of a parallel region."""
    from flame.compiler.pipeline import lower, results, source_of
    from flame.core.dtypes import float32
    from flame.core.types import tensor_type
    from flame.graph import one_op
    from flame.kernel.builder import KernelBuilder
    from flame.ops.op import OPS
    from flame.runtime import cpu
    from flame.runtime.cpu.jit import compiler, load

    made: list[float] = []
    for name in ("exp", "log", "sin", "erf", "sqrt", "floor", "sigmoid", "relu", "square"):
        start = time.perf_counter()
        graph = one_op(OPS[name], (tensor_type(float32, (32, 32)),), {})
        (bound,) = lower(graph, results(graph, None)).kernels
        source = source_of(bound.kernel)
        load(source.text, source.symbol)
        made.append((time.perf_counter() - start) * 1e3)
    fresh = type(compiler())(compiler().disk)
    start = time.perf_counter()
    fresh.load(source.text, (source.symbol,))
    again = (time.perf_counter() - start) * 1e3

    k = KernelBuilder("nothing")
    target = k.tensor("output", 0, tensor_type(float32, (2,)))
    with k.parallel(2, work=1 << 30) as (i,):
        k.store(target, (i,), flame.kernel.values.const(0.0, float32))
    bound = k.bind()
    source = source_of(bound.kernel)
    address = load(source.text, source.symbol)
    out = np.zeros(2, np.float32)
    region = statistics.median(
        microseconds(lambda: cpu.launch(address, 2, 1, out.ctypes.data, *bound.sizes))
        for _ in range(TURNS)
    )
    inline = statistics.median(
        microseconds(lambda: cpu.launch(address, 2, 2, out.ctypes.data, *bound.sizes))
        for _ in range(TURNS)
    )
    count, cold = len(made), statistics.median(made)
    return [
        f"- a small kernel, from call to machine code, uncached: {cold:.1f} ms (median of {count})",
        f"- the same from the disk cache: {again:.2f} ms",
        f"- a launch without threads: {inline:.2f} µs; as a parallel region: {region:.2f} µs",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="keep it in benchmarks/results")
    args = parser.parse_args()
    lines = [heading(flame.get_num_threads()), "", *compare(), "", *kernel_costs()]
    print("\n".join(lines))
    if args.save:
        target = Path(__file__).parent / "results" / "cpu_overhead.md"
        target.write_text("\n".join(["# Cost of calls on the CPU", "", *lines, ""]))


if __name__ == "__main__":
    main()
