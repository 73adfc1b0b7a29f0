"""Placing tensors into larger ones: embed (the inverse of a slice), cat, stack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core.types import Shape, TensorType, contiguous_strides, tensor_type
from flame.kernel.builder import KernelBuilder, Lowering
from flame.ops.elementwise import walk
from flame.ops.loops import broadcast_strides, coalesce
from flame.ops.op import Arg, Op, Sample, Types
from flame.ops.shapes import slice_dim

if TYPE_CHECKING:
    pass


def _infer_embed(types: Types, *, shape: Shape, dim: int, start: int, step: int) -> TensorType:
    x = types[0]
    assert isinstance(x, TensorType)
    return tensor_type(x.dtype, shape, None, x.device)


def _lower_embed(
    types: Types, outputs: tuple[TensorType, ...], *, shape: Shape, dim: int, start: int, step: int
) -> Lowering:
    """Zeros first, then the part: two kernels."""
    (x,), (out,) = types, outputs
    assert isinstance(x, TensorType)
    zero = KernelBuilder("zero")
    flat = tensor_type(out.dtype, (out.numel,))
    target = zero.tensor("output", 0, flat)
    walk(zero, coalesce(flat.shape, [flat.strides]),
         lambda index: zero.store(target, index, _zero(out)), light=True)  # fmt: skip
    k = KernelBuilder("place")
    strides = list(contiguous_strides(shape))
    offset = start * strides[dim]
    strides[dim] *= step
    nest = coalesce(x.shape, [broadcast_strides(x, x.shape), tuple(strides)])
    source = k.tensor("input", 0, tensor_type(x.dtype, nest.sizes, nest.strides[0]))
    part = k.tensor("output", 0, tensor_type(x.dtype, nest.sizes, nest.strides[1]))
    first = k.size(offset)
    shifted = _Shifted(part, first)
    walk(k, nest, lambda index: k.store(shifted, index, source[index]), light=True)
    return Lowering((zero.bind(), k.bind()))


def _zero(out: TensorType) -> Any:
    from flame.kernel.values import const

    return const(0, out.dtype)


class _Shifted:
    """An operand whose first element is further on."""

    def __init__(self, operand: Any, offset: Any) -> None:
        self.operand, self.offset = operand, offset
        self.buffer, self.dtype = operand.buffer, operand.dtype

    def at(self, index: Any) -> Any:
        return self.operand.at(index) + self.offset


def _embed_reference(x: Any, *, shape: Shape, dim: int, start: int, step: int) -> Any:
    out = np.zeros(shape, x.dtype)
    stop = start + step * x.shape[dim]
    out[(slice(None),) * dim + (slice(start, stop, step),)] = x
    return out


embed = Op(
    "embed", inputs=("x",), infer=_infer_embed, lower=_lower_embed,
    vjp=(
        lambda g, x_type, dim, start, step: slice_dim(
            g, dim, start, start + step * (x_type.shape[dim] - 1) + 1, step
        ),
    ),
    reference=_embed_reference,
    samples=[Sample((Arg((2, 3)),), {"shape": (5, 3), "dim": 0, "start": 1, "step": 2}),
             Sample((Arg((2, 2)),), {"shape": (2, 4), "dim": 1, "start": 2, "step": 1})],
)  # fmt: skip
