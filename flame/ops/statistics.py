"""Reductions with more than a fold: products, variances, log-sum-exp, counts.

Invariants: variances take two passes, so nothing cancels; gradients of products are exact at zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core import dtypes
from flame.core.autocast import plain
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError
from flame.core.types import TensorType
from flame.kernel import values
from flame.kernel.builder import Lowering
from flame.kernel.values import Value, cast, const
from flame.ops.arithmetic import true_divide
from flame.ops.autocast import autocasts
from flame.ops.comparison import eq, ne, where
from flame.ops.conversion import convert
from flame.ops.elementwise import compute_dtype, floating
from flame.ops.folds import Fold, floating_result
from flame.ops.foreach import reduce_each
from flame.ops.mathematics import abs as magnitude
from flame.ops.mathematics import exp, isnan, sqrt
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Op, Sample, Types
from flame.ops.reductions import Reduction, dims_of, kept_shape, restore
from flame.ops.reductions import mean as mean_of
from flame.ops.reductions import sum as sum_of
from flame.ops.rows import Index
from flame.ops.shapes import permute, reshape

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "count_nonzero", "logsumexp", "nanmean", "nansum", "prod", "std", "std_mean", "var",
    "var_mean",
]  # fmt: skip
METHODS = (
    "prod", "var", "std", "logsumexp", "nansum", "nanmean", "count_nonzero",
)  # fmt: skip

LARGE = 65536  # elements from which a reduction to few results is done by several kernels


# --- product --------------------------------------------------------------------------------------


def _others(x: Any, dim: int) -> Any:
    """For each element, the product of the others along ``dim``; nothing is divided."""
    from flame.ops.scans import _cumprod, _neighbours

    before = _cumprod(_neighbours(x, dim, later=False, fill=1), dim=dim, reverse=False)
    behind = _cumprod(_neighbours(x, dim, later=True, fill=1), dim=dim, reverse=True)
    return before * behind


def _prod_gradient(g: Any, x: Any, dims: tuple[int, ...], keepdim: bool) -> Any:
    if not dims or not x.numel():
        return restore(g, x.type, dims, keepdim) * (x * 0 + 1)
    kept = [d for d in range(x.ndim) if d not in dims]
    order = (*kept, *dims)
    moved = permute(x, order)
    shape = tuple(x.shape[d] for d in kept)
    others = reshape(_others(reshape(moved, (*shape, -1)), len(kept)), moved.shape)
    back = sorted(range(x.ndim), key=lambda i: order[i])
    return restore(g, x.type, dims, keepdim) * permute(others, back)


_prod = Reduction(
    "prod", "mul", result=lambda d: d if d.kind == "f" else dtypes.int64, vjp=(_prod_gradient,),
    reference=np.prod, autocast="float32",
)  # fmt: skip


def prod(
    input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: DType | None = None
) -> Tensor:
    """The product over ``dim`` (all dimensions by default); integers give int64."""
    if dtype is not None:
        made = plain(prod, convert(input, dtype=dtype), dim, keepdim)
        return convert(made, dtype=dtype)
    result: Tensor = _prod(input, dims=dims_of("prod", input, dim), keepdim=bool(keepdim))
    return result


# --- variance -------------------------------------------------------------------------------------


def _lower_var(name: str) -> Callable[..., Lowering]:
    def lower(
        types: Types, outputs: tuple[TensorType, ...], *, dims: tuple[int, ...], keepdim: bool
    ) -> Lowering:
        made = Fold(name, types, outputs, dims, keepdim=keepdim)
        correction = cast(made.k.number(1, float), made.compute)

        def per_row(row: Index) -> Value:
            mean = made.fold(row, "add", 0.0, lambda v: v) / made.count
            total = made.fold(row, "add", 0.0, lambda v: (v - mean) * (v - mean))
            freedom = values.binary("max", made.count - correction, const(0.0, made.compute))
            variance = total / freedom
            return values.unary("sqrt", variance) if name == "std" else variance

        return made.finish(per_row, passes=2)

    return lower


def _freedom(x: Any, dims: tuple[int, ...], correction: float) -> float:
    return float(math.prod(x.shape[d] for d in dims)) - correction


def _var_gradient(
    g: Any, x: Any, correction: float, dims: tuple[int, ...], keepdim: bool
) -> tuple[Any, None]:
    freedom = _freedom(x, dims, correction)
    slope = 2 / freedom if freedom else math.inf
    centred = x - (mean_of(x, dims, keepdim=True) if dims else x)
    return restore(g, x.type, dims, keepdim) * slope * centred, None


def _std_gradient(
    g: Any, out: Any, x: Any, correction: float, dims: tuple[int, ...], keepdim: bool
) -> tuple[Any, None]:
    """Through the square root, 0 where the deviation is 0."""
    still = eq(out, 0.0)
    inner = where(still, 0.0, g / (where(still, 1.0, out) * 2))
    return _var_gradient(inner, x, correction, dims, keepdim)


def _np_var(x: Any, correction: float, *, dims: tuple[int, ...], keepdim: bool) -> Any:
    wide = np.asarray(x, np.float64)
    with np.errstate(all="ignore"):
        centred = wide - wide.mean(axis=dims, keepdims=True)
        total = (centred * centred).sum(axis=dims, keepdims=keepdim)
        return total / max(math.prod(x.shape[d] for d in dims) - correction, 0)


def _var_samples() -> list[Sample]:
    cases = [((5, 7), (1,), False, 1.0), ((5, 7), (0,), True, 0.0), ((2, 3, 4), (0, 2), False, 1.0),
             ((3, 70), (0, 1), False, 0.5), ((0, 3), (1,), False, 1.0)]  # fmt: skip
    return [
        Sample((Arg(shape), correction), {"dims": dims, "keepdim": keepdim})
        for shape, dims, keepdim, correction in cases
    ]


_var_op, _std_op = (
    Op(
        name, inputs=("x", "correction"), infer=floating_result(name), lower=_lower_var(name),
        vjp=vjp, reference=reference, samples=_var_samples(),
    )
    for name, vjp, reference in (
        ("var", (lambda g, x, correction, dims, keepdim: _var_gradient(
            g, x, correction, dims, keepdim)[0], None), _np_var),
        ("std", (lambda g, out, x, correction, dims, keepdim: _std_gradient(
            g, out, x, correction, dims, keepdim)[0], None),
         lambda x, correction, *, dims, keepdim: np.sqrt(
            _np_var(x, correction, dims=dims, keepdim=keepdim))),
    )
)  # fmt: skip


def _spread_arguments(
    name: str, input: Tensor, dim: Any, unbiased: Any, correction: Any
) -> tuple[tuple[int, ...], float]:
    """PyTorch's two spellings: var(x, dim, unbiased) and var(x, dim, correction=)."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    if unbiased is not None and correction is not None:
        raise ArgumentError(f"{name} takes unbiased or correction, not both")
    if unbiased is not None:
        correction = 1 if unbiased else 0
    return dims_of(name, input, dim), 1.0 if correction is None else float(correction)


