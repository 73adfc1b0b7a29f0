"""Reading and writing along a dimension by index tensors: gather, scatter, index_select and their
kin.

All are calls of take_at and put_at (`flame.ops.indexed`) with index tensors expanded, without a
copy, to the shape of the elements addressed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flame.core import dtypes
from flame.core.errors import DTypeError, IndexRangeError, ShapeError
from flame.core.handle import is_tensor
from flame.core.types import Shape
from flame.ops.conversion import convert
from flame.ops.creation import full
from flame.ops.indexed import OutOfRange, take_at
from flame.ops.indexed_writes import combine_at, put_at
from flame.ops.loops import broadcast_shapes
from flame.ops.shapes import as_strided, expand, reshape, wrap_dim

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "gather", "index_add", "index_copy", "index_fill", "index_select", "put", "take",
    "take_along_dim",
]  # fmt: skip
METHODS = (*__all__, "index_add_", "index_copy_")
IN_PLACE = ("index_fill", "put")


def named(
    name: str, dims: Sequence[int], sizes: Any, call: Callable[..., Any], /,
    *args: Any, **attributes: Any,
) -> Any:  # fmt: skip
    """Call an op of `flame.ops.indexed`; a bad index becomes an error that names op, dimension and
    size."""
    try:
        return call(*args, **attributes)
    except OutOfRange as error:
        dim = dims[error.operand]
        raise IndexRangeError(
            f"{name}: index {error.index} is out of range for dimension {dim}, which has size "
            f"{sizes[dim]}"
        ) from None


def along(index: Tensor, shape: Shape, dims: Sequence[int]) -> Tensor:
    """``index`` seen with ``shape``: its dimensions stand at ``dims``, the others repeat it."""
    strides = [0] * len(shape)
    for axis, dim in enumerate(dims):
        strides[dim] = index.type.strides[axis]
    found: Tensor = as_strided(index, shape=shape, strides=tuple(strides), offset=0)
    return found


def coordinates(rank: int, dim: int) -> tuple[int, ...]:
    """``axes`` of an op whose one index tensor addresses ``dim``."""
    return (*range(dim), -1, *range(dim + 1, rank))


def with_dim(input: Tensor) -> Tensor:
    """0-d tensors as 1-d ones of one element."""
    return input if input.ndim else reshape(input, (1,))


def check_index(name: str, index: Any) -> None:
    """Raises DTypeError unless ``index`` is a tensor of int64 or int32."""
    if not is_tensor(index) or index.dtype not in (dtypes.int64, dtypes.int32):
        found = index.dtype.name if is_tensor(index) else type(index).__name__
        raise DTypeError(f"{name}: the index must be an int64 or int32 tensor, got {found}")


def _vector(name: str, index: Any) -> Tensor:
    """An index tensor of one dimension, from one of none or one."""
    check_index(name, index)
    if index.ndim > 1:
        raise ShapeError(f"{name}: the index must have one dimension, got shape {index.shape}")
    found: Tensor = with_dim(index)
    return found


def same_dtype(name: str, input: Tensor, source: Any) -> None:
    """Raises DTypeError unless ``source`` is a tensor of ``input``'s dtype."""
    if not is_tensor(source):
        raise DTypeError(f"{name}: the values must be a tensor, got {type(source).__name__}")
    if source.dtype is not input.dtype:
        raise DTypeError(
            f"{name}: values of {source.dtype.name} for a {input.dtype.name} tensor; convert "
            f"them first"
        )


# --- one index for whole slices: index_select, index_add, index_copy, index_fill ------------------


def index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    """The entries ``index`` (1-d) of a dimension, in that order."""
    dim = wrap_dim("index_select", dim, input.ndim)
    x, index = with_dim(input), _vector("index_select", index)
    shape = (*x.shape[:dim], index.shape[0], *x.shape[dim + 1 :])
    made: Tensor = named(
        "index_select", (dim,), x.shape, take_at,
        x, along(index, shape, (dim,)), axes=coordinates(x.ndim, dim), wrap=False,
    )  # fmt: skip
    return made if input.ndim else reshape(made, ())


