"""Golden texts: what the stages make of a few operations, for a reader to judge.

``pytest tests/text --update`` rewrites them; the difference is then reviewed like code.
"""

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
from flame.render.llvm import render

GOLDEN = Path(__file__).parent / "golden"
AVX512 = 64  # bytes of a vector; fixed, so that the texts are the same on every host


@pytest.fixture(autouse=True)
def _same_tiles_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of sums fit the host's registers; here, those of one host."""
    monkeypatch.setattr("flame.ops.contraction.blocking.vector_bytes", lambda: AVX512)


def f32(*shape: int, strides: tuple[int, ...] | None = None) -> TensorType:
    return tensor_type(dtypes.float32, shape, strides)


CASES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "add": ("add", (f32(40, 30), f32(40, 30)), {}),
    "add_row_bfloat16": (
        "add",
        (tensor_type(dtypes.bfloat16, (40, 30)), tensor_type(dtypes.bfloat16, (30,))),
        {},
    ),
    "mul_number": ("mul", (f32(100), float), {}),
    "tanh_permuted": ("tanh", (f32(3, 40, strides=(1, 3)),), {}),
    "sum_rows": ("sum", (f32(40, 30),), {"dims": (1,), "keepdim": False}),
    "sum_columns": ("sum", (f32(40, 30),), {"dims": (0,), "keepdim": False}),
    "sum_all_split": ("sum", (f32(400, 300),), {"dims": (0, 1), "keepdim": False}),
    "linear": ("linear", (f32(64, 32), f32(16, 32), f32(16)), {}),
    "softmax": ("softmax", (f32(40, 30),), {"dim": 1}),
    "layer_norm": ("layer_norm", (f32(40, 30), f32(30), f32(30), float), {"rows": 1}),
}


def text_of(name: str) -> str:
    """Graph, kernels and sources of a case, one after the other."""
    op, types, attributes = CASES[name]
    graph = one_op(OPS[op], types, attributes)
    graph.verify()
    parts = [str(graph)]
    for bound in lower(graph, results(graph, None)).kernels:
        parts.append(f"{bound.kernel}\n  over {bound.extent} in chunks of {bound.grain}")
        parts.append(render(bound.kernel, AVX512).text)
    return "\n\n".join(parts) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_text(name: str, request: pytest.FixtureRequest) -> None:
    path = GOLDEN / f"{name}.txt"
    made = text_of(name)
    if request.config.getoption("--update"):
        path.write_text(made)
    assert path.exists(), f"{path} is missing; run pytest tests/text --update and review it"
    assert made == path.read_text(), f"{name} changed; run pytest tests/text --update and review it"


def test_equal_kernels_of_other_sizes_are_one_text() -> None:
    """Kernels are generic in sizes, so a cache by text serves all of them."""

    def source(rows: int, columns: int) -> str:
        graph = one_op(OPS["sum"], (f32(rows, columns),), {"dims": (1,), "keepdim": False})
        (bound,) = lower(graph, results(graph, None)).kernels
        return render(bound.kernel, AVX512).text

    assert source(40, 30) == source(17, 300)
