"""The transpose statement, and vector loops whose vectors are no power of two."""

from __future__ import annotations

import numpy as np
import pytest

import flame
from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.types import TensorType, tensor_type
from flame.kernel.builder import KernelBuilder, Lowering
from flame.kernel.program import Matrix
from flame.kernel.values import const
from flame.ops.op import NOT_DIFFERENTIABLE, Op, Types

pytestmark = pytest.mark.unit


def _infer(types: Types) -> TensorType:
    (x,) = types
    assert isinstance(x, TensorType)
    return tensor_type(x.dtype, x.shape[::-1])


def _lower(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    (x,), (out,) = types, outputs
    assert isinstance(x, TensorType)
    k = KernelBuilder("turn")
    source, target = k.tensor("input", 0, x), k.tensor("output", 0, out)
    with k.parallel(1):
        k.transpose(
            k.size(x.shape[0]),
            k.size(x.shape[1]),
            Matrix(source.buffer, const(0), source.strides[0]),
            Matrix(target.buffer, const(0), target.strides[0]),
        )
    return k.finish()


def _lower_triple(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    (x,), (out,) = types, outputs
    assert isinstance(x, TensorType)
    k = KernelBuilder("triple")
    source, target = k.tensor("input", 0, x), k.tensor("output", 0, out)
    with k.parallel(1), k.vector(k.size(x.shape[0] - 5), 3) as i:
        k.store(target, (i,), source[i])
    return k.finish()


def _unregistered(name: str, lower: object) -> Op:
    return Op(
        name,
        inputs=("x",),
        infer=_infer,
        lower=lower,  # type: ignore[arg-type]
        vjp=NOT_DIFFERENTIABLE,
        reference=np.transpose,
        register=False,
    )


@pytest.mark.parametrize("dtype", [dtypes.float32, dtypes.float64, dtypes.int32, dtypes.int64])
@pytest.mark.parametrize("shape", [(16, 16), (1, 1), (3, 40), (33, 7), (64, 48), (17, 31)])
def test_transposes(dtype: DType, shape: tuple[int, int]) -> None:
    x = np.arange(shape[0] * shape[1]).reshape(shape).astype(dtype.numpy)
    made = _unregistered("turn", _lower)(flame.from_numpy(x))
    np.testing.assert_array_equal(made.numpy(), x.T)


def test_vectors_of_three_registers_stop_at_the_extent() -> None:
    out = flame.from_numpy(np.full(64, -1.0))
    x = flame.from_numpy(np.arange(64.0))
    _unregistered("triple", _lower_triple).into((out,), x)
    np.testing.assert_array_equal(out.numpy(), [*range(59), *[-1.0] * 5])
