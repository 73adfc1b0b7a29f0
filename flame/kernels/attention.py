"""Attention by own kernels: which of them solves an AttentionProblem, and its launches.

Two families: on tensor cores, for 16-bit elements in contiguous rows (``flash_attention_*``), and
in plain arithmetic for everything else (``attention_*``): float32, float64, odd widths, strided
elements. Both hold no (L, S) matrix, add nothing in an order that depends on timing, and draw the
same random bits.

Dropout: element (b, h, i, j) takes the word of position ((b H + h) L + i) S' + j of a draw whose
four elements share a block (see `flame.ops.philox`), with S' the length S rounded up to a multiple
of 64; it is kept where the word's upper 24 bits, as a fraction of 1, are not below the probability.

Sequences of several lengths (`Sequences`): the grid is made for the longest ones, and a block reads
on the device where its sequence begins; what stands there may change from launch to launch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from flame.core import dtypes
from flame.core.errors import UnsupportedError
from flame.core.types import Shape, TensorType
from flame.kernel.builder import BoundSource, Lowering, Ref
from flame.kernel.library import AttentionProblem
from flame.kernels import source
from flame.kernels.attention_tiles import (
    Tiles,
    fitting,
    flash_backward_tiles,
    flash_forward_tiles,
    plain_tiles,
    round_up,
    wide_of,
)

__all__ = ["dropout_blocks", "flash_attention", "on_tensor_cores", "takes"]

ELEMENTS: Final = {
    dtypes.float16: 0,
    dtypes.bfloat16: 1,
    dtypes.float32: 2,
    dtypes.float64: 3,
}
NO_MASK, BOOL_MASK, ELEMENT_MASK, FLOAT32_MASK, SLOPES = range(5)  # as in attention.cuh
WIDEST: Final = 256
LONGEST: Final = 2**31 - 1024  # rows are counted in int32, tiles may reach over the end
LONGEST_SEQUENCE: Final = 2**29  # so that a place and both ends of a window add up in int32
HOPPER_SHARED: Final = 232448  # bytes of shared memory that a block may have on an H100 or H200
DELTA_WARPS: Final = 4


# --- what is taken --------------------------------------------------------------------------------


def _widths(problem: AttentionProblem) -> tuple[int, int]:
    return problem.query.shape[-1], problem.value.shape[-1]


def _mask_kind(problem: AttentionProblem) -> int | None:
    """The code of a mask's dtype; None where no kernel reads it."""
    mask, dtype = problem.mask, problem.query.dtype
    if mask is None:
        return NO_MASK
    if problem.sequences is not None:
        return SLOPES if mask.dtype is dtypes.float32 else None
    if mask.dtype is dtypes.bool_:
        return BOOL_MASK
    if mask.dtype is dtype:
        return ELEMENT_MASK
    return FLOAT32_MASK if mask.dtype is dtypes.float32 else None


def on_tensor_cores(problem: AttentionProblem, *others: TensorType) -> bool:
    """Whether the kernels on tensor cores solve it; ``others``: gradients among the operands."""
    types = (problem.query, problem.key, problem.value, problem.result, *others)
    return (
        problem.query.dtype.bits == 16
        and problem.scale > 0
        and all(width % 8 == 0 and 0 < width <= WIDEST for width in _widths(problem))
        and all(t.strides[-1] == 1 or t.shape[-1] == 1 for t in types)
    )


