"""Tensors laid into larger ones: place (the inverse of a strided view), cat, stack and their
kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError, ShapeError
from flame.core.handle import is_tensor
from flame.core.types import Shape, TensorType, ordered_strides, tensor_type
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const
from flame.ops.conversion import contiguous
from flame.ops.elementwise import common_dtype, compute_dtype, walk
from flame.ops.loops import by_stride, coalesce
from flame.ops.op import Arg, Joint, Op, Sample, Types, constant
from flame.ops.shapes import as_strided, expand, reshape, slice_dim, unsqueeze, wrap_dim

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "cat", "column_stack", "concat", "concatenate", "dstack", "hstack", "repeat_interleave",
    "row_stack", "stack", "tile", "vstack",
]  # fmt: skip
METHODS = ("repeat", "repeat_interleave", "tile")


GROUP = 16  # small tensors that one kernel joins
SMALL = 16384  # elements


class Shifted(Operand):
    """An operand whose first element is ``offset`` further on."""

    def __init__(self, operand: Operand, offset: Value) -> None:
        super().__init__(operand.buffer, operand.shape, operand.strides)
        self.offset = offset

    def at(self, index: Sequence[Value]) -> Value:
        return super().at(index) + self.offset


# --- place ----------------------------------------------------------------------------------------


def _infer_place(types: Types, *, shape: Shape, strides: Shape) -> TensorType:
    x, offset = types
    assert isinstance(x, TensorType)
    if offset is not int:
        raise DTypeError("place: the offset must be an int")
    if len(strides) != x.ndim:
        raise ShapeError(f"place: {len(strides)} strides for a tensor of shape {x.shape}")
    return tensor_type(x.dtype, shape, None, x.device)


def _lower_place(
    types: Types, outputs: tuple[TensorType, ...], *, shape: Shape, strides: Shape
) -> Lowering:
    """Zeros first, then the part: two kernels. The offset is a number given at the call."""
    (x, _), (out,) = types, outputs
    assert isinstance(x, TensorType)
    k = KernelBuilder("place")
    nest = coalesce(x.shape, [x.strides, strides], by_stride(strides, x.shape))
    source = k.tensor("input", 0, tensor_type(x.dtype, nest.sizes, nest.strides[0]))
    offset = k.number(1, int)
    part = k.tensor("output", 0, tensor_type(x.dtype, nest.sizes, nest.strides[1]))
    target = Shifted(part, offset)
    walk(
        k, nest, lambda index: k.store(target, index, source[index]), light=True, device=out.device
    )
    return Lowering((zeroing(out).bind(), k.bind()))


def zeroing(out: TensorType) -> KernelBuilder:
    """The kernel that fills a fresh output with zeros."""
    k = KernelBuilder("zero")
    nest = coalesce((out.numel,), [(1,)])
    target = k.tensor("output", 0, tensor_type(out.dtype, nest.sizes, nest.strides[0]))
    walk(
        k,
        nest,
        lambda index: k.store(target, index, const(0, out.dtype)),
        light=True,
        device=out.device,
    )
    return k


def _place_reference(x: Any, offset: int, *, shape: Shape, strides: Shape) -> Any:
    out = np.zeros(shape, x.dtype)
    steps = tuple(s * out.itemsize for s in strides)
    np.lib.stride_tricks.as_strided(out.reshape(-1)[offset:], x.shape, steps)[...] = x
    return out


place = Op(
    "place", inputs=("x", "offset"), infer=_infer_place, lower=_lower_place,
    vjp=(
        lambda g, x_type, offset, strides: as_strided(
            contiguous(g), shape=x_type.shape, strides=strides, offset=offset
        ),
        None,
    ),
    reference=_place_reference,
    samples=[Sample((Arg((2, 3)), 3), {"shape": (5, 3), "strides": (6, 1)}),
             Sample((Arg((2, 2)), 2), {"shape": (2, 4), "strides": (4, 1)}),
             Sample((Arg(()), 5), {"shape": (2, 4), "strides": ()}),
             Sample((Arg((0, 2)), 0), {"shape": (2, 2), "strides": (2, 1)}),
             Sample((Arg((3,)), 0), {"shape": (3, 3), "strides": (4,)})],
)  # fmt: skip


# --- cat ------------------------------------------------------------------------------------------


def _infer_cat(types: Types, *, dim: int, dtype: DType | None = None) -> TensorType:
    first = types[0]
    assert isinstance(first, TensorType)
    total = 0
    for t in types:
        if not isinstance(t, TensorType):
            raise DTypeError(f"cat joins tensors, got a {getattr(t, '__name__', t)}")
        rest = (t.shape[:dim], t.shape[dim + 1 :])
        if rest != (first.shape[:dim], first.shape[dim + 1 :]):
            raise ShapeError(
                f"cat: shapes {first.shape} and {t.shape} must agree in all dimensions but {dim}"
            )
        total += t.shape[dim]
    shape = (*first.shape[:dim], total, *first.shape[dim + 1 :])
    strides = None if first.device == "cpu" else ordered_strides(shape, first)
    return tensor_type(dtype or common_dtype(types), shape, strides, first.device)


def _lower_cat(
    types: Types, outputs: tuple[TensorType, ...], *, dim: int, dtype: DType | None = None
) -> Lowering:
    """Each kernel copies one tensor, or a group of small ones of one type, to its place."""
    (out,) = outputs
    kernels = []
    start = position = 0
    while position < len(types):
        x = types[position]
        assert isinstance(x, TensorType)
        most = GROUP if x.numel <= SMALL else 1
        stop = position + 1
        while stop < len(types) and stop - position < most and types[stop] is x:
            stop += 1
        kernels.append(_copies(x, out, range(position, stop), start, dim).bind())
        start += (stop - position) * x.shape[dim]
        position = stop
    return Lowering(tuple(kernels))


def _copies(
    x: TensorType, out: TensorType, positions: range, start: int, dim: int
) -> KernelBuilder:
    """Inputs of type ``x`` laid into the output one after the other, from ``start`` on."""
    k = KernelBuilder("cat")
    nest = coalesce(x.shape, [x.strides, out.strides], by_stride(out.strides, x.shape))
    read, written = (
        tensor_type(t.dtype, nest.sizes, steps)
        for t, steps in zip((x, out), nest.strides, strict=True)
    )
    sources = [k.tensor("input", position, read) for position in positions]
    part = k.tensor("output", 0, written)
    step = out.strides[dim]
    targets = [
        Shifted(part, k.size((start + n * x.shape[dim]) * step)) for n in range(len(sources))
    ]
    wide = x.dtype if x.dtype is out.dtype else compute_dtype(out.dtype)

    def body(index: tuple[Value, ...]) -> None:
        for source, target in zip(sources, targets, strict=True):
            k.store(target, index, cast(source[index], wide))

    walk(k, nest, body, light=len(sources) == 1, device=out.device)
    return k


def _cat_vjp(g: Any, tensors_type: Any, dim: int, needs: Any) -> Any:
    parts, start = [], 0
    for t, need in zip(tensors_type, needs, strict=True):
        stop = start + t.shape[dim]
        parts.append(slice_dim(g, dim, start, stop) if need else None)
        start = stop
    return tuple(parts)


def pieces_of(node_types: Types, out: TensorType, dim: int) -> list[tuple[TensorType, int]]:
    """The part of a `cat`'s result that each operand becomes, and the element where it starts."""
    found, start = [], 0
    for t in node_types:
        assert isinstance(t, TensorType)
        piece = tensor_type(out.dtype, t.shape, out.strides, out.device)
        found.append((piece, start * out.strides[dim]))
        start += t.shape[dim]
    return found


