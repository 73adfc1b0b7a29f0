"""linear: a product and a bias in one kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flame.core.errors import DTypeError, ShapeError
from flame.core.types import TensorType, tensor_type
from flame.kernel.builder import Lowering, Ref
from flame.ops.arithmetic import add
from flame.ops.autocast import autocasts
from flame.ops.contraction import BiasStore, Epilogue, Factor, PlainStore, Prologue, contract
from flame.ops.contraction.library import matrix_readable, product_call, turned
from flame.ops.op import Arg, Op, Sample, Types
from flame.ops.products import matmul
from flame.ops.reductions import sum_to
from flame.ops.rows import type_of
from flame.ops.shapes import reshape, transpose

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__: list[str] = []


def _infer_linear(types: Types) -> TensorType:
    x, weight, bias = types
    assert isinstance(x, TensorType)
    assert isinstance(weight, TensorType)
    assert isinstance(bias, TensorType)
    if not x.dtype is weight.dtype is bias.dtype or x.dtype.kind != "f":
        raise DTypeError(
            f"linear: operands are {x.dtype.name}, {weight.dtype.name} and {bias.dtype.name}; "
            "all must be of one floating dtype"
        )
    if bias.shape != weight.shape[:1] or x.shape[-1] != weight.shape[-1]:
        raise ShapeError(
            f"linear: input {x.shape}, weight {weight.shape} and bias {bias.shape} do not fit; "
            "they must be (..., in), (out, in) and (out,)"
        )
    return tensor_type(x.dtype, (x.shape[0], weight.shape[0]), None, x.device)


def _lower_linear(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    return _lower_fused(types, outputs, PlainStore(outputs[0]))


def _lower_cuda(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    x, weight = type_of(types[0]), turned(type_of(types[1]))
    operands = (Ref("input", 0), Ref("input", 1), Ref("output", 0), Ref("input", 2))
    return product_call(x, weight, outputs[0], operands, epilogue="bias")


def _reads(type_: TensorType) -> bool:
    bias = type_.ndim != 1 or type_.device == "cpu" or type_.contiguous
    return bias and matrix_readable(type_)


def _lower_fused(
    types: Types,
    outputs: tuple[TensorType, ...],
    epilogue: Epilogue,
    prologues: Mapping[int, Prologue] | None = None,
) -> Lowering:
    """Kernels that hand x @ weight.T + bias to an epilogue."""
    x, weight, bias = types
    assert isinstance(x, TensorType)
    assert isinstance(weight, TensorType)
    assert isinstance(bias, TensorType)
    given = prologues or {}
    left = Factor(Ref("input", 0), x, -2, given.get(0))
    right = Factor(Ref("input", 1), weight, -2, given.get(1)).turned()
    biased = BiasStore(bias, Ref("input", 2), epilogue)
    return contract(left, right, outputs[0].shape, biased)


_linear = Op(
    "linear",
    inputs=("x", "weight", "bias"),
    infer=_infer_linear,
    lower=_lower_linear,
    vjp=(
        lambda g, weight: matmul(g, weight),
        lambda g, x: matmul(transpose(g, 0, 1), x),
        lambda g, bias_type: sum_to(g, bias_type.shape),
    ),
    flops=lambda types, outputs: 2 * outputs[0].numel * type_of(types[0]).shape[-1],
    reference=lambda x, weight, bias: x @ weight.T + bias,
    samples=[
        Sample((Arg((5, 4), kind="double"), Arg((3, 4), kind="double"), Arg((3,), kind="double"))),
        Sample(
            (Arg((2, 40), kind="double"), Arg((70, 40), kind="double"), Arg((70,), kind="double"))
        ),
        Sample((Arg((0, 4), kind="double"), Arg((3, 4), kind="double"), Arg((3,), kind="double"))),
    ],
    tolerance=4.0,
    lower_fused=_lower_fused,
    lower_cuda=_lower_cuda,
    reads=_reads,
)


@autocasts("lower")
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input @ weight.T + bias; input (..., in), weight (out, in) or (in,), bias (out,) or scalar.

    Raises ShapeError naming both shapes where the sizes differ.
    """
    if input.ndim == 0 or input.shape[-1] != weight.shape[-1]:
        raise ShapeError(
            f"linear: input of shape {input.shape} needs a last dimension of {weight.shape[-1]}, "
            f"the last size of the weight {weight.shape}"
        )
    if weight.ndim == 1:
        made = matmul(input, weight)
    elif bias is not None and _fusable(input, weight, bias):
        rows = reshape(input, (-1, input.shape[-1])) if input.ndim != 2 else input
        made = _linear(rows, weight, bias)
        return made if input.ndim == 2 else reshape(made, (*input.shape[:-1], weight.shape[0]))
    else:
        made = matmul(input, transpose(weight, 0, 1))
    return made if bias is None else add(made, bias)


def _fusable(input: Tensor, weight: Tensor, bias: Tensor) -> bool:
    same = input.dtype is weight.dtype is bias.dtype and input.dtype.kind == "f"
    return same and bias.shape == weight.shape[:1] and input.numel() > 0 and weight.numel() > 0
