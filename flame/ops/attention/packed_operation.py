"""The operations of attention within packed sequences: itself and its backward pass.

Invariants: as of `operation`, for each sequence by itself; log_sum is (H, T_q). On a GPU kernels
read the places of the sequences on the device; what differs from call to call is data, so one
launch, and one CUDA graph, serves all lengths. On the CPU the ops are NumPy, sequence by sequence:
`packed.varlen_attn` pads there, which is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from flame.core.device import device_index
from flame.core.dtypes import DType, float32, int32
from flame.core.errors import DTypeError, FlameError, IndexRangeError, ShapeError
from flame.core.types import TensorType, tensor_type
from flame.kernel.builder import Lowering, Ref
from flame.kernel.library import AttentionProblem, Sequences
from flame.kernels.attention import flash_attention, takes
from flame.ops.attention import packed_references as references
from flame.ops.attention.operation import ordered, second_order
from flame.ops.attention.packing import Packing, padded, unpadded
from flame.ops.creation import zeros_like
from flame.ops.elementwise import compute_dtype
from flame.ops.op import Joint, Op, Types
from flame.ops.rows import type_of
from flame.ops.shapes import reshape, transpose, unsqueeze
from flame.runtime.cuda.driver import driver

NAME = "varlen_attn"


def check(types: Types, *, max_q: int, max_k: int, left: int, right: int) -> None:
    """Raise where operands (query, key, value, cu_seq_q, cu_seq_k, slopes) do not go together."""
    query, key, value, *starts = (type_of(t) for t in types[:5])
    fits = query.ndim == key.ndim == value.ndim == 3
    fits = fits and key.shape[:2] == value.shape[:2] and query.shape[2] == key.shape[2]
    if not fits:
        raise ShapeError(
            f"{NAME}: query (T_q, H, E), key (T_k, G, E) and value (T_k, G, Ev) do not go with "
            f"{query.shape}, {key.shape} and {value.shape}"
        )
    if query.dtype.kind != "f" or not query.dtype is key.dtype is value.dtype:
        raise DTypeError(
            f"{NAME}: query, key and value are floating tensors of one dtype, got "
            f"{query.dtype.name}, {key.dtype.name} and {value.dtype.name}"
        )
    heads, key_heads = query.shape[1], key.shape[1]
    if heads and (not key_heads or heads % key_heads):
        raise ShapeError(f"{NAME}: {heads} query heads cannot share {key_heads} key heads")
    for t in starts:
        if t.dtype is not int32:
            raise DTypeError(f"{NAME}: places of sequences are int32, got {t.dtype.name}")
        if t.ndim != 1 or not t.numel:
            raise ShapeError(f"{NAME}: places of N sequences are N + 1 numbers, got {t.shape}")
    if starts[0].shape != starts[1].shape:
        raise ShapeError(
            f"{NAME}: cu_seq_q and cu_seq_k are of as many sequences; got {starts[0].shape} and "
            f"{starts[1].shape}"
        )
    count = starts[0].shape[0] - 1
    for rows, longest, name in ((query.shape[0], max_q, "q"), (key.shape[0], max_k, "k")):
        if rows > count * longest:
            raise IndexRangeError(
                f"{NAME}: {rows} rows do not fit into {count} sequences of at most max_{name} = "
                f"{longest}"
            )
    if min(left, right) < -1:
        raise ShapeError(f"{NAME}: a window has ends from 0 on, or -1 for none: {(left, right)}")
    if types[5] is not None:
        slopes = type_of(types[5])
        if slopes.shape != (heads,) or slopes.dtype is not float32:
            raise ShapeError(
                f"{NAME}: slopes are float32 ({heads},), one a head; got {slopes.dtype.name} "
                f"{slopes.shape}"
            )


# --- on a GPU -------------------------------------------------------------------------------------


@cache
def is_taken(dtype: DType, width: int, value_width: int, device: str) -> bool:
    """Whether the kernels hold heads of these widths, in any layout."""
    one, other = (tensor_type(dtype, (1, 1, 1, n), None, device) for n in (width, value_width))
    # Tensor cores take no negative scale: so the plain kernels are asked, which serve all layouts.
    problem = AttentionProblem(True, one, one, other, other, None, False, -1.0)
    return takes(problem, _shared_limit(device)) is None


def _shared_limit(device: str) -> int:
    return driver().properties(device_index(device)).shared_memory_per_block


def _four(type_: TensorType) -> TensorType:
    """(T, H, E) as (1, H, T, E)."""
    (rows, heads, width), (row, head, column) = type_.shape, type_.strides
    return tensor_type(
        type_.dtype, (1, heads, rows, width), (0, head, row, column), type_.device
    )  # fmt: skip


def _problem(
    types: Types, result: TensorType, *, scale: float, max_q: int, max_k: int, left: int,
    right: int, backward: bool = False, shift: bool = False,
) -> AttentionProblem:  # fmt: skip
    """``types``: from query to slopes."""
    query, key, value, starts = (type_of(t) for t in types[:4])
    slopes = None if types[5] is None else type_of(types[5])
    sequences = Sequences(starts.shape[0] - 1, max_q, max_k, left, right)
    return AttentionProblem(
        backward, _four(query), _four(key), _four(value), _four(result), slopes, False, scale,
        shift=shift, sequences=sequences,
    )  # fmt: skip


def _optional(types: Types, position: int) -> Ref | None:
    return None if types[position] is None else Ref("input", position)


def _lower_cuda(types: Types, outputs: tuple[TensorType, ...], **options: Any) -> Lowering:
    problem = _problem(types, outputs[0], **options)
    operands = (
        *(Ref("input", i) for i in range(3)), _optional(types, 5), Ref("output", 0),
        Ref("output", 1), Ref("input", 3), Ref("input", 4),
    )  # fmt: skip
    limit = _shared_limit(outputs[0].device)
    return flash_attention(problem, operands, shared_limit=limit)


def _lower_backward_cuda(types: Types, outputs: tuple[TensorType, ...], **options: Any) -> Lowering:
    problem = _problem(
        types[2:], type_of(types[8]), **options, backward=True, shift=types[1] is not None
    )
    operands = (
        Ref("input", 0), _optional(types, 1), *(Ref("input", i) for i in range(2, 5)),
        _optional(types, 7), Ref("input", 8), Ref("input", 9),
        *(Ref("output", i) for i in range(3)), Ref("input", 5), Ref("input", 6),
    )  # fmt: skip
    return flash_attention(
        problem, operands, grad=_four(type_of(types[0])), gradients=[_four(t) for t in outputs],
        shared_limit=_shared_limit(outputs[0].device),
    )  # fmt: skip


def _failure(code: int, types: Types) -> FlameError:
    sequence, keys = divmod(code, 2)
    return references.misplaced("qk"[keys], sequence)


# --- forward --------------------------------------------------------------------------------------


def _infer(types: Types, *, scale: float, **limits: int) -> tuple[TensorType, ...]:
    check(types, **limits)
    query, value = type_of(types[0]), type_of(types[2])
    rows, heads, _ = query.shape
    log_sum = tensor_type(compute_dtype(query.dtype), (heads, rows), None, query.device)
    return ordered((rows, heads, value.shape[-1]), query), log_sum


def _by(meaning: Callable[..., Any]) -> Callable[..., Lowering]:
    """The lowering that is NumPy's computation of the meaning."""

    def lower(types: Types, outputs: tuple[TensorType, ...], **options: Any) -> Lowering:
        def host(operands: Any, results: Any) -> None:
            for result, made in zip(results, meaning(*operands, **options), strict=True):
                result[...] = made

        return Lowering((), host=host)

    return lower


