"""Attention on a GPU: by cuDNN where it takes the problem, else by kernels of our own.

With dropout the own kernels come first: cuDNN would draw other bits than the CPU does.

Operands (batch..., length, width) are seen with two batch dimensions, (B, H, length, width), where
the strides of all of them allow it; query heads that share a key head are H = G * R heads over G.
What has no such view, and what no kernel takes, goes through the kernels of `forward` and
`backward`, as on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from flame.core.device import device_index
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel.builder import BoundCall, Lowering, Ref
from flame.kernel.library import AttentionProblem
from flame.kernels.attention import flash_attention, takes
from flame.ops.attention.forward import matrix
from flame.ops.elementwise import compute_dtype
from flame.ops.loops import broadcast_strides, coalesce
from flame.runtime.cuda.driver import driver

Refs = tuple[Ref | None, ...]


def forward(
    types: tuple[TensorType, TensorType, TensorType, TensorType | None],
    outputs: tuple[TensorType, ...],
    *,
    causal: bool,
    scale: float,
    dropout: float,
) -> Lowering | None:
    """Of (query, key, value, mask [, seed, offset]): (result, log_sum). None where no kernel takes
    it. ``types``: of the tensors."""
    query, key, value, mask = types
    result = outputs[0]
    seen = _seen((query, key, value, result), mask, result.shape[:-2], key.shape[-2])
    if seen is None:
        return None
    (q, k, v, made), masked = seen
    problem = AttentionProblem(False, q, k, v, made, masked, causal, scale, dropout)
    operands = (*_inputs(types), Ref("output", 0), Ref("output", 1), *_place(4, dropout))
    return _solved(problem, operands)


def backward(
    types: tuple[TensorType | None, ...],
    outputs: tuple[TensorType, ...],
    *,
    causal: bool,
    scale: float,
    dropout: float,
) -> Lowering | None:
    """Of (grad, shift, query, key, value, mask, result, log_sum [, seed, offset]): (dquery, dkey,
    dvalue). ``types``: of the tensors."""
    grad, shift, query, key, value, mask, result, log_sum = types
    assert grad is not None
    assert query is not None
    assert key is not None
    assert value is not None
    assert result is not None
    assert log_sum is not None
    rows = [t for t in (shift, log_sum) if t is not None]
    if any(t.dtype is not compute_dtype(query.dtype) for t in rows):
        return None
    tensors = (query, key, value, result, grad, *outputs)
    seen = _seen(tensors, mask, result.shape[:-2], key.shape[-2])
    if seen is None or not all(t.contiguous for t in rows):
        return None
    (q, k, v, made, g, dq, dk, dv), masked = seen
    problem = AttentionProblem(
        True, q, k, v, made, masked, causal, scale, dropout, shift=shift is not None, grad=g,
        gradients=(dq, dk, dv),
    )  # fmt: skip
    operands = (*_inputs(types), *(Ref("output", i) for i in range(3)), *_place(8, dropout))
    return _solved(problem, operands)


def _inputs(types: Sequence[TensorType | None]) -> Refs:
    return tuple(None if t is None else Ref("input", i) for i, t in enumerate(types))


def _place(position: int, dropout: float) -> Refs:
    """Seed and offset, if they are read."""
    return (Ref("input", position), Ref("input", position + 1)) if dropout else ()


def _solved(problem: AttentionProblem, operands: Refs) -> Lowering | None:
    index = device_index(problem.query.device)
    if not problem.dropout and driver().prepare(problem, index) is not None:
        return Lowering((), calls=(BoundCall(problem, operands),))
    limit = driver().properties(index).shared_memory_per_block
    if takes(problem, limit) is not None:
        return None
    return flash_attention(
        problem, operands, grad=problem.grad, gradients=problem.gradients, shared_limit=limit
    )


def _seen(
    tensors: Sequence[TensorType], mask: TensorType | None, batch: Shape, keys: int
) -> tuple[list[TensorType], TensorType | None] | None:
    """Tensors, of which the first four are query, key, value and result, with two batch
    dimensions; the mask with four. None where their strides do not allow it."""
    given = [*tensors, *([] if mask is None else [matrix(mask)])]
    if not all(t.numel for t in given):
        return None
    nest = coalesce(batch, [_batch_strides(t, batch) for t in given])
    sizes, strides = list(nest.sizes), [list(s) for s in nest.strides]
    while len(sizes) < 2:
        sizes.insert(0, 1)
        for steps in strides:
            steps.insert(0, 0)
    if len(sizes) == 3:
        shared = [t for t in (1, 2) if strides[t][2] == 0]
        if len(shared) != 2:
            return None
        return _grouped(given, sizes, strides, with_mask=mask is not None)
    if len(sizes) > 3:
        return None
    # one head of keys for all heads of queries
    alone = sizes[1] > 1 and strides[1][1] == strides[2][1] == 0
    found = []
    for i, (type_, steps) in enumerate(zip(given, strides, strict=True)):
        heads = 1 if alone and i in (1, 2) else sizes[1]
        found.append(_four(type_, (sizes[0], heads), tuple(steps)))
    return _parted(found, with_mask=mask is not None)


def _grouped(
    given: list[TensorType], sizes: list[int], strides: list[list[int]], *, with_mask: bool
) -> tuple[list[TensorType], TensorType | None] | None:
    """Batch dimensions (B, G, R), where R query heads share each key head."""
    batch, groups, each = sizes
    found = []
    for i, (type_, (outer, group, own)) in enumerate(zip(given, strides, strict=True)):
        if i in (1, 2):
            found.append(_four(type_, (batch, groups), (outer, group)))
        elif group == own * each:
            found.append(_four(type_, (batch, groups * each), (outer, own)))
        else:
            return None
    return _parted(found, with_mask=with_mask)


def _parted(
    found: list[TensorType], *, with_mask: bool
) -> tuple[list[TensorType], TensorType | None]:
    if not with_mask:
        return found, None
    mask = found[-1]
    shape = tuple(1 if step == 0 else n for n, step in zip(mask.shape, mask.strides, strict=True))
    return found[:-1], tensor_type(mask.dtype, shape, mask.strides, mask.device)


def _batch_strides(type_: TensorType, batch: Shape) -> Shape:
    outer = tensor_type(type_.dtype, type_.shape[:-2], type_.strides[:-2])
    return broadcast_strides(outer, batch)


def _four(type_: TensorType, batch: Shape, strides: Shape) -> TensorType:
    rows = tuple(
        0 if n == 1 and d == 0 else s
        for d, (n, s) in enumerate(zip(type_.shape[-2:], type_.strides[-2:], strict=True))
    )
    return tensor_type(type_.dtype, (*batch, *type_.shape[-2:]), (*strides, *rows), type_.device)
