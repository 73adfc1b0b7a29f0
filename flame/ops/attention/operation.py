"""The operations of attention: itself and its backward pass.

Invariants: a masked score is -inf; a row that is masked throughout gives 0, and its log-sum-exp is
set to 0, so that its probabilities exp(score - log_sum) are 0 without a special case. Dropout, with
probability ``dropout``, draws the bits that seed and offset give (see `dropping`), in each pass
anew; without it seed and offset may be None. The backward pass is a function of all its operands,
the result and the log-sum-exp among them: its derivative is exact in each.
"""

from __future__ import annotations

import math
from typing import Any

from flame.core.errors import ArgumentError, DTypeError, ShapeError
from flame.core.types import Shape, TensorType, contiguous_strides, tensor_type
from flame.kernel.builder import Lowering
from flame.ops.arithmetic import mul
from flame.ops.attention import dropping, library, references
from flame.ops.attention.backward import attend_backward
from flame.ops.attention.forward import attend
from flame.ops.conversion import convert
from flame.ops.creation import zeros_like
from flame.ops.elementwise import compute_dtype
from flame.ops.loops import broadcast_shapes
from flame.ops.op import Joint, Op, Types
from flame.ops.reductions import sum as sum_of
from flame.ops.reductions import sum_to
from flame.ops.rows import type_of
from flame.ops.shapes import transpose, unsqueeze

NAME = "scaled_dot_product_attention"


def check(query: TensorType, key: TensorType, value: TensorType) -> None:
    """Raise where operands of attention do not go together."""
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if min(query.ndim, key.ndim, value.ndim) < 2:
        raise ShapeError(f"{NAME}: needs tensors (..., length, width), got {shapes}")
    if query.dtype.kind != "f":
        raise DTypeError(f"{NAME}: takes floating tensors, got {query.dtype.name}; convert them")
    if not query.dtype is key.dtype is value.dtype:
        raise DTypeError(
            f"{NAME}: query, key and value are {query.dtype.name}, {key.dtype.name} and "
            f"{value.dtype.name}; make them equal"
        )
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ShapeError(
            f"{NAME}: widths of query and key, and lengths of key and value differ: {shapes}"
        )


def check_mask(mask: TensorType, scores: Shape) -> None:
    """Raise where a mask does not fit scores (..., L, S)."""
    if mask.dtype.kind not in "fb":
        raise DTypeError(
            f"attention: a mask must be bool or floating, got {mask.dtype.name}; compare it "
            "with 0 for a bool mask"
        )
    missing = len(scores) - mask.ndim
    if missing < 0 or any(
        m not in (1, s) for m, s in zip(mask.shape, scores[missing:], strict=True)
    ):
        raise ShapeError(
            f"attention: a mask of shape {mask.shape} does not broadcast to scores {scores}"
        )


def ordered(shape: Shape, model: TensorType) -> TensorType:
    """A dense type whose dimensions lie in memory in the order of ``model``'s.

    Heads that are a view of (B, T, H, E) give a result that lies in memory as (B, T, H, E) too. A
    dimension in which the model has one element, as the heads that share its keys, lies right
    inside of the one before it: so its rows stay rows.
    """
    strides = model.strides
    if len(shape) != model.ndim or any(
        s == 0 and n > 1 for s, n in zip(strides, model.shape, strict=True)
    ):
        return tensor_type(model.dtype, shape, None, model.device)
    keys: list[float] = []
    for step, size in zip(strides, model.shape, strict=True):
        keys.append(-step if size > 1 else keys[-1] if keys else -math.inf)
    order = sorted(range(len(shape)), key=lambda d: keys[d])
    dense = contiguous_strides(tuple(shape[d] for d in order))
    steps = tuple(dense[order.index(d)] for d in range(len(shape)))
    return tensor_type(model.dtype, shape, steps, model.device)


def _tensors(types: Types) -> tuple[TensorType, TensorType, TensorType, TensorType | None]:
    mask = None if types[3] is None else type_of(types[3])
    return type_of(types[0]), type_of(types[1]), type_of(types[2]), mask


def _batch(types: Types, dropout: float) -> Shape:
    """The dimensions before (L, S) of the scores; all operands (query to mask, seed, offset)
    checked."""
    if dropout and None in types[4:]:
        raise ArgumentError(f"attention: dropout of {dropout} needs a seed and an offset")
    query, key, value, mask = _tensors(types)
    check(query, key, value)
    batch = broadcast_shapes(NAME, [t.shape[:-2] for t in (query, key, value)])
    if mask is not None:
        check_mask(mask, (*batch, query.shape[-2], key.shape[-2]))
    return batch