def takes(problem: AttentionProblem, shared_limit: int = HOPPER_SHARED) -> str | None:
    """Why the kernels of this file do not solve a problem; None where they do.

    ``shared_limit``: bytes of shared memory that a block may have on the device.
    """
    query, key, value = problem.query, problem.key, problem.value
    dtype = query.dtype
    if dtype not in ELEMENTS or not dtype is key.dtype is value.dtype is problem.result.dtype:
        return f"query, key, value and result are {[t.dtype.name for t in _types(problem)]}"
    if any(t.ndim != 4 for t in _types(problem)):
        return f"operands must have four dimensions, query has shape {query.shape}"
    heads, key_heads = query.shape[1], key.shape[1]
    if heads and (not key_heads or heads % key_heads):
        return f"{heads} query heads cannot share {key_heads} key heads"
    if max(_widths(problem)) > WIDEST:
        return f"heads of width {max(_widths(problem))}, the kernels hold {WIDEST} at most"
    if max(query.shape[2], key.shape[2]) > LONGEST:
        return f"a length of {max(query.shape[2], key.shape[2])}, rows are counted in 32 bits"
    if _mask_kind(problem) is None:
        assert problem.mask is not None
        return f"a mask of {problem.mask.dtype.name} for {dtype.name}; convert it to {dtype.name}"
    if not 0.0 <= problem.dropout < 1.0:
        return f"dropout of probability {problem.dropout}"
    sequences = problem.sequences
    if sequences is not None and (query.shape[0] != 1 or problem.causal or problem.dropout):
        return "sequences in several entries of a batch, with causal or with dropout"
    if sequences is not None and max(sequences.max_q, sequences.max_k) > LONGEST_SEQUENCE:
        return f"sequences of {max(sequences.max_q, sequences.max_k)}, longer than 2^29"
    widths = _widths(problem)
    plain = plain_tiles(*widths, dtype, backward=problem.backward)
    if not on_tensor_cores(problem) and fitting(plain, shared_limit) is None:
        return f"{dtype.name} heads of width {max(widths)} need more shared memory than a block has"
    return None


def _types(problem: AttentionProblem) -> tuple[TensorType, ...]:
    return problem.query, problem.key, problem.value, problem.result


def dropout_blocks(problem: AttentionProblem) -> int:
    """How far a call moves the random generator's offset on."""
    batch, heads, length, _ = problem.query.shape
    return batch * heads * length * round_up(problem.key.shape[2], 64) // 4


# --- launches -------------------------------------------------------------------------------------


def _bits(number: float) -> int:
    """A float64 as the int64 of the same bits, which is how a kernel takes it by value."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _strides(type_: TensorType, count: int) -> Shape:
    """Of the first ``count`` dimensions, 0 where their size is 1."""
    pairs = zip(type_.strides[:count], type_.shape[:count], strict=True)
    return tuple(stride if size != 1 else 0 for stride, size in pairs)


def _mask_strides(problem: AttentionProblem) -> Shape:
    mask = problem.mask
    if mask is None:
        return ()
    if problem.sequences is not None:
        return (0, *_strides(mask, 1), 0, 0)
    return (0,) * (4 - mask.ndim) + _strides(mask, mask.ndim)


def _dropout_sizes(probability: float) -> Shape:
    """The least kept value of a word's upper 24 bits, and what kept elements are multiplied by."""
    if not probability:
        return ()
    return math.ceil(float(np.float32(probability)) * 2**24), _bits(1.0 / (1.0 - probability))


