"""Largest and smallest elements, where they stand, and whether any or all elements are true.

Invariants: NaN beats every number; of equal elements the first one is named. The gradient of amax
and amin is shared evenly among equal elements; that of max and min over a dimension goes to the
named one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import DTypeError, ShapeError
from flame.core.handle import is_tensor
from flame.core.types import Shape, TensorType, contiguous_strides, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering
from flame.kernel.program import identity
from flame.kernel.values import Value, cast, const
from flame.ops.arithmetic import true_divide
from flame.ops.comparison import eq, maximum, minimum, where
from flame.ops.conversion import convert
from flame.ops.elementwise import compute_dtype
from flame.ops.loops import broadcast_strides
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Op, Sample, Types
from flame.ops.reductions import Reduction, _all, _any, dims_of, kept_shape, restore
from flame.ops.reductions import sum as sum_of
from flame.ops.results import ValuesIndices
from flame.ops.rows import RowLoops, rows_of, type_of
from flame.ops.shapes import reshape, wrap_dim

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["all", "amax", "amin", "aminmax", "any", "argmax", "argmin", "max", "min"]
METHODS = __all__


class MinMax(NamedTuple):
    """What aminmax returns."""

    min: Tensor
    max: Tensor


# --- amax, amin -----------------------------------------------------------------------------------


def _same(dtype: DType) -> DType:
    return dtype


def _shared(g: Any, out: Any, x: Any, dims: tuple[int, ...], keepdim: bool) -> Any:
    """The gradient in equal parts to all elements that equal the extreme."""
    g, out = restore(g, x.type, dims, keepdim), restore(out, x.type, dims, keepdim)
    chosen = convert(eq(x, out), dtype=g.dtype)
    return chosen * true_divide(g, sum_of(chosen, dims, keepdim=True) if dims else chosen)


_amax = Reduction("amax", "max", vjp=(_shared,), reference=np.max, result=_same, empty=False)
_amin = Reduction("amin", "min", vjp=(_shared,), reference=np.min, result=_same, empty=False)


def _filled(name: str, input: Tensor, dims: tuple[int, ...]) -> None:
    if not input.numel() and math.prod(input.shape[d] for d in dims) == 0:
        raise ShapeError(
            f"{name} over an empty dimension of shape {input.shape} has no value; reduce over "
            "dimensions that have elements"
        )


def amax(input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    """The largest element over ``dim`` (all dimensions by default). Raises ShapeError on none."""
    result: Tensor = _amax(input, dims=dims_of("amax", input, dim), keepdim=bool(keepdim))
    return result


def amin(input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    """The smallest element over ``dim`` (all dimensions by default). Raises ShapeError on none."""
    result: Tensor = _amin(input, dims=dims_of("amin", input, dim), keepdim=bool(keepdim))
    return result


def aminmax(input: Tensor, *, dim: int | None = None, keepdim: bool = False) -> MinMax:
    """The smallest and the largest element, over one dimension or all."""
    dims = dims_of("aminmax", input, dim)
    return MinMax(
        _amin(input, dims=dims, keepdim=bool(keepdim)),
        _amax(input, dims=dims, keepdim=bool(keepdim)),
    )


# --- with places ----------------------------------------------------------------------------------


def _infer(
    name: str, *, places_only: bool
) -> Callable[..., TensorType | tuple[TensorType, TensorType]]:
    def infer(types: Types, *, dims: tuple[int, ...], keepdim: bool) -> Any:
        x = type_of(types[0])
        if _has_empty(x.shape, dims):
            raise ShapeError(
                f"{name} over an empty dimension of shape {x.shape} has no value; reduce over "
                "dimensions that have elements"
            )
        shape = kept_shape(x.shape, dims, keepdim)
        places = tensor_type(dtypes.int64, shape, None, x.device)
        return places if places_only else (tensor_type(x.dtype, shape, None, x.device), places)

    return infer


def _has_empty(shape: Shape, dims: tuple[int, ...]) -> bool:
    return 0 in (shape[d] for d in dims)


def _spread(t: TensorType, rank: int, dims: tuple[int, ...], *, keepdim: bool) -> Shape:
    """Strides of a reduced tensor in the dimensions of the whole."""
    if keepdim:
        own = broadcast_strides(t, t.shape)
        return tuple(0 if d in dims else own[d] for d in range(rank))
    rest = iter(broadcast_strides(t, t.shape))
    return tuple(0 if d in dims else next(rest) for d in range(rank))


def _lower(name: str, combine: str, *, places_only: bool) -> Callable[..., Lowering]:
    """Two passes over a row in cache: the extreme, then the first place that equals it."""

    def lower(
        types: Types, outputs: tuple[TensorType, ...], *, dims: tuple[int, ...], keepdim: bool
    ) -> Lowering:
        x = type_of(types[0])
        reduced = tuple(x.shape[d] for d in dims)
        counted = dict(zip(dims, contiguous_strides(reduced), strict=True))
        numbering = tuple(counted.get(d, 0) for d in range(x.ndim))
        strides = [broadcast_strides(x, x.shape), numbering]
        strides += [_spread(o, x.ndim, dims, keepdim=keepdim) for o in outputs]
        rows = rows_of(x.shape, dims, strides)
        k = KernelBuilder(name)
        source = rows.operand(k, "input", 0, x.dtype, 0)
        targets = [rows.operand(k, "output", i, o.dtype, 2 + i) for i, o in enumerate(outputs)]
        loops = RowLoops(k, rows)
        steps = [k.stride(s) for s in rows.row.strides[1]]
        compute = compute_dtype(x.dtype)
        last = const(1 << 62)  # beyond every place
        with loops.each_row(passes=4) as row:
            best = k.register(const(identity(combine, compute), compute))
            with loops.each(row) as index:
                k.accumulate(best, combine, cast(source[index], compute))
            extreme = values.read(best)
            place = k.register(last)
            with loops.each(row) as index:
                found = _equal(cast(source[index], compute), extreme)
                k.accumulate(place, "min", values.select(found, _number(index, row, steps), last))
            first = (*row, *(const(0) for _ in rows.row.sizes))
            results = [values.read(place)] if places_only else [extreme, values.read(place)]
            k.store_all([(t, first, r) for t, r in zip(targets, results, strict=True)])
        return k.finish()

    return lower


def _equal(x: Value, extreme: Value) -> Value:
    same = values.compare("eq", x, extreme)
    if x.dtype.kind != "f":
        return same
    return values.binary("or", same, values.unary("is_nan", x))  # a NaN is the extreme of its row


def _number(index: tuple[Value, ...], row: tuple[Value, ...], steps: list[Value]) -> Value:
    """The number of an element within its row, counted in the tensor's own order."""
    number = const(0)
    for counter, step in zip(index[len(row) :], steps, strict=True):
        number = number + counter * step
    return number