# --- attention ------------------------------------------------------------------------------------


def _infer(types: Types, *, causal: bool, scale: float, dropout: float) -> tuple[TensorType, ...]:
    batch = _batch(types, dropout)
    query, value = type_of(types[0]), type_of(types[2])
    rows = (*batch, query.shape[-2])
    log_sum = tensor_type(compute_dtype(query.dtype), rows, None, query.device)
    return ordered((*rows, value.shape[-1]), query), log_sum


def _lower(types: Types, outputs: tuple[TensorType, ...], **options: Any) -> Lowering:
    return attend(_tensors(types), outputs, **options)


def _lower_cuda(types: Types, outputs: tuple[TensorType, ...], **options: Any) -> Lowering:
    found = library.forward(_tensors(types), outputs, **options)
    return _lower(types, outputs, **options) if found is None else found


def _vjp(
    g: Any, query: Any, key: Any, value: Any, mask: Any, seed: Any, offset: Any, out: Any,
    needs: Any, causal: bool, scale: float, dropout: float,
) -> tuple[Any, ...]:  # fmt: skip
    made, log_sum = out
    options: dict[str, Any] = {"causal": causal, "scale": scale, "dropout": dropout}
    g = (zeros_like(made) if g[0] is None else g[0], g[1])
    found: list[Any] = [None] * 3
    if g[1] is None and not query.is_cuda:  # the CPU's kernels read it
        g = (g[0], zeros_like(log_sum))
    if any(needs[:3]):
        grads = attention_backward(
            *g, query, key, value, mask, made, log_sum, seed, offset, **options
        )
        found = [sum_to(d, x.shape) for d, x in zip(grads, (query, key, value), strict=True)]
    slopes = None
    if needs[3]:
        parts = _Parts(g[0], g[1], query, key, value, mask, made, log_sum, seed, offset, **options)
        slopes = convert(sum_to(parts.slopes, mask.shape), dtype=mask.dtype)
    return (*found, slopes, None, None)


def _flops(query: Any, key: Any, products: int) -> int:
    """Each product is (L, E) with (E, S), or as many multiplications."""
    return 2 * products * int(query.numel) * int(key.shape[-2])


attention = Op(
    "attention", inputs=("query", "key", "value", "mask", "seed", "offset"),
    infer=_infer, lower=_lower,
    flops=lambda types, outputs: _flops(types[0], types[1], 2),
    vjp=Joint(_vjp), reference=references.attention, samples=references.SAMPLES, tolerance=2.0,
    lower_cuda=_lower_cuda, materialize=False,
)  # fmt: skip


# --- backward -------------------------------------------------------------------------------------


class _Parts:
    """The matrices of the backward pass as tensors, for what no kernel does: higher orders."""

    def __init__(
        self, grad: Any, shift: Any, query: Any, key: Any, value: Any, mask: Any, result: Any,
        log_sum: Any, seed: Any, offset: Any, *, causal: bool, scale: float, dropout: float,
    ) -> None:  # fmt: skip
        from flame.ops.comparison import where
        from flame.ops.mathematics import exp
        from flame.ops.products import matmul

        wide = log_sum.dtype
        self.grad, self.result = (convert(t, dtype=wide) for t in (grad, result))
        self.query, self.key, self.value = (convert(t, dtype=wide) for t in (query, key, value))
        scores = matmul(mul(self.query, scale), transpose(self.key, -2, -1))
        if mask is not None and mask.dtype.kind == "b":
            scores = where(mask, scores, -math.inf)
        elif mask is not None:
            scores = scores + convert(mask, dtype=wide)
        if causal:
            scores = where(_order(scores), scores, -math.inf)
        self.probabilities = exp(scores - unsqueeze(log_sum, -1))
        delta = sum_of(self.grad * self.result, -1)
        delta = delta if shift is None else delta - shift
        self.factors = None
        if dropout:
            self.factors = dropping.kept(
                result.shape[:-2], query.shape[-2], key.shape[-2], dropout, seed, offset,
                dtype=wide, device=log_sum.device,
            )  # fmt: skip
        change = self.kept(matmul(self.grad, transpose(self.value, -2, -1)))
        self.change = change - unsqueeze(delta, -1)
        self.slopes = self.probabilities * self.change

    def kept(self, x: Any) -> Any:
        """What dropout makes of numbers (..., L, S): dropping is its own transpose."""
        return x if self.factors is None else x * self.factors


