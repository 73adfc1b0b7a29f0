"""What vendor libraries do, by NumPy: plain definitions of the problems of `flame.kernel.library`.

Invariants: computed in float64, rounded once to the result's dtype; operands are read and written
at the addresses and strides that the problem gives.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.types import TensorType, tensor_type
from flame.kernel.library import (
    AttentionProblem,
    ConvolutionProblem,
    MatmulProblem,
    Problem,
)
from flame.runtime.cuda.libraries import cudnn, matmul_layout

Array = np.ndarray[Any, Any]
Solve = Callable[[Sequence[int]], None]


def prepare(problem: Problem) -> tuple[Solve, int]:
    """What solves a problem, given the addresses of its operands; and how many it takes."""
    solve, count = _solver(problem)

    def quiet(given: Sequence[int]) -> None:
        # What half-width floats cannot hold becomes infinite, and infinities of two signs NaN.
        with np.errstate(over="ignore", invalid="ignore"):
            solve(given)

    return quiet, count


def _solver(problem: Problem) -> tuple[Solve, int]:
    if isinstance(problem, MatmulProblem):
        extra = {"none": 0, "gelu_aux_bias": 2}.get(problem.epilogue, 1)
        return (lambda given: _matmul(problem, given)), 3 + extra
    if isinstance(problem, ConvolutionProblem):
        return (lambda given: _convolution(problem, given)), 3 + problem.bias
    count = (11 if problem.backward else 6) + 2 * (problem.dropout > 0)
    solve = _attention_backward if problem.backward else _attention
    return (lambda given: solve(problem, given)), count


def is_taken(problem: Problem) -> bool:
    """Whether NVIDIA's libraries have a form for the problem."""
    if isinstance(problem, MatmulProblem):
        return matmul_layout.describe(problem) is not None
    return cudnn.describe(problem) is not None


def array_at(pointer: int, dtype: DType, shape: Sequence[int], strides: Sequence[int]) -> Array:
    """Memory as an array, without a copy; strides in elements."""
    if 0 in shape:
        return np.empty(shape, dtype.numpy)
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    raw = (ctypes.c_char * (span * dtype.itemsize)).from_address(pointer)
    flat = np.frombuffer(raw, np.uint8).view(dtype.numpy)
    return np.lib.stride_tricks.as_strided(
        flat, tuple(shape), tuple(s * dtype.itemsize for s in strides)
    )


def tensor_at(pointer: int, type_: TensorType) -> Array:
    return array_at(pointer, type_.dtype, type_.shape, type_.strides)


def wide(x: Array) -> Array:
    return x.astype(np.float64)


# --- products -------------------------------------------------------------------------------------


def gelu(x: Array) -> Array:
    """The tanh form."""
    return 0.5 * x * (1 + np.tanh(_ROOT * (x + 0.044715 * x**3)))


