"""``flame.linalg``: norms of vectors and matrices, by PyTorch's names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flame.core.errors import ShapeError, UnsupportedError
from flame.ops.extrema import amax, amin
from flame.ops.norms import vector_norm
from flame.ops.reductions import sum as sum_of
from flame.ops.shapes import wrap_dims

if TYPE_CHECKING:
    from flame.core.dtypes import DType
    from flame.tensor import Tensor

__all__ = ["matrix_norm", "norm", "vector_norm"]


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
        A = A.to(dtype)
    rows, columns = dims if abs(ord) == 1 else dims[::-1]
    sums = sum_of(A.abs(), rows, keepdim=True)
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
