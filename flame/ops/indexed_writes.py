"""put_at and combine_at: writing where index tensors say. See `flame.ops.indexed`.

Invariant: writes that can collide run one after the other in row-major order of the indices, so the
result is the same on every run and with any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flame.core import dtypes
from flame.core.errors import ShapeError
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const
from flame.ops.elementwise import compute_dtype, nest_of, walk
from flame.ops.indexed import (
    Check,
    at_coordinates,
    check_types,
    direct_steps,
    error_slot,
    failure,
    index_arg,
    indexed_dims,
    take_at,
)  # fmt: skip
from flame.ops.loops import by_stride, coalesce
from flame.ops.op import Arg, Joint, Op, Sample, Types
from flame.ops.writes_cuda import lower_put_cuda

COLUMNS = 128  # elements of the fastest dimension that one step of a write handles


def _infer_put(
    types: Types, *, axes: tuple[int, ...], shape: Shape, combine: str, wrap: bool
) -> TensorType:
    x, source, *indices = types
    assert isinstance(source, TensorType)
    wanted = check_types("put_at", shape, indices, axes)
    if source.shape != wanted:
        raise ShapeError(f"put_at: values of shape {source.shape} where {wanted} are addressed")
    if isinstance(x, TensorType) and (x.shape != shape or x.dtype is not source.dtype):
        raise ShapeError(f"put_at: values {source} do not fit the tensor {x}")
    return tensor_type(source.dtype, shape, None, source.device)


def beginning(types: Types, outputs: tuple[TensorType, ...]) -> KernelBuilder:
    """The kernel that makes the result a copy of x, or zeros."""
    x, (out,) = types[0], outputs
    k = KernelBuilder("put_at_start")
    given = isinstance(x, TensorType)
    nest = nest_of((x,) if given else (), outputs)
    if isinstance(x, TensorType):
        source = k.tensor("input", 0, tensor_type(x.dtype, nest.sizes, nest.strides[0]))
    target = k.tensor("output", 0, tensor_type(out.dtype, nest.sizes, nest.strides[-1]))
    walk(
        k, nest,
        lambda index: k.store(target, index, source[index] if given else const(0, out.dtype)),
        light=True, device=out.device,
    )  # fmt: skip
    return k


def _combined(combine: str, old: Value, new: Value) -> Value:
    if combine == "set":
        return new
    if old.dtype.kind == "b":  # or, and
        return values.binary("max" if combine in ("add", "max") else "min", old, new)
    wide = compute_dtype(old.dtype)
    return cast(values.binary(combine, cast(old, wide), cast(new, wide)), old.dtype)


def _lower_put(
    types: Types, outputs: tuple[TensorType, ...],
    *, axes: tuple[int, ...], shape: Shape, combine: str, wrap: bool,
) -> Lowering:  # fmt: skip
    source_type, (out,) = types[1], outputs
    assert isinstance(source_type, TensorType)
    indices = [t for t in types[2:] if isinstance(t, TensorType)]
    if not source_type.numel:
        return Lowering((beginning(types, outputs).bind(),))
    rank, extents = source_type.ndim, source_type.shape
    direct = direct_steps(out, rank, axes)
    steps = [source_type.strides, direct, *(i.strides for i in indices)]
    # Different indices of these loops write different elements, so they may run side by side.
    outer = coalesce(extents, steps, [d for d in by_stride(direct, extents) if d in axes])
    inner = coalesce(extents, steps, [d for d in range(rank) if d not in axes])
    sizes = (*outer.sizes, *inner.sizes)
    strides = [(*a, *b) for a, b in zip(outer.strides, inner.strides, strict=True)]
    k = KernelBuilder("put_at")
    source = k.tensor("input", 1, tensor_type(source_type.dtype, sizes, strides[0]))
    found = [
        k.tensor("input", n + 2, tensor_type(i.dtype, sizes, strides[n + 2]))
        for n, i in enumerate(indices)
    ]
    target = k.tensor("output", 0, tensor_type(out.dtype, sizes, strides[1]))
    error = error_slot(k)
    addressed = indexed_dims(axes, len(indices))
    limits = [k.size(out.shape[a]) for a in addressed]
    jumps = [k.stride(out.strides[a]) for a in addressed]
    counts = [k.size(s) for s in inner.sizes]
    last = len(outer.sizes) - 1

    def write(index: tuple[Value, ...], known: Any, guarded: Value | None) -> None:
        at = target.at(index) + known[0]
        old = values.load(target.buffer, at, guarded)
        k.store(_At(target, at), (), _combined(combine, old, source[index]), where=guarded)

    def offset_at(check: Check, index: tuple[Value, ...]) -> tuple[Value, Value]:
        return check.offset([cast(f[index], dtypes.int64) for f in found], jumps)

    if last < 0 or strides[1][last] != 1:  # no dimension to write along in vectors
        with k.parallel(*outer.sizes, work=math.prod(inner.sizes)) as before:
            check = Check(k, error, limits, wrap)
            with k.nest(counts) as after:
                index = (*(before if outer.sizes else ()), *after)
                known = offset_at(check, index)
                with k.when(known[1]):
                    write(index, known, None)
            check.report()
        return Lowering((beginning(types, outputs).bind(), k.bind()))
    width = outer.sizes[-1]
    work = math.prod(inner.sizes) * min(width, COLUMNS)
    with k.parallel(*outer.sizes[:-1], -(-width // COLUMNS), work=work) as (*rows, block):
        check = Check(k, error, limits, wrap)
        start = block * COLUMNS
        extent = values.binary("min", k.size(width) - start, const(COLUMNS))
        with k.nest(counts) as after:
            if any(s[last] for s in strides[2:]):
                with k.vector(extent) as v:
                    index = (*rows, start + v, *after)
                    known = offset_at(check, index)
                    write(index, known, known[1])
            else:
                known = offset_at(check, (*rows, const(0), *after))
                with k.when(known[1]), k.vector(extent, 4) as v:
                    write((*rows, start + v, *after), known, None)
        check.report()
    return Lowering((beginning(types, outputs).bind(), k.bind()))


def _lower_put_on_gpu(
    types: Types, outputs: tuple[TensorType, ...],
    *, axes: tuple[int, ...], shape: Shape, combine: str, wrap: bool,
) -> Lowering:  # fmt: skip
    attributes: dict[str, Any] = {"axes": axes, "combine": combine, "wrap": wrap}
    return lower_put_cuda(
        types, outputs, lambda: _lower_put(types, outputs, shape=shape, **attributes),
        lambda: beginning(types, outputs).bind(), **attributes,
    )  # fmt: skip


class _At(Operand):
    """The element of an operand at a computed offset."""

    def __init__(self, operand: Operand, offset: Value) -> None:
        super().__init__(operand.buffer, (), ())
        self.offset = offset

    def at(self, index: Sequence[Value]) -> Value:
        return self.offset


_UFUNCS = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def _put_reference(
    x: Any, source: Any, *indices: Any,
    axes: tuple[int, ...], shape: Shape, combine: str, wrap: bool,
) -> Any:  # fmt: skip
    out = np.zeros(shape, source.dtype) if x is None else np.array(x)
    place = at_coordinates(indices, axes)
    if combine == "set":
        for at in np.ndindex(source.shape):
            out[tuple(p[at] for p in place)] = source[at]
    else:
        wide = out.astype(np.float64) if out.dtype.kind not in "biu" else out
        _UFUNCS[combine].at(wide, place, source.astype(wide.dtype))
        out = wide.astype(out.dtype)
    return out


def _put_vjp(
    g: Any, source_type: TensorType, indices: Any, axes: tuple[int, ...], shape: Shape,
    combine: str, wrap: bool, needs: Any,
) -> Any:  # fmt: skip
    from flame.ops.creation import zeros
    from flame.ops.shapes import expand

    to_x = to_source = None
    if needs[0]:
        to_x = g
        if combine == "set":
            nothing = expand(zeros((), dtype=g.dtype, device=g.device), source_type.shape)
            to_x = put_at(g, nothing, *indices, axes=axes, shape=shape, combine="set", wrap=wrap)
    if needs[1]:
        to_source = take_at(g, *indices, axes=axes, wrap=wrap)
    return (to_x, to_source, *(None for _ in indices))


# Where "set" writes an element twice, the gradient goes to both values, as in PyTorch, while finite
# differences see the last only. So in these samples it writes each element once.
_WRITES: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (
        (Arg((4, 3)), Arg((5, 3)), index_arg(5, 3)),
        {"axes": (-1, 1), "shape": (4, 3), "combine": "add"},
    ),
    (
        (Arg((3, 4)), Arg((5, 3)), index_arg(5, 3)),
        {"axes": (1, -1), "shape": (3, 4), "combine": "add"},
    ),
    ((None, Arg((5, 70)), index_arg(5, 70)), {"axes": (-1, 1), "shape": (4, 70), "combine": "add"}),
    (
        (None, Arg((2, 6)), index_arg(2, 6, low=-4)),
        {"axes": (0, -1), "shape": (3, 4), "combine": "add", "wrap": True},
    ),
    (
        (Arg((9,)), Arg((2, 3)), index_arg(2, 3, high=9)),
        {"axes": (-1,), "shape": (9,), "combine": "add"},
    ),
    (
        (Arg((4, 3)), Arg((1, 3)), index_arg(1, 3)),
        {"axes": (-1, 1), "shape": (4, 3), "combine": "set"},
    ),
    ((Arg((4,)), Arg(()), index_arg()), {"axes": (-1,), "shape": (4,), "combine": "set"}),
    (
        (Arg((4, 3)), Arg((0, 3)), index_arg(0, 3)),
        {"axes": (-1, 1), "shape": (4, 3), "combine": "set"},
    ),
]

put_at = Op(
    "put_at",
    inputs=("x", "source", "*indices"),
    infer=_infer_put,
    lower=_lower_put,
    lower_cuda=_lower_put_on_gpu,
    vjp=Joint(_put_vjp),
    reference=_put_reference,
    samples=[Sample(inputs, {"wrap": False, **attributes}) for inputs, attributes in _WRITES],
    failure=failure,
    updates=True,
)


def _reduce_vjp(
    g: Any, out: Any, x: Any, source: Any, indices: Any, axes: tuple[int, ...], shape: Shape,
    combine: str, wrap: bool, needs: Any,
) -> Any:  # fmt: skip
    """Extremes share the gradient among those equal to the result; products leave each factor
    out."""

    def read(t: Any) -> Any:
        return take_at(t, *indices, axes=axes, wrap=wrap)

    def spread(t: Any, base: Any = None) -> Any:
        return put_at(base, t, *indices, axes=axes, shape=shape, combine="add", wrap=wrap)

    nothing = tuple(None for _ in indices)
    if combine == "mul":
        to_x, to_source = _product_gradients(
            g, x, source, read, spread, combine_at, indices, axes, wrap
        )
        return (to_x, to_source, *nothing)
    mine = (x == out).to(g.dtype)
    theirs = (source == read(out)).to(g.dtype)
    share = g / spread(theirs, mine)
    return (share * mine, read(share) * theirs, *nothing)


def _product_gradients(
    g: Any, x: Any, source: Any, read: Any, spread: Any, product: Any, indices: Any,
    axes: tuple[int, ...], wrap: bool,
) -> tuple[Any, Any]:  # fmt: skip
    """The gradient of a factor is g times the product of the others.

    The product of the factors that are not zero, over the factor, is right where none is zero. A
    zero among the others makes it zero; that zero stands in the formula by its value, so that the
    second derivative is right too.
    """
    zero_x, zero_source = (x == 0).to(g.dtype), (source == 0).to(g.dtype)
    whole_x, whole_source = x.masked_fill(x == 0, 1), source.masked_fill(source == 0, 1)
    rest = product(
        whole_x, whole_source, *indices, axes=axes, shape=x.shape, combine="mul", wrap=wrap
    )
    count, vanishing = spread(zero_source, zero_x), spread(source * zero_source, x * zero_x)
    none, one, two = ((count == n).to(g.dtype) for n in (0, 1, 2))

    def gradient(weight: Any, value: Any, whole: Any, zero: Any, at: Any) -> Any:
        beside = (1 - zero) * (at(none) + at(one) * at(vanishing))
        instead = zero * (at(one) + at(two) * (at(vanishing) - value))
        return weight / whole * (beside + instead)

    weight = g * rest
    return (
        gradient(weight, x, whole_x, zero_x, lambda t: t),
        gradient(read(weight), source, whole_source, zero_source, read),
    )


combine_at = Op(
    "combine_at",
    inputs=("x", "source", "*indices"),
    infer=_infer_put,
    lower=_lower_put,
    lower_cuda=_lower_put_on_gpu,
    vjp=Joint(_reduce_vjp),
    reference=_put_reference,
    samples=[
        Sample(
            (
                Arg((4, 3), 0.5, 2.0, distinct=True),
                Arg((5, 3), 0.6, 2.1, distinct=True),
                index_arg(5, 3),
            ),
            {"axes": (-1, 1), "shape": (4, 3), "combine": how, "wrap": False},
        )
        for how in ("mul", "max", "min")
    ],
    failure=failure,
    updates=True,
)
