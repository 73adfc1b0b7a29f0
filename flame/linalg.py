"""``flame.linalg``: norms of vectors and matrices, by PyTorch's names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flame.core.autocast import plain
from flame.core.dtypes import int64
from flame.core.errors import ShapeError, UnsupportedError
from flame.ops import composites
from flame.ops.arithmetic import add
from flame.ops.autocast import autocasts
from flame.ops.creation import eye, ones_like
from flame.ops.extrema import amax, amin
from flame.ops.joining import cat
from flame.ops.norms import vector_norm
from flame.ops.products import matmul
from flame.ops.reductions import sum as sum_of
from flame.ops.shapes import wrap_dims

if TYPE_CHECKING:
    from flame.core.dtypes import DType
    from flame.tensor import Tensor

__all__ = [
    "cross", "diagonal", "matmul", "matrix_norm", "matrix_power", "multi_dot", "norm", "vander",
    "vecdot", "vector_norm",
]  # fmt: skip


def matrix_norm(
    A: Tensor, ord: Any = "fro", dim: Any = (-2, -1), keepdim: bool = False, *,
    dtype: DType | None = None,
) -> Tensor:  # fmt: skip
    """The norm of matrices: "fro", or 1, -1 (column sums), inf, -inf (row sums) of magnitudes.

    Raises UnsupportedError for orders that need singular values.
    """
    dims = wrap_dims("matrix_norm", dim, A.ndim)
    if len(dims) != 2:
        raise ShapeError(f"matrix_norm needs two dimensions, got {dim}")
    if ord == "fro":
        return vector_norm(A, 2, dims, keepdim, dtype=dtype)
    if isinstance(ord, str) or abs(ord) not in (1, math.inf):
        raise UnsupportedError(
            f"matrix_norm: order {ord!r} needs singular values, which FLAME has not"
        )
    if dtype is not None:
        return plain(matrix_norm, A.to(dtype), ord, dim, keepdim)
    rows, columns = dims if abs(ord) == 1 else dims[::-1]
    sums = sum_of(A.abs(), rows, keepdim=True)
    if not sums.shape[columns] and ord > 0:
        best = sum_of(sums, columns, keepdim=True)  # of no columns: 0
    else:
        best = (amax if ord > 0 else amin)(sums, columns, keepdim=True)
    return best if keepdim else best.squeeze(dims)


def norm(
    A: Tensor, ord: Any = None, dim: Any = None, keepdim: bool = False, *,
    dtype: DType | None = None,
) -> Tensor:  # fmt: skip
    """A vector norm, or a matrix norm where ``ord`` is a string or two dimensions are named."""
    count = A.ndim if dim is None else 1 if isinstance(dim, int) else len(dim)
    if isinstance(ord, str) or (ord is not None and count == 2):
        return matrix_norm(A, ord, (-2, -1) if dim is None else dim, keepdim, dtype=dtype)
    return vector_norm(A, 2 if ord is None else ord, dim, keepdim, dtype=dtype)


def cross(input: Tensor, other: Tensor, *, dim: int = -1) -> Tensor:
    """Vector products along a dimension of size 3."""
    return composites.cross(input, other, dim)


def diagonal(A: Tensor, *, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
    """Diagonals of matrices, as a view."""
    return A.diagonal(offset, dim1, dim2)


@autocasts("lower")
def vecdot(x: Tensor, y: Tensor, *, dim: int = -1) -> Tensor:
    """Sums of products along a dimension, of broadcast tensors."""
    product: Tensor = x * y
    return sum_of(product, dim)


def matrix_power(A: Tensor, n: int) -> Tensor:
    """Square matrices to the power of an integer n >= 0, by repeated squaring."""
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ShapeError(f"matrix_power: the matrices of {A.shape} are not square")
    if n < 0:
        raise UnsupportedError("matrix_power: negative powers need an inverse, which FLAME has not")
    if n == 0:
        nothing: Tensor = A.masked_fill(A == A, 0.0).nan_to_num(0.0)
        return add(nothing, eye(A.shape[-1], dtype=A.dtype, device=A.device))
    result, square = None, A
    while n:
        if n % 2:
            result = square if result is None else matmul(result, square)
        n //= 2
        square = matmul(square, square) if n else square
    assert result is not None
    return result.clone() if result is A else result


def multi_dot(tensors: Any) -> Tensor:
    """The product of several matrices, in the order that multiplies least.

    The first and the last may be vectors.
    """
    given = list(tensors)
    if len(given) < 2:
        raise ShapeError(f"multi_dot: at least two tensors are needed, got {len(given)}")
    first, last = given[0].ndim == 1, given[-1].ndim == 1
    given[0] = given[0].unsqueeze(0) if first else given[0]
    given[-1] = given[-1].unsqueeze(1) if last else given[-1]
    if any(t.ndim != 2 for t in given):
        raise ShapeError(f"multi_dot takes matrices, got {[t.shape for t in given]}")
    sizes = [*(t.shape[0] for t in given), given[-1].shape[1]]
    made = _product(given, _splits(sizes), 0, len(given))
    shape = made.shape[1 if first else 0 : 1 if last else 2]
    return made.reshape(shape)


def _splits(sizes: list[int]) -> dict[tuple[int, int], int]:
    """Where to split each run of matrices, by dynamic programming over its cost."""
    count = len(sizes) - 1
    cost = {(i, i + 1): 0 for i in range(count)}
    best: dict[tuple[int, int], int] = {}
    for length in range(2, count + 1):
        for i in range(count - length + 1):
            j = i + length
            options = [
                (cost[i, k] + cost[k, j] + sizes[i] * sizes[k] * sizes[j], k)
                for k in range(i + 1, j)
            ]
            cost[i, j], best[i, j] = min(options)
    return best


def _product(given: list[Tensor], best: dict[tuple[int, int], int], i: int, j: int) -> Tensor:
    if j - i == 1:
        return given[i]
    k = best[i, j]
    return matmul(_product(given, best, i, k), _product(given, best, k, j))


def vander(x: Tensor, *, N: int | None = None) -> Tensor:
    """Powers 0 to N - 1 of each element, in a new last dimension."""
    x = x if x.ndim else x.unsqueeze(0)
    count = x.shape[-1] if N is None else N
    if count <= 1:
        raise ShapeError(f"vander: N must be larger than 1, got {count}")
    wide = x if x.dtype.kind == "f" else x.to(int64)
    powers = wide.unsqueeze(-1).expand((*x.shape, count - 1))
    return cat([ones_like(wide).unsqueeze(-1), powers.cumprod(-1)], -1)