@dataclass(frozen=True)
class _Launcher:
    """Builds the launches of one problem; `tensor_cores` chooses the family."""

    problem: AttentionProblem
    tensor_cores: bool
    shared_limit: int

    @property
    def dimensions(self) -> int:
        """How many strides an operand has: tensor cores read contiguous rows."""
        return 3 if self.tensor_cores else 4

    def launch(
        self, symbol: str, candidates: Iterator[Tiles], operands: Sequence[Ref], sizes: Shape,
        owners: int, length: int,
    ) -> BoundSource:  # fmt: skip
        """Blocks own ``rows`` of ``length`` rows, for each of ``owners`` heads of each entry."""
        tiles = fitting(candidates, self.shared_limit)
        problem = self.problem
        if tiles is None:
            raise UnsupportedError(
                f"attention: no tile of {symbol} for query {problem.query.shape} fits the "
                f"{self.shared_limit} bytes of shared memory that a block has on this device"
            )
        head, head_v = _widths(problem)
        text = source(
            symbol, ELEMENT=ELEMENTS[problem.query.dtype], HEAD=head, HEAD_V=head_v,
            CAUSAL=int(self.right_end), LEFT=int(self.left_end), PACKED=int(self.packed),
            DROPOUT=int(problem.dropout > 0), MASK=_mask_kind(problem) or NO_MASK,
            **dict(tiles.defines),
        )  # fmt: skip
        blocks = -(-length // tiles.rows) * owners * self.entries
        return BoundSource(
            symbol, text, symbol, tuple(operands), sizes, (max(blocks, 1), 1, 1),
            (tiles.threads, 1, 1), tiles.shared, blocks,
        )  # fmt: skip

    def strides(self, *types: TensorType) -> Shape:
        return tuple(s for t in types for s in _strides(t, self.dimensions))

    @property
    def packed(self) -> bool:
        return self.problem.sequences is not None

    @property
    def entries(self) -> int:
        """Entries of the batch, or sequences."""
        sequences = self.problem.sequences
        return self.problem.query.shape[0] if sequences is None else sequences.count

    @property
    def right_end(self) -> bool:
        """Whether queries do not see all keys behind them."""
        sequences = self.problem.sequences
        return self.problem.causal if sequences is None else sequences.right >= 0

    @property
    def left_end(self) -> bool:
        """Whether queries do not see all keys before them."""
        sequences = self.problem.sequences
        return sequences is not None and sequences.left >= 0

    @property
    def longest(self) -> tuple[int, int]:
        """The queries and keys that an entry has at most."""
        problem, sequences = self.problem, self.problem.sequences
        queries, keys = problem.query.shape[2], problem.key.shape[2]
        if sequences is None:
            return queries, keys
        return min(queries, sequences.max_q), min(keys, sequences.max_k)

    @property
    def tail(self) -> Shape:
        """The sizes that come last: of the mask, of dropout and of sequences."""
        problem, sequences = self.problem, self.problem.sequences
        sizes = (*_mask_strides(problem), *_dropout_sizes(problem.dropout))
        if sequences is None:
            return sizes
        return (*sizes, sequences.count, *self.longest, sequences.left, sequences.right)

    def forward(self, operands: Sequence[Ref]) -> BoundSource:
        problem = self.problem
        (_, heads, length, _), key = problem.query.shape, problem.key.shape
        sizes = (
            heads, key[1], length, key[2], _bits(problem.scale),
            *self.strides(problem.query, problem.key, problem.value, problem.result), *self.tail,
        )  # fmt: skip
        head, head_v = _widths(problem)
        if self.tensor_cores:
            extras = problem.mask is not None or problem.dropout > 0
            symbol = "flash_attention_forward"
            tiles = flash_forward_tiles(head, head_v, extras=extras)
        else:
            symbol = "attention_forward"
            tiles = plain_tiles(head, head_v, problem.query.dtype, backward=False)
        return self.launch(symbol, tiles, operands, sizes, heads, self.longest[0])

    def delta(self, grad: TensorType, operands: Sequence[Ref]) -> BoundSource:
        problem = self.problem
        batch, heads, length, width = problem.result.shape
        rows = batch * heads * length
        text = source(
            "attention_delta", ELEMENT=ELEMENTS[grad.dtype], SHIFT=int(problem.shift),
            WARPS=DELTA_WARPS,
        )  # fmt: skip
        sizes = (rows, heads, length, width, *_strides(grad, 4), *_strides(problem.result, 4))
        blocks = -(-rows // DELTA_WARPS)
        return BoundSource(
            "attention_delta", text, "attention_delta", tuple(operands), sizes,
            (max(blocks, 1), 1, 1), (32 * DELTA_WARPS, 1, 1), 0, blocks,
        )  # fmt: skip

    def backward(
        self, grad: TensorType, gradients: Sequence[TensorType], operands: Sequence[Ref], *,
        keys: bool, first: bool = True, second: bool = False,
    ) -> BoundSource:  # fmt: skip
        """``gradients``: dq, or dk and dv; ``first``: dq or dk is computed, ``second``: dv is."""
        problem = self.problem
        (_, heads, length, _), key = problem.query.shape, problem.key.shape
        owners = gradients[0].shape[1]
        sizes = (
            heads, key[1], owners, length, key[2], _bits(problem.scale),
            *self.strides(grad, problem.query, problem.key, problem.value, *gradients), *self.tail,
        )  # fmt: skip
        head, head_v = _widths(problem)
        if self.tensor_cores:
            symbol = "flash_attention_backward"
            tiles = flash_backward_tiles(
                head, head_v, keys=keys, first=first, second=second, dropout=problem.dropout > 0
            )
        else:
            symbol = "attention_backward"
            tiles = plain_tiles(head, head_v, problem.query.dtype, backward=True, keys=keys)
        return self.launch(symbol, tiles, operands, sizes, owners, self.longest[int(keys)])


def _present(*refs: Ref | None) -> tuple[Ref, ...]:
    return tuple(ref for ref in refs if ref is not None)


def _after(problem: AttentionProblem, rest: Sequence[Ref | None]) -> tuple[Ref | None, ...]:
    """Of the operands behind the results: seed and offset, or the places of sequences."""
    if problem.sequences is not None:
        return (*rest[:2], Ref("error", 0))
    return tuple(rest[:2]) if problem.dropout else ()


def _inputs_and_outputs(inputs: int, outputs: int) -> tuple[Ref, ...]:
    made = [Ref("input", i) for i in range(inputs)]
    return (*made, *(Ref("output", i) for i in range(outputs)))


def _forward(launcher: _Launcher, operands: Sequence[Ref | None] | None) -> Lowering:
    problem = launcher.problem
    if operands is None:
        operands = (*_inputs_and_outputs(4, 2), Ref("input", 4), Ref("input", 5))
    q, k, v, mask, result, log_sum = operands[:6]
    used = _present(
        q, k, v, mask if problem.mask is not None else None, result, log_sum,
        *_after(problem, operands[6:]),
    )  # fmt: skip
    return Lowering((), calls=(launcher.forward(used),))


def _backward(
    launcher: _Launcher, operands: Sequence[Ref | None] | None, grad: TensorType,
    gradients: Sequence[TensorType],
) -> Lowering:  # fmt: skip
    problem = launcher.problem
    if operands is None:
        operands = (*_inputs_and_outputs(8, 3), Ref("input", 8), Ref("input", 9))
    grad_ref, shift, q, k, v, mask, result, log_sum, dq, dk, dv = operands[:11]
    delta = Ref("temporary", 0)
    before = _present(grad_ref, q, k, v, mask if problem.mask is not None else None, log_sum, delta)
    after = _after(problem, operands[11:])
    sums = launcher.delta(grad, _present(grad_ref, result, shift if problem.shift else None, delta))
    of_keys = _present(*before, dk, dv, *after)
    # Two wide sums do not fit the registers of a thread: one kernel each, which repeats a product.
    split = launcher.tensor_cores and max(_widths(problem)) > 128
    parts = [(True, False), (False, True)] if split else [(True, True)]
    calls = (
        sums,
        *(
            launcher.backward(grad, gradients[1:], of_keys, keys=True, first=first, second=second)
            for first, second in parts
        ),
        launcher.backward(grad, gradients[:1], _present(*before, dq, *after), keys=False),
    )
    rows = math.prod(problem.query.shape[:3])
    return Lowering((), (rows * wide_of(problem.query.dtype).itemsize,), calls=calls)


def flash_attention(
    problem: AttentionProblem,
    operands: Sequence[Ref | None] | None = None,
    *,
    grad: TensorType | None = None,
    gradients: Sequence[TensorType] | None = None,
    shared_limit: int = HOPPER_SHARED,
) -> Lowering:
    """The launches that solve a problem, forward or backward, with their temporaries.

    ``operands``: in the problem's order (`AttentionProblem`); by default inputs and outputs of the
    ops `attention` and `attention_backward`, with seed and offset, or the places of sequences, as
    the inputs behind. ``grad``: type of the gradient of the result (B, H, L, Ev), by default the
    result's. ``gradients``: types of dq (B, H, L, E), dk (B, G or H, S, E) and dv (B, G or H, S,
    Ev), by default of q, k and v; with H heads each query head has its own, with G the heads that
    share a key are summed in order.
    log_sum and shift are (B, H, L) contiguous, float32 (float64 for float64).
    Raises UnsupportedError where `takes` gives a reason.
    """
    reason = takes(problem, shared_limit)
    if reason is not None:
        raise UnsupportedError(f"attention: no kernel takes {reason}")
    if not problem.backward:
        return _forward(_Launcher(problem, on_tensor_cores(problem), shared_limit), operands)
    grad = problem.result if grad is None else grad
    if gradients is None:
        gradients = (problem.query, problem.key, problem.value)
    tensor_cores = on_tensor_cores(problem, grad, *gradients)
    return _backward(_Launcher(problem, tensor_cores, shared_limit), operands, grad, gradients)