def gelu_slope(x: Array) -> Array:
    t = np.tanh(_ROOT * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _ROOT * (1 + 3 * 0.044715 * x * x)


_ROOT = np.sqrt(2 / np.pi)


def _matmul(p: MatmulProblem, given: Sequence[int]) -> None:
    sizes = [b.size for b in p.batch]
    a = array_at(given[0], p.dtype, (*sizes, p.m, p.k), (*(b.a for b in p.batch), *p.a))
    b = array_at(given[1], p.dtype, (*sizes, p.k, p.n), (*(b.b for b in p.batch), *p.b))
    place = (*sizes, p.m, p.n), (*(b.d for b in p.batch), *p.d)
    d = array_at(given[2], p.result, *place)
    made = wide(a) @ wide(b)
    rest = list(given[3:])
    if p.epilogue in ("bias", "relu_bias", "gelu_bias", "gelu_aux_bias"):
        made = made + wide(array_at(rest.pop(0), p.result, (p.n,), (1,)))
    if p.epilogue == "gelu_aux_bias":
        array_at(rest.pop(0), p.result, *place)[...] = made.astype(p.result.numpy)
    if p.epilogue == "relu_bias":
        made = np.maximum(made, 0)
    elif p.epilogue in ("gelu_bias", "gelu_aux_bias"):
        made = gelu(made)
    elif p.epilogue == "dgelu":
        made = made * gelu_slope(wide(array_at(rest.pop(0), p.result, *place)))
    if p.accumulate:
        made = made + wide(d)
    d[...] = made.astype(p.result.numpy)


# --- convolution ----------------------------------------------------------------------------------


def _convolution(p: ConvolutionProblem, given: Sequence[int]) -> None:
    order = {"forward": "xwy", "input_gradient": "ywx", "weight_gradient": "yxw"}[p.direction]
    types = {"x": p.x, "w": p.weight, "y": p.y}
    known = {n: tensor_at(at, types[n]) for n, at in zip(order, given[:3], strict=True)}
    groups, space = p.groups, range(len(p.stride))
    n, channels = p.x.shape[:2]
    outputs = p.y.shape[1]
    sizes = list(zip(p.x.shape[2:], p.padding, strict=True))
    padded = (n, groups, channels // groups, *(size + 2 * pad for size, pad in sizes))
    inside = (..., *(slice(pad, pad + size) for size, pad in sizes))
    x, y = np.zeros(padded), np.zeros((n, groups, outputs // groups, *p.y.shape[2:]))
    weight = np.zeros((groups, outputs // groups, *p.weight.shape[1:]))
    if "x" in order[:2]:
        x[inside] = wide(known["x"]).reshape(n, groups, channels // groups, *p.x.shape[2:])
    if "y" in order[:2]:
        y[...] = wide(known["y"]).reshape(y.shape)
    if "w" in order[:2]:
        weight[...] = wide(known["w"]).reshape(weight.shape)
    for at in itertools.product(*(range(size) for size in p.weight.shape[2:])):
        begins = [at[i] * p.dilation[i] for i in space]
        ends = [begins[i] + p.stride[i] * (p.y.shape[2 + i] - 1) + 1 for i in space]
        seen = (..., *(slice(begins[i], ends[i], p.stride[i]) for i in space))
        if p.direction == "forward":
            y += np.einsum("ngc...,gkc->ngk...", x[seen], weight[(..., *at)])
        elif p.direction == "input_gradient":
            x[seen] += np.einsum("ngk...,gkc->ngc...", y, weight[(..., *at)])
        else:
            flat = x[seen].reshape(n, groups, channels // groups, -1)
            many = y.reshape(n, groups, outputs // groups, -1)
            weight[(..., *at)] = np.einsum("ngks,ngcs->gkc", many, flat)
    made = {"x": x[inside], "y": y, "w": weight}[order[2]]
    target = known[order[2]]
    made = made.reshape(target.shape)
    if p.bias:
        count = target.shape[1]
        bias = wide(array_at(given[3], types[order[2]].dtype, (count,), (1,)))
        made = made + bias.reshape(count, *(1 for _ in space))
    target[...] = made.astype(target.dtype)


# --- attention ------------------------------------------------------------------------------------


def _scores(p: AttentionProblem, q: Array, k: Array, mask: int) -> Array:
    """(B, H, L, S), -inf where nothing is seen."""
    scores = np.einsum("bhle,bhse->bhls", q, k) * p.scale
    if p.mask is not None:
        given = np.broadcast_to(tensor_at(mask, p.mask), scores.shape)
        hidden = np.where(given, 0, -np.inf) if p.mask.dtype is dtypes.bool_ else wide(given)
        scores = scores + hidden
    if p.causal:
        later = np.triu(np.ones(scores.shape[-2:], bool), 1)
        scores = np.where(later, -np.inf, scores)
    return scores


def _kept(p: AttentionProblem, shape: tuple[int, ...], numbers: Sequence[int]) -> Array | float:
    """What dropout multiplies by: 0, or 1 / (1 - p)."""
    if not p.dropout:
        return 1.0
    seed, offset = (int(array_at(at, dtypes.int64, (), ())) for at in numbers)
    key = np.array([seed & (2**64 - 1), offset & (2**64 - 1)], np.uint64)
    draws = np.random.Generator(np.random.Philox(key=key)).random(shape)
    return (draws >= p.dropout) / (1 - p.dropout)


def _heads(p: AttentionProblem, pointers: Sequence[int]) -> tuple[Array, Array, Array]:
    """q, k and v, with the heads of k and v repeated for those of q."""
    q, k, v = (
        wide(tensor_at(at, t)) for at, t in zip(pointers, (p.query, p.key, p.value), strict=True)
    )
    times = q.shape[1] // k.shape[1]
    return q, np.repeat(k, times, 1), np.repeat(v, times, 1)


def _log_sums(p: AttentionProblem) -> TensorType:
    return tensor_type(dtypes.float32, p.query.shape[:3])


def _attention(p: AttentionProblem, given: Sequence[int]) -> None:
    q, k, v = _heads(p, given[:3])
    scores = _scores(p, q, k, given[3])
    most = np.max(scores, -1, keepdims=True, initial=-np.inf)
    most = np.where(np.isfinite(most), most, 0)
    weights = np.exp(scores - most)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        log_sum = (most + np.log(total))[..., 0]
    weights = weights / np.where(total == 0, 1, total) * _kept(p, scores.shape, given[6:])
    result = tensor_at(given[4], p.result)
    result[...] = (weights @ v).astype(result.dtype)
    tensor_at(given[5], _log_sums(p))[...] = log_sum.astype(np.float32)


def _attention_backward(p: AttentionProblem, given: Sequence[int]) -> None:
    grad, shift, mask, result, log_sum = given[0], given[1], given[5], given[6], given[7]
    q, k, v = _heads(p, given[2:5])
    g = wide(tensor_at(grad, p.grad or p.result))
    scores = _scores(p, q, k, mask)
    sums = wide(tensor_at(log_sum, _log_sums(p)))[..., None]
    weights = np.where(np.isfinite(sums), np.exp(scores - np.where(np.isfinite(sums), sums, 0)), 0)
    kept = _kept(p, scores.shape, given[11:])
    through = np.einsum("bhle,bhse->bhls", g, v) * kept
    delta = (g * wide(tensor_at(result, p.result))).sum(-1, keepdims=True)
    if p.shift:
        delta = delta - wide(tensor_at(shift, _log_sums(p)))[..., None]
    inner = weights * (through - delta) * p.scale
    groups = p.key.shape[1]

    def summed(x: Array) -> Array:
        return x.reshape(x.shape[0], groups, -1, *x.shape[2:]).sum(2)

    made = (
        inner @ k,
        summed(np.swapaxes(inner, -1, -2) @ q),
        summed(np.swapaxes(weights * kept, -1, -2) @ g),
    )
    types = p.gradients or (p.query, p.key, p.value)
    for at, type_, value in zip(given[8:11], types, made, strict=True):
        target = tensor_at(at, type_)
        target[...] = value.astype(target.dtype)
