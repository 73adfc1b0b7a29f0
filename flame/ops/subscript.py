"""``x[...]`` and ``x[...] = v``: ints, slices, None, Ellipsis, integer arrays, masks, in any
mixture.

The basic subscripts become one view. What index tensors remain then address dimensions of that
view; where they stand side by side the result has their common shape in their place, else in front.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.errors import DTypeError, IndexRangeError, ShapeError
from flame.core.handle import is_tensor
from flame.core.types import Shape
from flame.ops.autocast import autocasts
from flame.ops.conversion import convert
from flame.ops.creation import zeros
from flame.ops.indexed import take_at
from flame.ops.indexed_writes import put_at
from flame.ops.indexing import along, named
from flame.ops.loops import broadcast_shapes
from flame.ops.op import constant
from flame.ops.shapes import expand, reshape, view_strides
from flame.ops.slicing import Item, part
from flame.ops.transfer import move

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["index_put"]
METHODS = ("index_put", "index_put_")

WHOLE: Final = slice(None)


class _Subscript:
    """A subscript taken apart: ``items`` of the view, and index tensors for some of its
    dimensions."""

    __slots__ = ("indices", "items", "plain")

    def __init__(self, shape: Shape, index: Any) -> None:
        given = index if isinstance(index, tuple) else (index,)
        self.items: list[Item] = []
        self.indices: dict[int, Any] = {}  # dimension of the view -> index tensor
        self.plain = True  # the view is the tensor itself
        entries = _spelled_out(shape, [_entry(e) for e in given])
        dim = kept = 0
        for entry in entries:
            if entry is None:
                self.items.append(None)
                self.plain = False
                kept += 1
            elif isinstance(entry, int):
                self.items.append(_place(entry, dim, shape))
                self.plain = False
                dim += 1
            elif isinstance(entry, slice):
                item = _slice(entry, shape[dim])
                self.plain = self.plain and item == (0, shape[dim], 1)
                self.items.append(item)
                dim += 1
                kept += 1
            else:
                for found in _indices(entry, shape, dim):
                    if entry.ndim == 0 and entry.dtype is dtypes.bool_:
                        self.items.append(None)
                        self.plain = False
                    else:
                        self.items.append((0, shape[dim], 1))
                        dim += 1
                    self.indices[kept] = found
                    kept += 1


def _entry(e: Any) -> Any:
    """One part of a subscript as int, slice, None, Ellipsis or tensor."""
    if e is None or e is Ellipsis or isinstance(e, slice):
        return e
    if isinstance(e, (bool, np.bool_)):
        return constant(bool(e))
    if isinstance(e, int):
        return e
    if isinstance(e, np.integer):
        return int(e)
    if isinstance(e, (list, range, np.ndarray)):
        e = constant(list(e) if isinstance(e, range) else e)
        if not e.numel() and e.dtype.kind == "f":
            e = convert(e, dtype=dtypes.int64)
    if is_tensor(e):
        if e.dtype.kind not in "ib":
            raise DTypeError(
                f"a subscript tensor must be int64, int32 or bool, got {e.dtype.name}; convert it"
            )
        if e.ndim == 0 and e.dtype.kind == "i":
            return int(e.item())
        return e if e.dtype in (dtypes.int64, dtypes.int32, dtypes.bool_) else e.to(dtypes.int64)
    if hasattr(e, "__index__"):
        return e.__index__()
    raise DTypeError(
        f"a subscript takes integers, slices, None, ..., and tensors or lists of integers or "
        f"bools; "
        f"got {type(e).__name__}"
    )


def _taken(entry: Any) -> int:
    """How many dimensions of the tensor an entry addresses."""
    if entry is None or entry is Ellipsis:
        return 0
    if isinstance(entry, (int, slice)):
        return 1
    return entry.ndim if entry.dtype is dtypes.bool_ else 1


def _spelled_out(shape: Shape, entries: list[Any]) -> list[Any]:
    """Entries with whole slices for Ellipsis and for what is not mentioned."""
    missing = len(shape) - sum(_taken(e) for e in entries)
    dots = [i for i, e in enumerate(entries) if e is Ellipsis]
    if missing < 0:
        raise IndexRangeError(
            f"too many indices: {len(shape) - missing} for a tensor of shape {shape}"
        )
    if len(dots) > 1:
        raise IndexRangeError("a subscript can have only one Ellipsis (...)")
    at = dots[0] if dots else len(entries)
    return [*entries[:at], *[WHOLE] * missing, *entries[at + 1 :]]


_PLAIN: Final = frozenset((int, type(None)))


def _key(index: Any) -> Any:
    """A subscript of ints, slices, None and Ellipsis as a hashable tuple; None for others."""
    given = index if index.__class__ is tuple else (index,)
    found = []
    for e in given:
        kind = e.__class__
        if kind is slice:
            bounds = (e.start, e.stop, e.step)
            for bound in bounds:
                if bound.__class__ not in _PLAIN:
                    return None
            found.append(bounds)
        elif kind is int or e is None or e is Ellipsis:
            found.append(e)
        else:
            return None
    return tuple(found)


@functools.lru_cache(maxsize=8192)
def _basic(shape: Shape, key: Any) -> tuple[Item, ...]:
    """The items of a basic subscript; a loop over a tensor meets the same ones again and again."""
    index = tuple(slice(*e) if isinstance(e, tuple) else e for e in key)
    return tuple(_Subscript(shape, index).items)


def _place(index: int, dim: int, shape: Shape) -> int:
    size = shape[dim]
    if not -size <= index < size:
        raise IndexRangeError(
            f"index {index} is out of range for dimension {dim}, which has size {size}"
        )
    return index + size if index < 0 else index


def _slice(entry: slice, size: int) -> tuple[int, int, int]:
    step = 1 if entry.step is None else entry.step.__index__()
    if step <= 0:
        raise ShapeError(
            f"a slice needs a positive step, got {step}; use flip to turn an order round"
        )
    start, stop, step = entry.indices(size)
    count = max(0, -(-(stop - start) // step))
    return start, count, step


def _indices(entry: Any, shape: Shape, dim: int) -> Sequence[Any]:
    """A mask as the coordinates of its true elements; an integer tensor as it is."""
    if entry.dtype is not dtypes.bool_:
        return [entry]
    wanted = shape[dim : dim + entry.ndim]
    if entry.shape != wanted:
        raise IndexRangeError(
            f"a mask of shape {entry.shape} does not fit dimensions {dim} to "
            f"{dim + entry.ndim - 1} of a tensor of shape {shape}"
        )
    if not entry.ndim:
        return [zeros(1 if entry.item() else 0, dtype=dtypes.int64, device=entry.device)]
    if entry.is_cuda:
        from flame.ops.masking import nonzero

        found: Sequence[Any] = nonzero(entry, as_tuple=True)
        return found
    return [constant(found) for found in np.nonzero(entry.numpy())]


def _viewed(x: Tensor, subscript: _Subscript) -> Tensor:
    if subscript.plain:
        return x
    result: Tensor = part(x, items=tuple(subscript.items))
    return result


def _arranged(
    x: Tensor, indices: dict[int, Any]
) -> tuple[tuple[int, ...], list[Any], Shape, list[int]]:
    """(axes, expanded index tensors, result shape, dimensions of x that are indexed)."""
    dims = sorted(indices)
    # index tensors may be on the CPU, as in PyTorch
    indices = {d: move(index, x.type.device) for d, index in indices.items()}
    common = broadcast_shapes("a subscript", [indices[d].shape for d in dims])
    rest = [d for d in range(x.ndim) if d not in indices]
    together = dims[-1] - dims[0] == len(dims) - 1
    front = dims[0] if together else 0
    shape = (
        *(x.shape[d] for d in rest[:front]), *common, *(x.shape[d] for d in rest[front:])
    )  # fmt: skip
    place = range(front, front + len(common))
    where = {d: n if n < front else n + len(common) for n, d in enumerate(rest)}
    axes = tuple(where[d] if d in where else -1 - dims.index(d) for d in range(x.ndim))
    spread = []
    for d in dims:
        index = indices[d]
        if index.is_cpu and not x.is_cpu:  # lists, arrays, and index tensors of the host
            index = index.to(x.device)
        if index.shape != common:
            index = expand(index, common)
        spread.append(along(index, shape, place))
    return axes, spread, shape, dims


def _flat(x: Tensor, mask: Any) -> Any:
    """(x, mask) with the dimensions of a mask merged into one, where that is a view; else None."""
    if not is_tensor(mask) or mask.dtype is not dtypes.bool_ or mask.ndim < 2:
        return None
    shape = (mask.numel(), *x.shape[mask.ndim :])
    if mask.shape != x.shape[: mask.ndim] or view_strides(x.type, shape) is None:
        return None
    return reshape(x, shape), reshape(mask, (-1,))


def get(x: Tensor, index: Any) -> Tensor:
    """``x[index]``: a view for ints, slices, None and Ellipsis, else a copy."""
    key = _key(index)
    if key is not None:
        view: Tensor = part(x, items=_basic(x.type.shape, key))
        return view
    flat = _flat(x, index)
    if flat is not None:
        x, index = flat
    subscript = _Subscript(x.shape, index)
    if not subscript.indices:
        result: Tensor = part(x, items=tuple(subscript.items))
        return result
    base = _viewed(x, subscript)
    axes, spread, _, dims = _arranged(base, subscript.indices)
    taken: Tensor = named("x[...]", dims, base.shape, take_at, base, *spread, axes=axes, wrap=True)
    return taken


def put(x: Tensor, index: Any, value: Any) -> None:
    """``x[index] = value``, in place; ``value`` is broadcast and converted."""
    from flame.ops.masking import masked_fill_

    mask = _lone_mask(x, index)
    if mask is not None and _is_number(value):
        masked_fill_(x, mask, value)
        return
    flat = _flat(x, index)
    if flat is not None:
        x, index = flat
    subscript = _Subscript(x.shape, index)
    base = _viewed(x, subscript)
    if not subscript.indices:
        base.copy_(_slim(_as_value(base, value), base.shape))
        return
    _write(base, subscript.indices, _as_value(base, value), "set")


def _lone_mask(x: Tensor, index: Any) -> Any:
    """The mask of ``x[mask]``, shaped to broadcast with x; None for other subscripts."""
    if not is_tensor(index) or index.dtype is not dtypes.bool_ or not index.ndim:
        return None
    if index.shape != x.shape[: index.ndim]:
        return None
    return reshape(index, index.shape + (1,) * (x.ndim - index.ndim))


def _is_number(value: Any) -> bool:
    return not is_tensor(value) or value.ndim == 0


def _as_value(x: Tensor, value: Any) -> Tensor:
    from flame.ops.creation import full

    if is_tensor(value):
        return value
    if isinstance(value, (bool, int, float, np.generic)):
        number = value.item() if isinstance(value, np.generic) else value
        return full((), number, dtype=x.dtype, device=x.device)
    made: Tensor = constant(value, device=x.device)
    return made


def _slim(value: Tensor, shape: Shape) -> Tensor:
    """``value`` without leading dimensions of size 1 that ``shape`` does not have."""
    extra = value.ndim - len(shape)
    if extra <= 0 or any(s != 1 for s in value.shape[:extra]):
        return value
    return reshape(value, value.shape[extra:])


def _write(
    x: Tensor, indices: dict[int, Any], value: Tensor, combine: str, *, in_place: bool = True
) -> Tensor:
    axes, spread, shape, dims = _arranged(x, indices)
    value = _slim(value, shape)
    if not _fits(value.shape, shape):
        raise ShapeError(
            f"values of shape {value.shape} cannot be written where the subscript addresses {shape}"
        )
    source = expand(convert(value, dtype=x.dtype), shape)
    attributes = {"axes": axes, "shape": x.shape, "combine": combine, "wrap": True}

    def call(*operands: Any) -> Any:
        if in_place:
            return put_at.into((x,), *operands, **attributes)
        return put_at(*operands, **attributes)

    result: Tensor = named("x[...] = v", dims, x.shape, call, x, source, *spread)
    return result


def _fits(have: Shape, wanted: Shape) -> bool:
    if len(have) > len(wanted):
        return False
    ends = wanted[len(wanted) - len(have) :]
    return all(a in (1, b) for a, b in zip(have, ends, strict=True)) or math.prod(wanted) == 0


@autocasts("widest")
def index_put(
    input: Tensor, indices: Sequence[Any], values: Tensor, accumulate: bool = False
) -> Tensor:
    """A copy of ``input`` with ``values`` written (or added) at the places of the index tensors.

    indices: one for each leading dimension, integer tensors or masks; None for a whole dimension.
    """
    return _index_put(input, indices, values, "add" if accumulate else "set", in_place=False)


def index_put_(
    input: Tensor, indices: Sequence[Any], values: Tensor, accumulate: bool = False
) -> Tensor:
    """`index_put` in place."""
    return _index_put(input, indices, values, "add" if accumulate else "set", in_place=True)


def _index_put(
    input: Tensor, indices: Sequence[Any], values: Tensor, combine: str, *, in_place: bool
) -> Tensor:
    if values.dtype is not input.dtype:
        raise DTypeError(
            f"index_put: values of {values.dtype.name} for a {input.dtype.name} tensor; "
            f"convert them"
        )
    subscript = _Subscript(input.shape, tuple(WHOLE if i is None else _array(i) for i in indices))
    if not subscript.plain or not subscript.indices:
        raise IndexRangeError("index_put: the indices must be tensors, at least one of them")
    return _write(input, subscript.indices, values, combine, in_place=in_place)


def _array(index: Any) -> Any:
    """0-d integer tensors address like 1-d ones of one element here."""
    return reshape(index, (1,)) if index.ndim == 0 and index.dtype.kind == "i" else index


OPERATORS: Final[dict[str, Any]] = {"__getitem__": get, "__setitem__": put}