def _into_slices(
    name: str, input: Tensor, dim: int, index: Tensor, source: Tensor, combine: str,
    *, in_place: bool = False,
) -> Tensor:  # fmt: skip
    """``source`` written into the slices ``index`` of ``dim``."""
    dim = wrap_dim(name, dim, input.ndim)
    x, index, source = with_dim(input), _vector(name, index), with_dim(source)
    shape = (*x.shape[:dim], index.shape[0], *x.shape[dim + 1 :])
    if source.shape != shape:
        raise ShapeError(
            f"{name}: values of shape {source.shape} for {index.shape[0]} slices of dimension "
            f"{dim} of "
            f"{input.shape}; {shape} is needed"
        )
    same_dtype(name, input, source)
    place = along(index, shape, (dim,))
    made: Tensor = write(
        name, (dim,), x, source, [place], coordinates(x.ndim, dim), combine, in_place=in_place
    )
    return input if in_place else made if input.ndim else reshape(made, ())


def write(
    name: str, dims: Sequence[int], x: Tensor, source: Tensor, indices: Sequence[Tensor],
    axes: tuple[int, ...], combine: str, *, in_place: bool, wrap: bool = False,
) -> Tensor:  # fmt: skip
    """put_at or combine_at, with the caller's names in the error of a bad index."""
    op = put_at if combine in ("set", "add") else combine_at
    attributes = {"axes": axes, "shape": x.shape, "combine": combine, "wrap": wrap}
    made: Tensor
    if in_place:
        made = named(name, dims, x.shape, op.into, (x,), x, source, *indices, **attributes)
    else:
        made = named(name, dims, x.shape, op, x, source, *indices, **attributes)
    return made


def _scaled(source: Tensor, alpha: float) -> Tensor:
    return source if alpha == 1 else convert(source * alpha, dtype=source.dtype)


def index_add(
    input: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1
) -> Tensor:
    """``alpha * source`` added to the slices ``index`` of ``dim``, in a fixed order."""
    return _into_slices("index_add", input, dim, index, _scaled(source, alpha), "add")


def index_add_(
    input: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1
) -> Tensor:
    """`index_add` in place."""
    return _into_slices(
        "index_add_", input, dim, index, _scaled(source, alpha), "add", in_place=True
    )


