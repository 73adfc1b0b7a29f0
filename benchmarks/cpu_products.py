"""Matrix products of common models, FLAME against PyTorch on the CPU.

Forward products and those of both gradients, as `a @ b` on tensors with the strides that a layer
has; both libraries in turn in one process, medians of the time of a call from Python. Columns:
GFLOP/s of each, and PyTorch's time over FLAME's (above 1 is faster than PyTorch). `--busy` measures
one thread of each by its own CPU time, which means something on a machine that others use too.
With FLAME_CPU_AMX=0 in the environment FLAME leaves the matrix unit (AMX) of the processor alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WORK = 2e8  # operations that one timing lasts at least


@dataclass(frozen=True)
class Product:
    """(batch..., m, depth) @ (batch..., depth, n); a letter says which of them is transposed."""

    m: int
    depth: int
    n: int
    turned: str = ""
    batch: tuple[int, ...] = ()

    @property
    def operations(self) -> int:
        count = 2 * self.m * self.depth * self.n
        for size in self.batch:
            count *= size
        return count

    def __str__(self) -> str:
        batch = "".join(f"{size} x " for size in self.batch)
        a, b = ("T" if letter in self.turned else " " for letter in "ab")
        return f"{batch}{self.m} x {self.depth}{a} @ {self.depth} x {self.n}{b}"


def layer(rows: int, inputs: int, outputs: int) -> list[Product]:
    """A linear layer: its result, and the gradients of its input and of its weight."""
    return [
        Product(rows, inputs, outputs, "b"),
        Product(rows, outputs, inputs),
        Product(outputs, rows, inputs, "a"),
    ]


HEADS = (8, 8)
GROUPS: dict[str, list[Product]] = {
    "GPT": [
        *layer(2048, 256, 768),
        *layer(2048, 256, 256),
        *layer(2048, 256, 1024),
        *layer(2048, 1024, 256),
        Product(256, 32, 256, "b", HEADS),
        Product(256, 256, 32, "", HEADS),
        Product(256, 256, 32, "a", HEADS),
    ],
    "MLP": [*layer(128, 784, 512), *layer(128, 512, 512), *layer(128, 512, 10)],
    "tiny MLP": [*layer(32, 16, 32), *layer(32, 32, 32), *layer(32, 32, 1)],
    "convolution": [
        Product(2048, 64, 64, "", (36,)),
        Product(512, 128, 128, "", (36,)),
        Product(128, 256, 256, "", (36,)),
        Product(32, 512, 512, "", (36,)),
    ],
    "vectors": [
        Product(1, 1024, 1024),
        Product(1, 1024, 1024, "b"),
        Product(1024, 1024, 1),
        Product(1024, 1024, 1, "a"),
        Product(1, 1 << 20, 1),
        Product(4, 1024, 1024, "b"),
    ],
    "odd": [Product(257, 257, 257), Product(65, 65, 65), Product(31, 33, 17), Product(3, 3, 3)],
}


def operands(product: Product) -> tuple[list[Any], list[Any]]:
    """The same operands for FLAME and for PyTorch."""
    import numpy as np
    import torch

    import flame

    rng = np.random.default_rng(0)
    shapes = {"a": (product.m, product.depth), "b": (product.depth, product.n)}
    made: tuple[list[Any], list[Any]] = ([], [])
    for letter, shape in shapes.items():
        turned = letter in product.turned
        stored = shape[::-1] if turned else shape
        numbers = rng.standard_normal((*product.batch, *stored)).astype(np.float32)
        for library, into in ((flame, made[0]), (torch, made[1])):
            x = library.from_numpy(numbers)
            into.append(x.transpose(-1, -2) if turned else x)
    return made


def compare(product: Product, clock: Callable[[], float], rounds: int) -> tuple[float, float]:
    """Median seconds of a call of FLAME, and of PyTorch."""
    ours, theirs = operands(product)
    repeats = max(3, min(20_000, int(WORK / product.operations)))

    def timed(a: Any, b: Any) -> float:
        start = clock()
        for _ in range(repeats):
            a @ b
        return (clock() - start) / repeats

    timed(*ours), timed(*theirs)
    pairs = [(timed(*ours), timed(*theirs)) for _ in range(rounds)]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="of each library; 0: all")
    parser.add_argument("--busy", action="store_true", help="CPU time of one thread")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="groups whose name contains this")
    options = parser.parse_args()
    threads = 1 if options.busy else options.threads or os.cpu_count() or 1
    os.environ["FLAME_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    clock = time.thread_time if options.busy else time.perf_counter
    from flame.runtime.cpu import amx

    unit = amx.status() or "used"
    print(f"{threads} threads; matrix unit: {unit}; GFLOP/s, and PyTorch's time over FLAME's")
    for name, products in GROUPS.items():
        if options.only not in name:
            continue
        print(f"\n{name:32} {'FLAME':>8} {'PyTorch':>8} {'ratio':>6} {'us':>9}")
        for product in products:
            ours, theirs = compare(product, clock, options.rounds)
            rates = [product.operations / seconds / 1e9 for seconds in (ours, theirs)]
            print(
                f"{product!s:32} {rates[0]:8.1f} {rates[1]:8.1f} {theirs / ours:6.2f} "
                f"{ours * 1e6:9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
