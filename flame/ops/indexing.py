"""Reading and writing along a dimension by index tensors: gather, scatter, index_select and their kin.

All are calls of take_at and put_at (`flame.ops.indexed`) with index tensors expanded, without a copy,
to the shape of the elements addressed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flame.core import dtypes
from flame.core.errors import DTypeError, IndexRangeError, ShapeError
from flame.core.types import Shape
from flame.ops.conversion import convert
from flame.ops.creation import full
from flame.ops.indexed import OutOfRange, combine_at, put_at, take_at
from flame.ops.shapes import as_strided, expand, reshape, wrap_dim

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "gather",
    "index_add",
    "index_copy",
    "index_fill",
    "index_select",
    "scatter",
    "scatter_add",
]
METHODS = __all__
IN_PLACE: tuple[str, ...] = ()


def named(
    name: str, dims: Sequence[int], sizes: Shape, call: Callable[..., Any], /,
    *args: Any, **attributes: Any,
) -> Any:  # fmt: skip
    """Call an op of `flame.ops.indexed`; a bad index becomes an error that names op, dimension and size."""
    try:
        return call(*args, **attributes)
    except OutOfRange as error:
        dim = dims[error.operand]
        raise IndexRangeError(
            f"{name}: index {error.index} is out of range for dimension {dim}, which has size {sizes[dim]}"
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


def _with_dim(input: Tensor) -> Tensor:
    return input if input.ndim else reshape(input, (1,))


def check_index(name: str, index: Any) -> None:
    """Raises DTypeError unless ``index`` is a tensor of int64 or int32."""
    from flame.tensor import Tensor

    if not isinstance(index, Tensor) or index.dtype not in (dtypes.int64, dtypes.int32):
        found = index.dtype.name if isinstance(index, Tensor) else type(index).__name__
        raise DTypeError(f"{name}: the index must be an int64 or int32 tensor, got {found}")


def _vector(name: str, index: Any) -> Tensor:
    """An index tensor of one dimension, from one of none or one."""
    check_index(name, index)
    if index.ndim > 1:
        raise ShapeError(f"{name}: the index must have one dimension, got shape {index.shape}")
    found: Tensor = _with_dim(index)
    return found


def same_dtype(name: str, input: Tensor, source: Any) -> None:
    """Raises DTypeError unless ``source`` is a tensor of ``input``'s dtype."""
    from flame.tensor import Tensor

    if not isinstance(source, Tensor):
        raise DTypeError(f"{name}: the values must be a tensor, got {type(source).__name__}")
    if source.dtype is not input.dtype:
        raise DTypeError(
            f"{name}: values of {source.dtype.name} for a {input.dtype.name} tensor; convert them first"
        )


# --- one index for whole slices: index_select, index_add, index_copy, index_fill --------------------


def index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    """The entries ``index`` (1-d) of a dimension, in that order."""
    dim = wrap_dim("index_select", dim, input.ndim)
    x, index = _with_dim(input), _vector("index_select", index)
    shape = (*x.shape[:dim], index.shape[0], *x.shape[dim + 1 :])
    made: Tensor = named(
        "index_select", (dim,), x.shape, take_at,
        x, along(index, shape, (dim,)), axes=coordinates(x.ndim, dim), wrap=False,
    )  # fmt: skip
    return made if input.ndim else reshape(made, ())


