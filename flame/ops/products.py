"""Matrix products: matmul with batch broadcasting, and everything that is one in disguise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flame.core.errors import DTypeError, ShapeError
from flame.core.handle import is_tensor
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Ref
from flame.kernel.values import cast
from flame.ops.arithmetic import add, mul
from flame.ops.autocast import autocasts
from flame.ops.contraction import Epilogue, Factor, PlainStore, Prologue, contract
from flame.ops.contraction.library import matrix_readable, product_call
from flame.ops.elementwise import compute_dtype
from flame.ops.loops import broadcast_shapes, broadcast_strides
from flame.ops.op import Arg, Op, Sample, Types, constant
from flame.ops.reductions import sum, sum_to
from flame.ops.rows import type_of
from flame.ops.shapes import expand, reshape, transpose, unsqueeze

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "addbmm",
    "addmm",
    "addmv",
    "addr",
    "baddbmm",
    "bmm",
    "dot",
    "inner",
    "matmul",
    "mm",
    "mv",
    "outer",
    "tensordot",
    "vdot",
]
METHODS = (
    "addbmm",
    "addmm",
    "addmv",
    "addr",
    "baddbmm",
    "bmm",
    "dot",
    "inner",
    "matmul",
    "mm",
    "mv",
    "outer",
    "vdot",
)


def _split(x: TensorType) -> tuple[Shape, int, int]:
    return x.shape[:-2], x.shape[-2], x.shape[-1]


def _infer(types: Types) -> TensorType:
    a, b = types
    assert isinstance(a, TensorType)
    assert isinstance(b, TensorType)
    if a.dtype is not b.dtype:
        raise DTypeError(
            f"matmul: operands are {a.dtype.name} and {b.dtype.name}; convert one of them"
        )
    (left, m, k), (right, k2, n) = _split(a), _split(b)
    if k != k2:
        raise ShapeError(
            f"matmul: shapes {a.shape} and {b.shape} do not go together: the last dimension of the "
            f"first ({k}) must equal the last but one of the second ({k2})"
        )
    batch = broadcast_shapes("matmul", [left, right])
    return tensor_type(a.dtype, (*batch, m, n), None, a.device)


def _lower(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    a, b = types
    (out,) = outputs
    assert isinstance(a, TensorType)
    assert isinstance(b, TensorType)
    if a.dtype.kind == "f":
        return _lower_fused(types, outputs, PlainStore(out))
    return _lower_loops(a, b, out)


def _lower_cuda(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    a, b = type_of(types[0]), type_of(types[1])
    if a.dtype.kind != "f":
        return _lower_loops(a, b, outputs[0])
    return product_call(a, b, outputs[0], (Ref("input", 0), Ref("input", 1), Ref("output", 0)))


def _lower_fused(
    types: Types,
    outputs: tuple[TensorType, ...],
    epilogue: Epilogue,
    prologues: Mapping[int, Prologue] | None = None,
) -> Lowering:
    """Kernels that hand sums of ``outputs[0]``'s shape to an epilogue; floating dtypes only."""
    a, b = types
    assert isinstance(a, TensorType)
    assert isinstance(b, TensorType)
    given = prologues or {}
    left = Factor(Ref("input", 0), a, -2, given.get(0))
    right = Factor(Ref("input", 1), b, -1, given.get(1))
    return contract(left, right, outputs[0].shape, epilogue)


def _batch_of(x: TensorType) -> TensorType:
    return tensor_type(x.dtype, x.shape[:-2], x.strides[:-2])


def _lower_loops(a: TensorType, b: TensorType, out: TensorType) -> Lowering:
    """Integers and bools: columns of the output side by side, a serial sum over k."""
    batch, m, n = _split(out)
    inner = a.shape[-1]
    total = compute_dtype(a.dtype)
    k = KernelBuilder("matmul_loops")
    sources = [
        k.tensor(
            "input",
            i,
            tensor_type(
                t.dtype,
                (*batch, *t.shape[-2:]),
                (*broadcast_strides(_batch_of(t), batch), *t.strides[-2:]),
            ),
        )
        for i, t in enumerate((a, b))
    ]
    target = k.tensor("output", 0, out)
    with (
        k.parallel(*batch, m, work=max(1, n * inner)) as (*index, row),
        k.vector(k.size(n)) as column,
    ):
        acc = k.register(0, total)
        with k.loop(k.size(inner)) as i:
            left = cast(sources[0][(*index, row, i)], total)
            right = cast(sources[1][(*index, i, column)], total)
            k.accumulate(acc, "add", left * right)
        k.store(target, (*index, row, column), values.read(acc))
    return k.finish()


