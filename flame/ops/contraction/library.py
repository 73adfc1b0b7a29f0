"""Matrix products on a GPU: the vendor's library does the work, whatever the layout.

Invariant: an operand is read where it lies if one of its last two dimensions is contiguous; any
other one is copied first (`matrix_readable`).
"""

from __future__ import annotations

from flame.core.device import device_index
from flame.core.dtypes import DType
from flame.core.precision import get_float32_matmul_precision
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel.builder import BoundCall, BoundFill, Lowering, Ref
from flame.kernel.library import Batch, Epilogue, MatmulProblem
from flame.ops.loops import coalesce
from flame.runtime.cuda.driver import driver


def matrix_readable(type_: TensorType) -> bool:
    """Whether the last two dimensions form a matrix that the library can read; the CPU's kernels
    read any."""
    if type_.device == "cpu" or type_.ndim < 2 or type_.dtype.kind != "f" or not type_.numel:
        return True
    return _matrix(type_) is not None


def _matrix(type_: TensorType) -> tuple[int, int] | None:
    """(row, column) strides with one of them 1 and the other at least the extent beside it."""
    (rows, columns), (row, column) = type_.shape[-2:], type_.strides[-2:]
    if columns == 1 or rows == 1:
        # a dimension of one element may have any stride
        if columns == 1 and rows == 1:
            return (1, 1)
        if columns == 1:
            return (row, 1) if row >= 1 else None
        return (max(columns, 1), 1) if column == 1 else (1, column) if column >= 1 else None
    if column == 1 and row >= columns:
        return (row, 1)
    if row == 1 and column >= rows:
        return (1, column)
    return None


def turned(type_: TensorType) -> TensorType:
    """The transposed matrix in the same memory."""
    return tensor_type(
        type_.dtype,
        (*type_.shape[:-2], type_.shape[-1], type_.shape[-2]),
        (*type_.strides[:-2], type_.strides[-1], type_.strides[-2]),
        type_.device,
    )


def product_call(
    a: TensorType,
    b: TensorType,
    out: TensorType,
    operands: tuple[Ref, ...],
    *,
    epilogue: Epilogue = "none",
    accumulate: bool = False,
) -> Lowering:
    """a (batch..., m, k) @ b (batch..., k, n) into ``out``; operands: a, b, out, then as in
    `MatmulProblem`."""
    if not out.numel:
        return Lowering(())
    if not a.numel and epilogue == "none" and out.dense:
        return Lowering((), calls=(BoundFill((operands[2],), out.numel * out.dtype.itemsize),))
    problem = problem_of(a, b, out, epilogue=epilogue, accumulate=accumulate)
    return Lowering((), calls=(BoundCall(problem, operands),))


def taken(lowering: Lowering, out: TensorType) -> bool:
    """Whether the library takes all calls of a lowering."""
    device = device_index(out.device)
    calls = [c for c in lowering.calls if isinstance(c, BoundCall)]
    return all(driver().prepare(c.problem, device) is not None for c in calls)


def problem_of(
    a: TensorType, b: TensorType, out: TensorType, *, epilogue: Epilogue, accumulate: bool = False
) -> MatmulProblem:
    """The problem of operands that are `matrix_readable`."""
    found = [_matrix(t) for t in (a, b, out)]
    left, right, target = found
    assert left is not None
    assert right is not None
    assert target is not None
    return MatmulProblem(
        out.shape[-2],
        out.shape[-1],
        a.shape[-1],
        _batch(a, b, out),
        a.dtype,
        out.dtype,
        left,
        right,
        target,
        _precision(a.dtype),
        epilogue,
        accumulate,
    )


def _batch(a: TensorType, b: TensorType, out: TensorType) -> tuple[Batch, ...]:
    shape = out.shape[:-2]
    strides = [*(_batch_strides(t, shape) for t in (a, b)), out.strides[:-2]]
    nest = coalesce(shape, strides)
    return tuple(
        Batch(size, *(steps[i] for steps in nest.strides)) for i, size in enumerate(nest.sizes)
    )


def _batch_strides(type_: TensorType, shape: Shape) -> Shape:
    missing = len(shape) - (type_.ndim - 2)
    inner = [
        0 if size == 1 else stride
        for size, stride in zip(type_.shape[:-2], type_.strides[:-2], strict=True)
    ]
    return (0,) * missing + tuple(inner)


def _precision(dtype: DType) -> str:
    return get_float32_matmul_precision() if dtype.name == "float32" else "highest"