def _into_slices(
    name: str, input: Tensor, dim: int, index: Tensor, source: Tensor, combine: str,
    target: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``source`` written into the slices ``index`` of ``dim``; into ``target``, if given, in place."""
    dim = wrap_dim(name, dim, input.ndim)
    x, index, source = _with_dim(input), _vector(name, index), _with_dim(source)
    shape = (*x.shape[:dim], index.shape[0], *x.shape[dim + 1 :])
    if source.shape != shape:
        raise ShapeError(
            f"{name}: values of shape {source.shape} for {index.shape[0]} slices of dimension {dim} of "
            f"{input.shape}; {shape} is needed"
        )
    same_dtype(name, input, source)
    place = along(index, shape, (dim,))
    made: Tensor = _write(name, (dim,), x, source, [place], coordinates(x.ndim, dim), combine,
                          target is not None)  # fmt: skip
    return made if input.ndim else reshape(made, ())


def _write(
    name: str, dims: Sequence[int], x: Tensor, source: Tensor, indices: Sequence[Tensor],
    axes: tuple[int, ...], combine: str, in_place: bool, wrap: bool = False,
) -> Any:  # fmt: skip
    op = put_at if combine in ("set", "add") else combine_at
    attributes = {"axes": axes, "shape": x.shape, "combine": combine, "wrap": wrap}
    if in_place:
        return named(name, dims, x.shape, op.into, (x,), x, source, *indices, **attributes)
    return named(name, dims, x.shape, op, x, source, *indices, **attributes)


def index_add(
    input: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1
) -> Tensor:
    """``alpha * source`` added to the slices ``index`` of ``dim``; the order of additions is fixed."""
    if alpha != 1:
        source = source * alpha
    return _into_slices("index_add", input, dim, index, source, "add")


def index_copy(input: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """``source`` in place of the slices ``index`` of ``dim``."""
    return _into_slices("index_copy", input, dim, index, source, "set")


def index_fill(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """``value`` (a number or 0-d tensor) in place of the slices ``index`` of ``dim``."""
    dim = wrap_dim("index_fill", dim, input.ndim)
    count = _vector("index_fill", index).shape[0]
    shape = (*input.shape[:dim], count, *input.shape[dim + 1 :]) if input.ndim else (count,)
    return _into_slices(
        "index_fill", input, dim, index, filled("index_fill", input, value, shape), "set"
    )


def filled(name: str, input: Tensor, value: Any, shape: Shape) -> Tensor:
    """A number or 0-d tensor as an expanded tensor of ``input``'s dtype."""
    from flame.tensor import Tensor

    if isinstance(value, Tensor):
        if value.ndim:
            raise ShapeError(
                f"{name}: the value must be a number or a 0-d tensor, got {value.shape}"
            )
        return expand(convert(value, dtype=input.dtype), shape)
    return expand(full((), value, dtype=input.dtype), shape)


# --- one index for each element: gather, scatter -----------------------------------------------------


def _fit(name: str, input: Tensor, dim: int, index: Any, source: Any = None) -> None:
    check_index(name, index)
    if index.ndim != input.ndim and max(index.ndim, 1) != max(input.ndim, 1):
        raise ShapeError(
            f"{name}: the index has {index.ndim} dimensions, the tensor {input.ndim}; they must be equal"
        )
    if not index.numel() or not input.ndim:
        return
    for d, size in enumerate(index.shape):
        if d != dim and size > input.shape[d]:
            raise ShapeError(
                f"{name}: the index of shape {index.shape} is larger than the tensor of shape "
                f"{input.shape} in dimension {d}"
            )


def gather(input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """Element ``index[i, j, ...]`` of ``dim``, at the other coordinates of the index's place.

    index: as many dimensions as input, at most as large but in ``dim``. The result has its shape.
    """
    dim = wrap_dim("gather", dim, input.ndim)
    _fit("gather", input, dim, index)
    x, place = _with_dim(input), _with_dim(index)
    made: Tensor = named(
        "gather", (dim,), x.shape, take_at, x, place, axes=coordinates(x.ndim, dim), wrap=False
    )
    return made if made.ndim == index.ndim else reshape(made, index.shape)


def scattered(name: str, input: Tensor, dim: int, index: Tensor, src: Any, combine: str) -> Tensor:
    """``src`` combined into a copy of ``input`` at index's places; the core of all scatters."""
    from flame.tensor import Tensor

    dim = wrap_dim(name, dim, input.ndim)
    _fit(name, input, dim, index)
    x, place = _with_dim(input), _with_dim(index)
    if isinstance(src, Tensor):
        same_dtype(name, input, src)
        source = _with_dim(src)
        if source.ndim != place.ndim:
            raise ShapeError(
                f"{name}: the values have {src.ndim} dimensions, the index {index.ndim}; they must be equal"
            )
        if place.numel() and any(a > b for a, b in zip(place.shape, source.shape, strict=True)):
            raise ShapeError(
                f"{name}: the index of shape {index.shape} is larger than the values of shape {src.shape}"
            )
        source = _corner(source, place.shape)
    else:
        source = filled(name, input, src, place.shape)
    made: Tensor = _write(
        name, (dim,), x, source, [place], coordinates(x.ndim, dim), combine, False
    )
    return made if input.ndim else reshape(made, ())


def _corner(source: Tensor, shape: Shape) -> Tensor:
    from flame.ops.shapes import narrow

    for d, size in enumerate(shape):
        if source.shape[d] != size and size <= source.shape[d]:
            source = narrow(source, d, 0, size)
    return source


def scatter(
    input: Tensor,
    dim: int,
    index: Tensor,
    src: Any = None,
    *,
    value: Any = None,
    reduce: str | None = None,
) -> Tensor:
    """``src`` (a tensor, or a number for all) written to the places that ``index`` names; see `gather`.

    reduce: None to replace, "add" or "multiply" to combine. Where an element is written twice, the
    value of the last index in row-major order stays.
    """
    from flame.core.errors import ArgumentError

    ways = {None: "set", "add": "add", "multiply": "mul"}
    if reduce not in ways:
        raise ArgumentError(f"scatter: reduce must be 'add', 'multiply' or None, got {reduce!r}")
    return scattered("scatter", input, dim, index, value if src is None else src, ways[reduce])


def scatter_add(input: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """``src`` added at the places that ``index`` names; the order of additions is fixed."""
    same_dtype("scatter_add", input, src)
    return scattered("scatter_add", input, dim, index, src, "add")
