"""The kind of op that combines elements over dimensions: sum, mean, prod, amax, amin, any, all.

Invariant: the order of combination depends on shapes and strides alone, never on the number of
threads, so a reduction gives the same bits on every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core import dtypes
from flame.core.autocast import Policy, plain
from flame.core.dtypes import DType
from flame.core.errors import ShapeError
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.program import identity
from flame.kernel.values import Value, cast
from flame.ops.arithmetic import true_divide
from flame.ops.conversion import convert
from flame.ops.elementwise import compute_dtype, floating
from flame.ops.loops import by_stride
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Op, Sample, Types, Vjp
from flame.ops.schedules import across_parts, column_parts, on_gpu, part_step, row_parts
from flame.ops.shapes import reshape, wrap_dims
from flame.ops.views import ViewOp

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["mean", "sum"]
METHODS = ("sum", "mean")

COLUMNS = 64  # columns that one step of a parallel loop sums together
SPLIT = 65536  # elements of one result from which its reduction is split over threads
CHUNK = 16384  # elements of a part of a split reduction


@dataclass(frozen=True)
class Plan:
    """A reduction's loops: kept and reduced dimensions after coalescing, outermost first."""

    sizes: Shape
    source: Shape  # strides of the input
    target: Shape  # strides of the output, 0 in reduced dimensions
    reduced: tuple[bool, ...]


def _coalesce(x: TensorType, dims: Sequence[int], kept_strides: Shape) -> Plan:
    sizes: list[int] = []
    source: list[int] = []
    target: list[int] = []
    reduced: list[bool] = []
    for axis in by_stride(x.strides, x.shape):
        size, step, out = x.shape[axis], x.strides[axis], kept_strides[axis]
        gone = axis in dims
        if size == 1:
            continue
        if (
            sizes
            and reduced[-1] == gone
            and source[-1] == step * size
            and (gone or target[-1] == out * size)
        ):
            sizes[-1] *= size
            source[-1], target[-1] = step, out
        else:
            sizes.append(size)
            source.append(step)
            target.append(out)
            reduced.append(gone)
    return Plan(tuple(sizes), tuple(source), tuple(target), tuple(reduced))


def _parts(plan: Plan, out: TensorType, count: int, kept: int) -> int:
    """About how many parts a reduction is cut into, each summed by itself; 1: none."""
    if not on_gpu(out):
        return 2 if count >= SPLIT and kept <= COLUMNS else 1
    if not out.numel or True not in plan.reduced:
        return 1
    if not plan.reduced[-1]:
        return column_parts(count, kept)
    return row_parts(count, kept)