def _vjp(
    g: Any, query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, slopes: Any, out: Any,
    scale: float, max_q: int, max_k: int, left: int, right: int,
) -> tuple[Any, ...]:  # fmt: skip
    made, log_sum = out
    grads = attention_packed_backward(
        zeros_like(made) if g[0] is None else g[0], g[1], query, key, value, cu_seq_q, cu_seq_k,
        slopes, made, log_sum, scale=scale, max_q=max_q, max_k=max_k, left=left, right=right,
    )  # fmt: skip
    return (*grads, None, None, None)


def _flops(types: Types, products: int) -> int:
    """Of sequences that are equally long, without a window."""
    query, key, _, starts = (type_of(t) for t in types[:4])
    return 2 * products * query.numel * key.shape[0] // max(starts.shape[0] - 1, 1)


attention_packed = Op(
    "attention_packed", inputs=("query", "key", "value", "cu_seq_q", "cu_seq_k", "slopes"),
    infer=_infer, lower=_by(references.attention_packed), lower_cuda=_lower_cuda,
    vjp=Joint(_vjp), materialize=False, failure=_failure,
    reads=lambda t: t.ndim == 3 or t.contiguous,
    flops=lambda types, outputs: _flops(types, 2),
    reference=references.attention_packed, samples=references.SAMPLES, tolerance=2.0,
)  # fmt: skip