def _deviation(
    op: Op, input: Tensor, dims: tuple[int, ...], correction: float, *, keepdim: bool
) -> Tensor:
    kept = math.prod(s for d, s in enumerate(input.shape) if d not in dims)
    if input.numel() >= LARGE and kept < 4 and input.dtype.kind == "f" and dims:
        wide = convert(input, dtype=compute_dtype(input.dtype))
        centred = wide - mean_of(wide, dims, keepdim=True)
        freedom = max(_freedom(input, dims, correction), 0.0)
        made = sum_of(centred * centred, dims, keepdim=keepdim) * (
            1 / freedom if freedom else math.inf
        )
        return convert(sqrt(made) if op is _std_op else made, dtype=input.dtype)
    result: Tensor = op(input, correction, dims=dims, keepdim=keepdim)
    return result


def var(
    input: Tensor, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *,
    correction: float | None = None,
) -> Tensor:  # fmt: skip
    """The variance over ``dim``: squared differences to the mean, divided by count - correction.

    correction defaults to 1 (unbiased). NaN where there is nothing to divide by.
    """
    dims, amount = _spread_arguments("var", input, dim, unbiased, correction)
    return _deviation(_var_op, input, dims, amount, keepdim=bool(keepdim))


def std(
    input: Tensor, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *,
    correction: float | None = None,
) -> Tensor:  # fmt: skip
    """The square root of `var`; its gradient is 0 where it is 0."""
    dims, amount = _spread_arguments("std", input, dim, unbiased, correction)
    return _deviation(_std_op, input, dims, amount, keepdim=bool(keepdim))


