"""Puts the phases of a strided input gradient together.

Each phase stands on its own in memory; a result is taken from the phase that its position belongs
to.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flame.core import dtypes
from flame.core.types import Shape, TensorType, contiguous_strides, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder
from flame.kernel.values import Value, cast, const
from flame.ops.convolution.geometry import SPATIAL, Contraction


class Phases:
    """Memory for the phases: (phases of D, of H, of W, N, C, results of a phase in D, H, W)."""

    def __init__(self, c: Contraction, out: TensorType, dtype: dtypes.DType) -> None:
        axes = [sorted({p.axes[i].place for p in c.phases}) for i in range(SPATIAL)]
        extent = c.phases[0].extent
        self.places = axes
        self.type = tensor_type(dtype, (*(len(a) for a in axes), *out.shape[:2], *extent))
        self.out = out
        self.spreads = [c.phases[0].axes[i].spread for i in range(SPATIAL)]

    def base(self, places: Shape) -> int:
        """The first element of a phase."""
        found = zip(self.places, places, self.type.strides, strict=False)
        return sum(axis.index(place) * stride for axis, place, stride in found)

    def phase_type(self) -> TensorType:
        return tensor_type(
            self.type.dtype, self.type.shape[3:], contiguous_strides(self.type.shape[3:])
        )

    def tables(self) -> list[tuple[Any, Any]]:
        """For each dimension and position: its offset, and whether any phase has it."""
        found = []
        for i in range(SPATIAL):
            at = np.arange(self.out.shape[2 + i])
            offset, there = np.zeros(len(at), np.int64), np.zeros(len(at), np.int32)
            for number, place in enumerate(self.places[i]):
                mine = at % self.spreads[i] == place
                offset[mine] = number * self.type.strides[i]
                offset[mine] += at[mine] // self.spreads[i] * self.type.strides[5 + i]
                there[mine] = 1
            found.append((offset, there))
        return found


def interleave(
    phases: Phases, temporary: int, bias: TensorType | None
) -> tuple[BoundKernel, tuple[Any, ...]]:
    """The kernel and its tables; results that no phase has are the bias, or 0."""
    out = phases.out
    k = KernelBuilder("interleave")
    source = k.tensor("temporary", temporary, phases.type)
    other = None if bias is None else k.tensor("input", 2, bias)
    target = k.tensor("output", 0, out)
    constants: list[Any] = []
    tables = []
    for pair in phases.tables():
        made = []
        for array, dtype in zip(pair, (dtypes.int64, dtypes.int32), strict=True):
            made.append(k.tensor("constant", len(constants), tensor_type(dtype, array.shape)))
            constants.append(array)
        tables.append(made)
    dtype = phases.type.dtype
    by_channel = out.strides[1] == 1 and out.shape[1] > 1

    def move(index: tuple[Value, ...]) -> None:
        n, c, *place = index
        at = source.at((const(0), const(0), const(0), n, c, const(0), const(0), const(0)))
        inside = const(True, dtypes.bool_)
        for (offsets, there), position in zip(tables, place, strict=True):
            at = at + offsets[position]
            inside = inside & (there[position] > 0)
        missing = const(0, dtype) if other is None else cast(other[c], dtype)
        value = values.load(source.buffer, at, inside, missing)
        k.store(target, index, value)

    n, c, d, h, w = out.shape
    if by_channel:
        with k.parallel(n, d, h, w, work=c) as (i, a, b, e), k.vector(k.size(c)) as v:
            move((i, v, a, b, e))
    else:
        with k.parallel(n, c, d, h, work=w) as (i, j, a, b), k.vector(k.size(w)) as v:
            move((i, j, a, b, v))
    return k.bind(), tuple(constants)
