"""overwrite: a tensor with a strided part of its memory replaced; what writing into a view means.

Invariant: it starts as a copy of the whole, which is left out where it runs in place on it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flame.core.errors import ShapeError
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering
from flame.kernel.values import Value, cast
from flame.ops.elementwise import nest_of, walk
from flame.ops.joining import Shifted
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Op, Sample, Types
from flame.ops.rows import type_of

__all__: list[str] = []


def _infer(types: Types, *, strides: Shape, offset: int) -> TensorType:
    whole, part = type_of(types[0]), type_of(types[1])
    if len(strides) != part.ndim:
        raise ShapeError(f"overwrite: {len(strides)} strides for a part of shape {part.shape}")
    return whole


def _copy(name: str, source: tuple[int, TensorType], target: TensorType) -> BoundKernel:
    """Element by element from an input into (a part of) the output."""
    position, type_ = source
    nest = nest_of((type_,), (target,))
    k = KernelBuilder(name)
    x = k.tensor("input", position, tensor_type(type_.dtype, nest.sizes, nest.strides[0]))
    out = k.tensor("output", 0, tensor_type(target.dtype, nest.sizes, nest.strides[1]))

    def body(index: tuple[Value, ...]) -> None:
        k.store(out, index, cast(x[index], target.dtype))

    walk(k, nest, body, light=True, device=target.device)
    return k.bind()


def _lower(
    types: Types, outputs: tuple[TensorType, ...], *, strides: Shape, offset: int
) -> Lowering:
    whole, part, (out,) = type_of(types[0]), type_of(types[1]), outputs
    first = _copy("copy", (0, whole), out)
    if not part.numel:
        return Lowering((first,))
    nest = nest_of((part,), (tensor_type(out.dtype, part.shape, strides),))
    k = KernelBuilder("overwrite")
    x = k.tensor("input", 1, tensor_type(part.dtype, nest.sizes, nest.strides[0]))
    place = k.tensor("output", 0, tensor_type(out.dtype, nest.sizes, nest.strides[1]))
    target = Shifted(place, k.size(offset))

    def body(index: tuple[Value, ...]) -> None:
        k.store(target, index, cast(x[index], out.dtype))

    walk(k, nest, body, light=True, device=out.device)
    return Lowering((first, k.bind()))


def _reference(whole: Any, part: Any, *, strides: Shape, offset: int) -> Any:
    """As in row-major memory."""
    made = np.array(whole, order="C")
    flat = made.reshape(-1)
    index = np.full(part.shape, offset)
    for axis, step in enumerate(strides):
        shape = [1] * part.ndim
        shape[axis] = part.shape[axis]
        index = index + (np.arange(part.shape[axis]) * step).reshape(shape)
    flat[index] = part
    return made


overwrite = Op(
    "overwrite", inputs=("whole", "part"), infer=_infer, lower=_lower, vjp=NOT_DIFFERENTIABLE,
    reference=_reference, updates=True, of_memory=True,
    samples=[
        Sample((Arg((4, 6), contiguous=True), Arg((2, 3))), {"strides": (6, 2), "offset": 1}),
        Sample((Arg((7,), contiguous=True), Arg(())), {"strides": (), "offset": 3}),
        Sample((Arg((5, 2), contiguous=True), Arg((0,))), {"strides": (1,), "offset": 0}),
    ],
)  # fmt: skip
