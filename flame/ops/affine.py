"""linear: a product and a bias in one kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core.errors import DTypeError, ShapeError
from flame.core.types import TensorType, tensor_type
from flame.kernel.builder import BoundKernel, Lowering, Ref
from flame.ops.arithmetic import add
from flame.ops.autocast import autocasts
from flame.ops.contraction import BiasStore, Epilogue, Factor, PlainStore, Prologue, contract
from flame.ops.contraction.library import matrix_readable, product_call, taken, turned
from flame.ops.elementwise import Elementwise
from flame.ops.op import NOT_DIFFERENTIABLE, OPS, Arg, Op, Sample, Types
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


# --- products with an activation, for the compiler ------------------------------------------------


def _infer_linear_gelu(types: Types) -> tuple[TensorType, TensorType]:
    made = _infer_linear(types)
    return made, made


def _lower_linear_gelu(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    before = _lower_linear(types, outputs[1:])
    kernels = [k.over({Ref("output", 0): Ref("output", 1)}) for k in before.kernels]
    return replace(before, kernels=(*kernels, *_activated(outputs)))


def _activated(outputs: tuple[TensorType, ...]) -> list[BoundKernel]:
    """gelu of output 1 into output 0."""
    made = OPS["gelu_tanh"].lower((outputs[1],), outputs[:1])
    places = {Ref("input", 0): Ref("output", 1), Ref("output", 0): Ref("output", 0)}
    return [k.over(places) for k in made.kernels]


def _lower_linear_gelu_cuda(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    x, weight = type_of(types[0]), turned(type_of(types[1]))
    y, z = outputs
    inputs = (Ref("input", 0), Ref("input", 1))
    if y.strides == z.strides:
        operands = (*inputs, Ref("output", 0), Ref("input", 2), Ref("output", 1))
        made = product_call(x, weight, y, operands, epilogue="gelu_aux_bias")
        if taken(made, y):
            return made
    plain = product_call(
        x, weight, z, (*inputs, Ref("output", 1), Ref("input", 2)), epilogue="bias"
    )
    return replace(plain, calls=(*plain.calls, *_activated(outputs)))


linear_gelu = Op(
    "linear_gelu", inputs=("x", "weight", "bias"), infer=_infer_linear_gelu,
    lower=_lower_linear_gelu, lower_cuda=_lower_linear_gelu_cuda, vjp=NOT_DIFFERENTIABLE,
    reads=_reads, flops=_linear.flops, tolerance=4.0, samples=_linear.samples,
    reference=lambda x, weight, bias: _reference_gelu(x @ weight.T + bias),
)  # fmt: skip


def _reference_gelu(z: Any) -> tuple[Any, Any]:
    return OPS["gelu_tanh"].reference(z), z


def _double(*shape: int) -> Arg:
    return Arg(shape, kind="double")


def _infer_gelu_product(types: Types) -> TensorType:
    g, weight, z = (type_of(t) for t in types)
    if not g.dtype is weight.dtype is z.dtype or g.dtype.kind != "f":
        raise DTypeError(f"matmul_gelu_backward: operands {g}, {weight} and {z} differ in dtype")
    if g.shape[-1] != weight.shape[0] or z.shape != (g.shape[0], weight.shape[1]):
        raise ShapeError(f"matmul_gelu_backward: shapes of {g}, {weight} and {z} do not fit")
    return tensor_type(z.dtype, z.shape, None, z.device)


def _slope(out: TensorType, z: TensorType) -> list[BoundKernel]:
    """The product in output 0 times the derivative of gelu at z, in place."""
    gelu = OPS["gelu_tanh"]
    assert isinstance(gelu, Elementwise)
    made = gelu.backward((True,), (z,)).lower((out, z), (out,))
    places = {Ref("input", 0): Ref("output", 0), Ref("input", 1): Ref("input", 2)}
    return [k.over(places) for k in made.kernels]


def _lower_gelu_product(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    before = OPS["matmul"].lower(types[:2], outputs)
    return replace(before, kernels=(*before.kernels, *_slope(outputs[0], type_of(types[2]))))


def _lower_gelu_product_cuda(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    g, weight, z = (type_of(t) for t in types)
    (out,) = outputs
    operands = (Ref("input", 0), Ref("input", 1), Ref("output", 0))
    if z.strides == out.strides:
        made = product_call(g, weight, out, (*operands, Ref("input", 2)), epilogue="dgelu")
        if taken(made, out):
            return made
    plain = product_call(g, weight, out, operands)
    return replace(plain, calls=(*plain.calls, *_slope(out, z)))


matmul_gelu_backward = Op(
    "matmul_gelu_backward", inputs=("g", "weight", "z"), infer=_infer_gelu_product,
    lower=_lower_gelu_product, lower_cuda=_lower_gelu_product_cuda, vjp=NOT_DIFFERENTIABLE,
    reads=_reads, tolerance=4.0,
    flops=lambda types, outputs: 2 * outputs[0].numel * type_of(types[0]).shape[-1],
    reference=lambda g, weight, z: _reference_slope(g @ weight, z),
    samples=[
        Sample((_double(5, 4), _double(4, 3), _double(5, 3))),
        Sample((_double(2, 40), _double(40, 70), _double(2, 70))),
    ],
)  # fmt: skip


def _reference_slope(product: Any, z: Any) -> Any:
    wide = z.astype(np.float64)
    scale, cube = math.sqrt(2 / math.pi), 0.044715
    t = np.tanh(scale * (wide + cube * wide**3))
    slope = 0.5 * (1 + t) + 0.5 * wide * (1 - t * t) * scale * (1 + 3 * cube * wide**2)
    return (product * slope).astype(z.dtype)


# --- for users ----------------------------------------------------------------------------------


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