def _to_place(g: Any, out: Any, x_type: TensorType, dims: tuple[int, ...], keepdim: bool) -> Any:
    """The gradient at the named element, 0 elsewhere."""
    from flame.ops.creation import arange

    (dim,) = dims or (0,)
    g, places = (restore(t, x_type, dims, keepdim) for t in (g[0], out[1]))
    if not dims:
        return g
    shape = (x_type.shape[dim],) + (1,) * (x_type.ndim - dim - 1)
    return where(eq(reshape(arange(x_type.shape[dim], device=g.device), shape), places), g, 0.0)


def _np_places(function: Any) -> Callable[..., Any]:
    def reference(x: Any, *, dims: tuple[int, ...], keepdim: bool) -> Any:
        kept = [d for d in range(x.ndim) if d not in dims]
        count = math.prod(x.shape[d] for d in dims)
        flat = np.transpose(x, (*kept, *dims)).reshape(*(x.shape[d] for d in kept), count)
        return function(flat, axis=-1).reshape(kept_shape(x.shape, dims, keepdim)).astype(np.int64)

    return reference


def _np_both(function: Any, place: Any) -> Callable[..., Any]:
    def reference(x: Any, *, dims: tuple[int, ...], keepdim: bool) -> Any:
        return (
            function(x, axis=dims, keepdims=keepdim),
            _np_places(place)(x, dims=dims, keepdim=keepdim),
        )

    return reference


def _samples() -> list[Sample]:
    cases = [((5, 7), (1,), False), ((5, 7), (0,), True), ((3, 70), (1,), True), ((), (), False),
             ((2, 3, 4), (1,), False), ((0, 3), (1,), False), ((4, 1), (1,), False)]  # fmt: skip
    return [
        Sample((Arg(shape, distinct=True),), {"dims": dims, "keepdim": keepdim})
        for shape, dims, keepdim in cases
    ]