def _grad_left(g: Any, b: Any) -> Any:
    return _matmul(g, transpose(b, -1, -2))


def _grad_right(g: Any, a: Any) -> Any:
    return _matmul(transpose(a, -1, -2), g)


def _right_sum(g: Any, a: Any, b_type: TensorType) -> Any:
    """The second operand's gradient; one tall product where the operand was shared by a batch."""
    if math.prod(b_type.shape[:-2]) == 1 and g.ndim > 2 and a.shape[:-2] == g.shape[:-2]:
        rows = math.prod(g.shape[:-1])
        flat = _grad_right(reshape(g, (rows, g.shape[-1])), reshape(a, (rows, a.shape[-1])))
        return reshape(flat, b_type.shape)
    return sum_to(_grad_right(g, a), b_type.shape)


_matmul = Op(
    "matmul",
    inputs=("a", "b"),
    infer=_infer,
    lower=_lower,
    vjp=(lambda g, b: _grad_left(g, b), _right_sum),
    flops=lambda types, outputs: 2 * outputs[0].numel * type_of(types[0]).shape[-1],
    reference=np.matmul,
    autocast="lower",
    samples=[
        Sample((Arg((3, 4)), Arg((4, 5)))),
        Sample((Arg((1, 1)), Arg((1, 1)))),
        Sample((Arg((2, 3, 4)), Arg((4, 5)))),
        Sample((Arg((2, 1, 3, 4)), Arg((5, 4, 2)))),
        Sample((Arg((0, 4)), Arg((4, 3)))),
        Sample((Arg((3, 0)), Arg((0, 2)))),
        Sample((Arg((1, 70)), Arg((70, 33)))),
        Sample((Arg((2, 3, 4)), Arg((2, 4, 1)))),
    ],
    tolerance=4.0,
    lower_fused=_lower_fused,
    lower_cuda=_lower_cuda,
    reads=matrix_readable,
)


def matmul(input: Tensor, other: Tensor) -> Tensor:
    """Matrix product over the last two dimensions, the ones before broadcast.

    A 1-d operand is taken as a row (first) or a column (second), and its dimension is dropped from
    the result. Raises ShapeError where the inner sizes differ.
    """
    for x in (input, other):
        if x.ndim == 0:
            raise ShapeError("matmul: operands need at least one dimension; use mul for scalars")
    left = unsqueeze(input, 0) if input.ndim == 1 else input
    right = unsqueeze(other, 1) if other.ndim == 1 else other
    made = _matmul(left, right)
    shape = made.shape
    if input.ndim == 1:
        shape = (*shape[:-2], shape[-1])
    if other.ndim == 1:
        shape = shape[:-1]
    return made if shape == made.shape else reshape(made, shape)


def _ranks(name: str, *pairs: tuple[Tensor, int]) -> None:
    for x, rank in pairs:
        if x.ndim != rank:
            shapes = ", ".join(str(t.shape) for t, _ in pairs)
            wanted = ", ".join(f"{r}-d" for _, r in pairs)
            raise ShapeError(f"{name} takes {wanted} tensors, got shapes {shapes}")


def mm(input: Tensor, mat2: Tensor) -> Tensor:
    """(n, m) @ (m, p), without broadcasting."""
    _ranks("mm", (input, 2), (mat2, 2))
    return matmul(input, mat2)


def bmm(input: Tensor, mat2: Tensor) -> Tensor:
    """(b, n, m) @ (b, m, p), without broadcasting."""
    _ranks("bmm", (input, 3), (mat2, 3))
    if input.shape[0] != mat2.shape[0]:
        raise ShapeError(f"bmm: batch sizes differ in {input.shape} and {mat2.shape}")
    return matmul(input, mat2)


def mv(input: Tensor, vec: Tensor) -> Tensor:
    """(n, m) @ (m,)."""
    _ranks("mv", (input, 2), (vec, 1))
    return matmul(input, vec)


@autocasts("widest")
def dot(input: Tensor, tensor: Tensor) -> Tensor:
    """Sum of products of two 1-d tensors of equal length."""
    _ranks("dot", (input, 1), (tensor, 1))
    return matmul(input, tensor)


vdot = dot


@autocasts("widest")
def inner(input: Tensor, other: Tensor) -> Tensor:
    """Sums of products over the last dimensions of both."""
    if input.ndim == 0 or other.ndim == 0:
        return mul(input, other)
    return tensordot(input, other, ([-1], [-1]))


def outer(input: Tensor, vec2: Tensor) -> Tensor:
    """(n,) and (m,) to (n, m)."""
    _ranks("outer", (input, 1), (vec2, 1))
    return mul(unsqueeze(input, 1), vec2)


