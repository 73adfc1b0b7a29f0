"""Orders: sort, topk, kthvalue, median, mode, unique, searchsorted.

On the CPU the order itself is found by NumPy's sorting, on a GPU by the kernels of
`flame.ops.sorting_cuda`; values are gathered by it, so their gradients are gather's. NaN counts as
larger than all numbers, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from flame.core import dtypes
from flame.core.errors import ArgumentError, DTypeError, IndexRangeError, ShapeError
from flame.core.handle import is_tensor
from flame.core.types import TensorType, tensor_type
from flame.kernel.builder import Lowering
from flame.ops.indexing import gather, index_select
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Op, Sample, Types, constant
from flame.ops.results import ValuesIndices
from flame.ops.shapes import reshape, squeeze, wrap_dim
from flame.ops.sorting_cuda import (
    lower_argsort,
    lower_median,
    lower_mode,
    lower_search,
    lower_topk,
)  # fmt: skip

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "argsort", "bincount", "bucketize", "kthvalue", "median", "mode", "msort", "nanmedian",
    "searchsorted", "sort", "topk", "unique", "unique_consecutive",
]  # fmt: skip
METHODS = (
    "argsort", "bincount", "kthvalue", "median", "mode", "msort", "nanmedian", "sort", "topk",
    "unique", "unique_consecutive",
)  # fmt: skip


def _sortable(x: Any) -> Any:
    """Values that NumPy sorts natively: half-width floats in float32."""
    return x.astype(np.float32) if x.dtype.itemsize == 2 and x.dtype.kind not in "iu" else x


def _order(x: Any, dim: int, *, descending: bool, stable: bool) -> Any:
    """The sorting permutation along ``dim``."""
    x = _sortable(np.asarray(x))
    kind: Literal["stable"] | None = "stable" if stable else None
    if not descending:
        return np.argsort(x, dim, kind)
    # turned round, sorted, turned round again: equal elements keep their order
    flipped = np.flip(np.argsort(np.flip(x, dim), dim, kind), dim)
    return x.shape[dim] - 1 - flipped


def _selected(x: Any, k: int, dim: int, *, largest: bool, ordered: bool) -> Any:
    """The indices of the k largest (or smallest) elements along ``dim``."""
    x = _sortable(np.asarray(x))
    size = x.shape[dim]
    if k * 8 > size:
        found = _order(x, dim, descending=largest, stable=True)
        return np.take(found, np.arange(k), dim)
    at = size - k if largest else k - 1
    parted = np.argpartition(x, min(max(at, 0), size - 1), dim) if k else np.argsort(x, dim)
    chosen = np.take(parted, np.arange(at, size) if largest else np.arange(k), dim)
    if not ordered:
        return chosen
    inner = _order(np.take_along_axis(x, chosen, dim), dim, descending=largest, stable=True)
    return np.take_along_axis(chosen, inner, dim)


def _filling(function: Callable[..., Any]) -> Callable[..., Lowering]:
    """The lowering of an op whose one output is ``function(x, **attributes)``, on the host."""

    def lower(types: Types, outputs: tuple[TensorType, ...], **attributes: Any) -> Lowering:
        def host(operands: Sequence[Any], results: Sequence[Any]) -> None:
            results[0][...] = function(*operands, **attributes)

        return Lowering((), host=host)

    return lower


def _same_shape(types: Types, **attributes: Any) -> TensorType:
    x = types[0]
    assert isinstance(x, TensorType)
    return tensor_type(dtypes.int64, x.shape, None, x.device)


_argsort = Op(
    "argsort", inputs=("x",), infer=_same_shape, lower=_filling(_order),
    lower_cuda=lower_argsort, vjp=NOT_DIFFERENTIABLE,
    reference=_order,
    samples=[Sample((Arg(shape, distinct=True),), {"dim": dim, "descending": down, "stable": True})
             for shape, dim, down in (((7,), 0, False), ((3, 20), 1, True), ((5, 4), 0, False),
                                      ((0, 3), 1, False))],
)  # fmt: skip


def _infer_topk(types: Types, *, k: int, dim: int, largest: bool, ordered: bool) -> TensorType:
    x = types[0]
    assert isinstance(x, TensorType)
    shape = (*x.shape[:dim], k, *x.shape[dim + 1 :])
    return tensor_type(dtypes.int64, shape, None, x.device)


_topk = Op(
    "topk",
    inputs=("x",),
    infer=_infer_topk,
    lower=_filling(_selected),
    lower_cuda=lower_topk,
    vjp=NOT_DIFFERENTIABLE,
    reference=_selected,
    samples=[
        Sample((Arg(shape, distinct=True),), {"k": k, "dim": dim, "largest": up, "ordered": True})
        for shape, k, dim, up in (
            ((70,), 3, 0, True),
            ((4, 90), 2, 1, False),
            ((5, 4), 5, 0, True),
            ((3, 2), 0, 1, True),
        )
    ],
)


def _lines(name: str, input: Tensor, dim: int) -> tuple[Tensor, int]:
    dim = wrap_dim(name, dim, input.ndim)
    return (input if input.ndim else reshape(input, (1,))), dim


def _pair(x: Tensor, dim: int, order: Tensor, rank: int) -> ValuesIndices:
    values = gather(x, dim, order)
    if not rank:
        return ValuesIndices(reshape(values, ()), reshape(order, ()))
    return ValuesIndices(values, order)


def sort(
    input: Tensor, dim: int = -1, descending: bool = False, stable: bool = True
) -> ValuesIndices:
    """(values, indices) in order along ``dim``; equal elements keep their order."""
    x, dim = _lines("sort", input, dim)
    order = _argsort(x, dim=dim, descending=bool(descending), stable=True)
    return _pair(x, dim, order, input.ndim)


def argsort(input: Tensor, dim: int = -1, descending: bool = False, stable: bool = True) -> Tensor:
    """The indices that sort ``dim``; equal elements keep their order."""
    x, dim = _lines("argsort", input, dim)
    order: Tensor = _argsort(x, dim=dim, descending=bool(descending), stable=True)
    return order if input.ndim else reshape(order, ())


def msort(input: Tensor) -> Tensor:
    """Values in order along the first dimension."""
    return sort(input, 0).values


def topk(
    input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> ValuesIndices:
    """(values, indices) of the k largest (or smallest) elements of ``dim``, in order if
    ``sorted``."""
    x, dim = _lines("topk", input, dim)
    if not 0 <= k <= x.shape[dim]:
        raise IndexRangeError(f"topk: k = {k} is out of range for dimension {dim} of {input.shape}")
    found = _topk(x, k=k, dim=dim, largest=bool(largest), ordered=bool(sorted))
    return _pair(x, dim, found, input.ndim)


def kthvalue(input: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> ValuesIndices:
    """(value, index) of the k-th smallest element of ``dim``, counted from 1."""
    x, dim = _lines("kthvalue", input, dim)
    if not 1 <= k <= x.shape[dim]:
        raise IndexRangeError(
            f"kthvalue: k = {k} is out of range for dimension {dim} of {input.shape}"
        )
    order = _argsort(x, dim=dim, descending=False, stable=True)
    return _one(x, dim, order.narrow(dim, k - 1, 1), input.ndim, keepdim)


def _one(x: Tensor, dim: int, place: Tensor, rank: int, keepdim: bool) -> ValuesIndices:
    values = gather(x, dim, place)
    if not rank:
        return ValuesIndices(reshape(values, ()), reshape(place, ()))
    return (
        ValuesIndices(values, place)
        if keepdim
        else ValuesIndices(squeeze(values, dim), squeeze(place, dim))
    )


def _middle(x: Any, dim: int, *, skip_nan: bool) -> Any:
    """Where the lower median of each line stands; the first NaN if there is one and it counts."""
    values = _sortable(np.asarray(x))
    order = np.argsort(values, dim, "stable")
    bad = np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, np.bool_)
    count = values.shape[dim] - bad.sum(dim, keepdims=True)
    if skip_nan:
        at = np.maximum(count - 1, 0) // 2
    else:
        at = np.where(count < values.shape[dim], count, (values.shape[dim] - 1) // 2)
    return np.take_along_axis(order, at, dim)


def _one_line(types: Types, *, dim: int, **attributes: Any) -> TensorType:
    x = types[0]
    assert isinstance(x, TensorType)
    shape = (*x.shape[:dim], 1, *x.shape[dim + 1 :])
    return tensor_type(dtypes.int64, shape, None, x.device)


_median_place = Op(
    "median_place", inputs=("x",), infer=_one_line, lower=_filling(_middle),
    lower_cuda=lower_median, vjp=NOT_DIFFERENTIABLE, reference=_middle,
    samples=[Sample((Arg((4, 7), distinct=True),), {"dim": 1, "skip_nan": False}),
             Sample((Arg((4, 3), distinct=True),), {"dim": 0, "skip_nan": True})],
)  # fmt: skip


def _medians(name: str, input: Tensor, dim: int | None, keepdim: bool, *, skip_nan: bool) -> Any:
    if dim is None:
        flat = reshape(input, (-1,))
        if not flat.numel():
            from flame.ops.creation import full

            return full((), float("nan"), dtype=input.dtype, device=input.device)
        return reshape(gather(flat, 0, _median_place(flat, dim=0, skip_nan=skip_nan)), ())
    x, dim = _lines(name, input, dim)
    if not x.shape[dim]:
        raise IndexRangeError(f"{name}: dimension {dim} of {input.shape} is empty")
    return _one(x, dim, _median_place(x, dim=dim, skip_nan=skip_nan), input.ndim, keepdim)


def median(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """The median (the lower of two) of all elements; with ``dim``, (values, indices) along it."""
    return _medians("median", input, dim, keepdim, skip_nan=False)


def nanmedian(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """`median` of the elements that are not NaN."""
    return _medians("nanmedian", input, dim, keepdim, skip_nan=True)


def _commonest(x: Any, dim: int) -> Any:
    """Where the smallest of the most frequent values of each line stands last."""
    lines = np.moveaxis(np.asarray(x), dim, -1)
    found = np.empty((*lines.shape[:-1], 1), np.int64)
    for at in np.ndindex(lines.shape[:-1]):
        values, counts = np.unique(lines[at], return_counts=True)
        found[at] = np.flatnonzero(lines[at] == values[np.argmax(counts)])[-1]
    return np.moveaxis(found, -1, dim)


_mode_place = Op(
    "mode_place",
    inputs=("x",),
    infer=_one_line,
    lower=_filling(_commonest),
    lower_cuda=lower_mode,
    vjp=NOT_DIFFERENTIABLE,
    reference=_commonest,
    samples=[
        Sample((Arg((4, 9), -3, 3, kind="index"),), {"dim": 1}),
        Sample((Arg((5,), -3, 3, kind="index"),), {"dim": 0}),
    ],
)


def mode(input: Tensor, dim: int = -1, keepdim: bool = False) -> ValuesIndices:
    """(values, indices) of the most frequent value of ``dim``; of several the smallest."""
    x, dim = _lines("mode", input, dim)
    if not x.shape[dim]:
        raise IndexRangeError(f"mode: dimension {dim} of {input.shape} is empty")
    return _one(x, dim, _mode_place(x, dim=dim), input.ndim, keepdim)


# --- results whose size depends on the data, found on the host ------------------------------------


def unique(
    input: Tensor, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False,
    dim: int | None = None,
) -> Any:  # fmt: skip
    """The distinct values in order (slices along ``dim``, if given), and on demand for each
    element the place of its value, and how often each occurs."""
    if dim is not None:
        dim = wrap_dim("unique", dim, input.ndim)
    if input.is_cuda:
        return _wanted(_unique_on_device(input.detach(), dim), return_inverse, return_counts)
    array = input.detach().numpy()
    values, inverse, counts = np.unique(
        array, return_inverse=True, return_counts=True, axis=dim, equal_nan=False
    )
    inverse = inverse.reshape(array.shape if dim is None else -1)
    made = (np.ascontiguousarray(values), np.asarray(inverse, np.int64), counts.astype(np.int64))
    return _wanted(tuple(constant(a) for a in made), return_inverse, return_counts)


def _wanted(found: tuple[Tensor, ...], inverse: bool, counts: bool) -> Any:
    """Of (values, inverse, counts) what was asked for."""
    values, *others = found
    asked = [t for t, wish in zip(others, (inverse, counts), strict=True) if wish]
    return (values, *asked) if asked else values


def _unique_on_device(x: Tensor, dim: int | None) -> tuple[Tensor, ...]:
    """(values, inverse, counts): sorted, then the first of each run of equal ones is kept."""
    from flame.ops.compaction import differs, distinct, inverse_of, order_of_lines

    lines = reshape(x, (-1,)) if dim is None else x.movedim(dim, 0)
    count = lines.shape[0]
    if not count:
        return _no_runs(x, lines)
    flat = lines.ndim == 1
    order = argsort(lines, 0) if flat else order_of_lines(reshape(lines, (count, -1)))
    ordered = index_select(lines, 0, order)
    starts, running, counts = distinct(differs(ordered))
    values = index_select(ordered, 0, starts)
    inverse = inverse_of(order, running)
    if dim is None:
        return values, reshape(inverse, x.shape), counts
    return values.movedim(0, dim), inverse, counts


def _no_runs(x: Tensor, lines: Tensor) -> tuple[Tensor, ...]:
    """(values, inverse, counts) where there is nothing."""
    from flame.ops.creation import zeros

    nothing = zeros(0, dtype=dtypes.int64, device=x.device)
    return (lines if lines.ndim == 1 else x.clone()), nothing, nothing.clone()


def _runs_on_device(x: Tensor, dim: int | None) -> tuple[Tensor, ...]:
    """(values, inverse, counts) of runs in the order in which they stand."""
    from flame.ops.compaction import differs, distinct

    lines = reshape(x, (-1,)) if dim is None else x.movedim(dim, 0)
    if not lines.shape[0]:
        return _no_runs(x, lines)
    starts, running, counts = distinct(differs(lines))
    values = index_select(lines, 0, starts)
    if dim is None:
        return values, reshape(running, x.shape), counts
    return values.movedim(0, dim), running, counts


def unique_consecutive(
    input: Tensor, return_inverse: bool = False, return_counts: bool = False, dim: int | None = None
) -> Any:
    """The first of each run of equal values (equal slices along ``dim``), in the order they
    stand."""
    if dim is not None:
        dim = wrap_dim("unique_consecutive", dim, input.ndim)
    if input.is_cuda:
        return _wanted(_runs_on_device(input.detach(), dim), return_inverse, return_counts)
    array = input.detach().numpy()
    lines = array.reshape(-1) if dim is None else np.moveaxis(array, dim, 0)
    if not len(lines):
        starts = np.zeros(0, np.int64)
        inverse = np.zeros(0, np.int64)
    else:
        differ = lines[1:] != lines[:-1]
        fresh = differ.any(tuple(range(1, lines.ndim)))
        begins = np.concatenate([[True], fresh])
        starts, inverse = np.flatnonzero(begins), np.cumsum(begins) - 1
    values = lines[starts] if dim is None else np.moveaxis(lines[starts], 0, dim)
    counts = np.diff(np.append(starts, len(lines)))
    inverse = inverse.reshape(array.shape if dim is None else -1)
    made = (np.ascontiguousarray(values), np.asarray(inverse, np.int64), counts.astype(np.int64))
    return _wanted(tuple(constant(a) for a in made), return_inverse, return_counts)


def bincount(input: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """How often each number from 0 on occurs, or the sum of its weights."""
    if input.ndim != 1 or input.dtype.kind not in "iu":
        raise DTypeError(
            f"bincount takes a 1-d integer tensor, got {input.dtype.name} of {input.shape}"
        )
    if minlength < 0 or (input.numel() and input.min().item() < 0):
        raise ArgumentError("bincount: numbers and minlength must not be negative")
    if weights is not None and weights.shape != input.shape:
        raise ShapeError(f"bincount: weights of shape {weights.shape} for numbers of {input.shape}")
    if input.is_cuda:
        return _counted_on_device(input, weights, minlength)
    array = input.numpy()
    given = None if weights is None else weights.detach().numpy()
    made = np.bincount(array.astype(np.int64), given, minlength)
    if given is not None and given.dtype == np.float32:
        made = made.astype(np.float32)
    return constant(made)


def _counted_on_device(input: Tensor, weights: Tensor | None, minlength: int) -> Tensor:
    from flame.ops.creation import ones, zeros
    from flame.ops.scattering import scatter_add

    size = max(int(input.max().item()) + 1 if input.numel() else 0, minlength)
    if weights is None:
        values = ones(input.shape[0], dtype=dtypes.int64, device=input.device)
    else:
        values = weights.detach().to(dtypes.float64)
    start = zeros(size, dtype=values.dtype, device=input.device)
    made = scatter_add(start, 0, input.to(dtypes.int64), values)
    narrow = weights is not None and weights.dtype is dtypes.float32
    return made.to(dtypes.float32) if narrow else made


# --- searching ------------------------------------------------------------------------------------


def _found(edges: Any, x: Any, *, right: bool) -> Any:
    side: Any = "right" if right else "left"
    edges, x = _sortable(np.asarray(edges)), _sortable(np.asarray(x))
    if edges.ndim == 1:
        return np.searchsorted(edges, x, side)
    out = np.empty(x.shape, np.int64)
    for at in np.ndindex(edges.shape[:-1]):
        out[at] = np.searchsorted(edges[at], x[at], side)
    return out


def _infer_search(types: Types, *, right: bool) -> TensorType:
    edges, x = types
    assert isinstance(edges, TensorType)
    assert isinstance(x, TensorType)
    if edges.ndim != 1 and edges.shape[:-1] != x.shape[:-1]:
        raise ShapeError(
            f"searchsorted: sequences of shape {edges.shape} and values of shape {x.shape} "
            f"must agree "
            "in all dimensions but the last"
        )
    return tensor_type(dtypes.int64, x.shape, None, x.device)


_search = Op(
    "searchsorted", inputs=("edges", "x"), infer=_infer_search, lower=_filling(_found),
    lower_cuda=lower_search, vjp=NOT_DIFFERENTIABLE, reference=_found,
    samples=[Sample((Arg((6,), 0, 1), Arg((3, 4), 0, 1)), {"right": False}),
             Sample((Arg((3, 1)), Arg((3, 4))), {"right": True})],
)  # fmt: skip


def same_numbers(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in a dtype in which their numbers can be compared: in float64 if one is an integer."""
    if a.dtype is b.dtype:
        return a, b
    kinds = {a.dtype.kind, b.dtype.kind}
    mixed = "f" in kinds and kinds != {"f"}
    common = dtypes.float64 if mixed else dtypes.promote_types(a.dtype, b.dtype)
    return a.to(common), b.to(common)


