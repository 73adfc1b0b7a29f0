"""Views: new shapes and strides over the same memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core.dtypes import DType
from flame.core.errors import DTypeError, IndexRangeError, ShapeError, UnsupportedError
from flame.core.types import Shape, TensorType, contiguous_strides, tensor_type
from flame.ops.creation import shape_of
from flame.ops.loops import by_stride
from flame.ops.op import Arg, Sample, Types
from flame.ops.views import ViewOp

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "broadcast_to",
    "expand",
    "narrow",
    "permute",
    "reshape",
    "squeeze",
    "transpose",
    "unsqueeze",
]
METHODS = (
    "expand",
    "broadcast_to",
    "permute",
    "transpose",
    "view",
    "reshape",
    "narrow",
    "squeeze",
    "unsqueeze",
)


def wrap_dim(name: str, dim: Any, rank: int) -> int:
    """A dimension as a number from 0; negative ones count from the end. 0-d tensors have one."""
    limit = max(rank, 1)
    try:
        dim = dim.__index__()
    except AttributeError:
        raise ShapeError(f"{name}: a dimension must be an integer, got {dim!r}") from None
    if not -limit <= dim < limit:
        raise IndexRangeError(
            f"{name}: dimension {dim} is out of range for a tensor of {rank} dimensions "
            f"({-limit} to {limit - 1})"
        )
    found: int = dim % limit
    return found


def wrap_dims(name: str, dims: Any, rank: int) -> tuple[int, ...]:
    """Several dimensions, each named once; None means all."""
    if dims is None:
        return tuple(range(rank))
    given = (dims,) if isinstance(dims, int) else tuple(dims)
    found = tuple(wrap_dim(name, d, rank) for d in given)
    if len(set(found)) != len(found):
        raise ShapeError(f"{name}: a dimension is named twice in {given}")
    return found


def _first(types: Types) -> TensorType:
    x = types[0]
    assert isinstance(x, TensorType)
    return x


def _made(x: TensorType, shape: Sequence[int], strides: Sequence[int]) -> TensorType:
    return tensor_type(x.dtype, tuple(shape), tuple(strides), x.device)


# --- as_strided -----------------------------------------------------------------------------------


def _as_strided(
    types: Types, *, shape: Shape, strides: Shape, offset: int
) -> tuple[TensorType, int]:
    x = _first(types)
    made = _made(x, shape, strides)
    if any(s < 0 for s in strides):
        raise ShapeError(f"as_strided: strides must not be negative, got {strides}")
    return made, offset


def _as_strided_reference(x: Any, *, shape: Shape, strides: Shape, offset: int) -> Any:
    flat = np.ascontiguousarray(x).reshape(-1)[offset:]
    steps = tuple(s * flat.itemsize for s in strides)
    return np.lib.stride_tricks.as_strided(flat, shape, steps).copy()


as_strided = ViewOp(
    "as_strided",
    _as_strided,
    vjp=(
        lambda g, x_type, shape, strides, offset: as_strided_backward(
            g, base=x_type, shape=shape, strides=strides, offset=offset
        ),
    ),
    of_memory=True,
    reference=_as_strided_reference,
    samples=[
        Sample((Arg((4, 6), contiguous=True),), {"shape": (3, 2), "strides": (6, 2), "offset": 1}),
        Sample((Arg((10,), contiguous=True),), {"shape": (4, 3), "strides": (2, 1), "offset": 0}),
    ],
)


def as_strided_backward(
    g: Tensor, *, base: TensorType, shape: Shape, strides: Shape, offset: int
) -> Tensor:
    """``g`` added into zeros like ``base`` at the elements that the strided view addressed."""
    from flame.ops.joining import place

    order = memory_order(base)
    sizes = tuple(base.shape[d] for d in order)
    if apart(shape, strides):
        spread = place(g, offset, shape=sizes, strides=strides)
    else:
        spread = reshape(_summed(g, base.numel, strides, offset), sizes)
    return permute(spread, inverse(order))


def apart(shape: Shape, strides: Shape) -> bool:
    """Whether no two elements of such a view share memory, by each stride clearing those below
    it."""
    reach = 0
    for stride, size in sorted((t, s) for s, t in zip(shape, strides, strict=True) if s != 1):
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def _summed(g: Tensor, numel: int, strides: Shape, offset: int) -> Tensor:
    """``g`` summed into ``numel`` zeros, where several of its elements may meet."""
    from flame.ops.creation import arange
    from flame.ops.indexed_writes import put_at

    where: Any = arange(offset, offset + 1, device=g.device)
    for axis, (size, stride) in enumerate(zip(g.shape, strides, strict=True)):
        steps = arange(size, device=g.device) * stride
        where = where + steps.reshape((size,) + (1,) * (g.ndim - axis - 1))
    flat = reshape(g, (-1,))
    spread: Tensor = put_at(
        None, flat, where.reshape(-1), axes=(-1,), shape=(numel,), combine="add", wrap=False
    )
    return spread


def memory_order(base: TensorType) -> tuple[int, ...]:
    """The dimensions of a dense tensor from the largest stride to the smallest."""
    if not base.dense:
        raise UnsupportedError(
            f"a strided view of a tensor of shape {base.shape} and strides {base.strides} has no "
            "gradient here, as the tensor's memory has gaps; clone it first"
        )
    return tuple(by_stride(base.strides, base.shape))


# --- expand, permute ------------------------------------------------------------------------------


def _expand(types: Types, *, shape: Shape) -> tuple[TensorType, int]:
    x = _first(types)
    missing = len(shape) - x.ndim
    sizes, strides = [], []
    for axis, size in enumerate(shape):
        have = 1 if axis < missing else x.shape[axis - missing]
        step = 0 if axis < missing else x.strides[axis - missing]
        if missing < 0 or (size == -1 and axis < missing) or (have != 1 and size not in (-1, have)):
            raise ShapeError(
                f"expand: a tensor of shape {x.shape} cannot become {shape}; only dimensions of "
                "size 1 can grow, and new ones stand in front"
            )
        sizes.append(have if size == -1 else size)
        strides.append(step if sizes[-1] == have else 0)
    if missing < 0:
        raise ShapeError(f"expand: {shape} has fewer dimensions than the tensor's shape {x.shape}")
    return _made(x, sizes, strides), 0


def _sum_to(g: Any, shape: Shape) -> Any:
    from flame.ops.reductions import sum_to

    return sum_to(g, shape)


_expand_op = ViewOp(
    "expand", _expand,
    vjp=(lambda g, x_type: _sum_to(g, x_type.shape),),
    reference=lambda x, *, shape: np.broadcast_to(
        x, [x.shape[i - len(shape)] if s == -1 else s for i, s in enumerate(shape)]
    ),
    samples=[Sample((Arg((3, 1)),), {"shape": (3, 4)}), Sample((Arg((1,)),), {"shape": (2, 5)}),
             Sample((Arg(()),), {"shape": (2,)}), Sample((Arg((1, 2)),), {"shape": (0, 2)})],
)  # fmt: skip


def expand(input: Tensor, *sizes: Any) -> Tensor:
    """A view in which dimensions of size 1 repeat; -1 keeps a size. Nothing is copied."""
    result: Tensor = _expand_op(input, shape=shape_of(*sizes))
    return result


def broadcast_to(input: Tensor, size: Any) -> Tensor:
    """As `expand`."""
    return expand(input, size)


def _permute(types: Types, *, dims: tuple[int, ...]) -> tuple[TensorType, int]:
    x = _first(types)
    return _made(x, [x.shape[d] for d in dims], [x.strides[d] for d in dims]), 0


def inverse(dims: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes ``dims``."""
    return tuple(sorted(range(len(dims)), key=lambda i: dims[i]))


