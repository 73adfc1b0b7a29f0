"""Problems of attention with their operands, and their meaning in float64."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.types import TensorType, tensor_type
from flame.kernel.builder import BoundSource, Lowering
from flame.kernel.library import AttentionProblem
from flame.kernels.attention import HOPPER_SHARED, flash_attention
from flame.ops.attention import references
from flame.ops.attention.dropping import reference_kept

Array = np.ndarray[Any, Any]
SEED, OFFSET = 1234567890123, 77
# relative to the norm: the elements' rounding, met a few times on the way
LIMITS = {"bfloat16": 8e-3, "float16": 1e-3, "float32": 2e-6, "float64": 1e-13}
DTYPES = {
    d.name: d
    for d in (dtypes.bfloat16, dtypes.float16, dtypes.float32, dtypes.float64, dtypes.bool_)
}
Launcher = Callable[[BoundSource, Sequence[Array | None]], None]


@dataclass(frozen=True)
class Case:
    """Sizes of a problem. gap: elements between rows; rows_first: (B, L, H, E) in memory."""

    batch: int
    heads: int
    key_heads: int
    length: int
    key_length: int
    width: int
    value_width: int = 0
    dtype: DType = dtypes.bfloat16
    causal: bool = False
    mask: Array | None = None
    dropout: float = 0.0
    scale: float = 0.0
    gradient_heads: int = 0
    gap: int = 0
    rows_first: bool = False
    shift: bool = True
    shared_limit: int = HOPPER_SHARED

    def __str__(self) -> str:
        sizes = "x".join(
            str(n)
            for n in (self.batch, self.heads, self.key_heads, self.length, self.key_length,
                      self.width, self.value_width or self.width)
        )  # fmt: skip
        mask = "" if self.mask is None else f"-{self.mask.dtype}{list(self.mask.shape)}"
        rest = "-causal" * self.causal + mask + f"-drop{self.dropout}" * bool(self.dropout)
        return f"{self.dtype.name}-{sizes}{rest}"


def type_of(array: Array) -> TensorType:
    steps = tuple(s // array.itemsize for s in array.strides)
    return tensor_type(DTYPES[array.dtype.name], array.shape, steps)


class Run:
    """Draws the operands of a case; `forward` and `backward` fill results in through a launcher."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case, self.rng = case, np.random.default_rng(seed)
        b, h, g, n, s, e = (
            case.batch, case.heads, case.key_heads, case.length, case.key_length, case.width,
        )  # fmt: skip
        v = case.value_width or e
        self.scale = case.scale or 1 / math.sqrt(max(e, 1))
        self.query, self.key, self.value = (
            self.draw(b, h, n, e), self.draw(b, g, s, e), self.draw(b, g, s, v),
        )  # fmt: skip
        self.mask = case.mask
        self.grad = self.draw(b, h, n, v)
        wide = np.float64 if case.dtype is dtypes.float64 else np.float32
        self.shift = self.rng.standard_normal((b, h, n)).astype(wide) if case.shift else None
        self.seed, self.offset = np.array([SEED], np.int64), np.array([OFFSET], np.int64)
        self.result = self.unwritten(b, h, n, v)
        self.log_sum = np.full((b, h, n), np.nan, wide)
        d = case.gradient_heads or g
        self.gradients = (
            self.unwritten(b, h, n, e), self.unwritten(b, d, s, e), self.unwritten(b, d, s, v),
        )  # fmt: skip

    def draw(self, b: int, h: int, n: int, e: int) -> Array:
        shape = (b, n, h, e) if self.case.rows_first else (b, h, n, e)
        wide = self.rng.standard_normal((*shape[:3], e + self.case.gap))
        made = wide.astype(self.case.dtype.numpy)[..., :e]
        return made.swapaxes(1, 2) if self.case.rows_first else made

    def unwritten(self, *shape: int) -> Array:
        made = self.draw(*shape)
        made[...] = np.nan
        return made

    def problem(self, *, backward: bool) -> AttentionProblem:
        return AttentionProblem(
            backward, *map(type_of, (self.query, self.key, self.value, self.result)),
            None if self.mask is None else type_of(self.mask), self.case.causal, self.scale,
            self.case.dropout, backward and self.case.shift,
        )  # fmt: skip

    def lowering(self, *, backward: bool) -> Lowering:
        problem = self.problem(backward=backward)
        if not backward:
            return flash_attention(problem, shared_limit=self.case.shared_limit)
        gradients = [type_of(d) for d in self.gradients]
        return flash_attention(
            problem, grad=type_of(self.grad), gradients=gradients,
            shared_limit=self.case.shared_limit,
        )  # fmt: skip

    def forward(self, launch: Launcher) -> None:
        inputs = (self.query, self.key, self.value, self.mask, self.seed, self.offset)
        outputs = (self.result, self.log_sum)
        execute(self.lowering(backward=False), inputs, outputs, launch)

    def backward(self, launch: Launcher) -> None:
        inputs = (
            self.grad, self.shift, self.query, self.key, self.value, self.mask, self.result,
            self.log_sum, self.seed, self.offset,
        )  # fmt: skip
        execute(self.lowering(backward=True), inputs, self.gradients, launch)

    # --- the meaning ------------------------------------------------------------------------------

    def kept(self) -> Array:
        """(B, H, L, S): what probabilities are multiplied by."""
        case = self.case
        shape = (case.batch, case.heads, case.length, case.key_length)
        if not case.dropout:
            return np.ones(shape)
        kept: Array = reference_kept(shape, case.dropout, SEED, OFFSET)
        return kept

    def expected(self) -> tuple[Array, ...]:
        """result, log_sum, dq, dk, dv in float64."""
        case = self.case
        share = case.heads // case.key_heads
        query, grad = np.asarray(self.query, np.float64), np.asarray(self.grad, np.float64)
        key, value = (
            np.repeat(np.asarray(a, np.float64), share, 1) for a in (self.key, self.value)
        )
        mask = self.mask
        if mask is not None and mask.dtype != bool:
            mask = np.asarray(mask, np.float64)
        place = (SEED, OFFSET) if case.dropout else (None, None)
        options: dict[str, Any] = {
            "causal": case.causal, "scale": self.scale, "dropout": case.dropout
        }  # fmt: skip
        result, log_sum = references.attention(query, key, value, mask, *place, **options)
        shift = np.zeros(log_sum.shape) if self.shift is None else self.shift
        dq, dk, dv = references.attention_backward(
            grad, shift, query, key, value, mask, result, log_sum, *place, **options
        )
        heads = case.gradient_heads or case.key_heads
        dk, dv = (
            d.reshape(case.batch, heads, case.heads // heads, *d.shape[2:]).sum(2) for d in (dk, dv)
        )
        return result, log_sum, dq, dk, dv

    def made(self) -> tuple[Array, ...]:
        return self.result, self.log_sum, *self.gradients


def execute(
    lowering: Lowering, inputs: Sequence[Array | None], outputs: Sequence[Array], launch: Launcher
) -> Array:
    """All launches of a lowering, in order, over fresh temporaries full of NaN; the words in which
    kernels report errors."""
    errors = np.zeros(2, np.int64)
    temporaries = [np.full(count, 0xFF, np.uint8) for count in lowering.temporaries]
    operands: dict[str, Sequence[Array | None]] = {
        "input": inputs, "output": outputs, "temporary": temporaries, "error": [errors],
    }  # fmt: skip
    for call in lowering.calls:
        assert isinstance(call, BoundSource)
        if call.extent:
            launch(call, [operands[ref.role][ref.position] for ref in call.operands])
    return errors


def packed(call: BoundSource, pointers: Sequence[int]) -> tuple[Any, Any]:
    """The array of addresses of a launch's arguments, and what must outlive it."""
    words = [ctypes.c_longlong(word) for word in (*pointers, *call.sizes)]
    array = (ctypes.c_void_p * len(words))(*[ctypes.addressof(word) for word in words])
    return array, words


def error(made: Array, expected: Array) -> float:
    """Distance relative to the norm of what is expected; infinite for NaN."""
    found = float(np.linalg.norm(np.asarray(made, np.float64) - expected))
    size = float(np.linalg.norm(expected))
    return math.inf if math.isnan(found) else found / size if size else found