def index_copy(input: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """``source`` in place of the slices ``index`` of ``dim``."""
    return _into_slices("index_copy", input, dim, index, source, "set")


def index_copy_(input: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """`index_copy` in place."""
    return _into_slices("index_copy_", input, dim, index, source, "set", in_place=True)


def index_fill(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """``value`` (a number or 0-d tensor) in place of the slices ``index`` of ``dim``."""
    from flame.ops.masking import masked_fill

    if is_tensor(value) and value.ndim:
        raise ShapeError(f"index_fill: the value must be a number or 0-d, got {value.shape}")
    dim, where = wrap_dim("index_fill", dim, input.ndim), _vector("index_fill", index)
    size = input.shape[dim] if input.ndim else 1
    # a mask rather than a write, so that an index named twice counts once in the value's gradient
    chosen = expand(full((), True, device=where.device), where.shape)
    mask = named(
        "index_fill", (dim,), {dim: size}, put_at,
        None, chosen, where, axes=(-1,), shape=(size,), combine="set", wrap=True,
    )  # fmt: skip
    shape = (size,) + (1,) * (input.ndim - dim - 1) if input.ndim else ()
    return masked_fill(input, reshape(mask, shape), value)


def filled(name: str, input: Tensor, value: Any, shape: Shape) -> Tensor:
    """A number or 0-d tensor as an expanded tensor of ``input``'s dtype."""
    if is_tensor(value):
        if value.ndim:
            raise ShapeError(
                f"{name}: the value must be a number or a 0-d tensor, got {value.shape}"
            )
        return expand(convert(value, dtype=input.dtype), shape)
    return expand(full((), value, dtype=input.dtype, device=input.device), shape)


# --- one index for each element: gather, scatter --------------------------------------------------


def fitting_index(name: str, input: Tensor, dim: int, index: Any) -> Any:
    """The index, checked against the tensor; one without elements may be of any integer dtype."""
    if is_tensor(index) and not index.numel() and index.dtype.kind in "iu":
        index = convert(index, dtype=dtypes.int64)
    check_index(name, index)
    if not index.numel():
        return index
    if index.ndim != input.ndim and max(index.ndim, 1) != max(input.ndim, 1):
        raise ShapeError(
            f"{name}: the index has {index.ndim} dimensions, the tensor {input.ndim}; they "
            f"must be equal"
        )
    if not input.ndim:
        return index
    for d, size in enumerate(index.shape):
        if d != dim and size > input.shape[d]:
            raise ShapeError(
                f"{name}: the index of shape {index.shape} is larger than the tensor of shape "
                f"{input.shape} in dimension {d}"
            )
    return index


def gather(input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """Element ``index[i, j, ...]`` of ``dim``, at the other coordinates of the index's place.

    index: as many dimensions as input, at most as large but in ``dim``. The result has its shape.
    """
    return _gathered("gather", input, dim, index, wrap=False)


def _gathered(name: str, input: Tensor, dim: int, index: Tensor, *, wrap: bool) -> Tensor:
    dim = wrap_dim(name, dim, input.ndim)
    index = fitting_index(name, input, dim, index)
    if not index.numel():
        return reshape(reshape(input, (-1,))[:0], index.shape)
    x, place = with_dim(input), with_dim(index)
    made: Tensor = named(
        name, (dim,), x.shape, take_at, x, place, axes=coordinates(x.ndim, dim), wrap=wrap
    )
    return made if made.ndim == index.ndim else reshape(made, index.shape)


# --- flat places ----------------------------------------------------------------------------------


def take(input: Tensor, index: Tensor) -> Tensor:
    """Elements by their place in row-major order; negative places count from the end."""
    check_index("take", index)
    flat = reshape(input, (-1,))
    made: Tensor = named("take", (0,), flat.shape, take_at, flat, index, axes=(-1,), wrap=True)
    return made


def put(input: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    """A copy with ``source`` written (or added) at places in row-major order."""
    check_index("put", index)
    same_dtype("put", input, source)
    if index.numel() != source.numel():
        raise ShapeError(f"put: {index.numel()} places for {source.numel()} values")
    made = write(
        "put", (0,), reshape(input, (-1,)), reshape(source, index.shape), [index], (-1,),
        "add" if accumulate else "set", in_place=False, wrap=True,
    )  # fmt: skip
    return reshape(made, input.shape)


def take_along_dim(input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """`gather` with input and indices broadcast to each other in the other dimensions.

    Negative indices count from the end.
    """
    check_index("take_along_dim", indices)
    if dim is None:
        return _gathered(
            "take_along_dim", reshape(input, (-1,)), 0, reshape(indices, (-1,)), wrap=True
        )
    if input.ndim != indices.ndim:
        raise ShapeError(
            f"take_along_dim: input {input.shape} and indices {indices.shape} must have as many "
            "dimensions"
        )
    dim = wrap_dim("take_along_dim", dim, input.ndim)

    def sizes(shape: Shape, there: int) -> Shape:
        return tuple(there if d == dim else s for d, s in enumerate(shape))

    common = broadcast_shapes("take_along_dim", [sizes(input.shape, 1), sizes(indices.shape, 1)])
    x = expand(input, sizes(common, input.shape[dim]))
    index = expand(indices, sizes(common, indices.shape[dim]))
    return _gathered("take_along_dim", x, dim, index, wrap=True)