# --- backward -------------------------------------------------------------------------------------


def _infer_backward(types: Types, *, scale: float, **limits: int) -> tuple[TensorType, ...]:
    check(types[2:8], **limits)
    query, key, value = (type_of(t) for t in types[2:5])
    rows, heads, _ = query.shape
    whole, wide = (rows, heads, value.shape[-1]), compute_dtype(query.dtype)
    wanted = {
        0: (whole, query.dtype), 1: ((heads, rows), wide), 8: (whole, query.dtype),
        9: ((heads, rows), wide),
    }  # fmt: skip
    for position, (shape, dtype) in wanted.items():
        given = types[position]
        if given is not None and (type_of(given).shape, type_of(given).dtype) != (shape, dtype):
            raise ShapeError(f"attention_packed_backward: {given} instead of {dtype.name} {shape}")
    return tuple(ordered(t.shape, t) for t in (query, key, value))


def _second(
    g: Any, grad: Any, shift: Any, query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any,
    slopes: Any, result: Any, log_sum: Any, needs: Any, scale: float, max_q: int, max_k: int,
    left: int, right: int,
) -> tuple[Any, ...]:  # fmt: skip
    """That of `operation`, of the padded sequences: linear in what is padded and in what is not."""
    packing = Packing(cu_seq_q, cu_seq_k, max_q, max_k, left, right, slopes)
    groups = key.shape[1]

    def of_queries(t: Any) -> Any:
        """(T_q, H, E) as (N, G, H / G, max_q, E)."""
        made = padded(t, cu_seq_q, max_q)
        return reshape(made, (made.shape[0], groups, made.shape[1] // groups, *made.shape[2:]))

    def of_keys(t: Any) -> Any:
        return unsqueeze(padded(t, cu_seq_k, max_k), 2)

    def of_rows(t: Any) -> Any:
        """(H, T_q) as (N, G, H / G, max_q)."""
        return None if t is None else of_queries(unsqueeze(transpose(t, 0, 1), 2))[..., 0]

    mask = packing.mask(log_sum.dtype, whole=True)
    if slopes is not None:
        mask = reshape(mask, (mask.shape[0], groups, mask.shape[1] // groups, *mask.shape[2:]))
    else:
        mask = unsqueeze(mask, 1)
    found = second_order(
        (of_queries(g[0]), of_keys(g[1]), of_keys(g[2])), of_queries(grad), of_rows(shift),
        of_queries(query), of_keys(key), of_keys(value), mask, of_queries(result),
        of_rows(log_sum), None, None, (*needs[:5], False, *needs[8:10]), False, scale, 0.0,
    )  # fmt: skip

    def to_queries(t: Any) -> Any:
        made = reshape(t, (t.shape[0], t.shape[1] * t.shape[2], *t.shape[3:]))
        return unpadded(made, cu_seq_q, query.shape[0])

    def to_keys(t: Any) -> Any:
        return unpadded(t[:, :, 0], cu_seq_k, key.shape[0])

    def to_rows(t: Any) -> Any:
        return transpose(to_queries(unsqueeze(t, -1))[..., 0], 0, 1)

    back = (
        to_queries, to_rows, to_queries, to_keys, to_keys, None, to_queries, to_rows
    )  # fmt: skip
    d = [
        None if made is None or turn is None else turn(made)
        for turn, made in zip(back, found[:8], strict=True)
    ]
    return (*d[:5], None, None, None, *d[6:])


attention_packed_backward: Op = Op(
    "attention_packed_backward",
    inputs=(
        "grad", "shift", "query", "key", "value", "cu_seq_q", "cu_seq_k", "slopes", "result",
        "log_sum",
    ),
    infer=_infer_backward, lower=_by(references.attention_packed_backward),
    lower_cuda=_lower_backward_cuda, vjp=Joint(_second),
    reads=lambda t: t.ndim == 3 or t.contiguous, failure=_failure,
    flops=lambda types, outputs: _flops(types[2:6], 5),
    reference=references.attention_packed_backward, tolerance=4.0,
    samples=[references.backward_sample(s) for s in references.SAMPLES],
)  # fmt: skip
