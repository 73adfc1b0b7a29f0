"""Elements in another order or masked by place: flip, roll, triangles, diagonals, grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError, IndexRangeError, ShapeError
from flame.core.types import Shape, TensorType, contiguous_strides, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering
from flame.kernel.values import const
from flame.ops.elementwise import walk
from flame.ops.joining import Shifted, cat, place
from flame.ops.loops import broadcast_shapes, by_stride, coalesce
from flame.ops.op import Arg, Op, Sample, Types, constant
from flame.ops.shapes import expand, permute, reshape, slice_dim, transpose, wrap_dim, wrap_dims
from flame.ops.slicing import diagonal as diagonal_view

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "cartesian_prod", "diag", "diag_embed", "diagflat", "flip", "fliplr", "flipud", "meshgrid",
    "roll", "rot90", "tril", "tril_indices", "triu", "triu_indices",
]  # fmt: skip
METHODS = (
    "diag", "diag_embed", "diagflat", "flip", "fliplr", "flipud", "roll", "rot90", "tril", "triu",
)  # fmt: skip
IN_PLACE = ("tril", "triu")


# --- flip -----------------------------------------------------------------------------------------


def _same_type(types: Types, **attributes: Any) -> TensorType:
    x = types[0]
    assert isinstance(x, TensorType)
    return tensor_type(x.dtype, x.shape, None, x.device)


def _lower_flip(
    types: Types, outputs: tuple[TensorType, ...], *, dims: tuple[int, ...]
) -> Lowering:
    """A copy that walks the flipped dimensions from their ends, by negative steps."""
    (x,), (out,) = types, outputs
    assert isinstance(x, TensorType)
    steps = tuple(-s if d in dims else s for d, s in enumerate(x.strides))
    first = sum((x.shape[d] - 1) * x.strides[d] for d in dims)
    nest = coalesce(x.shape, [steps, out.strides], by_stride(out.strides, out.shape))
    k = KernelBuilder("flip")
    source = Shifted(
        k.tensor("input", 0, tensor_type(x.dtype, nest.sizes, nest.strides[0])), k.size(first)
    )
    target = k.tensor("output", 0, tensor_type(out.dtype, nest.sizes, nest.strides[1]))
    walk(
        k, nest, lambda index: k.store(target, index, source[index]), light=True, device=out.device
    )
    return k.finish()


_flip: Op = Op(
    "flip", inputs=("x",), infer=_same_type, lower=_lower_flip,
    vjp=(lambda g, dims: _flip(g, dims=dims),),
    reference=lambda x, *, dims: np.flip(x, dims),
    samples=[Sample((Arg((3, 5)),), {"dims": (0,)}), Sample((Arg((2, 3, 40)),), {"dims": (0, 2)}),
             Sample((Arg((0, 2)),), {"dims": (1,)}), Sample((Arg(()),), {"dims": ()}),
             Sample((Arg((1, 4)),), {"dims": (0, 1)})],
)  # fmt: skip


def flip(input: Tensor, *where: Any, dims: Any = None) -> Tensor:
    """The order of entries turned round in the given dimensions; a copy."""
    from flame.ops.creation import shape_of

    found = wrap_dims("flip", shape_of(*where) if dims is None else shape_of(dims), input.ndim)
    result: Tensor = _flip(input, dims=found if input.ndim else ())
    return result


def fliplr(input: Tensor) -> Tensor:
    """`flip` of the second dimension."""
    if input.ndim < 2:
        raise ShapeError(f"fliplr: two dimensions are needed, got shape {input.shape}")
    return flip(input, 1)


def flipud(input: Tensor) -> Tensor:
    """`flip` of the first dimension."""
    if input.ndim < 1:
        raise ShapeError("flipud: at least one dimension is needed")
    return flip(input, 0)


def rot90(input: Tensor, k: int = 1, dims: Any = (0, 1)) -> Tensor:
    """Turned ``k`` times by 90 degrees in the plane of two dimensions, from the first to the
    second."""
    if input.ndim < 2 or len(dims) != 2:
        raise ShapeError(
            f"rot90: two dimensions of a tensor of at least two are needed, got {dims}"
        )
    first, second = wrap_dims("rot90", dims, input.ndim)
    turns = k % 4
    if turns == 2:
        return flip(input, first, second)
    if turns == 1:
        return transpose(flip(input, second), first, second)
    if turns == 3:
        return transpose(flip(input, first), first, second)
    return input.clone()


def roll(input: Tensor, shifts: Any, dims: Any = None) -> Tensor:
    """Entries moved on by ``shifts`` places; those pushed out at the end come in at the start."""
    if dims is None or (not isinstance(dims, int) and not len(dims)):
        if not isinstance(shifts, int) and len(shifts) != 1:
            raise ArgumentError("roll: several shifts need as many dims")
        shift = shifts if isinstance(shifts, int) else shifts[0]
        return reshape(_rolled(reshape(input, (-1,)), shift, 0), input.shape)
    moves = (shifts,) if isinstance(shifts, int) else tuple(shifts)
    where = (dims,) if isinstance(dims, int) else tuple(dims)
    if len(moves) != len(where):
        raise ArgumentError(f"roll: {len(moves)} shifts for {len(where)} dims")
    if not input.ndim:
        raise IndexRangeError("roll: a 0-d tensor has no dimension to roll along")
    made = input
    for shift, d in zip(moves, where, strict=True):
        made = _rolled(made, shift, wrap_dim("roll", d, input.ndim))
    return made.clone() if made is input else made


def _rolled(x: Tensor, shift: int, dim: int) -> Tensor:
    size = x.shape[dim] if x.ndim else 0
    if not size or not shift % size:
        return x.clone()
    at = size - shift % size
    return cat([slice_dim(x, dim, at, size), slice_dim(x, dim, 0, at)], dim)


# --- triangles ------------------------------------------------------------------------------------


def _lower_triangle(
    types: Types, outputs: tuple[TensorType, ...], *, diagonal: int, upper: bool
) -> Lowering:
    (x,), (out,) = types, outputs
    assert isinstance(x, TensorType)
    k = KernelBuilder("triangle")
    source, target = k.tensor("input", 0, x), k.tensor("output", 0, out)
    border = k.size(diagonal)
    with (
        k.parallel(*x.shape[:-1], work=x.shape[-1]) as outer,
        k.vector(k.size(x.shape[-1]), 4) as column,
    ):
        edge = outer[-1] + border
        inside = column >= edge if upper else column <= edge
        index = (*outer, column)
        k.store(target, index, values.select(inside, source[index], const(0, x.dtype)))
    return k.finish()


def _infer_triangle(types: Types, **attributes: Any) -> TensorType:
    x = types[0]
    assert isinstance(x, TensorType)
    if x.ndim < 2:
        raise ShapeError(f"tril, triu: at least two dimensions are needed, got shape {x.shape}")
    return tensor_type(x.dtype, x.shape, None, x.device)


_triangle: Op = Op(
    "triangle", inputs=("x",), infer=_infer_triangle, lower=_lower_triangle,
    vjp=(lambda g, diagonal, upper: _triangle(g, diagonal=diagonal, upper=upper),),
    reference=lambda x, *, diagonal, upper: (np.triu if upper else np.tril)(x, diagonal),
    samples=[Sample((Arg((4, 5)),), {"diagonal": 0, "upper": True}),
             Sample((Arg((2, 5, 30)),), {"diagonal": -2, "upper": False}),
             Sample((Arg((0, 3)),), {"diagonal": 0, "upper": False}),
             Sample((Arg((3, 3)),), {"diagonal": 5, "upper": True})],
)  # fmt: skip


def tril(input: Tensor, diagonal: int = 0) -> Tensor:
    """The last two dimensions with zeros above the given diagonal."""
    result: Tensor = _triangle(input, diagonal=int(diagonal), upper=False)
    return result


def triu(input: Tensor, diagonal: int = 0) -> Tensor:
    """The last two dimensions with zeros below the given diagonal."""
    result: Tensor = _triangle(input, diagonal=int(diagonal), upper=True)
    return result


def _indices(
    name: str, row: int, col: int, offset: int, dtype: DType | None, device: Any
) -> Tensor:
    if row < 0 or col < 0:
        raise ShapeError(f"{name}: sizes must not be negative, got {row} and {col}")
    find = np.tril_indices if name == "tril_indices" else np.triu_indices
    made = constant(np.stack(find(row, offset, col)).astype(np.int64), device=device)
    return made if dtype is None else made.to(dtype)


def tril_indices(
    row: int, col: int, offset: int = 0, *, dtype: DType | None = None, device: Any = None
) -> Tensor:
    """Coordinates of the lower triangle of a (row, col) matrix, (2, count)."""
    return _indices("tril_indices", row, col, offset, dtype, device)


def triu_indices(
    row: int, col: int, offset: int = 0, *, dtype: DType | None = None, device: Any = None
) -> Tensor:
    """Coordinates of the upper triangle of a (row, col) matrix, (2, count)."""
    return _indices("triu_indices", row, col, offset, dtype, device)


# --- diagonals ------------------------------------------------------------------------------------


def diag_embed(input: Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
    """Matrices with the last dimension on a diagonal, zeros elsewhere; they lie in dim1 and
    dim2."""
    if not input.ndim:
        raise ShapeError("diag_embed: at least one dimension is needed")
    rank = input.ndim + 1
    first, second = (wrap_dim("diag_embed", d, rank) for d in (dim1, dim2))
    if first == second:
        raise ShapeError(f"diag_embed: the two dimensions must differ, both are {first}")
    side = input.shape[-1] + abs(offset)
    shape: Shape = (*input.shape[:-1], side, side)
    strides = contiguous_strides(shape)
    start = offset if offset >= 0 else -offset * side
    steps = (*strides[:-2], side + 1)
    made: Tensor = place(input, start, shape=shape, strides=steps)
    rest = iter(range(rank - 2))
    order = {first: rank - 2, second: rank - 1}
    return permute(made, tuple(order[d] if d in order else next(rest) for d in range(rank)))


def diag(input: Tensor, diagonal: int = 0) -> Tensor:
    """A matrix with this diagonal, of a 1-d tensor; the diagonal (a copy) of a matrix."""
    if input.ndim == 1:
        return diag_embed(input, diagonal)
    if input.ndim != 2:
        raise ShapeError(f"diag: one or two dimensions are needed, got shape {input.shape}")
    return diagonal_view(input, diagonal).clone()


def diagflat(input: Tensor, offset: int = 0) -> Tensor:
    """A matrix with all elements of the tensor on a diagonal."""
    return diag_embed(reshape(input, (-1,)), offset)


# --- grids ----------------------------------------------------------------------------------------


def meshgrid(*tensors: Any, indexing: str = "ij") -> tuple[Tensor, ...]:
    """Coordinates of a grid: expanded views of 1-d tensors, dimension i following tensor i.

    indexing "xy" swaps the first two dimensions.
    """
    given: Sequence[Any] = (
        tensors[0] if len(tensors) == 1 and not hasattr(tensors[0], "ndim") else tensors
    )
    if indexing not in ("ij", "xy"):
        raise ArgumentError(f"meshgrid: indexing must be 'ij' or 'xy', got {indexing!r}")
    if not given:
        raise ArgumentError("meshgrid needs at least one tensor")
    for x in given:
        if x.ndim > 1:
            raise ShapeError(f"meshgrid takes 0-d and 1-d tensors, got shape {x.shape}")
        if x.dtype is not given[0].dtype:
            raise DTypeError(
                f"meshgrid: all tensors must have one dtype, got {given[0].dtype.name} and "
                f"{x.dtype.name}"
            )
    swap = indexing == "xy" and len(given) > 1
    order = [given[1], given[0], *given[2:]] if swap else list(given)
    rank = len(order)
    laid = [
        reshape(x, (1,) * d + (x.numel(),) + (1,) * (rank - d - 1)) for d, x in enumerate(order)
    ]
    shape = broadcast_shapes("meshgrid", [tuple(x.numel() for x in order)])
    found = [expand(x, shape) for x in laid]
    return (found[1], found[0], *found[2:]) if swap else tuple(found)


def cartesian_prod(*tensors: Any) -> Tensor:
    """All combinations of the elements of 1-d tensors, one a row."""
    if len(tensors) == 1:
        return tensors[0]  # type: ignore[no-any-return]
    return cat([reshape(x, (-1, 1)) for x in meshgrid(*tensors)], 1)