def _order(scores: Any) -> Any:
    """Which keys (S) stand at or before each query (L, 1)."""
    from flame.ops.comparison import le
    from flame.ops.creation import arange

    queries, keys = scores.shape[-2:]
    return le(
        unsqueeze(arange(keys, device=scores.device), 0),
        unsqueeze(arange(queries, device=scores.device), 1),
    )


def _infer_backward(
    types: Types, *, causal: bool, scale: float, dropout: float
) -> tuple[TensorType, ...]:
    batch = _batch((*types[2:6], *types[8:]), dropout)
    query, key, value = (type_of(t) for t in types[2:5])
    rows = (*batch, query.shape[-2])
    whole = (*rows, value.shape[-1])
    pairs = ((types[0], whole), (types[1], rows), (types[6], whole), (types[7], rows))
    for operand, wanted in pairs:
        found = wanted if operand is None else type_of(operand).shape
        if found != wanted:
            raise ShapeError(f"attention_backward: an operand of shape {found} instead of {wanted}")
    return tuple(ordered((*batch, *t.shape[-2:]), t) for t in (query, key, value))


def _lower_backward(types: Types, outputs: tuple[TensorType, ...], **options: Any) -> Lowering:
    return attend_backward(_given(types), outputs, **options)


def _lower_backward_cuda(types: Types, outputs: tuple[TensorType, ...], **options: Any) -> Lowering:
    found = library.backward(_given(types), outputs, **options)
    return _lower_backward(types, outputs, **options) if found is None else found


def _given(types: Types) -> tuple[TensorType | None, ...]:
    """Types of the tensors."""
    return tuple(None if t is None else type_of(t) for t in types[:8])


def second_order(
    g: Any, grad: Any, shift: Any, query: Any, key: Any, value: Any, mask: Any, result: Any,
    log_sum: Any, seed: Any, offset: Any, needs: Any, causal: bool, scale: float, dropout: float,
) -> tuple[Any, ...]:  # fmt: skip
    """With a, b, c the gradients of dquery, dkey and dvalue; names as in `backward`.

    x = d dS, z = -d delta, y = d (grad valueᵀ), w = d scores.
    """
    from flame.ops.products import matmul

    parts = _Parts(
        grad, shift, query, key, value, mask, result, log_sum, seed, offset,
        causal=causal, scale=scale, dropout=dropout,
    )  # fmt: skip
    given = (grad, shift, query, key, value, mask, result, log_sum)
    a, b, c = (convert(t, dtype=log_sum.dtype) for t in g)
    p = parts.probabilities

    def turned(t: Any) -> Any:
        return transpose(t, -2, -1)

    x = (matmul(a, turned(parts.key)) + matmul(parts.query, turned(b))) * scale
    z = p * x
    y = parts.kept(z)
    w = p * (x * parts.change + parts.kept(matmul(parts.grad, turned(c))))
    rows = sum_of(z, -1)
    d_grad = matmul(y, parts.value) - unsqueeze(rows, -1) * parts.result
    d_grad = d_grad + matmul(parts.kept(p), c)
    d_query = (matmul(w, parts.key) + matmul(parts.slopes, b)) * scale
    d_key = (matmul(turned(w), parts.query) + matmul(turned(parts.slopes), a)) * scale
    d_value = matmul(turned(y), parts.grad)
    d_out = -(unsqueeze(rows, -1) * parts.grad)
    made = (d_grad, rows, d_query, d_key, d_value, w, d_out, -sum_of(w, -1))
    found = [
        convert(sum_to(d, t.shape), dtype=t.dtype) if need else None
        for d, t, need in zip(made, given, needs[:8], strict=True)
    ]
    return (*found, None, None)


attention_backward: Op = Op(
    "attention_backward",
    inputs=(
        "grad", "shift", "query", "key", "value", "mask", "result", "log_sum", "seed", "offset",
    ),
    infer=_infer_backward, lower=_lower_backward, lower_cuda=_lower_backward_cuda,
    vjp=Joint(second_order),
    flops=lambda types, outputs: _flops(types[2], types[3], 5),
    reference=references.attention_backward, tolerance=4.0,
    samples=[references.backward_sample(s) for s in references.SAMPLES],
)  # fmt: skip
