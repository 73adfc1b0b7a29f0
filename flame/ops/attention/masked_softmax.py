"""Softmax of the masked scores of attention, for the paths that need the probabilities.

Invariant: masked entries are -inf before the softmax, never 0; a row that is masked throughout
gives 0, as PyTorch's attention does (its softmax gives NaN there).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flame.core import dtypes
from flame.core.errors import DTypeError, ShapeError
from flame.core.types import Shape, TensorType, contiguous_strides, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const
from flame.ops.elementwise import compute_dtype
from flame.ops.loops import broadcast_strides
from flame.ops.op import Arg, Joint, Op, Sample, Types
from flame.ops.rows import Index, RowLoops, rows_of, type_of
from flame.ops.softmax import softmax_backward


def _infer(types: Types, *, causal: bool) -> TensorType:
    x, mask = type_of(types[0]), types[1]
    if x.dtype.kind != "f" or x.ndim < 2:
        raise DTypeError(f"masked_softmax needs floating scores (..., L, S), got {x}")
    if mask is not None:
        mask = type_of(mask)
        if mask.dtype.kind not in "fb":
            raise DTypeError(
                f"attention: a mask must be bool or floating, got {mask.dtype.name}; compare it "
                "with 0 for a bool mask"
            )
        missing = x.ndim - mask.ndim
        if missing < 0 or any(
            m not in (1, s) for m, s in zip(mask.shape, x.shape[missing:], strict=True)
        ):
            raise ShapeError(
                f"attention: a mask of shape {mask.shape} does not broadcast to scores {x.shape}"
            )
    return tensor_type(x.dtype, x.shape, contiguous_strides(x.shape), x.device)


class _Scores:
    """The masked scores of a row, as the kernel sees them."""

    def __init__(self, types: Types, outputs: tuple[TensorType, ...], *, causal: bool) -> None:
        x, mask, out = type_of(types[0]), types[1], outputs[0]
        rank = x.ndim
        places = tuple(1 if d == rank - 2 else 0 for d in range(rank))  # counts query positions
        strides: list[Shape] = [broadcast_strides(x, x.shape), broadcast_strides(out, x.shape)]
        strides.append(places if causal else (0,) * rank)
        if mask is not None:
            strides.append(broadcast_strides(type_of(mask), x.shape))
        self.k = KernelBuilder("masked_softmax")
        self.compute = compute_dtype(x.dtype)
        self.rows = rows = rows_of(x.shape, (rank - 1,), strides)
        self.x = rows.operand(self.k, "input", 0, x.dtype, 0)
        self.mask: Operand | None = None
        if mask is not None:
            self.mask = rows.operand(self.k, "input", 1, type_of(mask).dtype, 3)
        self.out = rows.operand(self.k, "output", 0, out.dtype, 1)
        self.loops = RowLoops(self.k, rows)
        self.causal = causal
        self.length = self.k.size(x.shape[-1])
        self.steps = [self.k.stride(s) for s in rows.kept.strides[2]]

    def query(self, row: Index) -> Value:
        """The position of the row's query."""
        place = const(0)
        for counter, step in zip(row, self.steps, strict=True):
            place = place + counter * step
        return place

    def score(self, row: Index, index: Index) -> Value:
        """An element, -inf where it is masked."""
        nothing = const(-math.inf, self.compute)
        made = cast(self.x[index], self.compute)
        if self.mask is not None:
            given = self.mask[index]
            if self.mask.dtype is dtypes.bool_:
                made = values.select(given, made, nothing)
            else:
                made = made + cast(given, self.compute)
        if self.causal and self.rows.columns:
            key = index[-1] if self.rows.row.sizes else const(0)
            made = values.select(values.compare("le", key, self.query(row)), made, nothing)
        return made

    def power(self, row: Index, index: Index, top: Value) -> Value:
        """exp(score - top); a masked lane takes no part, as numbers near underflow are slow."""
        score = self.score(row, index)
        if self.mask is None and not self.causal:
            return values.unary("exp", score - top)
        masked = values.compare("eq", score, const(-math.inf, self.compute))
        zero = const(0.0, self.compute)
        made = values.unary("exp", values.select(masked, zero, score - top))
        return values.select(masked, zero, made)


def _lower(types: Types, outputs: tuple[TensorType, ...], *, causal: bool) -> Lowering:
    """As softmax; of a causal row that lies along memory, only the allowed part is visited."""
    s = _Scores(types, outputs, causal=causal)
    k, loops = s.k, s.loops
    exact = outputs[0].dtype is s.compute
    with loops.each_row(passes=8) as row:
        limit = None
        if causal and not s.rows.columns and s.rows.row.sizes:
            limit = values.binary("min", s.query(row) + 1, s.length)
        peak = k.register(-math.inf, s.compute)
        with loops.each(row, limit) as index:
            k.accumulate(peak, "max", s.score(row, index))
        top = values.read(peak)
        empty = values.compare("eq", top, const(-math.inf, s.compute))
        top = values.select(empty, const(0.0, s.compute), top)
        total = k.register(0.0, s.compute)
        with loops.each(row, limit) as index:
            power = s.power(row, index, top)
            if exact:
                k.store(s.out, index, power)
            k.accumulate(total, "add", power)
        one = const(1.0, s.compute)
        factor = one / values.select(empty, one, values.read(total))
        with loops.each(row, limit) as index:
            power = s.out[index] if exact else s.power(row, index, top)
            k.store(s.out, index, power * factor)
        if limit is not None:
            with k.vector(s.length - limit, loops.unroll) as rest:
                k.store(s.out, (*row, limit + rest), const(0.0, s.compute))
    return k.finish()


def _reference(x: Any, mask: Any, *, causal: bool) -> Any:
    wide = np.asarray(x, np.float64)
    if mask is not None:
        wide = np.where(mask, wide, -np.inf) if mask.dtype == bool else wide + mask
    if causal:
        wide = np.where(np.tril(np.ones(x.shape[-2:], bool)), wide, -np.inf)
    peak = wide.max(axis=-1, keepdims=True, initial=-np.inf)
    power = np.exp(wide - np.where(np.isfinite(peak), peak, 0.0))
    total = power.sum(axis=-1, keepdims=True)
    return power / np.where(total == 0, 1, total)


def _gradient(g: Any, out: Any, needs: Any) -> tuple[Any, Any]:
    made = softmax_backward(g, out, dim=out.ndim - 1)
    return made, made if needs[1] else None


masked_softmax = Op(
    "masked_softmax", inputs=("x", "mask"), infer=_infer, lower=_lower, vjp=Joint(_gradient),
    reference=_reference,
    samples=[
        Sample((Arg((5, 7)), None), {"causal": True}),
        Sample((Arg((7, 3)), None), {"causal": True}),
        Sample((Arg((2, 3, 4, 70)), None), {"causal": True}),
        Sample((Arg((2, 3, 5)), Arg((3, 5))), {"causal": False}),
        Sample((Arg((2, 3, 5)), Arg((2, 1, 5), kind="bool")), {"causal": False}),
        Sample((Arg((2, 4, 4)), Arg((4,))), {"causal": True}),
        Sample((Arg((0, 3, 4)), None), {"causal": True}),
        Sample((Arg((3, 1)), None), {"causal": False}),
    ],
)  # fmt: skip