def _scaled_sum(input: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    if product.dtype.kind != "f":  # integers take whole factors, as in PyTorch
        kind = bool if product.dtype.kind == "b" else int
        beta, alpha = kind(beta), kind(alpha)
    if alpha != 1:
        product = mul(product, alpha)
    if beta == 0:
        expand(input, product.shape)
        return product
    return add(product, input if beta == 1 else mul(input, beta))


@autocasts("lower")
def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """beta * input + alpha * (mat1 @ mat2); with beta 0, ``input`` is not read."""
    product = mm(mat1, mat2)
    _fits("addmm", input, product)
    return _scaled_sum(input, product, beta, alpha)


@autocasts("lower")
def addmv(input: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta * input + alpha * (mat @ vec)."""
    product = mv(mat, vec)
    _fits("addmv", input, product)
    return _scaled_sum(input, product, beta, alpha)


@autocasts("lower")
def addr(input: Tensor, vec1: Tensor, vec2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta * input + alpha * outer(vec1, vec2)."""
    product = outer(vec1, vec2)
    _fits("addr", input, product)
    return _scaled_sum(input, product, beta, alpha)


@autocasts("lower")
def baddbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """beta * input + alpha * bmm(batch1, batch2)."""
    product = bmm(batch1, batch2)
    _fits("baddbmm", input, product)
    return _scaled_sum(input, product, beta, alpha)


@autocasts("lower")
def addbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """beta * input + alpha * the sum over the batch of batch1 @ batch2."""
    products = bmm(batch1, batch2)
    product = sum(products, 0, dtype=products.dtype)  # integers are not widened here
    _fits("addbmm", input, product)
    return _scaled_sum(input, product, beta, alpha)


def _fits(name: str, input: Tensor, product: Tensor) -> None:
    if broadcast_shapes(name, [input.shape, product.shape]) != product.shape:
        raise ShapeError(
            f"{name}: input of shape {input.shape} does not broadcast to the product's shape "
            f"{product.shape}"
        )
    if input.dtype is not product.dtype:
        raise DTypeError(f"{name}: input is {input.dtype.name}, the product {product.dtype.name}")


@autocasts("widest")
def tensordot(a: Tensor, b: Tensor, dims: Any = 2) -> Tensor:
    """Sum of products over pairs of dimensions: the last and first ``dims``, or two lists of
    them.
    """
    from flame.ops.shapes import permute, wrap_dims

    if isinstance(dims, int):
        if not 0 <= dims <= min(a.ndim, b.ndim):
            raise ShapeError(f"tensordot: dims={dims} does not fit shapes {a.shape} and {b.shape}")
        dims = (list(range(a.ndim - dims, a.ndim)), list(range(dims)))
    first = wrap_dims("tensordot", tuple(dims[0]), a.ndim)
    second = wrap_dims("tensordot", tuple(dims[1]), b.ndim)
    a, b = _without_repeats(a, b, first, second)
    if [a.shape[d] for d in first] != [b.shape[d] for d in second]:
        raise ShapeError(f"tensordot: dimensions {dims} of {a.shape} and {b.shape} differ in size")
    free_a = [d for d in range(a.ndim) if d not in first]
    free_b = [d for d in range(b.ndim) if d not in second]
    count = math.prod(a.shape[d] for d in first)
    left_shape, right_shape = [a.shape[d] for d in free_a], [b.shape[d] for d in free_b]
    left = reshape(permute(a, (*free_a, *first)), (math.prod(left_shape), count))
    right = reshape(permute(b, (*second, *free_b)), (count, math.prod(right_shape)))
    return reshape(matmul(left, right), (*left_shape, *right_shape))


def _without_repeats(
    a: Tensor, b: Tensor, first: Sequence[int], second: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Where one tensor has size 1 in a pair of dimensions, the other one is summed over its own."""
    pairs = list(zip(first, second, strict=False))
    over_a = [d for d, e in pairs if b.shape[e] == 1 and a.shape[d] != 1]
    over_b = [e for d, e in pairs if a.shape[d] == 1 and b.shape[e] != 1]
    return (
        sum(a, over_a, keepdim=True, dtype=a.dtype) if over_a else a,
        sum(b, over_b, keepdim=True, dtype=b.dtype) if over_b else b,
    )


def _product(a: Any, b: Any) -> Tensor:
    """``a @ b`` where one of them may be a NumPy array."""
    a, b = (x if is_tensor(x) else constant(x) for x in (a, b))
    return matmul(a, b)


OPERATORS: Final = {
    "__matmul__": lambda self, other: _product(self, other),
    "__rmatmul__": lambda self, other: _product(other, self),
}
