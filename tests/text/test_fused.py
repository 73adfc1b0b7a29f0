"""Golden texts of fused schedules: the graph, its tasks, and their kernels in the loop language.

``pytest tests/text --update`` rewrites them; the difference is then reviewed like code. A reader
should see that every value is read and written once, as far as its size allows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flame.nn.functional  # noqa: F401 - declares every op
from flame.compiler.schedule.fusion import fuse
from flame.graph import Graph, Symbol
from flame.testing.schedules import GraphBuilder

GOLDEN = Path(__file__).parent / "golden"
LIBRARY = ("convolution", "matmul", "linear")  # kernels that have texts of their own


def softmax() -> Graph:
    """Three visits of a row in cache; the exponentials wait in scratch."""
    g = GraphBuilder()
    x = g.input((64, 300))
    power = g("exp", g("sub", x, g("amax", x, dims=(1,), keepdim=True)))
    return g.graph(g("div", power, g("sum", power, dims=(1,), keepdim=True)))


def layer_norm_backward() -> Graph:
    """Of y = (x - mean) * scale * weight: dx joined with the residual's gradient, and dweight."""
    g = GraphBuilder()
    grad, x, weight = g.input((512, 96)), g.input((512, 96)), g.input((96,))
    residual = g.input((512, 96))

    def mean(t: Symbol) -> Any:
        return g("mean", t, dims=(1,), keepdim=True)

    centred = g("sub", x, mean(x))
    scale = g("rsqrt", g("add", mean(g("mul", centred, centred)), 1e-5))
    normal = g("mul", centred, scale)
    through = g("mul", grad, weight)
    inner = g(
        "sub", g("sub", through, mean(through)), g("mul", normal, mean(g("mul", through, normal)))
    )
    dx = g("add", g("mul", inner, scale), residual)
    return g.graph(dx, g("sum", g("mul", grad, normal), dims=(0,), keepdim=False))


def convolution_block() -> Graph:
    """convolution -> batch norm -> add the residual -> relu, channels last."""
    g = GraphBuilder()
    shape, strides = (4, 16, 24, 24), (9216, 1, 384, 16)
    x, kernel = g.input(shape, strides=strides), g.input((16, 16, 3, 3))
    pair = (1, 1)
    y = g(
        "convolution", x, kernel, None, stride=pair, padding=pair, dilation=pair, groups=1,
        size=(24, 24),
    )  # fmt: skip
    z, mean, variance = g("batch_norm", y, g.input((16,)), g.input((16,)), 1e-5)
    return g.graph(g("relu", g("add", z, x)), mean, variance)


def adamw_with_clipping() -> Graph:
    """Squares summed in parts; one update, in place, whose text serves every parameter."""
    g = GraphBuilder()
    step = g.number(float)
    shapes = [(400, 300), (300,)]
    parameters, grads, firsts, seconds = ([g.input(s) for s in shapes] for _ in range(4))
    total: Any = None
    for grad in grads:
        dims = (0, 1) if grad is grads[0] else (0,)
        part = g("sum", g("mul", grad, grad), dims=dims, keepdim=False)
        total = part if total is None else g("add", total, part)
    scale = g("clamp_max", g("div", 1.0, g("add", g("sqrt", total), 1e-6)), 1.0)
    updates = []
    for p, grad, m, v in zip(parameters, grads, firsts, seconds, strict=True):
        clipped = g("mul", grad, scale)
        first = g("add", g("mul", m, 0.9), g("mul", clipped, 0.1))
        second = g("add", g("mul", v, 0.999), g("mul", g("mul", clipped, clipped), 0.001))
        change = g("div", first, g("add", g("sqrt", second), 1e-8))
        made = g("sub", g("mul", p, 0.9999), g("mul", change, step))
        updates += [(p, made), (m, first), (v, second)]
    return g.graph(updates=updates)


CASES: dict[str, Callable[[], Graph]] = {
    "softmax": softmax,
    "layer_norm_backward": layer_norm_backward,
    "convolution_block": convolution_block,
    "adamw_with_clipping": adamw_with_clipping,
}


def text_of(name: str) -> str:
    """Graph, schedule and kernels of a case, every kernel once."""
    graph = CASES[name]()
    schedule = fuse(graph)
    parts = [str(graph)]
    seen: set[str] = set()
    for task in schedule.tasks:
        pairs = ", ".join(f"out{o} over inp{i}" for o, i in sorted(task.in_place))
        parts.append(f"{task}\n    in place: {pairs or 'no'}")
        for bound in task.lowering.kernels:
            text = str(bound.kernel)
            if task.nodes[0].op.name not in LIBRARY and text not in seen:
                parts.append(text)
                seen.add(text)
    return "\n\n".join(parts) + "\n"


@pytest.mark.text
@pytest.mark.parametrize("name", CASES)
def test_text(name: str, request: pytest.FixtureRequest) -> None:
    path = GOLDEN / f"fused_{name}.txt"
    made = text_of(name)
    if request.config.getoption("--update"):
        path.write_text(made)
    assert path.exists(), f"{path} is missing; run pytest tests/text --update and review it"
    assert made == path.read_text(), f"{name} changed; run pytest tests/text --update and review it"


@pytest.mark.text
def test_updates_of_all_sizes_share_one_text() -> None:
    tasks = fuse(adamw_with_clipping()).tasks
    texts = {str(b.kernel) for t in tasks if len(t.outputs) == 3 for b in t.lowering.kernels}
    assert len(texts) == 1
