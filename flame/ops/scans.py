"""Scans: running sums, products, extremes along a dimension.

A loop carries the running value in a register; the other dimensions run side by side. The order of
combination is that of the entries, so a scan gives the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core import dtypes
from flame.core.autocast import plain
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError, ShapeError
from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.program import identity
from flame.kernel.values import Value, cast, const
from flame.ops.conversion import convert
from flame.ops.elementwise import compute_dtype
from flame.ops.loops import by_stride, coalesce
from flame.ops.op import Arg, Op, Sample, Types, Vjp
from flame.ops.scans_cuda import ADD, LAST_EXTREME, LOG_ADD_EXP, MULTIPLY, RECURRENCE, lower_scan
from flame.ops.shapes import reshape, slice_dim, wrap_dim

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["cummax", "cummin", "cumprod", "cumsum", "diff", "logcumsumexp"]
METHODS = __all__
IN_PLACE = ("cumprod", "cumsum")

BLOCK = 128  # neighbouring lines that one step of the parallel loop scans side by side

Step = Callable[[tuple[Value, ...], Value, tuple[Value, ...]], tuple[Value, ...]]


def scan_kernel(
    name: str, inputs: Types, outputs: tuple[TensorType, ...], dim: int, reverse: bool,
    start: tuple[Value, ...], step: Step, *, heavy: bool = False,
) -> Lowering:  # fmt: skip
    """Along ``dim`` of every line: state = step(elements, place, state), stored into the outputs.

    heavy: the step has so many instructions that vectors pay even where they must gather.
    """
    given = [t for t in inputs if isinstance(t, TensorType)]
    x = given[0]
    others = [d for d in by_stride(outputs[0].strides, x.shape) if d != dim]
    nest = coalesce(x.shape, [t.strides for t in (*given, *outputs)], others)
    sizes = (*nest.sizes, x.shape[dim])
    k = KernelBuilder(name)

    def operand(role: Any, position: int, t: TensorType, strides: tuple[int, ...]) -> Operand:
        return k.tensor(role, position, tensor_type(t.dtype, sizes, (*strides, t.strides[dim])))

    bound = iter(nest.strides)
    sources = [operand("input", i, t, next(bound)) for i, t in enumerate(given)]
    targets = [operand("output", i, t, next(bound)) for i, t in enumerate(outputs)]
    length = k.size(x.shape[dim])

    def line(index: tuple[Value, ...]) -> None:
        state = [k.register(s) for s in start]
        with k.loop(length) as i:
            at = length - 1 - i if reverse else i
            place = (*index, at)
            read = tuple(values.read(s) for s in state)
            now = step(tuple(_wide(s[place]) for s in sources), at, read)
            for register, value in zip(state, now, strict=True):
                k.assign(register, value)
            k.store_all([(t, place, values.read(s)) for t, s in zip(targets, state, strict=True)])

    along = x.strides[dim] == 1 and not heavy  # lines in memory order: vectors would gather
    if not nest.sizes or nest.sizes[-1] < 4 or along:
        with k.parallel(*nest.sizes, work=x.shape[dim] * 4) as index:
            line(tuple(index) if nest.sizes else ())
        return k.finish()
    width = nest.sizes[-1]
    blocks = -(-width // BLOCK)
    with k.parallel(*nest.sizes[:-1], blocks, work=x.shape[dim] * BLOCK) as (*outer, block):
        first = block * BLOCK
        extent = values.binary("min", k.size(width) - first, const(BLOCK))
        with k.vector(extent) as v:
            line((*outer, first + v))
    return k.finish()


def _sum_dtype(dtype: DType) -> DType:
    return dtype if dtype.kind == "f" else dtypes.int64


def _infer(types: Types, *, dim: int, reverse: bool = False) -> TensorType:
    x = types[0]
    assert isinstance(x, TensorType)
    return tensor_type(_sum_dtype(x.dtype), x.shape, None, x.device)


def _folding(name: str, combine: str) -> Callable[..., Lowering]:
    def lower(
        types: Types, outputs: tuple[TensorType, ...], *, dim: int, reverse: bool = False
    ) -> Lowering:
        wide = compute_dtype(outputs[0].dtype)
        return scan_kernel(
            name, types, outputs, dim, reverse, (const(identity(combine, wide), wide),),
            lambda v, _, state: (values.binary(combine, state[0], cast(v[0], wide)),),
        )  # fmt: skip

    return lower


def _on_gpu(operation: int, generic: Callable[..., Lowering]) -> Callable[..., Lowering]:
    """The lowering of a scan on a GPU; ``generic``: that of the CPU."""

    def lower(
        types: Types, outputs: tuple[TensorType, ...], *, dim: int, reverse: bool = False,
        **attributes: Any,
    ) -> Lowering:  # fmt: skip
        def slow() -> Lowering:
            given = attributes or {"reverse": reverse}
            return generic(types, outputs, dim=dim, **given)

        return lower_scan(
            operation, types, outputs, dim, slow, reverse=reverse,
            largest=attributes.get("largest", False),
        )  # fmt: skip

    return lower


def _wide(v: Value) -> Value:
    return cast(v, compute_dtype(v.dtype))


def _samples(low: float = -2.0, **attributes: Any) -> list[Sample]:
    return [Sample((Arg((5,), low),), {"dim": 0, **attributes}),
            Sample((Arg((4, 70), low),), {"dim": 0, **attributes}),
            Sample((Arg((3, 6, 5), low),), {"dim": 1, **attributes}),
            Sample((Arg((3, 9), low),), {"dim": 1, **attributes}),
            Sample((Arg((0, 3), low),), {"dim": 0, **attributes}),
            Sample((Arg((2, 1), low),), {"dim": 1, **attributes})]  # fmt: skip


def _running(function: Any) -> Callable[..., Any]:
    def reference(x: Any, *, dim: int, reverse: bool = False) -> Any:
        return np.flip(function(np.flip(x, dim), dim), dim) if reverse else function(x, dim)

    return reference


def _op(name: str, combine: str, vjp: Vjp, function: Any) -> Op:
    lower = _folding(name, combine)
    return Op(
        name, inputs=("x",), infer=_infer, lower=lower, vjp=vjp,
        lower_cuda=_on_gpu({"add": ADD, "mul": MULTIPLY}[combine], lower),
        reference=_running(function),
        samples=[*_samples(reverse=False), *_samples(reverse=True)[:3]], autocast="float32",
    )  # fmt: skip


_cumsum: Op = _op(
    "cumsum", "add",
    (lambda g, dim, reverse: _cumsum(g, dim=dim, reverse=not reverse),),
    np.cumsum,
)  # fmt: skip


def _neighbours(x: Any, dim: int, *, later: bool, fill: float) -> Any:
    """Each entry replaced by the next (or the previous) one along ``dim``; ``fill`` at the end."""
    from flame.ops.creation import full
    from flame.ops.joining import cat

    size = x.shape[dim]
    if not size:
        return x
    edge = full((), fill, dtype=x.dtype, device=x.device).expand(
        (*x.shape[:dim], 1, *x.shape[dim + 1 :])
    )
    kept = slice_dim(x, dim, 1, size) if later else slice_dim(x, dim, 0, size - 1)
    return cat([kept, edge] if later else [edge, kept], dim)


def _infer_recurrence(types: Types, *, dim: int, reverse: bool) -> TensorType:
    x, factor = types
    assert isinstance(x, TensorType)
    if not isinstance(factor, TensorType) or factor.shape != x.shape:
        raise ShapeError(f"recurrence: factors {factor} do not fit {x}")
    return tensor_type(x.dtype, x.shape, None, x.device)


def _lower_recurrence(
    types: Types, outputs: tuple[TensorType, ...], *, dim: int, reverse: bool
) -> Lowering:
    wide = compute_dtype(outputs[0].dtype)
    return scan_kernel(
        "recurrence", types, outputs, dim, reverse, (const(0, wide),),
        lambda v, at, state: (v[0] + cast(v[1], wide) * state[0],),
    )  # fmt: skip


def _recurrence_reference(x: Any, factor: Any, *, dim: int, reverse: bool) -> Any:
    out = np.moveaxis(np.zeros(x.shape, x.dtype), dim, 0)
    x, factor = np.moveaxis(x, dim, 0), np.moveaxis(factor, dim, 0)
    before = np.zeros(out.shape[1:], x.dtype)
    for i in reversed(range(len(x))) if reverse else range(len(x)):
        before = out[i] = x[i] + factor[i] * before
    return np.moveaxis(out, 0, dim)


recurrence: Op = Op(
    # y[i] = x[i] + factor[i] * y[i - 1] along dim (i + 1 where reversed), starting from 0
    "recurrence", inputs=("x", "factor"), infer=_infer_recurrence, lower=_lower_recurrence,
    lower_cuda=_on_gpu(RECURRENCE, _lower_recurrence),
    vjp=(
        lambda g, factor, dim, reverse: recurrence(
            g, _neighbours(factor, dim, later=not reverse, fill=0), dim=dim, reverse=not reverse
        ),
        lambda g, out, factor, dim, reverse: (
            recurrence(
                g, _neighbours(factor, dim, later=not reverse, fill=0), dim=dim, reverse=not reverse
            )
            * _neighbours(out, dim, later=reverse, fill=0)
        ),
    ),
    reference=_recurrence_reference,
    samples=[Sample((Arg(shape), Arg(shape)), {"dim": dim, "reverse": reverse})
             for shape, dim, reverse in (((6,), 0, False), ((5, 40), 0, True), ((3, 7), 1, False),
                                         ((0, 2), 0, False))],
)  # fmt: skip


def _cumprod_gradient(g: Any, x: Any, dim: int, reverse: bool) -> Any:
    """Entry i is a factor of all products from i on: the product of those before it, times
    g[i] + x[i+1] * (g[i+1] + x[i+2] * (...)). Nothing is divided, so zeros need no care."""
    factor = _neighbours(x, dim, later=not reverse, fill=0)
    behind = recurrence(g, factor, dim=dim, reverse=not reverse)
    before = _cumprod(_neighbours(x, dim, later=reverse, fill=1), dim=dim, reverse=reverse)
    return before * behind


_cumprod = _op("cumprod", "mul", (_cumprod_gradient,), np.cumprod)


# --- logcumsumexp ---------------------------------------------------------------------------------


def _lower_logcumsumexp(
    types: Types, outputs: tuple[TensorType, ...], *, dim: int, reverse: bool = False
) -> Lowering:
    """log(exp(a) + exp(x)) = m + log1p(exp(-|a - x|)) with m the larger of both."""
    wide = compute_dtype(outputs[0].dtype)

    def step(v: Any, _: Value, state: tuple[Value, ...]) -> tuple[Value, ...]:
        most, least = values.binary("max", state[0], v[0]), values.binary("min", state[0], v[0])
        gap = values.unary("log1p", values.unary("exp", least - most))
        endless = (least == float("-inf")) | (most == float("inf"))
        grown = values.select(endless, most, most + gap)
        return (values.select(values.unary("is_nan", most), most, grown),)

    return scan_kernel("logcumsumexp", types, outputs, dim, reverse,
                       (const(float("-inf"), wide),), step, heavy=True)  # fmt: skip


def _logcumsumexp_gradient(g: Any, out: Any, x: Any, dim: int, reverse: bool) -> Any:
    """sum over k >= i of g[k] * exp(x[i] - out[k]). As out grows along the scan, that is
    exp(x[i] - out[i]) times s[i] = g[i] + exp(out[i] - out[i+1]) * s[i+1], and no exp overflows."""
    from flame.ops.mathematics import exp

    endless = abs(out) == float("inf")
    following = _neighbours(out, dim, later=not reverse, fill=float("inf"))
    ratio = exp((out - following).masked_fill(endless, 0))
    total = recurrence(g, ratio, dim=dim, reverse=not reverse)
    return exp((x - out).masked_fill(endless & (x == out), 0)) * total


_logcumsumexp = Op(
    "logcumsumexp", inputs=("x",),
    infer=lambda types, *, dim, reverse=False: tensor_type(
        types[0].dtype, types[0].shape, None, types[0].device
    ),
    lower=_lower_logcumsumexp, lower_cuda=_on_gpu(LOG_ADD_EXP, _lower_logcumsumexp),
    vjp=(_logcumsumexp_gradient,),
    reference=_running(lambda x, dim: np.logaddexp.accumulate(x, dim) if x.size else x),
    samples=[*_samples(reverse=False), *_samples(reverse=True)[:2]],
)  # fmt: skip


# --- running extremes -----------------------------------------------------------------------------


def _infer_extreme(types: Types, *, dim: int, largest: bool) -> tuple[TensorType, TensorType]:
    x = types[0]
    assert isinstance(x, TensorType)
    return (
        tensor_type(x.dtype, x.shape, None, x.device),
        tensor_type(dtypes.int64, x.shape, None, x.device),
    )


def _lower_extreme(
    types: Types, outputs: tuple[TensorType, ...], *, dim: int, largest: bool
) -> Lowering:
    """The running extreme and where it stands: of equal ones the last; a NaN stays."""
    wide = compute_dtype(outputs[0].dtype)

    def step(v: Any, at: Value, state: tuple[Value, ...]) -> tuple[Value, ...]:
        best, where = state
        better = (at == 0) | (v[0] >= best if largest else v[0] <= best)
        if wide.kind == "f":
            better = better | values.unary("is_nan", v[0])
        return values.select(better, v[0], best), values.select(better, at, where)

    start = const(identity("max" if largest else "min", wide), wide)
    return scan_kernel("running_extreme", types, outputs, dim, False, (start, const(0)), step)


def _extreme_gradient(g: Any, out: Any, x_type: TensorType, dim: int) -> Any:
    from flame.ops.indexed_writes import put_at

    axes = (*range(dim), -1, *range(dim + 1, x_type.ndim))
    return put_at(None, g[0], out[1], axes=axes, shape=x_type.shape, combine="add", wrap=False)


def _extreme_reference(x: Any, *, dim: int, largest: bool) -> Any:
    best = (np.maximum if largest else np.minimum).accumulate(x, dim)
    counters = np.arange(x.shape[dim]).reshape((-1,) + (1,) * (x.ndim - dim - 1))
    return best, np.maximum.accumulate(np.where(x == best, counters, 0), dim)


_extreme = Op(
    "running_extreme", inputs=("x",), infer=_infer_extreme, lower=_lower_extreme,
    lower_cuda=_on_gpu(LAST_EXTREME, _lower_extreme),
    vjp=(_extreme_gradient,), reference=_extreme_reference,
    samples=[Sample((Arg(shape, distinct=True),), {"dim": dim, "largest": largest})
             for largest in (True, False)
             for shape, dim in (((6,), 0), ((5, 40), 0), ((3, 7), 1), ((0, 2), 1))],
)  # fmt: skip


# --- public ---------------------------------------------------------------------------------------


def _prepared(name: str, input: Tensor, dim: int) -> tuple[Tensor, int]:
    dim = wrap_dim(name, dim, input.ndim)
    return (input if input.ndim else reshape(input, (1,))), dim


def _back(made: Tensor, rank: int) -> Tensor:
    return made if rank else reshape(made, ())


def cumsum(input: Tensor, dim: int, *, dtype: DType | None = None) -> Tensor:
    """Running sum along ``dim``; integers give int64."""
    if dtype is not None:
        return convert(plain(cumsum, convert(input, dtype=dtype), dim), dtype=dtype)
    x, dim = _prepared("cumsum", input, dim)
    return _back(_cumsum(x, dim=dim, reverse=False), input.ndim)


def cumprod(input: Tensor, dim: int, *, dtype: DType | None = None) -> Tensor:
    """Running product along ``dim``; integers give int64."""
    if dtype is not None:
        return convert(plain(cumprod, convert(input, dtype=dtype), dim), dtype=dtype)
    x, dim = _prepared("cumprod", input, dim)
    return _back(_cumprod(x, dim=dim, reverse=False), input.ndim)


def logcumsumexp(input: Tensor, dim: int) -> Tensor:
    """log of the running sum of exp along ``dim``, without overflow."""
    if input.dtype.kind != "f":
        raise DTypeError(f"logcumsumexp needs a floating tensor, got {input.dtype.name}")
    x, dim = _prepared("logcumsumexp", input, dim)
    return _back(_logcumsumexp(x, dim=dim, reverse=False), input.ndim)


def _extremes(name: str, input: Tensor, dim: int, *, largest: bool) -> Any:
    from flame.ops.results import ValuesIndices

    x, dim = _prepared(name, input, dim)
    best, where = _extreme(x, dim=dim, largest=largest)
    return ValuesIndices(_back(best, input.ndim), _back(where, input.ndim))


def cummax(input: Tensor, dim: int) -> Any:
    """(values, indices) of the running maximum along ``dim``; of equal entries the last."""
    return _extremes("cummax", input, dim, largest=True)


def cummin(input: Tensor, dim: int) -> Any:
    """(values, indices) of the running minimum along ``dim``; of equal entries the last."""
    return _extremes("cummin", input, dim, largest=False)


def diff(
    input: Tensor, n: int = 1, dim: int = -1, prepend: Tensor | None = None,
    append: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Differences of neighbours along ``dim``, taken ``n`` times."""
    from flame.ops.joining import cat

    if not input.ndim:
        raise ShapeError("diff: at least one dimension is needed")
    if n < 0:
        raise ArgumentError(f"diff: n must not be negative, got {n}")
    dim = wrap_dim("diff", dim, input.ndim)
    if n == 0:
        return input
    parts = [p for p in (prepend, input, append) if p is not None]
    made = cat(parts, dim) if len(parts) > 1 else input
    for _ in range(min(n, made.shape[dim])):
        size = made.shape[dim]
        later, earlier = (
            slice_dim(made, dim, min(1, size), size),
            slice_dim(made, dim, 0, max(size - 1, 0)),
        )
        made = later ^ earlier if made.dtype is dtypes.bool_ else later - earlier
    return made