_cat = Op(
    "cat", inputs=("*tensors",), infer=_infer_cat, lower=_lower_cat, vjp=Joint(_cat_vjp),
    any_layout=True,
    reference=lambda *tensors, dim, dtype=None: np.concatenate(tensors, dim),
    samples=[Sample((Arg((2, 3)), Arg((4, 3))), {"dim": 0}),
             Sample((Arg((2, 3)), Arg((2, 0)), Arg((2, 2))), {"dim": 1}),
             Sample((Arg((5,)),), {"dim": 0}),
             Sample((Arg((0, 3)), Arg((0, 3))), {"dim": 0})],
)  # fmt: skip


def _listed(name: str, tensors: Any) -> list[Tensor]:
    if is_tensor(tensors) or not hasattr(tensors, "__iter__"):
        raise DTypeError(f"{name} takes a list or tuple of tensors, got {type(tensors).__name__}")
    found = list(tensors)
    if not found:
        raise ArgumentError(f"{name} needs at least one tensor, got an empty list")
    for t in found:
        if not is_tensor(t):
            raise DTypeError(f"{name} takes tensors, got {type(t).__name__} in the list")
    return found


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Tensors one after the other along ``dim``, in their common dtype.

    All other dimensions must agree; empty tensors of one dimension are passed over.
    """
    found = _listed("cat", tensors)
    if any(t.ndim == 0 for t in found):
        raise ShapeError("cat: 0-d tensors cannot be joined; use stack")
    whole = [t for t in found if t.shape != (0,)] or found[:1]
    dim = wrap_dim("cat", dim, whole[0].ndim)
    ranks = {t.ndim for t in whole}
    if len(ranks) > 1:
        raise ShapeError(f"cat: tensors of {sorted(ranks)} dimensions cannot be joined")
    result: Tensor
    if len(whole) < len(found):  # their dtypes count all the same
        result = _cat(*whole, dim=dim, dtype=common_dtype(tuple(t.type for t in found)))
    else:
        result = _cat(*whole, dim=dim)
    return result


def concat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """As `cat`."""
    return cat(tensors, dim)


def concatenate(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """As `cat`."""
    return cat(tensors, dim)


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Tensors of one shape along a new dimension at ``dim``."""
    found = _listed("stack", tensors)
    dim = wrap_dim("stack", dim, found[0].ndim + 1)
    for t in found:
        if t.shape != found[0].shape:
            raise ShapeError(
                f"stack: all tensors must have one shape, got {found[0].shape} and {t.shape}"
            )
    return cat([unsqueeze(t, dim) for t in found], dim)


