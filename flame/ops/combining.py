"""Small compositions of views and joins: blocks, combinations, traces, trapezoids, membership."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core import dtypes
from flame.core.errors import ArgumentError, DTypeError, ShapeError
from flame.core.handle import is_tensor
from flame.core.types import TensorType, tensor_type
from flame.kernel.builder import Lowering
from flame.ops.autocast import autocasts
from flame.ops.creation import shape_of, zeros
from flame.ops.dimensions import atleast_2d
from flame.ops.elementwise import common_dtype
from flame.ops.indexing import index_select
from flame.ops.joining import cat
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Op, Sample, Types, constant
from flame.ops.shapes import reshape, slice_dim, wrap_dim
from flame.ops.slicing import diagonal
from flame.ops.sorting import same_numbers
from flame.ops.sorting_cuda import lower_isin

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "block_diag", "combinations", "cumulative_trapezoid", "isin", "nonzero_static", "trace",
    "trapezoid", "trapz", "unravel_index",
]  # fmt: skip
METHODS = ("trace",)


def block_diag(*tensors: Any) -> Tensor:
    """Matrices along the diagonal of a larger one, zeros elsewhere."""
    given = [atleast_2d(x) for x in tensors] or [zeros(1, 0)]
    if any(x.ndim > 2 for x in given):
        raise ShapeError("block_diag takes tensors of at most two dimensions")
    width = sum(x.shape[1] for x in given)
    dtype = common_dtype(tuple(x.type for x in given))
    rows, before = [], 0
    for x in given:
        left = zeros(x.shape[0], before, dtype=dtype, device=x.device)
        before += x.shape[1]
        rows.append(
            cat([left, x, zeros(x.shape[0], width - before, dtype=dtype, device=x.device)], 1)
        )
    return cat(rows, 0)


def combinations(input: Tensor, r: int = 2, with_replacement: bool = False) -> Tensor:
    """All choices of ``r`` elements of a 1-d tensor, one a row, in the order of itertools."""
    if input.ndim != 1:
        raise ShapeError(f"combinations takes a 1-d tensor, got shape {input.shape}")
    if r < 0:
        raise ArgumentError(f"combinations: r must not be negative, got {r}")
    if not r:
        return zeros(0, dtype=input.dtype, device=input.device)
    choose = itertools.combinations_with_replacement if with_replacement else itertools.combinations
    places = np.array(list(choose(range(input.shape[0]), r)), np.int64).reshape(-1, r)
    picked = index_select(input, 0, constant(places.reshape(-1), device=input.device))
    return reshape(picked, places.shape)


@autocasts("plain")
def trace(input: Tensor) -> Tensor:
    """The sum of a matrix's diagonal."""
    from flame.ops.reductions import sum as total

    if input.ndim != 2:
        raise ShapeError(f"trace takes a matrix, got shape {input.shape}")
    return total(diagonal(input))


def _areas(y: Tensor, x: Tensor | None, dx: Any, dim: int) -> Tensor:
    size = y.shape[dim]
    right = slice_dim(y, dim, min(1, size), size)
    left = slice_dim(y, dim, 0, max(size - 1, 0))
    heights: Tensor = right + left
    if x is None:
        scaled: Tensor = heights * dx / 2
        return scaled
    if x.ndim == 1:
        if x.shape[0] != size:
            raise ShapeError(f"trapezoid: {x.shape[0]} points for dimension {dim} of {y.shape}")
        x = reshape(x, (size,) + (1,) * (y.ndim - dim - 1))
    at = x.ndim - (y.ndim - dim)
    count = x.shape[at]
    steps = slice_dim(x, at, min(1, count), count) - slice_dim(x, at, 0, max(count - 1, 0))
    return steps * heights / 2


def trapezoid(y: Tensor, x: Tensor | None = None, *, dx: Any = 1, dim: int = -1) -> Tensor:
    """The integral along ``dim`` by the trapezoidal rule, of points ``x`` or with steps ``dx``."""
    from flame.ops.reductions import sum as total

    dim = wrap_dim("trapezoid", dim, y.ndim)
    return total(_areas(y, x, dx, dim), dim - y.ndim)


def trapz(y: Tensor, x: Tensor | None = None, *, dx: Any = 1, dim: int = -1) -> Tensor:
    """As `trapezoid`."""
    return trapezoid(y, x, dx=dx, dim=dim)


def cumulative_trapezoid(
    y: Tensor, x: Tensor | None = None, *, dx: Any = 1, dim: int = -1
) -> Tensor:
    """The running integral along ``dim`` by the trapezoidal rule."""
    from flame.ops.scans import cumsum

    dim = wrap_dim("cumulative_trapezoid", dim, y.ndim)
    return cumsum(_areas(y, x, dx, dim), dim - y.ndim)


def unravel_index(indices: Tensor, shape: Any) -> tuple[Tensor, ...]:
    """Places in row-major order as coordinates, a tensor for each dimension of ``shape``."""
    if indices.dtype.kind not in "iu":
        raise DTypeError(f"unravel_index takes integers, got {indices.dtype.name}")
    sizes = (shape,) if isinstance(shape, int) else shape_of(shape)
    found = []
    for axis, size in enumerate(sizes):
        found.append((indices // math.prod(sizes[axis + 1 :])) % size)
    return tuple(found)


def nonzero_static(input: Tensor, *, size: int, fill_value: int = -1) -> Tensor:
    """The first ``size`` rows of `nonzero`, filled up with ``fill_value``."""
    if input.is_cuda:
        from flame.ops.compaction import places

        return places(input, size, fill_value)
    found = np.argwhere(input.detach().numpy())[:size]
    made = np.full((size, input.ndim), fill_value, np.int64)
    made[: len(found)] = found
    return constant(made)


# --- membership -----------------------------------------------------------------------------------


def _infer_isin(types: Types, *, invert: bool) -> TensorType:
    x = types[0]
    assert isinstance(x, TensorType)
    return tensor_type(dtypes.bool_, x.shape, None, x.device)


def _members(x: Any, tests: Any, *, invert: bool) -> Any:
    wide = [
        a.astype(np.float32) if a.dtype.kind == "V" else a
        for a in (np.asarray(x), np.asarray(tests))
    ]
    return np.isin(wide[0], wide[1], invert=invert)


def _lower_isin(types: Types, outputs: tuple[TensorType, ...], *, invert: bool) -> Lowering:
    def host(operands: Sequence[Any], results: Sequence[Any]) -> None:
        results[0][...] = _members(*operands, invert=invert)

    return Lowering((), host=host)


_isin = Op(
    "isin",
    inputs=("x", "tests"),
    infer=_infer_isin,
    lower=_lower_isin,
    lower_cuda=lower_isin,
    vjp=NOT_DIFFERENTIABLE,
    reference=_members,
    samples=[
        Sample((Arg((3, 4), 0, 9, kind="index"), Arg((5,), 0, 9, kind="index")), {"invert": False})
    ],
)


def isin(
    elements: Any, test_elements: Any, *, assume_unique: bool = False, invert: bool = False
) -> Tensor:
    """Whether each element is among ``test_elements``."""
    device = next((e.device for e in (elements, test_elements) if is_tensor(e)), None)
    x, tests = (
        e.detach() if is_tensor(e) else constant(e, device=device)
        for e in (elements, test_elements)
    )  # fmt: skip
    x, tests = same_numbers(x, reshape(tests, (-1,)))
    result: Tensor = _isin(x, tests, invert=bool(invert))
    return result