_permute_op: ViewOp = ViewOp(
    "permute", _permute,
    vjp=(lambda g, dims: _permute_op(g, dims=inverse(dims)),),
    reference=lambda x, *, dims: np.transpose(x, dims),
    samples=[Sample((Arg((2, 3, 4)),), {"dims": (2, 0, 1)}), Sample((Arg(()),), {"dims": ()}),
             Sample((Arg((0, 3)),), {"dims": (1, 0)})],
)  # fmt: skip


def permute(input: Tensor, *dims: Any) -> Tensor:
    """Dimensions in another order."""
    order = shape_of(*dims)
    if len(order) != input.ndim:
        raise ShapeError(f"permute: {order} must name all {input.ndim} dimensions of {input.shape}")
    result: Tensor = _permute_op(input, dims=wrap_dims("permute", order, input.ndim))
    return result


def transpose(input: Tensor, dim0: int, dim1: int) -> Tensor:
    """Two dimensions swapped."""
    a, b = (wrap_dim("transpose", d, input.ndim) for d in (dim0, dim1))
    dims = list(range(input.ndim))
    if dims:
        dims[a], dims[b] = dims[b], dims[a]
    result: Tensor = _permute_op(input, dims=tuple(dims))
    return result


# --- reshape --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def view_strides(x: TensorType, shape: Shape) -> Shape | None:
    """Strides of ``x`` seen with ``shape`` (of equal size), or None where it needs a copy."""
    if x.numel == 0:
        return tensor_type(x.dtype, shape).strides
    groups: list[tuple[int, int]] = []  # (elements, innermost stride) of runs that walk as one
    for size, stride in zip(x.shape, x.strides, strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == stride * size:
            groups[-1] = (groups[-1][0] * size, stride)
        else:
            groups.append((size, stride))
    strides: list[int] = []
    at = len(groups) - 1
    left = groups[at][0] if groups else 1
    step = groups[at][1] if groups else 1
    for size in reversed(shape):
        if size == 1:
            strides.append(step)
            continue
        if left == 1 and at > 0:
            at -= 1
            left, step = groups[at]
        if left % size:
            return None
        strides.append(step)
        left //= size
        step *= size
    return tuple(reversed(strides))


def _view(types: Types, *, shape: Shape) -> tuple[TensorType, int]:
    x = _first(types)
    strides = view_strides(x, shape)
    if strides is None:
        raise ShapeError(
            f"view: a tensor of shape {x.shape} and strides {x.strides} cannot be seen as {shape} "
            "without a copy; use reshape"
        )
    return _made(x, shape, strides), 0


_view_op = ViewOp(
    "view",
    _view,
    vjp=(lambda g, x_type: reshape(g, x_type.shape),),
    reference=lambda x, *, shape: np.reshape(x, shape),
    samples=[
        Sample((Arg((2, 6), contiguous=True),), {"shape": (3, 4)}),
        Sample((Arg((1,)),), {"shape": ()}),
        Sample((Arg((2, 0)),), {"shape": (0, 5)}),
        Sample((Arg(()),), {"shape": (1, 1)}),
    ],
)


@functools.lru_cache(maxsize=4096)
def whole_shape(name: str, x: TensorType, shape: Shape) -> Shape:
    """``shape`` with its one -1 replaced. Raises ShapeError where the sizes do not match."""
    unknown = shape.count(-1)
    known = math.prod(s for s in shape if s != -1)
    fits = unknown <= 1 and all(s >= -1 for s in shape)
    if fits and unknown:
        fits = known != 0 and x.numel % known == 0
        shape = tuple(x.numel // known if s == -1 else s for s in shape) if fits else shape
    elif fits:
        fits = known == x.numel
    if not fits:
        raise ShapeError(
            f"{name}: a tensor of shape {x.shape} ({x.numel} elements) cannot become {shape}"
        )
    return shape


def view(input: Tensor, *shape: Any) -> Tensor:
    """The same memory in another shape, or (given a dtype) with bits seen as another dtype's.

    Raises ShapeError where that needs a copy."""
    result: Tensor
    if len(shape) == 1 and isinstance(shape[0], DType):
        from flame.ops.slicing import view_bits

        result = view_bits(input, dtype=shape[0]) if shape[0] is not input.dtype else input
        return result
    result = _view_op(input, shape=whole_shape("view", input.type, shape_of(*shape)))
    return result


def reshape(input: Tensor, *shape: Any) -> Tensor:
    """Another shape; a view where possible, else a copy. One size may be -1."""
    wanted = whole_shape("reshape", input.type, shape_of(*shape))
    if view_strides(input.type, wanted) is None:
        from flame.ops.conversion import copy

        input = copy(input, contiguous=True)
    result: Tensor = _view_op(input, shape=wanted)
    return result


# --- slices ---------------------------------------------------------------------------------------


def _slice(types: Types, *, dim: int, start: int, stop: int, step: int) -> tuple[TensorType, int]:
    x = _first(types)
    sizes, strides = list(x.shape), list(x.strides)
    sizes[dim] = max(0, -((start - stop) // step))
    offset = start * strides[dim] if sizes[dim] else 0
    strides[dim] *= step
    return _made(x, sizes, strides), offset


_slice_op = ViewOp(
    "slice", _slice,
    vjp=(
        lambda g, x_type, dim, start, stop, step: _unslice(g, x_type.shape, dim, start, stop, step),
    ),
    reference=lambda x, *, dim, start, stop, step: x[
        (slice(None),) * dim + (slice(start, stop, step),)
    ],
    samples=[Sample((Arg((7, 3)),), {"dim": 0, "start": 1, "stop": 6, "step": 2}),
             Sample((Arg((4, 5)),), {"dim": 1, "start": 2, "stop": 4, "step": 1}),
             Sample((Arg((3,)),), {"dim": 0, "start": 2, "stop": 2, "step": 1})],
)  # fmt: skip


def _unslice(g: Any, shape: Shape, dim: int, start: int, stop: int, step: int) -> Any:
    from flame.ops.joining import place

    if g.shape == shape:
        return g
    strides = list(contiguous_strides(shape))
    offset = start * strides[dim]
    strides[dim] *= step
    return place(g, offset, shape=shape, strides=tuple(strides))


def slice_dim(input: Tensor, dim: int, start: int, stop: int, step: int = 1) -> Tensor:
    """``input[start:stop:step]`` along ``dim``, indices in range already."""
    result: Tensor = _slice_op(input, dim=dim, start=start, stop=stop, step=step)
    return result


def narrow(input: Tensor, dim: int, start: int, length: int) -> Tensor:
    """``length`` entries of a dimension from ``start``, as a view."""
    if not input.ndim:
        raise ShapeError("narrow: a 0-d tensor has no dimension to narrow")
    kind: DType | None = getattr(start, "dtype", None)
    if kind is not None and kind.kind not in "iu":
        raise DTypeError(f"narrow: start must be an integer, got a {kind.name} tensor")
    dim, start = wrap_dim("narrow", dim, input.ndim), start.__index__()
    size = input.shape[dim]
    start = start + size if start < 0 else start
    if not (0 <= start <= size and 0 <= length <= size - start):
        raise IndexRangeError(
            f"narrow: start {start} and length {length} leave dimension {dim} of {input.shape}"
        )
    return slice_dim(input, dim, start, start + length)


def squeeze(input: Tensor, dim: Any = None) -> Tensor:
    """Without dimensions of size 1 (all, or the given ones)."""
    dims = wrap_dims("squeeze", dim, input.ndim) if input.ndim else ()
    kept = tuple(s for d, s in enumerate(input.shape) if s != 1 or d not in dims)
    result: Tensor = _view_op(input, shape=kept)
    return result


def unsqueeze(input: Tensor, dim: int) -> Tensor:
    """With a new dimension of size 1 at ``dim``."""
    dim = wrap_dim("unsqueeze", dim, input.ndim + 1)
    shape = input.type.shape
    result: Tensor = _view_op(input, shape=(*shape[:dim], 1, *shape[dim:]))
    return result
