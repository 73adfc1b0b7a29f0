"""Times FLAME's own attention kernels on a GPU; ``--sweep`` also tries other tiles of the forward.

TFLOP/s count 4 B H L S E operations forward, 2.5 times as many backward, and half of them where
causal. Times are medians of device events over random operands.

Sequences of several lengths, causal, come as they stand one behind the other, and as a batch padded
to the longest one, without what the padding itself costs; operations are those of the sequences.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from flame.core import dtypes
from flame.core.types import TensorType, tensor_type
from flame.kernel.builder import BoundSource
from flame.kernel.library import AttentionProblem, Sequences
from flame.kernels.attention import flash_attention
from flame.runtime.cuda.driver import driver

SHAPES = [  # batch, heads, key heads, length, width, causal
    (4, 16, 16, 4096, 128, False),
    (4, 16, 16, 4096, 128, True),
    (16, 16, 16, 1024, 128, True),
    (4, 16, 4, 4096, 64, False),
    (16, 16, 16, 1024, 64, True),
    (2, 8, 8, 4096, 256, False),
]
LENGTHS = {  # of sequences
    "like": [1024] * 16,
    "drawn": [int(n) for n in np.random.default_rng(0).integers(64, 2048, 16)],
    "one long": [8192, *[256] * 32],
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
        image = self.driver.compile(call.text, call.symbol, self.capability)
        module = self.driver.load_module(0, image)
        function = self.driver.function(module, call.symbol, call.shared)
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


def measure(bench: Bench, shape: tuple[int, int, int, int, int, bool], *, sweep: bool) -> None:
    batch, heads, key_heads, length, width, causal = shape
    query, key = (
        tensor_type(dtypes.bfloat16, (batch, h, length, width)) for h in (heads, key_heads)
    )
    q, grad, result, dq = (bench.random(*query.shape) for _ in range(4))
    k, v, dk, dv = (bench.random(*key.shape) for _ in range(4))
    rows = batch * heads * length
    log_sum, shift, delta = (bench.empty(4 * rows) for _ in range(3))
    bench.driver.fill(shift, 0, 4 * rows, bench.stream)
    work = 4 * rows * length * width * (0.5 if causal else 1.0) * 1e-9  # TFLOP for milliseconds
    for backward in (False, True):
        problem = AttentionProblem(
            backward, query, key, key, query, None, causal, width**-0.5, 0.0, backward
        )
        if backward:
            operands = {
                "input": (grad, shift, q, k, v, 0, result, log_sum),
                "output": (dq, dk, dv), "temporary": (delta,),
            }  # fmt: skip
        else:
            operands = {"input": (q, k, v, 0), "output": (result, log_sum), "temporary": ()}
        calls = [c for c in flash_attention(problem).calls if isinstance(c, BoundSource)]
        pointers = [[operands[r.role][r.position] for r in call.operands] for call in calls]
        launches = [bench.launcher(c, p) for c, p in zip(calls, pointers, strict=True)]
        time = bench.milliseconds(launches)
        each = ", ".join(f"{bench.milliseconds([launch]):.3f}" for launch in launches)
        rate = work * (2.5 if backward else 1.0) / time
        name = "backward" if backward else "forward"
        print(f"{shape} {name}: {time:.3f} ms ({each}), {rate:.0f} TFLOP/s", flush=True)
        for tiles in SWEEP if sweep and not backward else ():
            call = retiled(calls[0], problem, tiles)
            if call.shared > bench.driver.properties(0).shared_memory_per_block:
                continue
            time = bench.milliseconds([bench.launcher(call, pointers[0])])
            print(f"    {tiles}: {time:.3f} ms, {work / time:.0f} TFLOP/s", flush=True)
    for pointer in (q, grad, result, dq, k, v, dk, dv, log_sum, shift, delta):
        bench.driver.free(0, pointer, bench.stream)


def problem_of(
    query: TensorType, key: TensorType, sequences: Sequences | None, *, backward: bool
) -> AttentionProblem:
    return AttentionProblem(
        backward, query, key, key, query, None, sequences is None, query.shape[-1] ** -0.5,
        sequences=sequences,
    )  # fmt: skip


def timed_packed(
    bench: Bench, shape: tuple[int, int, int], lengths: Sequence[int], *, padded: bool
) -> list[float]:
    """Milliseconds of the forward and the backward pass, causal."""
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
    q, grad, result, dq = (bench.random(*query.shape) for _ in range(4))
    k, v, dk, dv = (bench.random(*key.shape) for _ in range(4))
    log_sum, delta = (bench.empty(4 * batch * heads * rows) for _ in range(2))
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
        lowering = flash_attention(problem_of(query, key, sequences, backward=backward))
        calls = [c for c in lowering.calls if isinstance(c, BoundSource)]
        times.append(bench.milliseconds([
            bench.launcher(c, [operands[r.role][r.position] for r in c.operands]) for c in calls
        ]))  # fmt: skip
    for pointer in (q, grad, result, dq, k, v, dk, dv, log_sum, delta, starts, errors):
        bench.driver.free(0, pointer, bench.stream)
    return times


def measure_packed(bench: Bench, shape: tuple[int, int, int], name: str) -> None:
    lengths, (heads, _, width) = LENGTHS[name], shape
    work = 2 * heads * width * sum(n * n for n in lengths) * 1e-9
    packed, padded = (timed_packed(bench, shape, lengths, padded=p) for p in (False, True))
    for part, factor, own, other in zip(
        ("forward", "backward"), (1.0, 2.5), packed, padded, strict=True
    ):
        print(
            f"{shape} {len(lengths)} sequences, {name} {part}: packed {own:.3f} ms, "
            f"{work * factor / own:.0f} TFLOP/s; padded {other:.3f} ms",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="try other tiles of the forward")
    options = parser.parse_args()
    bench = Bench()
    for shape in SHAPES:
        measure(bench, shape, sweep=options.sweep)
    for heads in PACKED:
        for name in LENGTHS:
            measure_packed(bench, heads, name)


if __name__ == "__main__":
    main()
