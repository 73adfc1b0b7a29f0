"""Dimensions merged, split, added and reordered: views of the whole tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from flame.core.errors import IndexRangeError, ShapeError
from flame.core.types import Shape, tensor_type
from flame.ops.creation import shape_of
from flame.ops.loops import broadcast_shapes as common_shape
from flame.ops.shapes import expand, permute, reshape, transpose, view, wrap_dim, wrap_dims

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "adjoint", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_shapes", "broadcast_tensors",
    "flatten", "moveaxis", "movedim", "ravel", "swapaxes", "swapdims", "t", "unflatten",
]  # fmt: skip
METHODS = (
    "adjoint", "expand_as", "flatten", "moveaxis", "movedim", "ravel", "reshape_as", "swapaxes",
    "swapdims", "t", "unflatten", "view_as",
)  # fmt: skip


def flatten(input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """Dimensions start_dim to end_dim as one."""
    first, last = (wrap_dim("flatten", d, input.ndim) for d in (start_dim, end_dim))
    if first > last:
        raise ShapeError(f"flatten: start_dim {start_dim} comes after end_dim {end_dim}")
    if not input.ndim:
        return reshape(input, (1,))
    if first == last:
        return input
    count = 1
    for size in input.shape[first : last + 1]:
        count *= size
    return reshape(input, (*input.shape[:first], count, *input.shape[last + 1 :]))


def unflatten(input: Tensor, dim: int, sizes: Any) -> Tensor:
    """One dimension as several, of the given sizes (one may be -1)."""
    from flame.ops.shapes import whole_shape

    dim = wrap_dim("unflatten", dim, input.ndim)
    if not input.ndim:
        raise IndexRangeError("unflatten: a 0-d tensor has no dimension to split")
    wanted = shape_of(sizes)
    if not wanted:
        raise ShapeError("unflatten: sizes must not be empty")
    made = whole_shape("unflatten", tensor_type(input.dtype, (input.shape[dim],)), wanted)
    return view(input, (*input.shape[:dim], *made, *input.shape[dim + 1 :]))


def ravel(input: Tensor) -> Tensor:
    """All elements in one dimension; a view where possible."""
    return reshape(input, (-1,))


def movedim(input: Tensor, source: Any, destination: Any) -> Tensor:
    """Dimensions ``source`` moved to the places ``destination``; the rest keep their order."""
    before = wrap_dims("movedim", source, input.ndim)
    after = wrap_dims("movedim", destination, input.ndim)
    if len(before) != len(after):
        raise ShapeError(f"movedim: {source} and {destination} must name as many dimensions")
    if not input.ndim:
        return permute(input, ())
    order = dict(zip(after, before, strict=True))
    rest = iter(d for d in range(input.ndim) if d not in before)
    return permute(input, tuple(order[d] if d in order else next(rest) for d in range(input.ndim)))


def moveaxis(input: Tensor, source: Any, destination: Any) -> Tensor:
    """As `movedim`."""
    return movedim(input, source, destination)


def swapaxes(input: Tensor, axis0: int, axis1: int) -> Tensor:
    """As `transpose`."""
    return transpose(input, axis0, axis1)


def swapdims(input: Tensor, dim0: int, dim1: int) -> Tensor:
    """As `transpose`."""
    return transpose(input, dim0, dim1)


def t(input: Tensor) -> Tensor:
    """A matrix transposed; tensors of fewer dimensions as they are."""
    if input.ndim > 2:
        raise ShapeError(
            f"t: at most two dimensions, got shape {input.shape}; use .mT or transpose"
        )
    return transpose(input, 0, 1) if input.ndim == 2 else permute(input, tuple(range(input.ndim)))


def adjoint(input: Tensor) -> Tensor:
    """The last two dimensions swapped, as all numbers here are real."""
    return _matrices(input)


def _matrices(input: Tensor) -> Tensor:
    if input.ndim < 2:
        raise ShapeError(f"mT: a matrix is needed, got shape {input.shape}")
    return transpose(input, -2, -1)


def _reversed(input: Tensor) -> Tensor:
    return permute(input, tuple(reversed(range(input.ndim))))


def expand_as(input: Tensor, other: Tensor) -> Tensor:
    """`expand` to the shape of ``other``."""
    return expand(input, other.shape)


def view_as(input: Tensor, other: Tensor) -> Tensor:
    """`view` in the shape of ``other``."""
    return view(input, other.shape)


def reshape_as(input: Tensor, other: Tensor) -> Tensor:
    """`reshape` to the shape of ``other``."""
    return reshape(input, other.shape)


def broadcast_shapes(*shapes: Any) -> Shape:
    """The common shape of several, by the rules of broadcasting."""
    return common_shape("broadcast_shapes", [shape_of(s) for s in shapes])


def broadcast_tensors(*tensors: Any) -> tuple[Tensor, ...]:
    """Views of the tensors in their common shape."""
    given = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)) else tensors
    shape = common_shape("broadcast_tensors", [x.shape for x in given])
    return tuple(expand(x, shape) for x in given)


# --- at least so many dimensions ------------------------------------------------------------------


def _each(function: Any, tensors: tuple[Any, ...]) -> Any:
    if len(tensors) == 1 and not isinstance(tensors[0], (list, tuple)):
        return function(tensors[0])
    given = tensors[0] if len(tensors) == 1 else tensors
    return tuple(function(x) for x in given)


def atleast_1d(*tensors: Any) -> Any:
    """Tensors with at least one dimension."""
    return _each(lambda x: x if x.ndim else reshape(x, (1,)), tensors)


def atleast_2d(*tensors: Any) -> Any:
    """Tensors with at least two dimensions; new ones stand in front."""
    return _each(lambda x: x if x.ndim > 1 else reshape(x, (1,) * (2 - x.ndim) + x.shape), tensors)


def atleast_3d(*tensors: Any) -> Any:
    """Tensors with at least three dimensions: 1-d ones lie in the middle, 2-d ones get a last
    one."""

    def one(x: Any) -> Any:
        if x.ndim > 2:
            return x
        return reshape(x, (*x.shape, 1) if x.ndim == 2 else (1, *(x.shape or (1,)), 1))

    return _each(one, tensors)


OPERATORS: Final[dict[str, Any]] = {
    "T": property(_reversed, doc="All dimensions in reverse order."),
    "mT": property(_matrices, doc="The last two dimensions swapped."),
    "mH": property(_matrices, doc="As mT, for real numbers."),
    "H": property(t, doc="A matrix transposed."),
}
