"""Softmax and its kin over one dimension, as fused row kernels.

Invariant: exponentials are taken of differences to the row's maximum, so nothing overflows; a row
of -inf alone gives NaN, as its softmax has no value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core import dtypes
from flame.core.autocast import plain
from flame.core.dtypes import DType
from flame.core.errors import DTypeError
from flame.core.types import TensorType, like_strides, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast
from flame.ops.arithmetic import mul, neg
from flame.ops.conversion import convert
from flame.ops.elementwise import compute_dtype
from flame.ops.loops import broadcast_strides
from flame.ops.op import Arg, Op, Sample, Types
from flame.ops.reductions import sum as sum_of
from flame.ops.rows import Index, RowLoops, rows_of, type_of
from flame.ops.shapes import wrap_dim

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["log_softmax", "softmax"]
METHODS = ("softmax", "log_softmax")


def _infer(name: str) -> Callable[..., TensorType]:
    def infer(types: Types, *, dim: int) -> TensorType:
        x = type_of(types[0])
        if x.dtype.kind != "f":
            raise DTypeError(
                f"{name} needs a floating tensor, got {x.dtype.name}; pass dtype=flame.float32"
            )
        return tensor_type(x.dtype, x.shape, like_strides(x.shape, x), x.device)

    return infer


class RowKernel:
    """A kernel over the rows along ``dim`` of equally shaped operands, outputs last."""

    def __init__(self, name: str, types: Types, outputs: tuple[TensorType, ...], dim: int) -> None:
        self.k = KernelBuilder(name)
        inputs = [type_of(t) for t in types]
        out = outputs[0]
        self.compute = compute_dtype(out.dtype)
        every = [*inputs, *outputs]
        dims = (dim,) if out.ndim else ()
        self.rows = rows_of(out.shape, dims, [broadcast_strides(t, out.shape) for t in every])
        self.inputs = [
            self.rows.operand(self.k, "input", i, t.dtype, i) for i, t in enumerate(inputs)
        ]
        self.outputs = [
            self.rows.operand(self.k, "output", i, t.dtype, len(inputs) + i)
            for i, t in enumerate(outputs)
        ]
        self.loops = RowLoops(self.k, self.rows)

    def load(self, operand: Operand, index: Index) -> Value:
        return cast(operand[index], self.compute)

    def zero(self, number: float = 0.0) -> Any:
        return self.k.register(number, self.compute)

    def peak(self, operand: Operand, row: Index) -> Value:
        """The row's maximum; NaN where it holds one."""
        k = self.k
        found = self.zero(float("-inf"))
        with self.loops.each(row) as index:
            k.accumulate(found, "max", self.load(operand, index))
        return values.read(found)


def _lower_softmax(types: Types, outputs: tuple[TensorType, ...], *, dim: int) -> Lowering:
    kernel = RowKernel("softmax", types, outputs, dim)
    k, loops, (x,), (out,) = kernel.k, kernel.loops, kernel.inputs, kernel.outputs
    exact = out.dtype is kernel.compute  # the exponentials fit into the output meanwhile
    with loops.each_row(passes=8) as row:
        peak = kernel.peak(x, row)
        total = kernel.zero()
        with loops.each(row) as index:
            power = values.unary("exp", kernel.load(x, index) - peak)
            if exact:
                k.store(out, index, power)
            k.accumulate(total, "add", power)
        factor = values.const(1.0, kernel.compute) / values.read(total)
        with loops.each(row) as index:
            power = out[index] if exact else values.unary("exp", kernel.load(x, index) - peak)
            k.store(out, index, power * factor)
    return k.finish()


def _lower_log_softmax(types: Types, outputs: tuple[TensorType, ...], *, dim: int) -> Lowering:
    kernel = RowKernel("log_softmax", types, outputs, dim)
    k, loops, (x,), (out,) = kernel.k, kernel.loops, kernel.inputs, kernel.outputs
    with loops.each_row(passes=6) as row:
        peak = kernel.peak(x, row)
        total = kernel.zero()
        with loops.each(row) as index:
            k.accumulate(total, "add", values.unary("exp", kernel.load(x, index) - peak))
        shift = values.unary("log", values.read(total))
        with loops.each(row) as index:
            k.store(out, index, (kernel.load(x, index) - peak) - shift)
    return k.finish()


def _lower_softmax_backward(types: Types, outputs: tuple[TensorType, ...], *, dim: int) -> Lowering:
    kernel = RowKernel("softmax_backward", types, outputs, dim)
    k, loops, (g, y), (out,) = kernel.k, kernel.loops, kernel.inputs, kernel.outputs
    with loops.each_row(passes=2) as row:
        total = kernel.zero()
        with loops.each(row) as index:
            k.accumulate(total, "add", kernel.load(g, index) * kernel.load(y, index))
        dot = values.read(total)
        with loops.each(row) as index:
            k.store(out, index, kernel.load(y, index) * (kernel.load(g, index) - dot))
    return k.finish()