class Reduction(Op):
    """An op that folds ``prepare(x)`` by ``combine`` and stores ``finish(total, count)``."""

    def __init__(
        self,
        name: str,
        combine: str,
        *,
        vjp: Vjp,
        reference: Callable[..., Any],
        result: Callable[[DType], DType],
        prepare: Callable[[Value], Value] | None = None,
        finish: Callable[[Value, Value], Value] | None = None,
        empty: bool = True,
        samples: Sequence[Sample] | None = None,
        autocast: Policy | None = None,
    ) -> None:
        self.combine, self.prepare, self.finish = combine, prepare, finish
        self.result, self.empty = result, empty
        super().__init__(
            name,
            inputs=("x",),
            infer=self._infer,
            lower=self._lower,
            vjp=vjp,
            reference=lambda x, *, dims, keepdim: reference(x, axis=dims, keepdims=keepdim),
            samples=_samples(empty) if samples is None else samples,
            autocast=autocast,
        )

    def _infer(self, types: Types, *, dims: tuple[int, ...], keepdim: bool) -> TensorType:
        (x,) = types
        assert isinstance(x, TensorType)
        if not self.empty and any(x.shape[d] == 0 for d in dims):
            raise ShapeError(
                f"{self.name} over an empty dimension of shape {x.shape} has no value; "
                "reduce over dimensions that have elements"
            )
        return tensor_type(self.result(x.dtype), kept_shape(x.shape, dims, keepdim), None, x.device)

    def _lower(
        self, types: Types, outputs: tuple[TensorType, ...], *, dims: tuple[int, ...], keepdim: bool
    ) -> Lowering:
        (x,), (out,) = types, outputs
        assert isinstance(x, TensorType)
        count = math.prod(x.shape[d] for d in dims)
        strides = _spread(out.strides, x.ndim, dims, keepdim)
        plan = _coalesce(x, dims, strides)
        total = self.total_dtype(x.dtype, out.dtype)
        kept = math.prod(s for s, r in zip(plan.sizes, plan.reduced, strict=True) if not r)
        parts = _parts(plan, out, count, kept)
        if parts > 1:
            return self._split(x, out, plan, total, count, parts)
        k = KernelBuilder(self.name)
        source = k.tensor("input", 0, _flat(x.dtype, plan.sizes, plan.source))
        target = k.tensor("output", 0, _flat(out.dtype, plan.sizes, plan.target))
        size = k.size(count)
        self._loops(
            k,
            plan,
            source,
            total,
            lambda index, v: k.store(target, index, self.finished(v, size, out.dtype)),
            self.prepared(x.dtype, total),
        )
        return k.finish()

    def total_dtype(self, source: DType, result: DType) -> DType:
        if self.combine in ("max", "min") or source.kind == "b":
            return (
                compute_dtype(source) if self.combine in ("max", "min") else compute_dtype(result)
            )
        return compute_dtype(result)

    def prepared(self, source: DType, total: DType) -> Callable[[Value], Value]:
        def prepared(v: Value) -> Value:
            v = cast(v, compute_dtype(source))
            return cast(v if self.prepare is None else self.prepare(v), total)

        return prepared

    def finished(self, value: Value, count: Value, dtype: DType) -> Value:
        if self.finish is not None:
            value = self.finish(value, cast(count, value.dtype))
        return cast(value, dtype)

    def _split(
        self, x: TensorType, out: TensorType, plan: Plan, total: DType, count: int, parts: int
    ) -> Lowering:
        """Two kernels: parts along the longest reduced dimension, then the sum of the parts."""
        folded = [i for i, r in enumerate(plan.reduced) if r]
        axis, gpu = max(folded, key=lambda i: plan.sizes[i]), on_gpu(out)
        if gpu and axis == len(plan.sizes) - 1:  # whole runs of memory, where others are enough
            axis = next((i for i in folded if plan.sizes[i] >= parts), axis)
        size = plan.sizes[axis]
        step = part_step(size, parts) if gpu else max(1, CHUNK * size // count)
        parts = -(-size // step)
        kept = [i for i, r in enumerate(plan.reduced) if not r]
        kept_sizes = tuple(plan.sizes[i] for i in kept)
        side_by_side = across_parts(parts, kept_sizes) if gpu else None
        partial = tensor_type(total, (parts, *kept_sizes), side_by_side)
        first = KernelBuilder(f"{self.name}_parts")
        source = first.tensor("input", 0, _flat(x.dtype, plan.sizes, plan.source))
        target = first.tensor("temporary", 0, partial)
        self._part_loops(
            first,
            plan,
            source,
            target,
            total,
            axis,
            step,
            parts,
            kept,
            self.prepared(x.dtype, total),
            COLUMNS if gpu else plan.sizes[-1],
        )
        second = KernelBuilder(f"{self.name}_total")
        kept_target = tuple(plan.target[i] for i in kept)
        rest = Plan(
            partial.shape, partial.strides, (0, *kept_target), (True, *(False for _ in kept))
        )
        if gpu:  # the parts of a result lie side by side
            rest = Plan(
                (*kept_sizes, parts),
                (*partial.strides[1:], 1),
                (*kept_target, 0),
                (*(False for _ in kept), True),
            )
        source = second.tensor("temporary", 0, _flat(total, rest.sizes, rest.source))
        result = second.tensor("output", 0, _flat(out.dtype, rest.sizes, rest.target))
        whole = second.size(count)
        self._loops(
            second,
            rest,
            source,
            total,
            lambda index, v: second.store(result, index, self.finished(v, whole, out.dtype)),
            lambda v: v,
        )
        return Lowering((first.bind(), second.bind()), (partial.numel * total.itemsize,))

    def _part_loops(
        self,
        k: KernelBuilder,
        plan: Plan,
        source: Operand,
        target: Operand,
        total: DType,
        axis: int,
        step: int,
        parts: int,
        kept: list[int],
        prepared: Callable[[Value], Value],
        across: int,
    ) -> None:
        """For each part: the loops of `_loops` over a range of dimension ``axis``.

        across: columns that one step takes.
        """
        last = len(plan.sizes) - 1
        width = k.size(step)
        size = k.size(plan.sizes[axis])
        extents = {i: k.size(s) for i, s in enumerate(plan.sizes)}
        inner_kept = not plan.reduced[last]
        outer_kept = [i for i in kept if not (inner_kept and i == last)]
        blocks = -(-plan.sizes[last] // across) if inner_kept else 1
        outer_sizes = [plan.sizes[i] for i in outer_kept]
        cut = [blocks] if blocks > 1 else []
        with k.parallel(parts, *outer_sizes, *cut, work=CHUNK) as (part, *outer):
            begin = part * width
            extents[axis] = values.binary("min", size - begin, width)
            known = dict(zip(outer_kept, outer, strict=False))
            first = values.const(0)
            if cut:
                first = outer[-1] * across
                rest = extents[last] - first
                extents[last] = values.binary("min", rest, values.const(across))

            def fold(accumulate: Callable[[Value], None], fixed: dict[int, Value]) -> None:
                loops = [i for i, r in enumerate(plan.reduced) if r]
                vector = loops.pop() if not inner_kept else None
                with k.nest([extents[i] for i in loops]) as counters:
                    place = {**fixed, **dict(zip(loops, counters, strict=True))}
                    if vector is None:
                        accumulate(prepared(source[_place(place, axis, begin, last)]))
                        return
                    with k.vector(extents[vector], 4) as v:
                        place[vector] = v
                        accumulate(prepared(source[_place(place, axis, begin, last)]))

            neutral = values.const(identity(self.combine, total), total)
            if inner_kept:
                with k.vector(extents[last], 4) as column:
                    acc = k.register(neutral)
                    place = {**known, last: first + column}
                    fold(lambda v: k.accumulate(acc, self.combine, v), place)
                    k.store(target, (part, *(place[i] for i in kept)), values.read(acc))
            else:
                acc = k.register(neutral)
                fold(lambda v: k.accumulate(acc, self.combine, v), known)
                k.store(target, (part, *(known[i] for i in kept)), values.read(acc))

    def _loops(
        self,
        k: KernelBuilder,
        plan: Plan,
        source: Operand,
        total: DType,
        store: Callable[[tuple[Value, ...], Value], None],
        prepared: Callable[[Value], Value],
    ) -> None:
        """Fold all reduced dimensions for each kept index."""
        rank = len(plan.sizes)
        neutral = values.const(identity(self.combine, total), total)
        kept = [i for i in range(rank) if not plan.reduced[i]]
        folded = [i for i in range(rank) if plan.reduced[i]]
        work = math.prod(plan.sizes[i] for i in folded)
        if rank and not plan.reduced[-1]:
            self._columns(k, plan, source, store, prepared, neutral, kept, folded, work)
            return
        with k.parallel(*(plan.sizes[i] for i in kept), work=work) as outer:
            place = dict(zip(kept, outer, strict=True)) if kept else {}
            acc = k.register(neutral)
            if not folded:
                k.accumulate(acc, self.combine, prepared(source[_index(place, rank)]))
            else:
                *serial, vector = folded
                with k.nest([k.size(plan.sizes[i]) for i in serial]) as counters:
                    place.update(zip(serial, counters, strict=True))
                    with k.vector(k.size(plan.sizes[vector]), 4) as v:
                        place[vector] = v
                        k.accumulate(acc, self.combine, prepared(source[_index(place, rank)]))
            place.update(dict.fromkeys(folded, values.const(0)))
            store(_index(place, rank), values.read(acc))

    def _columns(
        self,
        k: KernelBuilder,
        plan: Plan,
        source: Operand,
        store: Callable[[tuple[Value, ...], Value], None],
        prepared: Callable[[Value], Value],
        neutral: Value,
        kept: list[int],
        folded: list[int],
        work: int,
    ) -> None:
        """The innermost dimension is kept: blocks of columns side by side in vectors."""
        rank, width = len(plan.sizes), plan.sizes[-1]
        outer_kept = kept[:-1]
        blocks = -(-width // COLUMNS)
        extents = [plan.sizes[i] for i in outer_kept]
        with k.parallel(*extents, blocks, work=work * COLUMNS) as (*outer, block):
            start = block * COLUMNS
            extent = values.binary("min", k.size(width) - start, values.const(COLUMNS))
            with k.vector(extent, 4) as v:
                place = dict(zip(outer_kept, outer, strict=True))
                place[rank - 1] = start + v
                acc = k.register(neutral)
                with k.nest([k.size(plan.sizes[i]) for i in folded]) as counters:
                    place.update(zip(folded, counters, strict=True))
                    k.accumulate(acc, self.combine, prepared(source[_index(place, rank)]))
                place.update(dict.fromkeys(folded, values.const(0)))
                store(_index(place, rank), values.read(acc))


def _index(place: dict[int, Value], rank: int) -> tuple[Value, ...]:
    return tuple(place[i] for i in range(rank))


def _place(place: dict[int, Value], axis: int, begin: Value, last: int) -> tuple[Value, ...]:
    return tuple(place[i] + begin if i == axis else place[i] for i in range(last + 1))


def _flat(dtype: DType, sizes: Shape, strides: Shape) -> TensorType:
    return tensor_type(dtype, sizes, strides)


def _spread(strides: Shape, rank: int, dims: Sequence[int], keepdim: bool) -> Shape:
    """The output's strides for the input's dimensions, 0 in the reduced ones."""
    if keepdim:
        return tuple(0 if d in dims else strides[d] for d in range(rank))
    rest = iter(strides)
    return tuple(0 if d in dims else next(rest) for d in range(rank))


def kept_shape(shape: Shape, dims: Sequence[int], keepdim: bool) -> Shape:
    """The shape after reducing ``dims``."""
    if keepdim:
        return tuple(1 if d in dims else s for d, s in enumerate(shape))
    return tuple(s for d, s in enumerate(shape) if d not in dims)


def _samples(empty: bool) -> list[Sample]:
    def sample(shape: Shape, dims: tuple[int, ...], keepdim: bool) -> Sample:
        arg = Arg(shape, -2.0, 2.0, distinct=True)
        return Sample((arg,), {"dims": dims, "keepdim": keepdim})

    found = [
        sample((5, 7), (1,), False),
        sample((5, 7), (0,), True),
        sample((2, 3, 4), (0, 2), False),
        sample((2, 3, 4, 5), (0, 2, 3), True),
        sample((), (), False),
        sample((3, 70), (0, 1), False),
        sample((0, 3), (1,), False),
    ]
    return [*found, sample((0, 3), (0,), False), sample((2, 0), (1,), True)] if empty else found


def restore(g: Any, x_type: TensorType, dims: tuple[int, ...], keepdim: bool) -> Any:
    """A reduced tensor with its reduced dimensions back at size 1."""
    return g if keepdim else reshape(g, kept_shape(x_type.shape, dims, True))


def _spread_view(
    types: Types, *, shape: Shape, dims: tuple[int, ...], keepdim: bool
) -> tuple[TensorType, int]:
    """A reduced tensor seen with the shape before the reduction: stride 0 in the reduced dims."""
    (g,) = types
    assert isinstance(g, TensorType)
    strides = _spread(g.strides, len(shape), dims, keepdim)
    return tensor_type(g.dtype, shape, strides, g.device), 0


def _spread_reference(x: Any, *, shape: Shape, dims: tuple[int, ...], keepdim: bool) -> Any:
    return np.broadcast_to(np.reshape(x, kept_shape(shape, dims, True)), shape)


spread = ViewOp(
    "spread",
    _spread_view,
    vjp=(lambda g, dims, keepdim: _sum(g, dims=dims, keepdim=keepdim),),
    reference=_spread_reference,
    samples=[
        Sample((Arg((3,)),), {"shape": (3, 4), "dims": (1,), "keepdim": False}),
        Sample((Arg((1, 4)),), {"shape": (3, 4), "dims": (0,), "keepdim": True}),
        Sample((Arg(()),), {"shape": (2, 0), "dims": (0, 1), "keepdim": False}),
    ],
)


def _sum_dtype(dtype: DType) -> DType:
    return dtype if dtype.kind == "f" else dtypes.int64


def _bool(dtype: DType) -> DType:
    return dtypes.bool_


_sum: Reduction = Reduction(
    "sum",
    "add",
    result=_sum_dtype,
    vjp=(
        lambda g, x_type, dims, keepdim: spread(g, shape=x_type.shape, dims=dims, keepdim=keepdim),
    ),
    reference=np.sum,
    autocast="float32",
)

_mean = Reduction(
    "mean",
    "add",
    result=floating,
    finish=lambda total, count: total / count,
    vjp=(
        lambda g, x_type, dims, keepdim: spread(
            true_divide(g, max(1, math.prod(x_type.shape[d] for d in dims))),
            shape=x_type.shape,
            dims=dims,
            keepdim=keepdim,
        ),
    ),
    reference=lambda x, axis, keepdims: np.mean(x, axis=axis, keepdims=keepdims),
    samples=_samples(empty=False),
)

_any = Reduction(
    "any",
    "or",
    result=_bool,
    prepare=lambda v: cast(v, dtypes.bool_),
    vjp=NOT_DIFFERENTIABLE,
    reference=np.any,
)
_all = Reduction(
    "all",
    "and",
    result=_bool,
    prepare=lambda v: cast(v, dtypes.bool_),
    vjp=NOT_DIFFERENTIABLE,
    reference=np.all,
)


def dims_of(name: str, input: Tensor, dim: Any) -> tuple[int, ...]:
    """The dimensions to reduce: all for None or an empty list."""
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return tuple(range(input.ndim))
    found = wrap_dims(name, dim, input.ndim)
    return found if input.ndim else ()


def sum(
    input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: DType | None = None
) -> Tensor:
    """Sum over ``dim`` (all dimensions by default); integers give int64, or ``dtype``."""
    if dtype is not None:
        made: Tensor = plain(sum, convert(input, dtype=dtype), dim, keepdim)
        return made.to(dtype)
    result: Tensor = _sum(input, dims=dims_of("sum", input, dim), keepdim=keepdim)
    return result


def mean(
    input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: DType | None = None
) -> Tensor:
    """Mean over ``dim`` (all dimensions by default); NaN where there is nothing to average."""
    if dtype is not None:
        input = convert(input, dtype=dtype)
    result: Tensor = _mean(input, dims=dims_of("mean", input, dim), keepdim=keepdim)
    return result


def sum_to(input: Any, shape: Shape) -> Any:
    """Sum away what broadcasting to ``input``'s shape has added to ``shape``."""
    missing = input.ndim - len(shape)
    dims = tuple(range(missing)) + tuple(
        d for d in range(missing, input.ndim) if shape[d - missing] == 1 and input.shape[d] != 1
    )
    if not dims:
        return input
    return reshape(_sum(input, dims=dims, keepdim=True), shape)
