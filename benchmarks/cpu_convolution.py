"""Convolutions of a ResNet-18 (CIFAR form) and of a small UNet, FLAME against PyTorch on the CPU.

Both run in turn in one process; medians and best runs in GFLOP/s, and the ratio of median times
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
    """A square two-dimensional convolution with padding that keeps the size at stride 1."""

    images: int
    inputs: int
    outputs: int
    size: int
    kernel: int
    stride: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def result(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def operations(self) -> int:
        taps = self.inputs * self.kernel**2
        return 2 * self.images * self.outputs * self.result**2 * taps

    def __str__(self) -> str:
        channels = f"{self.inputs}->{self.outputs}"
        return f"{self.images:3} x {channels:>8} @{self.size:2} k{self.kernel} s{self.stride}"


RESNET = [
    Form(32, 3, 64, 32, 3),
    Form(32, 64, 64, 32, 3),
    Form(32, 64, 128, 32, 3, 2),
    Form(32, 64, 128, 32, 1, 2),
    Form(32, 128, 128, 16, 3),
    Form(32, 128, 256, 16, 3, 2),
    Form(32, 256, 256, 8, 3),
    Form(32, 256, 512, 8, 3, 2),
    Form(32, 512, 512, 4, 3),
]
UNET = [
    Form(8, 3, 64, 32, 3),
    Form(8, 64, 64, 32, 3),
    Form(8, 64, 64, 32, 3, 2),
    Form(8, 128, 128, 16, 3),
    Form(8, 256, 128, 16, 3),
    Form(8, 192, 64, 32, 3),
    Form(8, 128, 128, 8, 1),
    Form(8, 64, 3, 32, 3),
]


def alternate(
    first: Callable[[], Any], second: Callable[[], Any], runs: int, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Seconds of each, in turn, after two runs to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(runs + 2):
        for call, kept in zip((first, second), times, strict=True):
            # OpenMP's threads go on spinning for milliseconds after PyTorch's call; then a call
            # that is not timed wakes the threads of the one to measure
            time.sleep(SETTLE)
            call()
            begin = clock()
            call()
            if turn >= 2:
                kept.append(clock() - begin)
    return times


def passes(form: Form) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """For each pass: the call in FLAME and in PyTorch."""
    import numpy as np
    import torch

    import flame
    from flame.ops.convolution import operation

    rng = np.random.default_rng(0)
    shapes = (
        (form.images, form.inputs, form.size, form.size),
        (form.outputs, form.inputs, form.kernel, form.kernel),
        (form.images, form.outputs, form.result, form.result),
    )
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    x, w, g = (flame.from_numpy(a) for a in arrays)
    theirs = [torch.from_numpy(a) for a in arrays]
    stride, padding = [form.stride] * 2, [form.padding] * 2
    options: dict[str, Any] = {
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": (1, 1),
        "groups": 1,
    }

    def backward(*wanted: bool) -> Any:
        return torch.ops.aten.convolution_backward(
            theirs[2], theirs[0], theirs[1], None, stride, padding, [1, 1], False, [0, 0], 1, wanted
        )

    return {
        "forward": (
            lambda: operation.convolution(x, w, None, size=shapes[2][2:], **options),
            lambda: torch.nn.functional.conv2d(theirs[0], theirs[1], None, stride, padding),
        ),
        "input gradient": (
            lambda: operation.convolution_input_gradient(g, w, None, size=shapes[0][2:], **options),
            lambda: backward(True, False, False),
        ),
        "weight gradient": (
            lambda: operation.convolution_weight_gradient(g, x, size=shapes[1][2:], **options),
            lambda: backward(False, True, False),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--busy", action="store_true", help="one thread each, by its CPU time")
    arguments = parser.parse_args()
    if arguments.busy:
        os.environ["FLAME_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1 if arguments.busy else 2)
    clock = time.thread_time if arguments.busy else time.perf_counter
    print(f"{'':30}{'pass':>16}{'FLAME':>8}{'(best)':>8}{'PyTorch':>9}{'(best)':>8}  ratio")
    for name, forms in (("resnet", RESNET), ("unet", UNET)):
        for form in forms:
            for kind, (ours, theirs) in passes(form).items():
                mine, others = alternate(ours, theirs, arguments.runs, clock)
                a, b = statistics.median(mine), statistics.median(others)
                speeds = [form.operations / t / 1e9 for t in (a, min(mine), b, min(others))]
                columns = "".join(f"{v:{w}.0f}" for v, w in zip(speeds, (8, 8, 9, 8), strict=True))
                print(f"{name:7}{form!s:23}{kind:>16}{columns}{a / b:7.2f}", flush=True)


if __name__ == "__main__":
    main()