def hstack(tensors: Sequence[Tensor]) -> Tensor:
    """Joined along the second dimension, or the only one of 1-d tensors."""
    from flame.ops.dimensions import atleast_1d

    found = [atleast_1d(t) for t in _listed("hstack", tensors)]
    return cat(found, 0 if found[0].ndim == 1 else 1)


def vstack(tensors: Sequence[Tensor]) -> Tensor:
    """Joined along the first dimension, 1-d tensors as rows."""
    from flame.ops.dimensions import atleast_2d

    return cat([atleast_2d(t) for t in _listed("vstack", tensors)], 0)


def row_stack(tensors: Sequence[Tensor]) -> Tensor:
    """As `vstack`."""
    return vstack(tensors)


def dstack(tensors: Sequence[Tensor]) -> Tensor:
    """Joined along the third dimension."""
    from flame.ops.dimensions import atleast_3d

    return cat([atleast_3d(t) for t in _listed("dstack", tensors)], 2)


def column_stack(tensors: Sequence[Tensor]) -> Tensor:
    """Joined along the second dimension, 1-d tensors as columns."""
    found = _listed("column_stack", tensors)
    return hstack([reshape(t, (t.numel(), 1)) if t.ndim <= 1 else t for t in found])


# --- repetition -----------------------------------------------------------------------------------


def repeat(input: Tensor, *repeats: Any) -> Tensor:
    """The tensor laid side by side, ``repeats[d]`` times along dimension d; new ones in front."""
    from flame.ops.creation import shape_of

    counts = shape_of(*repeats)
    if len(counts) < input.ndim or any(c < 0 for c in counts):
        raise ShapeError(
            f"repeat: {counts} must name at least {input.ndim} counts, none of them negative"
        )
    sizes = (1,) * (len(counts) - input.ndim) + input.shape
    pairs = [n for pair in zip((1,) * len(sizes), sizes, strict=True) for n in pair]
    spread = [n for pair in zip(counts, sizes, strict=True) for n in pair]
    whole = [c * s for c, s in zip(counts, sizes, strict=True)]
    from flame.ops.conversion import copy

    made = reshape(expand(reshape(input, pairs), spread), whole)
    if made.storage is not input.storage:
        return made
    result: Tensor = copy(made, contiguous=True)  # never a view, whatever the counts
    return result


def tile(input: Tensor, *dims: Any) -> Tensor:
    """As `repeat`, with missing counts taken as 1."""
    from flame.ops.creation import shape_of

    counts = shape_of(*dims)
    return repeat(input, (1,) * (input.ndim - len(counts)) + counts)


def repeat_interleave(
    input: Tensor, repeats: Any = None, dim: int | None = None, *, output_size: int | None = None
) -> Tensor:
    """Each entry of ``dim`` (of the flattened tensor by default) ``repeats`` times in a row.

    repeats: a number, or one for each entry as a tensor. With a tensor of counts alone: the indices
    0, 1, ... each as often as it says.
    """
    from flame.ops.indexing import index_select

    if repeats is None:
        return _places(_checked_counts(input))
    if dim is None:
        input, dim = reshape(input, (-1,)), 0
    dim = wrap_dim("repeat_interleave", dim, input.ndim)
    if not input.ndim:
        input = reshape(input, (1,))
    size = input.shape[dim]
    if isinstance(repeats, (list, tuple)):
        repeats = constant(repeats, device=input.device)
    if is_tensor(repeats) and repeats.numel() != 1:
        counts = _checked_counts(repeats)
        if counts.shape != (size,):
            raise ShapeError(
                f"repeat_interleave: {counts.numel()} counts for dimension {dim} of size {size}"
            )
        return index_select(input, dim, _places(counts))
    count = int(repeats)
    if count < 0:
        raise ArgumentError(f"repeat_interleave: repeats must not be negative, got {count}")
    shape = (*input.shape[: dim + 1], count, *input.shape[dim + 1 :])
    grown = expand(unsqueeze(input, dim + 1), shape)
    return reshape(grown, (*input.shape[:dim], size * count, *input.shape[dim + 1 :]))


def _checked_counts(repeats: Tensor) -> Tensor:
    if repeats.dtype.kind not in "iu" or repeats.ndim > 1:
        raise DTypeError(
            f"repeat_interleave: counts must be a 1-d integer tensor, got {repeats.dtype.name} of "
            f"shape {repeats.shape}"
        )
    if repeats.numel() and repeats.min().item() < 0:
        raise ArgumentError("repeat_interleave: repeats must not be negative")
    return repeats


def _places(counts: Tensor) -> Tensor:
    """0 counts[0] times, 1 counts[1] times, and so on."""
    if counts.is_cuda:
        from flame.ops.compaction import repeated

        return repeated(counts)
    given = counts.numpy()
    return constant(np.repeat(np.arange(given.size), given))
