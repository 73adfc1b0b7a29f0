"""Scaled dot-product attention, FLAME against PyTorch's flash kernel on the CPU.

Query, key and value are heads of one tensor (batch, length, 3, heads, width), as a transformer's
projection gives them, or (with `contiguous`) lie as PyTorch likes them best. Forward and backward
of both in turn in one process: medians in milliseconds, and the ratio of FLAME's to PyTorch's time
(below 1 is faster than PyTorch). `--busy` measures one thread of each by its own CPU time, which
means something on a machine that others use too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SETTLE = 0.01  # seconds between the libraries


@dataclass(frozen=True)
class Form:
    """Self-attention over ``length`` positions."""

    batch: int
    heads: int
    length: int
    width: int
    causal: bool = False
    contiguous: bool = False

    def __str__(self) -> str:
        sizes = f"{self.batch} x {self.heads} heads x {self.length} x {self.width}"
        kinds = " causal" * self.causal + " contiguous" * self.contiguous
        return f"{sizes}{kinds}"


FORMS = [
    Form(8, 8, 256, 32, causal=True),  # the GPT of the training benchmarks
    Form(8, 8, 256, 32),
    Form(8, 1, 256, 128),  # its UNet
    Form(8, 12, 128, 64),
    Form(4, 8, 512, 64, causal=True),
    Form(4, 12, 1024, 64, causal=True),
    Form(2, 4, 1024, 128),
    Form(2, 4, 1024, 128, contiguous=True),
    Form(1, 8, 2048, 80, causal=True),
]


def passes(form: Form, tensor: Callable[[Any], Any], function: Callable[..., Any]) -> Any:
    """A call that gives (forward, backward of its result), anew for each turn."""
    import numpy as np

    rng = np.random.default_rng(0)
    shape = (form.batch, form.length, 3, form.heads, form.width)
    packed = tensor(rng.standard_normal(shape).astype(np.float32))
    grad = tensor(rng.standard_normal((*shape[:2], shape[3], shape[4])).astype(np.float32))
    grad = grad.permute(0, 2, 1, 3)
    views = packed.permute(2, 0, 3, 1, 4).unbind(0)

    def begin() -> Any:
        parts = [t.contiguous() if form.contiguous else t for t in views]
        leaves = [t.detach().requires_grad_() for t in parts]
        return (
            lambda: function(*leaves, is_causal=form.causal),
            lambda made: made.backward(grad),
        )

    return begin


def alternate(calls: list[Any], runs: int, clock: Callable[[], float]) -> list[list[float]]:
    """Median seconds of (forward, backward) of each, in turn, after two runs to warm up."""
    times: list[list[list[float]]] = [[[], []] for _ in calls]
    for turn in range(runs + 2):
        for begin, kept in zip(calls, times, strict=True):
            time.sleep(SETTLE)  # OpenMP's threads go on spinning after PyTorch's call
            forward, backward = begin()
            forward()
            start = clock()
            made = forward()
            middle = clock()
            backward(made)
            end = clock()
            if turn >= 2:
                kept[0].append(middle - start)
                kept[1].append(end - middle)
    return [[statistics.median(t) for t in each] for each in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--busy", action="store_true", help="one thread each, by its CPU time")
    parser.add_argument("--only", default="", help="forms whose line contains this text")
    arguments = parser.parse_args()
    if arguments.busy:
        os.environ["FLAME_NUM_THREADS"] = "1"
    import torch

    import flame
    from flame.nn import functional

    torch.set_num_threads(1 if arguments.busy else flame.get_num_threads())
    clock = time.thread_time if arguments.busy else time.perf_counter
    heads = "".join(f"{h:>10}" for h in ("FLAME", "PyTorch", "ratio"))
    print(f"{'':44}{'forward':>30}{'backward':>30}\n{'':44}{heads}{heads}", flush=True)
    for form in FORMS:
        if arguments.only not in str(form):
            continue
        calls = [
            passes(form, flame.from_numpy, functional.scaled_dot_product_attention),
            passes(form, torch.from_numpy, torch.nn.functional.scaled_dot_product_attention),
        ]
        (mine, rival) = alternate(calls, arguments.runs, clock)
        columns = "".join(
            f"{a * 1e3:10.2f}{b * 1e3:10.2f}{a / b:10.2f}" for a, b in zip(mine, rival, strict=True)
        )
        print(f"{form!s:44}{columns}", flush=True)


if __name__ == "__main__":
    main()
