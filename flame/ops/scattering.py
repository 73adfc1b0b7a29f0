"""Writing along a dimension by an index for each element: scatter and its reductions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flame.core.errors import ArgumentError, ShapeError
from flame.core.handle import is_tensor
from flame.kernel.program import identity
from flame.ops.autocast import autocasts
from flame.ops.creation import full
from flame.ops.indexing import (
    along,
    check_index,
    coordinates,
    filled,
    fitting_index,
    same_dtype,
    with_dim,
    write,
)  # fmt: skip
from flame.ops.shapes import expand, narrow, reshape, wrap_dim

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["index_reduce", "scatter", "scatter_add", "scatter_reduce"]
METHODS = (*__all__, "scatter_", "scatter_add_")
IN_PLACE = ("index_reduce", "scatter_reduce")

_WAYS = {None: "set", "add": "add", "multiply": "mul"}
_REDUCTIONS = {"sum": "add", "prod": "mul", "mean": "add", "amax": "max", "amin": "min"}


def _scattered(
    name: str, input: Tensor, dim: int, index: Tensor, src: Any, combine: str,
    *, in_place: bool = False,
) -> Tensor:  # fmt: skip
    """``src`` combined into ``input`` (or a copy) at index's places; the core of all scatters."""
    dim = wrap_dim(name, dim, input.ndim)
    index = fitting_index(name, input, dim, index)
    x, place = with_dim(input), with_dim(index)
    if is_tensor(src):
        same_dtype(name, input, src)
        source = _source(name, with_dim(src), place)
    else:
        source = filled(name, input, src, place.shape)
    made = write(
        name, (dim,), x, source, [place], coordinates(x.ndim, dim), combine, in_place=in_place
    )
    return input if in_place else made if input.ndim else reshape(made, ())


def _source(name: str, source: Tensor, index: Tensor) -> Tensor:
    """The corner of the values that the index names."""
    if not index.numel():
        return reshape(narrow(reshape(source, (-1,)), 0, 0, 0), index.shape)
    if source.ndim != index.ndim:
        raise ShapeError(
            f"{name}: the values have {source.ndim} dimensions, the index {index.ndim}; they "
            f"must be "
            "equal"
        )
    for d, size in enumerate(index.shape):
        if size > source.shape[d]:
            raise ShapeError(
                f"{name}: the index of shape {index.shape} is larger than the values of shape "
                f"{source.shape} in dimension {d}"
            )
        if size < source.shape[d]:
            source = narrow(source, d, 0, size)
    return source


def _way(name: str, reduce: str | None) -> str:
    if reduce not in _WAYS:
        raise ArgumentError(f"{name}: reduce must be 'add', 'multiply' or None, got {reduce!r}")
    return _WAYS[reduce]


def scatter(
    input: Tensor, dim: int, index: Tensor, src: Any = None, *, value: Any = None,
    reduce: str | None = None,
) -> Tensor:  # fmt: skip
    """``src`` (a tensor, or a number for all) written to the places that ``index`` names.

    index: the place in ``dim`` of each element of src, as in `gather`. reduce: None to replace,
    "add" or "multiply" to combine. Where an element is written twice, the last value in row-major
    order of the index stays.
    """
    given = value if src is None else src
    return _scattered("scatter", input, dim, index, given, _way("scatter", reduce))


def scatter_(
    input: Tensor, dim: int, index: Tensor, src: Any = None, *, value: Any = None,
    reduce: str | None = None,
) -> Tensor:  # fmt: skip
    """`scatter` in place."""
    given, way = value if src is None else src, _way("scatter_", reduce)
    if way == "mul":  # its gradient needs the values from before
        made: Tensor = input.copy_(_scattered("scatter_", input, dim, index, given, way))
        return made
    return _scattered("scatter_", input, dim, index, given, way, in_place=True)


@autocasts("widest")
def scatter_add(input: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """``src`` added at the places that ``index`` names; the order of additions is fixed."""
    same_dtype("scatter_add", input, src)
    return _scattered("scatter_add", input, dim, index, src, "add")


def scatter_add_(input: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """`scatter_add` in place."""
    same_dtype("scatter_add_", input, src)
    return _scattered("scatter_add_", input, dim, index, src, "add", in_place=True)


def _combination(name: str, reduce: str, known: tuple[str, ...]) -> str:
    if reduce not in known:
        raise ArgumentError(f"{name}: reduce must be one of {', '.join(known)}; got {reduce!r}")
    return _REDUCTIONS[reduce]


def scatter_reduce(
    input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """``src`` combined at the places that ``index`` names: "sum", "prod", "mean", "amax" or "amin".

    include_self: whether the values of ``input`` at these places take part.
    """
    combine = _combination("scatter_reduce", reduce, tuple(_REDUCTIONS))
    return _reduced("scatter_reduce", input, dim, index, src, reduce, combine, include_self)


def index_reduce(
    input: Tensor,
    dim: int,
    index: Tensor,
    source: Tensor,
    reduce: str,
    *,
    include_self: bool = True,
) -> Tensor:
    """Slices of ``source`` combined into the slices ``index`` (1-d) of ``dim``; see
    `scatter_reduce`."""
    combine = _combination("index_reduce", reduce, ("prod", "mean", "amax", "amin"))
    dim = wrap_dim("index_reduce", dim, input.ndim)
    check_index("index_reduce", index)
    x, values, places = with_dim(input), with_dim(source), with_dim(index)
    shape = (*x.shape[:dim], places.numel(), *x.shape[dim + 1 :])
    if values.shape != shape or places.ndim != 1:
        raise ShapeError(
            f"index_reduce: values of shape {source.shape} and index {index.shape} for dimension "
            f"{dim} of {input.shape}; {shape} is needed"
        )
    spread = along(places, shape, (dim,))
    made = _reduced("index_reduce", x, dim, spread, values, reduce, combine, include_self)
    return made if input.ndim else reshape(made, ())


def _reduced(
    name: str, input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, combine: str,
    include_self: bool,
) -> Tensor:  # fmt: skip
    same_dtype(name, input, src)
    base = input
    if not include_self:
        neutral = identity(combine, input.dtype)
        base = _scattered(name, input, dim, index, neutral, "set")
    made = _scattered(name, base, dim, index, src, combine)
    if reduce != "mean":
        return made
    ones = expand(full((), 1, dtype=input.dtype, device=input.device), input.shape)
    counts = ones if include_self else _scattered(name, ones, dim, index, 0, "set")
    counts = _scattered(
        name,
        counts,
        dim,
        index,
        expand(full((), 1, dtype=input.dtype, device=input.device), index.shape),
        "add",
    )
    counts = counts.clamp(min=1)
    if input.dtype.kind == "f":
        return made / counts
    floored: Tensor = made // counts
    return floored
