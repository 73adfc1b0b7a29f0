"""Problems that vendor libraries solve, as plain data.

Invariants: a problem says all that decides how it is solved (shapes, strides, dtypes, precision,
epilogue), so it is the key of every cache of plans, in memory and on disk; it holds no address.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flame.core.dtypes import DType, float32
from flame.core.types import Shape, TensorType, tensor_type

Epilogue = Literal["none", "bias", "relu_bias", "gelu_bias", "gelu_aux_bias", "dgelu"]
Direction = Literal["forward", "input_gradient", "weight_gradient"]


@dataclass(frozen=True)
class Batch:
    """A batch dimension: its size, and the elements between neighbours in each matrix."""

    size: int
    a: int
    b: int
    d: int


@dataclass(frozen=True)
class MatmulProblem:
    """d (batch..., m, n) = epilogue(a (batch..., m, k) @ b (batch..., k, n)).

    Strides are in elements, (row, column) of the last two dimensions: one of them is 1 (or the
    dimension has size 1), the other at least the size of that dimension. ``batch``: outermost
    first, a stride of 0 shares the matrix. ``precision``: of float32 factors, as in
    `flame.set_float32_matmul_precision`; sums are at least float32. ``accumulate``: d += instead.

    Epilogues ("gelu" is the tanh form): bias (n,) in d's dtype is added; gelu_aux_bias also keeps
    what gelu is taken of in aux (m, n), of d's dtype and strides; dgelu multiplies by the
    derivative of gelu at aux. Operands of a call, in order: a, b, d, then bias and aux as needed.
    """

    m: int
    n: int
    k: int
    batch: tuple[Batch, ...]
    dtype: DType  # of a and b
    result: DType  # of d
    a: tuple[int, int]
    b: tuple[int, int]
    d: tuple[int, int]
    precision: str = "highest"
    epilogue: Epilogue = "none"
    accumulate: bool = False


@dataclass(frozen=True)
class ConvolutionProblem:
    """x (N, C, ...), weight (K, C / groups, ...), y (N, K, ...); 1 to 3 dimensions of space.

    forward: y of x and weight, plus ``bias`` (K,) if there is one; operands x, weight, y [, bias].
    input_gradient: x of y and weight; operands y, weight, x [, bias of x's channels].
    weight_gradient: weight of y and x; operands y, x, weight.
    Types give dtypes and strides (row-major or channels-last in memory).
    """

    direction: Direction
    x: TensorType
    weight: TensorType
    y: TensorType
    stride: Shape
    padding: Shape
    dilation: Shape
    groups: int
    bias: bool = False


@dataclass(frozen=True)
class Sequences:
    """``count`` sequences that stand one behind the other, the longest of ``max_q`` and ``max_k``.

    Query i of a sequence with L queries and S keys has its own place at key i + S - L, and sees the
    keys from ``left`` before to ``right`` behind it; -1 is no end.
    """

    count: int
    max_q: int
    max_k: int
    left: int
    right: int


@dataclass(frozen=True)
class AttentionProblem:
    """softmax(q kᵀ scale + mask) v with q (B, H, L, E), k (B, G, S, E), v (B, G, S, Ev).

    H is a multiple of G. mask: a type that broadcasts to (B, H, L, S), bool (true takes part) or
    floating (added), or None. causal: query i sees keys up to i. dropout: probability; its random
    bits come from two numbers (seed, offset), int64.
    forward operands: q, k, v, mask or None, result, log_sum (B, H, L) float32 [, seed, offset].
    backward operands: grad (of the result), shift (gradient of log_sum) or None, q, k, v, mask or
    None, result, log_sum, dq, dk, dv [, seed, offset].
    grad, gradients: types of grad and of dq, dk, dv, where they do not lie as the result and as
    q, k and v do.

    sequences: B is 1, and L and S are the lengths of all sequences together, without causal and
    dropout. The operands end with the places where the sequences of queries and of keys begin,
    int32 (count + 1). mask: slopes (H) float32, of which -slope |own place - key| is added, or
    None.
    """

    backward: bool
    query: TensorType
    key: TensorType
    value: TensorType
    result: TensorType
    mask: TensorType | None
    causal: bool
    scale: float
    dropout: float = 0.0
    shift: bool = False
    grad: TensorType | None = None
    gradients: tuple[TensorType, TensorType, TensorType] | None = None
    sequences: Sequences | None = None


Problem = MatmulProblem | ConvolutionProblem | AttentionProblem


def operands_of(problem: Problem) -> tuple[tuple[TensorType | None, bool], ...]:
    """(type, whether it is written) of the tensors among a call's operands, in order; nothing of
    products, whose library takes any alignment."""
    if isinstance(problem, ConvolutionProblem):
        x, weight, y = problem.x, problem.weight, problem.y
        tensors = {
            "forward": ((x, False), (weight, False), (y, True)),
            "input_gradient": ((y, False), (weight, False), (x, True)),
            "weight_gradient": ((y, False), (x, False), (weight, True)),
        }[problem.direction]
        result = tensors[2][0]
        bias = tensor_type(result.dtype, result.shape[1:2], None, result.device)
        return (*tensors, (bias, False)) if problem.bias else tensors
    if isinstance(problem, AttentionProblem):
        given = (problem.query, problem.key, problem.value)
        inputs = tuple((t, False) for t in (*given, problem.mask))
        rows = tensor_type(float32, problem.query.shape[:3], None, problem.query.device)
        if not problem.backward:
            return (*inputs, (problem.result, True), (rows, True))
        grad = problem.grad or problem.result
        made = tuple((t, True) for t in problem.gradients or given)
        before = ((grad, False), (rows if problem.shift else None, False))
        return (*before, *inputs, (problem.result, False), (rows, False), *made)
    return ()
