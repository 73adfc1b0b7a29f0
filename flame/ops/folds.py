"""Kernels that make one number of each row, in several passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flame.core.errors import DTypeError
from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const
from flame.ops.elementwise import compute_dtype
from flame.ops.extrema import _spread
from flame.ops.loops import broadcast_strides
from flame.ops.op import Types
from flame.ops.reductions import kept_shape
from flame.ops.rows import Index, RowLoops, rows_of, type_of

if TYPE_CHECKING:
    pass

# --- kernels over rows ----------------------------------------------------------------------------


def floating_result(
    name: str,
) -> Callable[..., TensorType]:
    def infer(types: Types, *, dims: tuple[int, ...], keepdim: bool, **rest: Any) -> TensorType:
        x = type_of(types[0])
        if x.dtype.kind != "f":
            raise DTypeError(
                f"{name} needs a floating tensor, got {x.dtype.name}; convert it first"
            )
        return tensor_type(x.dtype, kept_shape(x.shape, dims, keepdim), None, x.device)

    return infer


class Fold:
    """A kernel that makes one number of each row."""

    def __init__(
        self, name: str, types: Types, outputs: tuple[TensorType, ...], dims: tuple[int, ...],
        *, keepdim: bool,
    ) -> None:  # fmt: skip
        x, out = type_of(types[0]), outputs[0]
        spread = _spread(out, x.ndim, dims, keepdim=keepdim)
        self.k = KernelBuilder(name)
        self.compute = compute_dtype(x.dtype)
        self.rows = rows_of(x.shape, dims, [broadcast_strides(x, x.shape), spread])
        self.x: Operand = self.rows.operand(self.k, "input", 0, x.dtype, 0)
        self.out: Operand = self.rows.operand(self.k, "output", 0, out.dtype, 1)
        self.loops = RowLoops(self.k, self.rows)
        self.count = cast(self.k.size(self.rows.length), self.compute)

    def fold(self, row: Index, combine: str, start: float, term: Callable[[Value], Value]) -> Value:
        total = self.k.register(start, self.compute)
        with self.loops.each(row) as index:
            self.k.accumulate(total, combine, term(cast(self.x[index], self.compute)))
        return values.read(total)

    def finish(self, per_row: Callable[[Index], Value], passes: int) -> Lowering:
        with self.loops.each_row(passes=passes) as row:
            first = (*row, *(const(0) for _ in self.rows.row.sizes))
            self.k.store(self.out, first, per_row(row))
        return self.k.finish()