def var_mean(
    input: Tensor, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *,
    correction: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(variance, mean) over ``dim``."""
    dims, amount = _spread_arguments("var_mean", input, dim, unbiased, correction)
    keepdim = bool(keepdim)
    return (
        _deviation(_var_op, input, dims, amount, keepdim=keepdim),
        mean_of(input, dims, keepdim),
    )


def std_mean(
    input: Tensor, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *,
    correction: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(standard deviation, mean) over ``dim``."""
    dims, amount = _spread_arguments("std_mean", input, dim, unbiased, correction)
    keepdim = bool(keepdim)
    return (
        _deviation(_std_op, input, dims, amount, keepdim=keepdim),
        mean_of(input, dims, keepdim),
    )


# --- log-sum-exp ----------------------------------------------------------------------------------


def _lower_logsumexp(
    types: Types, outputs: tuple[TensorType, ...], *, dims: tuple[int, ...], keepdim: bool
) -> Lowering:
    made = Fold("logsumexp", types, outputs, dims, keepdim=keepdim)

    def per_row(row: Index) -> Value:
        peak = made.fold(row, "max", -math.inf, lambda v: v)
        endless = values.compare("eq", values.unary("abs", peak), const(math.inf, made.compute))
        shift = values.select(endless, const(0.0, made.compute), peak)
        total = made.fold(row, "add", 0.0, lambda v: values.unary("exp", v - shift))
        return values.unary("log", total) + shift

    return made.finish(per_row, passes=5)


def _logsumexp_gradient(g: Any, out: Any, x: Any, dims: tuple[int, ...], keepdim: bool) -> Any:
    """softmax(x) g; where the result is -inf, x is -inf throughout and gets 0."""
    g, out = restore(g, x.type, dims, keepdim), restore(out, x.type, dims, keepdim)
    same = eq(x, out) & eq(magnitude(out), math.inf)
    return g * exp(where(same, out, x - out))


def _np_logsumexp(x: Any, *, dims: tuple[int, ...], keepdim: bool) -> Any:
    wide = np.asarray(x, np.float64)
    with np.errstate(all="ignore"):
        peak = wide.max(axis=dims, keepdims=True, initial=-np.inf)
        peak = np.where(np.isfinite(peak), peak, 0.0)
        made = np.log(np.exp(wide - peak).sum(axis=dims, keepdims=True)) + peak
    return made.reshape(kept_shape(x.shape, dims, keepdim))


_logsumexp = Op(
    "logsumexp", inputs=("x",), infer=floating_result("logsumexp"), lower=_lower_logsumexp,
    vjp=(_logsumexp_gradient,), reference=_np_logsumexp, autocast="float32",
    samples=[Sample((Arg(s),), {"dims": d, "keepdim": k})
             for s, d, k in (((5, 7), (1,), False), ((5, 7), (0,), True),
                             ((2, 3, 70), (0, 2), False),
                             ((), (), False), ((0, 3), (1,), False), ((4, 1), (1,), False))],
)  # fmt: skip


def logsumexp(input: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    """log(sum(exp(input))) over ``dim``, without overflow; integers give floats."""
    input = convert(input, dtype=floating(input.dtype))
    dims = dims_of("logsumexp", input, dim)
    result: Tensor = _logsumexp(input, dims=dims, keepdim=bool(keepdim))
    return result


# --- numbers that are none ------------------------------------------------------------------------

_has_nonfinite = Reduction(
    "has_nonfinite", "or", result=lambda d: dtypes.bool_,
    prepare=lambda v: values.compare("ge", values.unary("abs", v), const(math.inf, v.dtype))
    | values.unary("is_nan", v),
    vjp=NOT_DIFFERENTIABLE,
    reference=lambda x, axis, keepdims: np.any(~np.isfinite(x), axis=axis, keepdims=keepdims),
)  # fmt: skip


def has_nonfinite(input: Tensor) -> Tensor:
    """Whether any element is infinite or NaN: a bool without dimensions. Floating tensors only."""
    result: Tensor = _has_nonfinite(input, dims=tuple(range(input.ndim)), keepdim=False)
    return result


def any_nonfinite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether any element of any tensor is infinite or NaN: a bool without dimensions."""
    if len(tensors) == 1:
        return has_nonfinite(tensors[0])
    found: Tensor = reduce_each(_has_nonfinite, tensors, has_nonfinite).any()
    return found


# --- counts and sums without NaN ------------------------------------------------------------------


def count_nonzero(input: Tensor, dim: Any = None) -> Tensor:
    """How many elements over ``dim`` (all dimensions by default) are not 0; int64."""
    return sum_of(convert(ne(input, 0), dtype=dtypes.int64), dim)


@autocasts("plain")
def nansum(
    input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: DType | None = None
) -> Tensor:
    """The sum over ``dim`` with NaN taken as 0."""
    if input.dtype.kind == "f":
        input = where(isnan(input), 0.0, input)
    return sum_of(input, dim, keepdim, dtype=dtype)


@autocasts("plain")
def nanmean(
    input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: DType | None = None
) -> Tensor:
    """The mean over ``dim`` of the elements that are not NaN."""
    present = sum_of(convert(~isnan(input), dtype=floating(input.dtype)), dim, keepdim)
    return true_divide(nansum(input, dim, keepdim, dtype=dtype), present)
