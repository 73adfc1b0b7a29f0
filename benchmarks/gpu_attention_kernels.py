"""FLAME's own attention kernels on a GPU, beside cuDNN's.

    python benchmarks/gpu_attention_kernels.py [--sweep] [--save [FOLDER]]

TFLOP/s count 4 B H L S E operations forward, 2.5 times as many backward, and half of them where
causal. Times are medians of device events over random operands. Where cuDNN can, FLAME runs cuDNN;
its own kernels are for what it refuses. ``--sweep`` also tries other tiles of the forward.

Sequences of several lengths, causal, come as they stand one behind the other, and as a batch padded
to the longest one, both by our own kernels, without what the padding itself costs; operations are
those of the sequences.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import ml_dtypes
import numpy as np
from gpu_report import add_save, heading

import flame
from flame.core import dtypes
from flame.core.types import tensor_type
from flame.kernel.builder import BoundSource
from flame.kernel.library import AttentionProblem, Sequences
from flame.kernels.attention import flash_attention
from flame.runtime.cuda import modules
from flame.runtime.cuda.driver import driver

Shape = tuple[int, int, int, int, int, bool]
SHAPES = [  # batch, heads, key heads, length, width, causal
    (4, 16, 16, 4096, 128, False),
    (4, 16, 16, 4096, 128, True),
    (16, 16, 16, 1024, 128, True),
    (4, 16, 4, 4096, 64, False),
    (16, 16, 16, 1024, 64, True),
    (2, 8, 8, 4096, 256, False),
]
LENGTHS = {  # of sequences
    "drawn": [int(n) for n in np.random.default_rng(0).integers(64, 2048, 16)],
    "one long": [4096, *[256] * 16],
}
PACKED = [(16, 16, 128), (16, 4, 64)]  # heads, key heads, width
SWEEP = [  # warps, tiles of 16 rows a warp, columns, blocks a multiprocessor, queries in registers
    (4, 2, 64, 2, 0), (4, 2, 32, 2, 0), (4, 2, 128, 1, 0), (8, 1, 64, 1, 0), (8, 1, 64, 1, 1),
    (4, 1, 64, 2, 1), (8, 2, 64, 1, 0), (4, 2, 64, 2, 1),
]  # fmt: skip


class Bench:
    """Device 0, a stream, and what was allocated on it."""

    def __init__(self) -> None:
        self.driver = driver()
        self.driver.use(0)
        self.capability = self.driver.properties(0).capability
        self.stream = self.driver.create_stream(0)
        self.noise = np.random.default_rng(0)

    def empty(self, nbytes: int) -> int:
        return self.driver.allocate(0, nbytes, self.stream)

    def random(self, *shape: int) -> int:
        made = self.noise.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        pointer = self.empty(made.nbytes)
        self.driver.copy_to_device(pointer, made.ctypes.data, made.nbytes, self.stream)
        self.driver.synchronize(self.stream)
        return pointer

    def integers(self, numbers: np.ndarray[Any, Any]) -> int:
        made = numbers.astype(np.int32)
        pointer = self.empty(made.nbytes)
        self.driver.copy_to_device(pointer, made.ctypes.data, made.nbytes, self.stream)
        self.driver.synchronize(self.stream)
        return pointer

    def launcher(self, call: BoundSource, pointers: Sequence[int]) -> Callable[[], None]:
        (function,) = modules.load_many(0, [(call.text, call.symbol, call.shared)])
        words = [ctypes.c_longlong(word) for word in (*pointers, *call.sizes)]
        array = (ctypes.c_void_p * len(words))(*[ctypes.addressof(word) for word in words])

        def launch(kept: Any = words) -> None:
            self.driver.launch(
                function, call.grid, call.block, call.shared, self.stream, ctypes.addressof(array)
            )

        return launch

    def milliseconds(self, launches: Sequence[Callable[[], None]], repeats: int = 10) -> float:
        begin, end = (self.driver.create_event(0, timing=True) for _ in range(2))
        found = []
        for _ in range(7):
            self.driver.record_event(begin, self.stream)
            for _ in range(repeats):
                for launch in launches:
                    launch()
            self.driver.record_event(end, self.stream)
            self.driver.synchronize_event(end)
            found.append(self.driver.elapsed(begin, end) / repeats)
        return statistics.median(found[2:])

    def vendor(self, problem: AttentionProblem, pointers: Sequence[int]) -> float | None:
        """Milliseconds of cuDNN; None where it refuses."""
        plan = self.driver.prepare(problem, 0)
        if plan is None:
            return None
        workspace = self.empty(max(plan.workspace, 256))
        time = self.milliseconds([lambda: plan.enqueue(pointers, workspace, self.stream)])
        self.driver.free(0, workspace, self.stream)
        return time


def retiled(call: BoundSource, problem: AttentionProblem, tiles: Sequence[int]) -> BoundSource:
    """The forward with other tiles."""
    warps, m_tiles, columns, *_ = tiles
    text = call.text
    for name, value in zip(("WARPS", "M_TILES", "COLUMNS", "BLOCKS", "KEEP_Q"), tiles, strict=True):
        text = re.sub(rf"^#define {name} \d+$", f"#define {name} {value}", text, flags=re.MULTILINE)
    batch, heads, length, width = problem.query.shape
    rows = 16 * warps * m_tiles
    shared = 2 * -(-width // 32) * 32 * (rows + 4 * columns)
    grid = (-(-length // rows) * batch * heads, 1, 1)
    return dataclasses.replace(call, text=text, grid=grid, block=(32 * warps, 1, 1), shared=shared)


def dense(shape: Shape, *, backward: bool) -> AttentionProblem:
    batch, heads, key_heads, length, width, causal = shape
    query, key = (
        tensor_type(dtypes.bfloat16, (batch, h, length, width), None, "cuda:0")
        for h in (heads, key_heads)
    )
    return AttentionProblem(backward, query, key, key, query, None, causal, width**-0.5)


def own_calls(problem: AttentionProblem) -> list[BoundSource]:
    return [c for c in flash_attention(problem).calls if isinstance(c, BoundSource)]


def measure(bench: Bench, shape: Shape, *, sweep: bool) -> Iterator[list[str]]:
    """Rows of the table: forward and backward."""
    batch, heads, key_heads, length, width, causal = shape
    query, key = (dense(shape, backward=False).query, dense(shape, backward=False).key)
    q, grad, result, dq = (bench.random(*query.shape) for _ in range(4))
    k, v, dk, dv = (bench.random(*key.shape) for _ in range(4))
    rows = batch * heads * length
    log_sum, delta = (bench.empty(4 * rows) for _ in range(2))
    work = 4 * rows * length * width * (0.5 if causal else 1.0) * 1e-9  # TFLOP for milliseconds
    for backward in (False, True):
        problem = dense(shape, backward=backward)
        if backward:
            given, made = (grad, 0, q, k, v, 0, result, log_sum), (dq, dk, dv)
        else:
            given, made = (q, k, v, 0), (result, log_sum)
        operands = {"input": given, "output": made, "temporary": (delta,)}
        calls = own_calls(problem)
        pointers = [[operands[r.role][r.position] for r in call.operands] for call in calls]
        launches = [bench.launcher(c, p) for c, p in zip(calls, pointers, strict=True)]
        flops = work * (2.5 if backward else 1.0)
        own, vendor = bench.milliseconds(launches), bench.vendor(problem, (*given, *made))
        kind = f"{batch} x {heads} heads" + (f" on {key_heads}" if key_heads != heads else "")
        told = [
            f"{kind} x {length} x {width}{', causal' if causal else ''}",
            "backward" if backward else "forward",
            f"{own:.3f}", f"{flops / own:.0f}",
        ]  # fmt: skip
        yield told + (
            ["refused", "", ""] if vendor is None
            else [f"{vendor:.3f}", f"{flops / vendor:.0f}", f"**{own / vendor:.2f}**"]
        )  # fmt: skip
        for tiles in SWEEP if sweep and not backward else ():
            call = retiled(calls[0], problem, tiles)
            if call.shared > bench.driver.properties(0).shared_memory_per_block:
                continue
            time = bench.milliseconds([bench.launcher(call, pointers[0])])
            print(f"    {tiles}: {time:.3f} ms, {work / time:.0f} TFLOP/s", flush=True)
    for pointer in (q, grad, result, dq, k, v, dk, dv, log_sum, delta):
        bench.driver.free(0, pointer, bench.stream)


def packed_problem(
    shape: tuple[int, int, int], lengths: Sequence[int], *, padded: bool, backward: bool
) -> AttentionProblem:
    heads, key_heads, width = shape
    count, longest, total = len(lengths), max(lengths), sum(lengths)
    batch, rows = (count, longest) if padded else (1, total)
    query, key = (
        tensor_type(  # heads inside, as projections give them
            dtypes.bfloat16, (batch, h, rows, width), (rows * h * width, width, h * width, 1)
        )
        for h in (heads, key_heads)
    )
    sequences = None if padded else Sequences(count, longest, longest, -1, 0)
    scale = width**-0.5
    return AttentionProblem(
        backward, query, key, key, query, None, padded, scale, sequences=sequences
    )


def timed_packed(
    bench: Bench, shape: tuple[int, int, int], lengths: Sequence[int], *, padded: bool
) -> list[float]:
    """Milliseconds of the forward and the backward pass, causal."""
    first = packed_problem(shape, lengths, padded=padded, backward=False)
    query, key = first.query, first.key
    rows = query.numel // query.shape[-1]
    q, grad, result, dq = (bench.random(*query.shape) for _ in range(4))
    k, v, dk, dv = (bench.random(*key.shape) for _ in range(4))
    log_sum, delta = (bench.empty(4 * rows) for _ in range(2))
    starts, errors = bench.integers(np.cumsum((0, *lengths))), bench.empty(16)
    places = () if padded else (starts, starts)
    times = []
    for backward in (False, True):
        if backward:
            inputs: tuple[int, ...] = (grad, 0, q, k, v, 0, result, log_sum, *places)
            outputs: tuple[int, ...] = (dq, dk, dv)
        else:
            inputs, outputs = (q, k, v, 0, *places), (result, log_sum)
        operands = {"input": inputs, "output": outputs, "temporary": (delta,), "error": (errors,)}
        calls = own_calls(packed_problem(shape, lengths, padded=padded, backward=backward))
        times.append(bench.milliseconds([
            bench.launcher(c, [operands[r.role][r.position] for r in c.operands]) for c in calls
        ]))  # fmt: skip
    for pointer in (q, grad, result, dq, k, v, dk, dv, log_sum, delta, starts, errors):
        bench.driver.free(0, pointer, bench.stream)
    return times


def measure_packed(bench: Bench, shape: tuple[int, int, int], name: str) -> Iterator[list[str]]:
    """Rows of the table of packed sequences: forward and backward."""
    lengths, (heads, key_heads, width) = LENGTHS[name], shape
    work = 2 * heads * width * sum(n * n for n in lengths) * 1e-9
    packed, padded = (timed_packed(bench, shape, lengths, padded=p) for p in (False, True))
    for part, factor, own, other in zip(
        ("forward", "backward"), (1.0, 2.5), packed, padded, strict=True
    ):
        kind = f"{len(lengths)} of up to {max(lengths)}, {heads} heads on {key_heads} x {width}"
        rate = f"{work * factor / own:.0f}"
        yield [kind, part, f"{own:.3f}", rate, f"{other:.3f}", f"**{own / other:.2f}**"]


def table(header: Sequence[str], rows: Iterator[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{' --- |' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def load_all() -> None:
    """Compiles all kernels at once, as one takes seconds."""
    problems = [dense(shape, backward=b) for shape in SHAPES for b in (False, True)]
    problems += [
        packed_problem(shape, lengths, padded=padded, backward=backward)
        for shape in PACKED for lengths in LENGTHS.values()
        for padded in (False, True) for backward in (False, True)
    ]  # fmt: skip
    calls = [call for problem in problems for call in own_calls(problem)]
    modules.load_many(0, [(call.text, call.symbol, call.shared) for call in calls])


def lines_of(bench: Bench, *, sweep: bool) -> Iterator[str]:
    yield "# FLAME's own attention kernels, bfloat16"
    yield ""
    yield heading({"flame": flame.__version__}, "cuda")
    yield ""
    load_all()
    header = ["attention", "pass", "FLAME ms", "TFLOP/s", "cuDNN ms", "TFLOP/s", "ratio"]
    yield from table(header, (row for s in SHAPES for row in measure(bench, s, sweep=sweep)))
    yield ""
    header = ["packed sequences, causal", "pass", "packed ms", "TFLOP/s", "padded ms", "ratio"]
    rows = (row for s in PACKED for name in LENGTHS for row in measure_packed(bench, s, name))
    yield from table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sweep", action="store_true", help="try other tiles of the forward")
    add_save(parser)
    options = parser.parse_args()
    lines = []
    for line in lines_of(Bench(), sweep=options.sweep):
        print(line, flush=True)
        lines.append(line)
    if options.save is not None:
        (options.save / "gpu_attention_kernels.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
