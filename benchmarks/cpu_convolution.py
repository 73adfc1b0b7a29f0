"""Convolutions of a ResNet-18 (CIFAR form) and of a small UNet, FLAME against PyTorch on the CPU.

Each with channels first and with channels last in memory, all four in turn in one process: medians
in GFLOP/s of the direct algorithm's operations (so a Winograd kernel may exceed what the machine
can do), and the ratio of FLAME's to PyTorch's time with channels last (below 1 is faster than
PyTorch). `--busy` measures one thread of each by its own CPU time, which means something on a
machine that others use too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
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
    Form(8, 128, 128, 8, 3),
    Form(8, 256, 128, 16, 1),
    Form(8, 128, 128, 8, 1),
    Form(8, 64, 3, 32, 3),
]
COLUMNS = ("FLAME", "FLAME last", "PyTorch", "PyTorch last")


def alternate(
    calls: Sequence[Callable[[], Any]], runs: int, clock: Callable[[], float]
) -> list[list[float]]:
    """Seconds of each, in turn, after two runs to warm up."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(runs + 2):
        for call, kept in zip(calls, times, strict=True):
            # OpenMP's threads go on spinning for milliseconds after PyTorch's call; then a call
            # that is not timed wakes the threads of the one to measure
            time.sleep(SETTLE)
            call()
            begin = clock()
            call()
            if turn >= 2:
                kept.append(clock() - begin)
    return times


Passes = dict[str, Callable[[], Any]]


def flame_passes(form: Form, arrays: Sequence[Any], *, last: bool) -> Passes:
    import numpy as np

    import flame
    from flame.ops.convolution import operation

    x, w, g = (flame.from_numpy(a) for a in arrays)
    if last:
        order, back = (0, 2, 3, 1), (0, 3, 1, 2)
        x, g = (
            flame.from_numpy(np.ascontiguousarray(arrays[i].transpose(order))).permute(*back)
            for i in (0, 2)
        )
    options: dict[str, Any] = {
        "stride": (form.stride,) * 2,
        "padding": (form.padding,) * 2,
        "dilation": (1, 1),
        "groups": 1,
    }
    sizes = [a.shape[2:] for a in arrays]
    return {
        "forward": lambda: operation.convolution(x, w, None, size=sizes[2], **options),
        "input gradient": lambda: operation.convolution_input_gradient(
            g, w, None, size=sizes[0], **options
        ),
        "weight gradient": lambda: operation.convolution_weight_gradient(
            g, x, size=sizes[1], **options
        ),
    }


def torch_passes(form: Form, arrays: Sequence[Any], *, last: bool) -> Passes:
    import torch

    layout = torch.channels_last if last else torch.contiguous_format
    x, w, g = (torch.from_numpy(a).contiguous(memory_format=layout) for a in arrays)
    stride, padding = [form.stride] * 2, [form.padding] * 2

    def backward(*wanted: bool) -> Any:
        return torch.ops.aten.convolution_backward(
            g, x, w, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
        )

    return {
        "forward": lambda: torch.nn.functional.conv2d(x, w, None, stride, padding),
        "input gradient": lambda: backward(True, False, False),
        "weight gradient": lambda: backward(False, True, False),
    }


def passes(form: Form) -> dict[str, list[Callable[[], Any]]]:
    """For each pass: the calls of `COLUMNS`."""
    import numpy as np

    rng = np.random.default_rng(0)
    shapes = (
        (form.images, form.inputs, form.size, form.size),
        (form.outputs, form.inputs, form.kernel, form.kernel),
        (form.images, form.outputs, form.result, form.result),
    )
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    made = [
        make(form, arrays, last=last)
        for make in (flame_passes, torch_passes)
        for last in (False, True)
    ]
    return {name: [each[name] for each in made] for name in made[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--busy", action="store_true", help="one thread each, by its CPU time")
    parser.add_argument("--only", default="", help="layers whose line contains this text")
    arguments = parser.parse_args()
    if arguments.busy:
        os.environ["FLAME_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1 if arguments.busy else 2)
    clock = time.thread_time if arguments.busy else time.perf_counter
    heads = "".join(f"{column:>13}" for column in COLUMNS)
    print(f"{'':34}{'pass':>16}{heads}  ratio", flush=True)
    for name, forms in (("resnet", RESNET), ("unet", UNET)):
        for form in forms:
            if arguments.only not in f"{name} {form}":
                continue
            for kind, calls in passes(form).items():
                times = [statistics.median(t) for t in alternate(calls, arguments.runs, clock)]
                columns = "".join(f"{form.operations / t / 1e9:13.0f}" for t in times)
                ratio = times[1] / times[3]
                print(f"{name:7}{form!s:27}{kind:>16}{columns}{ratio:7.2f}", flush=True)


if __name__ == "__main__":
    main()
