"""Norms of the elements over dimensions.

Invariant: the gradient is 0 where a norm is 0, a subgradient as PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core.autocast import plain
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError, UnsupportedError
from flame.core.types import TensorType
from flame.kernel import values
from flame.kernel.builder import Lowering
from flame.kernel.values import Value, cast, const
from flame.ops.autocast import autocasts
from flame.ops.comparison import eq, where
from flame.ops.conversion import convert
from flame.ops.extrema import _amax, _amin
from flame.ops.folds import Fold, floating_result
from flame.ops.foreach import reduce_each
from flame.ops.joining import stack
from flame.ops.mathematics import abs as magnitude
from flame.ops.mathematics import sign
from flame.ops.op import Arg, Op, Sample, Types
from flame.ops.reductions import Reduction, dims_of, restore
from flame.ops.rows import Index

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["norm"]
METHODS = ("norm",)


def _length_gradient(g: Any, out: Any, x: Any, dims: tuple[int, ...], keepdim: bool) -> Any:
    g, out = restore(g, x.type, dims, keepdim), restore(out, x.type, dims, keepdim)
    nothing = eq(out, 0.0)
    return x * where(nothing, 0.0, g / where(nothing, 1.0, out))


def _same(dtype: DType) -> DType:
    return dtype


def _norm_samples() -> list[Sample]:
    cases = [((5, 7), (1,), False), ((5, 7), (0,), True), ((2, 3, 4), (0, 2), False),
             ((), (), False), ((3, 70), (0, 1), False), ((0, 3), (1,), False),
             ((0, 3), (0,), False)]  # fmt: skip
    return [
        Sample((Arg(shape, avoid=(0.0,)),), {"dims": dims, "keepdim": keepdim})
        for shape, dims, keepdim in cases
    ]


_length = Reduction(
    "vector_length", "add", result=_same, prepare=lambda v: v * v,
    finish=lambda total, count: values.unary("sqrt", total), vjp=(_length_gradient,),
    reference=lambda x, axis, keepdims: np.sqrt(np.sum(x * x, axis=axis, keepdims=keepdims)),
    samples=_norm_samples(),
)  # fmt: skip

_sum_of_sizes = Reduction(
    "sum_of_magnitudes", "add", result=_same, prepare=lambda v: values.unary("abs", v),
    vjp=(lambda g, x, dims, keepdim: restore(g, x.type, dims, keepdim) * sign(x),),
    reference=lambda x, axis, keepdims: np.sum(np.abs(x), axis=axis, keepdims=keepdims),
    samples=_norm_samples(),
)  # fmt: skip


def _zeros(x: TensorType) -> Any:
    from flame.ops.creation import zeros

    return zeros(x.shape, dtype=x.dtype, device=x.device)


_count = Reduction(
    "count_norm", "add", result=_same,
    prepare=lambda v: cast(values.compare("ne", v, const(0, v.dtype)), v.dtype),
    vjp=(lambda g, x_type: _zeros(x_type),),
    reference=lambda x, axis, keepdims: np.sum(
        x != 0, axis=axis, keepdims=keepdims
    ).astype(x.dtype),
    samples=_norm_samples(),
)  # fmt: skip


def _lower_power_norm(
    types: Types, outputs: tuple[TensorType, ...], *, dims: tuple[int, ...], keepdim: bool
) -> Lowering:
    made = Fold("power_norm", types, outputs, dims, keepdim=keepdim)
    p = cast(made.k.number(1, float), made.compute)

    def per_row(row: Index) -> Value:
        total = made.fold(
            row, "add", 0.0, lambda v: values.binary("pow", values.unary("abs", v), p)
        )
        return values.binary("pow", total, const(1.0, made.compute) / p)

    return made.finish(per_row, passes=10)


def _power_gradient(
    g: Any, out: Any, x: Any, p: float, dims: tuple[int, ...], keepdim: bool
) -> Any:
    """sign(x) |x / norm|^(p - 1) g; 0 where the norm is 0, and at x = 0 for p below 2."""
    g, out = restore(g, x.type, dims, keepdim), restore(out, x.type, dims, keepdim)
    nothing = eq(out, 0.0)
    ratio = magnitude(x) / where(nothing, 1.0, out)
    if p < 2:
        still = eq(x, 0.0)
        powers = where(still, 0.0, where(still, 1.0, ratio) ** (p - 1))
    else:
        powers = ratio ** (p - 1)
    return sign(x) * powers * where(nothing, 0.0, g)


_power_norm = Op(
    "power_norm", inputs=("x", "p"), infer=floating_result("norm"), lower=_lower_power_norm,
    vjp=(_power_gradient, None),
    reference=lambda x, p, *, dims, keepdim: np.sum(
        np.abs(np.asarray(x, np.float64)) ** p, axis=dims, keepdims=keepdim
    ) ** (1 / p),
    samples=[Sample((Arg(s, avoid=(0.0,)), p), {"dims": d, "keepdim": k})
             for s, d, k, p in (((5, 7), (1,), False, 3.0), ((5, 7), (0,), True, 1.5),
                                ((2, 3, 4), (0, 2), False, 2.5), ((0, 3), (1,), False, 3.0))],
    tolerance=4.0,
)  # fmt: skip


@autocasts("float32")
def vector_norm(
    x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: DType | None = None
) -> Tensor:
    """The norm of the elements over ``dim`` (all by default): (sum |x|^ord)^(1/ord).

    ord inf and -inf: the largest and smallest magnitude; 0: the count of elements that are not 0.
    """
    if dtype is not None:
        return plain(vector_norm, convert(x, dtype=dtype), ord, dim, keepdim)
    if x.dtype.kind != "f":
        raise DTypeError(
            f"vector_norm needs a floating tensor, got {x.dtype.name}; pass dtype=flame.float32"
        )
    dims = dims_of("vector_norm", x, dim)
    options = {"dims": dims, "keepdim": bool(keepdim)}
    order = float(ord)
    result: Tensor
    if order == 2:
        result = _length(x, **options)
    elif order == 1:
        result = _sum_of_sizes(x, **options)
    elif order == 0:
        result = _count(x, **options)
    elif math.isinf(order):
        result = (_amax if order > 0 else _amin)(magnitude(x), **options)
    else:
        result = _power_norm(x, order, **options)
    return result


def norm_of_each(tensors: Sequence[Tensor], order: float) -> Tensor:
    """(len(tensors),): the norm of all elements of each; no gradient flows through it."""
    if order in (1.0, 2.0) and all(t.dtype.kind == "f" for t in tensors):
        op = _length if order == 2.0 else _sum_of_sizes
        return reduce_each(op, tensors, lambda t: vector_norm(t, order))
    return stack([vector_norm(t, order).to(tensors[0].device) for t in tensors])


def norm(
    input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: None = None,
    dtype: DType | None = None,
) -> Tensor:  # fmt: skip
    """The p-norm of the elements over ``dim`` (all by default); "fro" and None are p = 2."""
    if p == "nuc":
        raise UnsupportedError("norm: the nuclear norm needs singular values, which FLAME has not")
    if p is not None and not isinstance(p, (int, float)) and p != "fro":
        raise ArgumentError(f"norm: p must be a number or 'fro', got {p!r}")
    order = 2.0 if p in (None, "fro") else float(p)
    return vector_norm(input, order, dim, keepdim, dtype=dtype)
