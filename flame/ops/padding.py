"""F.pad: constant, reflect, replicate and circular borders; negative amounts crop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core import dtypes
from flame.core.errors import ArgumentError, ShapeError, UnsupportedError
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering
from flame.kernel.values import Value, cast, const
from flame.ops.creation import shape_of
from flame.ops.elementwise import compute_dtype
from flame.ops.op import Arg, Op, Sample, Types
from flame.ops.shapes import expand, slice_dim

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["constant_pad_nd"]


def _infer(types: Types, *, before: Shape, after: Shape) -> TensorType:
    x = types[0]
    assert isinstance(x, TensorType)
    shape = tuple(b + s + a for b, s, a in zip(before, x.shape, after, strict=True))
    return tensor_type(x.dtype, shape, None, x.device)


def _lower(
    types: Types, outputs: tuple[TensorType, ...], *, before: Shape, after: Shape
) -> Lowering:
    """One pass over the output: an element of x where there is one, else the value."""
    (x, number), (out,) = types, outputs
    assert isinstance(x, TensorType)
    assert isinstance(number, type)
    sizes, borders, lengths = out.shape, before, x.shape
    k = KernelBuilder("pad")
    source = k.tensor("input", 0, x)
    value = cast(cast(k.number(1, number), compute_dtype(x.dtype)), x.dtype)
    target = k.tensor("output", 0, out)
    starts = [k.size(b) for b in borders]
    limits = [k.size(n) for n in lengths]

    def within(i: int, place: Value) -> tuple[Value, Value]:
        at = place - starts[i]
        if not borders[i] and lengths[i] == sizes[i]:
            return at, const(True, dtypes.bool_)
        return at, (at >= 0) & (at < limits[i])

    width = sizes[-1]
    with k.parallel(*sizes[:-1], work=width) as outer:
        if len(sizes) == 1:
            outer = ()
        rows = [within(i, o) for i, o in enumerate(outer)]
        inside = const(True, dtypes.bool_)
        for _, fits in rows:
            inside = values.binary("and", inside, fits)
        with k.vector(k.size(width), 2) as v:
            at, fits = within(len(sizes) - 1, v)
            found = source.load(
                *(r for r, _ in rows), at, where=values.binary("and", inside, fits), otherwise=value
            )
            k.store(target, (*outer, v), found)
    return k.finish()


def _cropped(g: Any, before: Shape, after: Shape) -> Any:
    return _constant(g, 0, before=tuple(-b for b in before), after=tuple(-a for a in after))


def _reference(x: Any, value: Any, *, before: Shape, after: Shape) -> Any:
    amounts = list(zip(before, after, strict=True))
    grown = np.pad(x, [(max(b, 0), max(a, 0)) for b, a in amounts], constant_values=value)
    return grown[
        tuple(
            slice(max(-b, 0), max(-b, 0) + b + s + a)
            for (b, a), s in zip(amounts, x.shape, strict=True)
        )
    ]


_constant = Op(
    "pad", inputs=("x", "value"), infer=_infer, lower=_lower,
    vjp=(lambda g, before, after: _cropped(g, before, after), None),
    reference=_reference,
    samples=[Sample((Arg((3, 4)), 0.5), {"before": (1, 2), "after": (0, 3)}),
             Sample((Arg((2, 3, 40)), 0), {"before": (0, 1, 1), "after": (0, 1, 1)}),
             Sample((Arg((6,)), 1.0), {"before": (-2,), "after": (3,)}),
             Sample((Arg((0, 2)), 1), {"before": (1, 0), "after": (1, 0)}),
             Sample((Arg((4, 5)), 0), {"before": (-1, -2), "after": (-1, 0)})],
)  # fmt: skip


def constant_pad_nd(input: Tensor, pad: Any, value: Any = 0) -> Tensor:
    """``value`` in front of and behind the last dimensions; negative amounts crop."""
    before, after = _amounts("constant_pad_nd", input.shape, pad)
    if not input.ndim:
        return input.clone()
    for b, s, a in zip(before, input.shape, after, strict=True):
        if b + s + a < 0:
            raise ShapeError(f"pad: {tuple(pad)} crops more than {input.shape} has")
    result: Tensor = _constant(input, _plain(value), before=before, after=after)
    return result


def _plain(value: Any) -> Any:
    if value is None:
        return 0
    return value if isinstance(value, (bool, int, float)) else value.item()


def _amounts(name: str, shape: Shape, given: Any) -> tuple[Shape, Shape]:
    """Amounts in front and behind for each dimension, from pairs that begin with the last one."""
    pad = shape_of(given)
    if len(pad) % 2 or len(pad) // 2 > len(shape):
        raise ShapeError(
            f"{name}: {pad} must be pairs for at most the {len(shape)} dimensions of {shape}, "
            "the last dimension first"
        )
    before, after = [0] * len(shape), [0] * len(shape)
    for i in range(len(pad) // 2):
        before[-1 - i], after[-1 - i] = pad[2 * i], pad[2 * i + 1]
    return tuple(before), tuple(after)


def pad(input: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Tensor:
    """Borders around the last dimensions.

    pad: (front, behind) of the last dimension, then of the one before it, and so on; negative
    amounts crop. mode: "constant" (with ``value``), or for one to three last dimensions of a
    tensor with one or two more "reflect" (mirrored, the edge not repeated), "replicate" (the
    edge), "circular" (the other end).
    """
    if mode == "constant":
        return constant_pad_nd(input, pad, value)
    if mode not in ("reflect", "replicate", "circular"):
        raise UnsupportedError(
            f"pad: mode must be 'constant', 'reflect', 'replicate' or 'circular', got {mode!r}"
        )
    if value is not None and _plain(value) != 0:
        raise ArgumentError(f"pad: mode {mode!r} takes no value")
    before, after = _amounts("pad", input.shape, pad)
    count = len(shape_of(pad)) // 2
    if not 1 <= count <= 3 or input.ndim not in (count + 1, count + 2):
        raise UnsupportedError(
            f"pad: mode {mode!r} takes 2 amounts for 2 or 3 dimensions, 4 for 3 or 4, 6 for 4 "
            f"or 5; got "
            f"{tuple(shape_of(pad))} for shape {input.shape}"
        )
    if 0 in input.shape[1:]:
        raise ShapeError(f"pad: mode {mode!r} needs elements in all dimensions but the first")
    made = input
    for dim in reversed(range(input.ndim - count, input.ndim)):
        made = _border(made, mode, dim, before[dim], after[dim])
    return made.clone() if made is input else made


def _border(x: Tensor, mode: str, dim: int, front: int, behind: int) -> Tensor:
    """One dimension with borders copied from inside it."""
    from flame.ops.joining import cat
    from flame.ops.rearranging import flip

    size = x.shape[dim]
    most = {"reflect": size - 1, "circular": size, "replicate": front + behind + size}[mode]
    if front > most or behind > most:
        raise ShapeError(
            f"pad: borders of {front} and {behind} in mode {mode!r} need more than the {size} "
            f"entries "
            f"of dimension {dim}"
        )
    if size + front + behind <= 0:
        raise ShapeError(f"pad: borders of {front} and {behind} leave nothing of dimension {dim}")
    first, last = max(-front, 0), size - max(-behind, 0)
    middle = slice_dim(x, dim, first, last) if (first, last) != (0, size) else x
    if mode == "circular":  # what was cropped does not come in at the other end
        x, size = middle, last - first
    parts = []
    if front > 0:
        parts.append(_edge(x, mode, dim, front, size, flip, at_front=True))
    parts.append(middle)
    if behind > 0:
        parts.append(_edge(x, mode, dim, behind, size, flip, at_front=False))
    return cat(parts, dim) if len(parts) > 1 else middle


def _edge(
    x: Tensor, mode: str, dim: int, count: int, size: int, flip: Any, *, at_front: bool
) -> Tensor:
    if mode == "replicate":
        at = 0 if at_front else size - 1
        edge = slice_dim(x, dim, at, at + 1)
        return expand(edge, (*x.shape[:dim], count, *x.shape[dim + 1 :]))
    if mode == "circular":
        return slice_dim(x, dim, size - count, size) if at_front else slice_dim(x, dim, 0, count)
    start = 1 if at_front else size - 1 - count
    mirrored: Tensor = flip(slice_dim(x, dim, start, start + count), dim)
    return mirrored
