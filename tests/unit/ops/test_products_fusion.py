"""What other kernels may put in front of and behind a product."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
import flame.nn.functional as F
from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const
from flame.ops.op import NOT_DIFFERENTIABLE, OPS, Op

rng = np.random.default_rng(0)


class ReluAndResidual:
    """out = bfloat16(max(sum, 0) + residual + row / 8)."""

    def __init__(self, residual: TensorType, out: TensorType, *, repeatable: bool) -> None:
        self.types, self.repeatable = (residual, out), repeatable
        self.residual: Operand
        self.out: Operand

    def declare(self, k: KernelBuilder) -> None:
        self.residual = k.tensor("input", 2, self.types[0])
        self.out = k.tensor("output", 0, self.types[1])

    def store(self, k: KernelBuilder, index: tuple[Value, ...], value: Value) -> None:
        value = values.binary("max", value, const(0, value.dtype)) + self.residual[index]
        k.store(self.out, index, value + cast(index[-2], value.dtype) * 0.125)


class Doubled:
    """A factor of twice what memory holds."""

    def __init__(self, position: int, type_: TensorType) -> None:
        self.position, self.type = position, type_
        self.source: Operand

    def declare(self, k: KernelBuilder) -> None:
        self.source = k.tensor("input", self.position, self.type)

    def load(self, k: KernelBuilder, index: tuple[Value, ...]) -> Value:
        return self.source[index] * 2.0


def fused(*, repeatable: bool, doubled: tuple[int, ...] = ()) -> Op:
    """relu(a @ b) + residual + row / 8, where some factors are doubled first."""

    def infer(types: tuple[Any, ...]) -> TensorType:
        return tensor_type(flame.bfloat16, types[2].shape)

    def lower(types: tuple[Any, ...], outputs: tuple[TensorType, ...]) -> Lowering:
        lowering = OPS["matmul"].lower_fused
        assert lowering is not None
        epilogue = ReluAndResidual(types[2], outputs[0], repeatable=repeatable)
        prologues = {i: Doubled(i, types[i]) for i in doubled}
        sums = tensor_type(flame.float32, types[2].shape)
        made: Lowering = lowering(types[:2], (sums,), epilogue, prologues)
        return made

    return Op(
        "fused", inputs=("a", "b", "residual"), infer=infer, lower=lower,
        vjp=NOT_DIFFERENTIABLE, reference=np.matmul, register=False,
    )  # fmt: skip


SHAPES = [
    ((5, 9), (9, 7)),
    ((33, 32), (32, 65)),
    ((90, 70), (70, 130)),
    ((45, 600), (600, 100)),
    ((2, 300), (300, 70)),
    ((70, 300), (300, 1)),
    ((1, 200_000), (200_000, 1)),
    ((3, 40, 50), (50, 36)),
    ((3, 40, 50), (3, 50, 36)),
    ((4, 0), (0, 5)),
]


@pytest.mark.parametrize("doubled", [(), (0, 1)])
@pytest.mark.parametrize("repeatable", [True, False])
@pytest.mark.parametrize("turned", [(), (0,), (1,)])
@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_epilogue_and_prologue(
    a: tuple[int, ...], b: tuple[int, ...], turned: tuple[int, ...], repeatable: bool,
    doubled: tuple[int, ...],
) -> None:  # fmt: skip
    arrays, tensors = [], []
    for i, shape in enumerate((a, b)):
        x = rng.standard_normal(shape).astype(np.float32)
        arrays.append(x * 2 if i in doubled else x)
        t = flame.tensor(np.ascontiguousarray(x.swapaxes(-1, -2)) if i in turned else x)
        tensors.append(t.transpose(-1, -2) if i in turned else t)
    exact = arrays[0].astype(np.float64) @ arrays[1].astype(np.float64)
    residual = rng.standard_normal(exact.shape).astype(np.float32)
    rows = np.arange(exact.shape[-2])[:, None] / 8
    expected = np.maximum(exact, 0) + residual + rows
    made = fused(repeatable=repeatable, doubled=doubled)(*tensors, flame.tensor(residual))
    assert made.dtype is flame.bfloat16
    np.testing.assert_allclose(made.to(flame.float32).numpy(), expected, rtol=8e-3, atol=2e-2)


@pytest.mark.parametrize("dtype", [flame.float32, flame.float64, flame.bfloat16, flame.float16])
@pytest.mark.parametrize("shape", [(6, 40), (2, 5, 40), (300, 40), (1, 40)])
def test_linear(shape: tuple[int, ...], dtype: flame.DType) -> None:
    x, weight, bias = (
        flame.tensor(rng.standard_normal(s), dtype=dtype) for s in (shape, (70, 40), (70,))
    )
    exact = [t.to(flame.float64).numpy() for t in (x, weight, bias)]
    made = F.linear(x, weight, bias).to(flame.float64).numpy()
    tolerance = {"float32": 1e-5, "float64": 1e-13}.get(dtype.name, 4e-2)
    np.testing.assert_allclose(made, exact[0] @ exact[1].T + exact[2], tolerance, 10 * tolerance)
