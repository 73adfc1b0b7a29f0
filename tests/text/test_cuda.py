"""Golden CUDA C++ of a few operations, as `test_golden` has their LLVM IR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import flame.nn.functional  # noqa: F401 - declares every op
from flame.compiler.pipeline import lower, results
from flame.core import dtypes
from flame.core.types import TensorType, tensor_type
from flame.graph import one_op
from flame.ops.op import OPS
from flame.render.cuda import render

GOLDEN = Path(__file__).parent / "golden" / "cuda"


def bf16(*shape: int) -> TensorType:
    return tensor_type(dtypes.bfloat16, shape)


def f32(*shape: int) -> TensorType:
    return tensor_type(dtypes.float32, shape)


CASES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "add_bfloat16": ("add", (bf16(4096, 4096), bf16(4096, 4096)), {}),
    "add_row": ("add", (f32(4096, 1000), f32(1000)), {}),
    "softmax_short_rows": ("softmax", (f32(100_000, 10),), {"dim": 1}),
    "softmax_long_rows": ("softmax", (f32(512, 50_257),), {"dim": 1}),
    "sum_columns": ("sum", (f32(4096, 1000),), {"dims": (0,), "keepdim": False}),
    "layer_norm": ("layer_norm", (bf16(8192, 768), bf16(768), bf16(768), float), {"rows": 1}),
    "dropout": ("dropout", (f32(8192, 768), float, float, int, int), {}),
}


def text_of(name: str) -> str:
    """Kernels of a case in CUDA C++, one after the other."""
    op, types, attributes = CASES[name]
    graph = one_op(OPS[op], types, attributes)
    parts = []
    for bound in lower(graph, results(graph, None)).kernels:
        launch = render(bound, by_pointer=True)
        parts.append(f"// {bound.extent} iterations in a grid of {launch.grid[0]} blocks\n")
        parts.append(launch.text)
    return "".join(parts)


@pytest.mark.parametrize("name", CASES)
def test_text(name: str, request: pytest.FixtureRequest) -> None:
    path = GOLDEN / f"{name}.txt"
    made = text_of(name)
    if request.config.getoption("--update"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(made)
    assert path.exists(), f"{path} is missing; run pytest tests/text --update and review it"
    assert made == path.read_text(), f"{name} changed; run pytest tests/text --update and review it"