def searchsorted(
    sorted_sequence: Tensor, input: Any, *, out_int32: bool = False, right: bool = False,
    side: str | None = None, sorter: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Where each value would be inserted into a sorted sequence (its last dimension) to keep its
    order."""
    if side not in (None, "left", "right") or (side == "left" and right):
        raise ArgumentError(f"searchsorted: side is {side!r} and right is {right}; they disagree")
    if sorter is not None:
        if sorter.shape != sorted_sequence.shape or sorter.dtype is not dtypes.int64:
            raise ShapeError(
                "searchsorted: the sorter must be an int64 tensor of the sequence's shape"
            )
        sorted_sequence = gather(sorted_sequence, -1, sorter)
    if not sorted_sequence.ndim:
        raise ShapeError("searchsorted: the sequence needs at least one dimension")
    if not is_tensor(input):
        if sorted_sequence.ndim != 1:
            raise ShapeError("searchsorted: a number can be searched for in a 1-d sequence only")
        input = constant(input, device=sorted_sequence.device)
    edges, x = same_numbers(sorted_sequence.detach(), input.detach())
    found: Tensor = _search(edges, x, right=right or side == "right")
    return found.to(dtypes.int32) if out_int32 else found


def bucketize(
    input: Any, boundaries: Tensor, *, out_int32: bool = False, right: bool = False
) -> Tensor:
    """Between which of the 1-d ``boundaries`` each value lies."""
    if boundaries.ndim != 1:
        raise ShapeError(f"bucketize: boundaries must be 1-d, got shape {boundaries.shape}")
    return searchsorted(boundaries, input, out_int32=out_int32, right=right)
