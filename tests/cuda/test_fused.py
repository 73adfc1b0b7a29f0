"""Fused schedules: the kernels that the compiler writes, as CUDA C++ on the host."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import flame.nn.functional  # noqa: F401 - declares every op
from flame.compiler.schedule.fusion import fuse
from flame.core import dtypes
from flame.graph import Graph, Symbol
from flame.graph.interpreter import interpret
from flame.kernel.builder import BoundKernel
from flame.kernel.geometry import Geometry, KernelLaunch
from flame.render.cuda import render
from flame.testing.schedules import GraphBuilder, run_schedule

from .host_compiler import HostLibrary
from .op_cases import run_words


def softmax(g: GraphBuilder) -> list[Symbol]:
    x = g.input((64, 300))
    power = g("exp", g("sub", x, g("amax", x, dims=(1,), keepdim=True)))
    return [g("div", power, g("sum", power, dims=(1,), keepdim=True))]


def layer_norm_backward(g: GraphBuilder) -> list[Symbol]:
    grad, x, weight = g.input((70, 96)), g.input((70, 96)), g.input((96,))

    def mean(t: Symbol) -> Any:
        return g("mean", t, dims=(1,), keepdim=True)

    centred = g("sub", x, mean(x))
    scale = g("rsqrt", g("add", mean(g("mul", centred, centred)), 1e-5))
    normal = g("mul", centred, scale)
    through = g("mul", grad, weight)
    inner = g(
        "sub", g("sub", through, mean(through)), g("mul", normal, mean(g("mul", through, normal)))
    )
    return [g("mul", inner, scale), g("sum", g("mul", grad, normal), dims=(0,), keepdim=False)]


def adamw(g: GraphBuilder) -> list[Symbol]:
    step = g.number(float)
    made: list[Symbol] = []
    for shape in ((40, 300), (300,)):
        p, grad, m, v = (g.input(shape) for _ in range(4))
        first = g("add", g("mul", m, 0.9), g("mul", grad, 0.1))
        second = g("add", g("mul", v, 0.999), g("mul", g("mul", grad, grad), 0.001))
        change = g("div", first, g("add", g("sqrt", g("abs", second)), 1e-2))
        made += [g("sub", g("mul", p, 0.9999), g("mul", change, step)), first, second]
    return made


def half_width_gelu(g: GraphBuilder) -> list[Symbol]:
    x = g.input((33, 65), dtypes.bfloat16)
    bias = g.input((65,), dtypes.bfloat16)
    y = g("add", x, bias)
    return [g("mul", g("mul", y, 0.5), g("add", g("erf", g("mul", y, 0.7071)), 1.0))]


CASES = (softmax, layer_norm_backward, adamw, half_width_gelu)


@pytest.mark.parametrize("geometry", [None, Geometry(64, 64, by_pointer=True), Geometry(8, 32)])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_fused_kernels(
    case: Callable[[GraphBuilder], list[Symbol]],
    geometry: Geometry | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    g = GraphBuilder()
    graph: Graph = g.graph(*case(g))
    schedule = fuse(graph)
    kernels = [b for task in schedule.tasks for b in task.lowering.kernels if b.extent]
    launches = {b: render(b, geometry) for b in kernels}
    library = HostLibrary.of(list(dict.fromkeys(launch.text for launch in launches.values())))

    def launch(bound: BoundKernel, extent: int, grain: int, *given: Any) -> None:
        by_pointer = geometry is not None and geometry.by_pointer
        _launch(library, launches[bound], bound, given, by_pointer=by_pointer)

    def step(bound: BoundKernel, source: None) -> Any:
        return SimpleNamespace(address=bound, extent=bound.extent, grain=1, scratch=(),
                               operands=bound.operands, sizes=bound.sizes)  # fmt: skip

    schedules = "flame.testing.schedules"
    monkeypatch.setattr(f"{schedules}.source_of", lambda kernel: None)
    monkeypatch.setattr(f"{schedules}.load", step)
    monkeypatch.setattr(f"{schedules}.cpu", SimpleNamespace(launch=launch))
    rng = np.random.default_rng(0)
    values = [_value(symbol, rng) for symbol in graph.inputs]
    tolerance = 2e-2 if case is half_width_gelu else 2e-5
    for made, want in zip(run_schedule(schedule, values), interpret(graph, values), strict=True):
        np.testing.assert_allclose(
            made.astype("d"), want.astype("d"), rtol=tolerance, atol=tolerance
        )


def _value(symbol: Symbol, rng: np.random.Generator) -> Any:
    if isinstance(symbol.type, type):
        return 0.01
    return rng.normal(size=symbol.type.shape).astype(symbol.type.dtype.numpy)


def _launch(
    library: HostLibrary, launch: KernelLaunch, bound: BoundKernel, given: tuple[Any, ...], *,
    by_pointer: bool,
) -> None:  # fmt: skip
    words: list[Any] = []
    kept: list[Any] = []
    operands = bound.kernel.operands
    for value, operand in zip(given[: len(operands)], operands, strict=True):
        word = ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(int(value))
        kept.append(word)
        number = not hasattr(operand, "written")
        words.append(ctypes.c_int64(ctypes.addressof(word)) if number and by_pointer else word)
    scratch = np.full(max(launch.scratch, 1), 0xFF, np.uint8)
    words += [ctypes.c_int64(scratch.ctypes.data)] if launch.scratch else []
    words += [ctypes.c_int64(n) for n in (*given[len(operands) :], bound.extent)]
    run_words(library, launch, words)