def _whole_samples() -> list[Sample]:
    cases = [((3, 4, 5), (0, 1, 2), False), ((2, 3, 4), (0, 2), True)]
    return [
        *_samples(),
        *(Sample((Arg(s, distinct=True),), {"dims": d, "keepdim": k}) for s, d, k in cases),
    ]


def _with_places(name: str, combine: str, function: Any, place: Any) -> tuple[Op, Op]:
    both = Op(
        f"{name}_with_index", inputs=("x",), infer=_infer(name, places_only=False),
        lower=_lower(f"{name}_with_index", combine, places_only=False), vjp=(_to_place,),
        reference=_np_both(function, place), samples=_samples(),
    )  # fmt: skip
    where_only = Op(
        f"arg{name}", inputs=("x",), infer=_infer(f"arg{name}", places_only=True),
        lower=_lower(f"arg{name}", combine, places_only=True), vjp=NOT_DIFFERENTIABLE,
        reference=_np_places(place), samples=_whole_samples(),
    )  # fmt: skip
    return both, where_only


_max_with_index, _argmax = _with_places("max", "max", np.max, np.argmax)
_min_with_index, _argmin = _with_places("min", "min", np.min, np.argmin)


def _places(op: Op, input: Tensor, dim: int | None, keepdim: bool) -> Tensor:
    if input.dtype.kind == "b":
        raise DTypeError(f"{op.name} is not defined for bool tensors; convert them to uint8")
    dims = dims_of(op.name, input, None if dim is None else (wrap_dim(op.name, dim, input.ndim),))
    result: Tensor = op(input, dims=dims, keepdim=bool(keepdim))
    return result


def argmax(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Where the largest element stands: along ``dim``, or in the flattened tensor. int64."""
    return _places(_argmax, input, dim, keepdim)


def argmin(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Where the smallest element stands: along ``dim``, or in the flattened tensor. int64."""
    return _places(_argmin, input, dim, keepdim)


def _extreme(
    name: str, whole: Op, along: Op, pair: Any, input: Tensor, dim: Any, keepdim: bool, other: Any
) -> Any:
    if not is_tensor(input):
        raise DTypeError(f"{name} takes a tensor, got {type(input).__name__}")
    if is_tensor(dim):
        dim, other = None, dim
    if other is not None:
        return pair(input, other)
    if dim is None:
        dims = tuple(range(input.ndim))
        _filled(name, input, dims)
        return whole(input, dims=dims, keepdim=bool(keepdim))
    dims = dims_of(name, input, (wrap_dim(name, dim, input.ndim),))
    return ValuesIndices(*along(input, dims=dims, keepdim=bool(keepdim)))


def max(
    input: Tensor, dim: Any = None, keepdim: bool = False, *, other: Tensor | None = None
) -> Any:
    """The largest element; with ``dim``, (values, indices) along it; with a tensor, `maximum`."""
    return _extreme("max", _amax, _max_with_index, maximum, input, dim, keepdim, other)


def min(
    input: Tensor, dim: Any = None, keepdim: bool = False, *, other: Tensor | None = None
) -> Any:
    """The smallest element; with ``dim``, (values, indices) along it; with a tensor, `minimum`."""
    return _extreme("min", _amin, _min_with_index, minimum, input, dim, keepdim, other)


# --- any, all -------------------------------------------------------------------------------------


def _truth(op: Op, input: Tensor, dim: Any, keepdim: bool) -> Tensor:
    dims = dims_of(op.name, input, dim) if dim is None or isinstance(dim, int) or dim else ()
    result: Tensor = op(input, dims=dims, keepdim=bool(keepdim))
    # PyTorch keeps uint8 here, from the time before bool tensors
    return convert(result, dtype=dtypes.uint8) if input.dtype is dtypes.uint8 else result


def any(input: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """Whether an element is not zero, over ``dim`` (all dimensions by default); NaN is not zero."""
    return _truth(_any, input, dim, keepdim)


def all(input: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """Whether no element is zero, over ``dim`` (all dimensions by default)."""
    return _truth(_all, input, dim, keepdim)
