"""Fused and unfused schedules, and PyTorch eager, on patterns of training steps; one thread.

FLAME_NUM_THREADS=1 python benchmarks/cpu_fusion.py [pattern...]
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("FLAME_NUM_THREADS", "1")

import numpy as np
import torch
from torch.nn import functional

import flame.nn.functional  # noqa: F401 - declares every op
from flame.compiler.program import Program
from flame.compiler.schedule import Schedule, one_task_a_node
from flame.compiler.schedule.fusion import fuse
from flame.core.types import TensorType
from flame.graph import Graph, Symbol
from flame.runtime.storage import Storage
from flame.testing.schedules import GraphBuilder, memory_of

torch.set_num_threads(1)
Pattern = tuple[Graph, Callable[..., Any]]


def bias_gelu() -> Pattern:
    g = GraphBuilder()
    x, bias = g.input((2048, 3072)), g.input((3072,))
    graph = g.graph(g("gelu", g("add", x, bias)))
    return graph, lambda x, b: functional.gelu(x + b)


def linear_bias_gelu() -> Pattern:
    g = GraphBuilder()
    x, w, bias = g.input((512, 768)), g.input((768, 3072)), g.input((3072,))
    graph = g.graph(g("gelu", g("add", g("matmul", x, w), bias)))
    return graph, lambda x, w, b: functional.gelu(x @ w + b)


def residual_layer_norm() -> Pattern:
    g = GraphBuilder()
    x, r, w, b = g.input((4096, 768)), g.input((4096, 768)), g.input((768,)), g.input((768,))
    total = g("add", x, r)
    mean = g("mean", total, dims=(1,), keepdim=True)
    centred = g("sub", total, mean)
    scale = g(
        "rsqrt", g("add", g("mean", g("mul", centred, centred), dims=(1,), keepdim=True), 1e-5)
    )
    made = g("add", g("mul", g("mul", centred, scale), w), b)

    def reference(x: Any, r: Any, w: Any, b: Any) -> Any:
        total = x + r
        return functional.layer_norm(total, (768,), w, b), total

    return g.graph(made, total), reference


def softmax() -> Pattern:
    g = GraphBuilder()
    x = g.input((4096, 1000))
    e = g("exp", g("sub", x, g("amax", x, dims=(1,), keepdim=True)))
    graph = g.graph(g("div", e, g("sum", e, dims=(1,), keepdim=True)))
    return graph, lambda x: torch.softmax(x, 1)


def cross_entropy() -> Pattern:
    """Soft labels: -mean(sum(t * log_softmax(x)))."""
    g = GraphBuilder()
    x, t = g.input((4096, 1000)), g.input((4096, 1000))
    shifted = g("sub", x, g("amax", x, dims=(1,), keepdim=True))
    total = g("log", g("sum", g("exp", shifted), dims=(1,), keepdim=True))
    loss = g("neg", g("sum", g("mul", t, g("sub", shifted, total)), dims=(1,), keepdim=False))
    graph = g.graph(g("mean", loss, dims=(0,), keepdim=False))
    return graph, lambda x, t: functional.cross_entropy(x, t)


def batch_norm_relu_add() -> Pattern:
    g = GraphBuilder()
    shape, strides = (64, 64, 32, 32), (65536, 1, 2048, 64)
    x, residual = g.input(shape, strides=strides), g.input(shape, strides=strides)
    y, mean, variance = g("batch_norm", x, g.input((64,)), g.input((64,)), 1e-5)
    graph = g.graph(g("relu", g("add", y, residual)), mean, variance)

    def reference(x: Any, residual: Any, w: Any, b: Any) -> Any:
        return functional.relu(functional.batch_norm(x, None, None, w, b, True) + residual)

    return graph, reference


def batch_norm_statistics_backward() -> Pattern:
    """The sums of a normalization's backward: of g and of g * x, after relu's derivative."""
    g = GraphBuilder()
    grad, x, y = (g.input((65536, 64)) for _ in range(3))
    through = g("where", g("gt", y, 0.0), grad, 0.0)
    shift = g("sum", through, dims=(0,), keepdim=False)
    slope = g("sum", g("mul", through, x), dims=(0,), keepdim=False)

    def reference(grad: Any, x: Any, y: Any) -> Any:
        through = torch.where(y > 0, grad, 0.0)
        return through, through.sum(0), (through * x).sum(0)

    return g.graph(through, shift, slope), reference


def adamw() -> Pattern:
    """60 parameters of different sizes, with gradients clipped by their common norm."""
    g = GraphBuilder()
    sizes = [(64 + 16 * i, 768) for i in range(30)] + [(768 + i,) for i in range(30)]
    step = g.number(float)
    tensors = [[g.input(s) for s in sizes] for _ in range(4)]
    total: Any = None
    for grad in tensors[1]:
        dims = tuple(range(len(grad.type.shape)))  # type: ignore[union-attr]
        part = g("sum", g("mul", grad, grad), dims=dims, keepdim=False)
        total = part if total is None else g("add", total, part)
    scale = g("minimum", g("div", 1.0, g("add", g("sqrt", total), 1e-6)), 1.0)
    updates = []
    for p, grad, m, v in zip(*tensors, strict=True):
        clipped = g("mul", grad, scale)
        first = g("add", g("mul", m, 0.9), g("mul", clipped, 0.1))
        second = g("add", g("mul", v, 0.999), g("mul", g("mul", clipped, clipped), 0.001))
        change = g("div", first, g("add", g("sqrt", second), 1e-8))
        made = g("sub", g("mul", p, 0.9999), g("mul", change, step))
        updates += [(p, made), (m, first), (v, second)]

    def reference(step: float, *given: Any) -> None:
        count = len(sizes)
        ps, gs, ms, vs = (given[i * count : (i + 1) * count] for i in range(4))
        torch._fused_adamw_(
            ps, gs, ms, vs, [], [torch.tensor(3.0)] * count, lr=1e-3, beta1=0.9, beta2=0.999,
            weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False,
            grad_scale=None, found_inf=None,
        )  # fmt: skip

    return g.graph(updates=updates), reference


PATTERNS = (
    bias_gelu, linear_bias_gelu, residual_layer_norm, softmax, cross_entropy, batch_norm_relu_add,
    batch_norm_statistics_backward, adamw,
)  # fmt: skip


def array_of(symbol: Symbol, rng: np.random.Generator) -> Any:
    assert isinstance(symbol.type, TensorType)
    return rng.uniform(0.1, 1.0, symbol.type.shape).astype(symbol.type.dtype.numpy)


def runner(schedule: Schedule, values: list[Any]) -> Callable[[], None]:
    program = Program.build(schedule, {})
    memory = [
        memory_of(v, s.type) if isinstance(s.type, TensorType) else v
        for s, v in zip(schedule.graph.inputs, values, strict=True)
    ]
    results = [Storage.allocate(n) for _, n in program.result_types]
    words = [m.pointer if isinstance(m, Storage) else m for m in [*memory, *results]]
    return lambda: program.run(*words)


def milliseconds(functions: list[Callable[[], Any]], rounds: int = 15) -> list[float]:
    """Medians of CPU time, the functions taking turns."""
    found: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 2):
        for function, times in zip(functions, found, strict=True):
            begin = time.thread_time()
            function()
            if round_ >= 2:
                times.append((time.thread_time() - begin) * 1e3)
    return [statistics.median(times) for times in found]


def torch_of(symbol: Symbol, value: Any) -> Any:
    if not isinstance(symbol.type, TensorType):
        return value
    made = torch.from_numpy(np.array(value))
    if symbol.type.ndim == 4 and not symbol.type.contiguous:
        made = made.to(memory_format=torch.channels_last)
    return made


def main() -> None:
    print(f"{'pattern':32} {'tasks':>9} {'unfused ms':>11} {'fused ms':>9} {'torch ms':>9}")
    rng = np.random.default_rng(0)
    for pattern in PATTERNS:
        if len(sys.argv) > 1 and pattern.__name__ not in sys.argv[1:]:
            continue
        graph, reference = pattern()
        values = [
            array_of(s, rng) if isinstance(s.type, TensorType) else 0.001 for s in graph.inputs
        ]
        plain, fused = one_task_a_node(graph), fuse(graph)
        given = [torch_of(s, v) for s, v in zip(graph.inputs, values, strict=True)]
        times = milliseconds(
            [runner(plain, values), runner(fused, values), lambda: reference(*given)]  # noqa: B023
        )
        count = f"{len(plain.tasks)}>{len(fused.tasks)}"
        print(f"{pattern.__name__:32} {count:>9} {times[0]:11.2f} {times[1]:9.2f} {times[2]:9.2f}")


if __name__ == "__main__":
    main()