def _lower_log_softmax_backward(
    types: Types, outputs: tuple[TensorType, ...], *, dim: int
) -> Lowering:
    kernel = RowKernel("log_softmax_backward", types, outputs, dim)
    k, loops, (g, y), (out,) = kernel.k, kernel.loops, kernel.inputs, kernel.outputs
    with loops.each_row(passes=4) as row:
        total = kernel.zero()
        with loops.each(row) as index:
            k.accumulate(total, "add", kernel.load(g, index))
        gone = values.read(total)
        with loops.each(row) as index:
            power = values.unary("exp", kernel.load(y, index))
            k.store(out, index, kernel.load(g, index) - power * gone)
    return k.finish()


def _reference_softmax(x: Any, *, dim: int) -> Any:
    if x.size == 0:
        return x.copy()
    e = np.exp(x - x.max(axis=dim, keepdims=True)) if x.ndim else np.ones_like(x)
    return e / e.sum(axis=dim, keepdims=True) if x.ndim else e


def _reference_log_softmax(x: Any, *, dim: int) -> Any:
    if x.size == 0 or not x.ndim:
        return np.zeros_like(x)
    shifted = x - x.max(axis=dim, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=dim, keepdims=True))


def _axis(x: Any, dim: int) -> Any:
    return dim if x.ndim else None


def _reference_softmax_backward(g: Any, y: Any, *, dim: int) -> Any:
    return y * (g - (g * y).sum(axis=_axis(g, dim), keepdims=True))


def _reference_log_softmax_backward(g: Any, y: Any, *, dim: int) -> Any:
    return g - np.exp(y) * g.sum(axis=_axis(g, dim), keepdims=True)


def _samples(count: int) -> list[Sample]:
    shapes = [((5, 7), 1), ((5, 7), 0), ((2, 3, 19), 2), ((2, 5, 70), 1), ((), 0), ((0, 3), 1),
              ((3, 0), 1), ((4, 1), 1), ((2, 3, 4, 5), 1)]  # fmt: skip
    return [Sample((Arg(shape),) * count, {"dim": dim}) for shape, dim in shapes]


def _exp(x: Tensor) -> Tensor:
    from flame.ops.mathematics import exp

    result: Tensor = exp(x)
    return result


softmax_backward: Op = Op(
    "softmax_backward", inputs=("grad", "y"), infer=_infer("softmax_backward"),
    lower=_lower_softmax_backward,
    vjp=(
        lambda g, y, dim: softmax_backward(g, y, dim=dim),
        lambda g, grad, y, dim: (
            g * (grad - sum_of(mul(grad, y), dim, keepdim=True))
            - grad * sum_of(mul(g, y), dim, keepdim=True)
        ),
    ),
    reference=_reference_softmax_backward, samples=_samples(2), widens=True,
)  # fmt: skip

log_softmax_backward: Op = Op(
    "log_softmax_backward", inputs=("grad", "y"), infer=_infer("log_softmax_backward"),
    lower=_lower_log_softmax_backward,
    vjp=(
        lambda g, y, dim: g - sum_of(g * _exp(y), dim, keepdim=True),
        lambda g, grad, y, dim: neg(g * _exp(y)) * sum_of(grad, dim, keepdim=True),
    ),
    reference=_reference_log_softmax_backward, samples=_samples(2), widens=True,
)  # fmt: skip

softmax_op = Op(
    "softmax", inputs=("x",), infer=_infer("softmax"), lower=_lower_softmax,
    vjp=(lambda g, out, dim: softmax_backward(g, out, dim=dim),),
    reference=_reference_softmax, samples=_samples(1), autocast="float32", widens=True,
)  # fmt: skip

log_softmax_op = Op(
    "log_softmax", inputs=("x",), infer=_infer("log_softmax"), lower=_lower_log_softmax,
    vjp=(lambda g, out, dim: log_softmax_backward(g, out, dim=dim),),
    reference=_reference_log_softmax, samples=_samples(1), autocast="float32", widens=True,
)  # fmt: skip


def _dimension(name: str, input: Tensor, dim: int | None) -> int:
    if dim is None:  # the choice that PyTorch makes where none is named
        dim = 0 if input.ndim in (0, 1, 3) else 1
    return wrap_dim(name, dim, input.ndim)


def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: DType | None = None
) -> Tensor:
    """exp(input) / sum(exp(input)) over ``dim``; ``dtype`` converts the input first.

    The result has the input's shape and sums to 1 along ``dim``. Raises DTypeError for integers.
    """
    wanted = _wanted_dtype(_stacklevel, dtype)
    if wanted is not None:
        return plain(softmax, convert(input, dtype=wanted), dim)
    result: Tensor = softmax_op(input, dim=_dimension("softmax", input, dim))
    return result


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: DType | None = None
) -> Tensor:
    """log(softmax(input)) over ``dim``, computed without overflow or cancellation."""
    wanted = _wanted_dtype(_stacklevel, dtype)
    if wanted is not None:
        return plain(log_softmax, convert(input, dtype=wanted), dim)
    result: Tensor = log_softmax_op(input, dim=_dimension("log_softmax", input, dim))
    return result


def softmin(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: DType | None = None
) -> Tensor:
    """softmax(-input) over ``dim``."""
    return softmax(neg(input), dim, _stacklevel, dtype)


def _wanted_dtype(third: Any, dtype: DType | None) -> DType | None:
    """torch.softmax has dtype as its third argument, torch.nn.functional.softmax as its fourth."""
    return third if isinstance(third, dtypes.DType) else dtype
