"""Attention within packed sequences: problems with their operands, and their meaning in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.types import TensorType, tensor_type
from flame.kernel.builder import Lowering
from flame.kernel.library import AttentionProblem, Sequences
from flame.kernels.attention import flash_attention
from flame.ops.attention import packed_references as references

from .attention_cases import Array, Launcher, execute, type_of


@dataclass(frozen=True)
class PackedCase:
    """Lengths of the sequences, and sizes. gap: elements between heads; spare: how much longer than
    the longest one sequences may be."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: int
    key_heads: int
    width: int
    value_width: int = 0
    dtype: DType = dtypes.float16
    left: int = -1
    right: int = -1
    slopes: bool = False
    gap: int = 0
    spare: int = 0
    shift: bool = True

    def __str__(self) -> str:
        sizes = f"{list(self.queries)}x{list(self.keys)}-{self.heads}x{self.key_heads}x{self.width}"
        return f"{self.dtype.name}-{sizes}-{self.left}..{self.right}" + "-slopes" * self.slopes


def _starts(lengths: tuple[int, ...]) -> Array:
    return np.cumsum((0, *lengths)).astype(np.int32)


class PackedRun:
    """Draws the operands of a case; `forward` and `backward` fill results in through a launcher and
    return what kernels report."""

    def __init__(self, case: PackedCase, seed: int = 0) -> None:
        self.case, self.rng = case, np.random.default_rng(seed)
        rows, keys = sum(case.queries), sum(case.keys)
        h, g, e, v = case.heads, case.key_heads, case.width, case.value_width or case.width
        self.scale = 1 / math.sqrt(e)
        self.query, self.key, self.value = (
            self.draw(rows, h, e), self.draw(keys, g, e), self.draw(keys, g, v),
        )  # fmt: skip
        self.grad = self.draw(rows, h, v)
        self.starts = _starts(case.queries), _starts(case.keys)
        self.slopes = self.rng.random(h).astype(np.float32) / 8 if case.slopes else None
        wide = np.float64 if case.dtype is dtypes.float64 else np.float32
        self.shift = self.rng.standard_normal((h, rows)).astype(wide) if case.shift else None
        self.result, self.log_sum = self.unwritten(rows, h, v), np.full((h, rows), np.nan, wide)
        self.gradients = (
            self.unwritten(rows, h, e), self.unwritten(keys, g, e), self.unwritten(keys, g, v),
        )  # fmt: skip

    def draw(self, rows: int, heads: int, width: int) -> Array:
        made = self.rng.standard_normal((rows, heads, width + self.case.gap))
        return made.astype(self.case.dtype.numpy)[..., :width]

    def unwritten(self, *shape: int) -> Array:
        made = self.draw(*shape)
        made[...] = np.nan
        return made

    @property
    def limits(self) -> dict[str, int]:
        case = self.case
        longest = (max(lengths, default=0) + case.spare for lengths in (case.queries, case.keys))
        return dict(zip(("max_q", "max_k"), longest, strict=True)) | {
            "left": case.left, "right": case.right,
        }  # fmt: skip

    def lowering(self, *, backward: bool) -> Lowering:
        slopes = None if self.slopes is None else type_of(self.slopes)
        problem = AttentionProblem(
            backward, *(by_heads(a) for a in (self.query, self.key, self.value, self.result)),
            slopes, False, self.scale, shift=backward and self.case.shift,
            sequences=Sequences(len(self.case.queries), **self.limits),
        )  # fmt: skip
        if not backward:
            return flash_attention(problem)
        gradients = [by_heads(d) for d in self.gradients]
        return flash_attention(problem, grad=by_heads(self.grad), gradients=gradients)

    def forward(self, launch: Launcher) -> Array:
        inputs = (self.query, self.key, self.value, self.slopes, *self.starts)
        return execute(
            self.lowering(backward=False), inputs, (self.result, self.log_sum), launch
        )  # fmt: skip

    def backward(self, launch: Launcher) -> Array:
        inputs = (
            self.grad, self.shift, self.query, self.key, self.value, self.slopes, self.result,
            self.log_sum, *self.starts,
        )  # fmt: skip
        return execute(self.lowering(backward=True), inputs, self.gradients, launch)

    def expected(self) -> tuple[Any, ...]:
        """result, log_sum, dq, dk, dv in float64."""
        operands = (self.query, self.key, self.value, *self.starts, self.slopes)
        options: dict[str, Any] = {"scale": self.scale, **self.limits}
        made = references.attention_packed(*operands, **options)
        gradients = references.attention_packed_backward(
            self.grad, self.shift, *operands, *made, **options
        )
        return *made, *gradients

    def made(self) -> tuple[Array, ...]:
        return self.result, self.log_sum, *self.gradients


def by_heads(array: Array) -> TensorType:
    """(T, H, E) as (1, H, T, E)."""
    found = type_of(array)
    (rows, heads, width), (row, head, column) = found.shape, found.strides
    return tensor_type(found.dtype, (1, heads, rows, width), (0, head, row, column))


CASES = [  # few combinations of dtype, width and options, as each is compiled
    # longer than a tile, one row, none; queries without keys; more room than is needed
    PackedCase((150, 1, 0, 70), (150, 1, 0, 70), 2, 1, 64, right=0),
    PackedCase((40, 0, 90, 7), (100, 9, 30, 0), 4, 2, 64, right=0, spare=200),
    PackedCase((40, 90), (100, 70), 2, 2, 64, shift=False),
    PackedCase((), (), 2, 2, 64),
    # windows: whole tiles out of sight on both sides, and rows that see nothing
    PackedCase((200, 60), (200, 140), 2, 1, 64, left=20, right=5),
    PackedCase((200, 60, 5), (30, 160, 400), 1, 1, 64, left=20, right=5),
    PackedCase((150, 20), (150, 20), 2, 1, 64, left=70, right=0, dtype=dtypes.bfloat16),
    # slopes
    PackedCase((90, 3, 130), (60, 20, 130), 4, 2, 64, right=0, slopes=True),
    PackedCase((70, 75), (70, 100), 2, 1, 128, slopes=True, dtype=dtypes.bfloat16),
    # widths; rows that are not aligned to 16 bytes
    PackedCase((30, 70), (60, 40), 1, 1, 256, right=0),
    PackedCase((70, 33), (140, 9), 2, 1, 40, 24, left=50),
    PackedCase((40, 90), (100, 70), 2, 2, 64, gap=3),
    # plain arithmetic
    PackedCase((50, 0, 33), (70, 5, 33), 4, 2, 48, dtype=dtypes.float32, left=20, right=3,
               slopes=True),
    PackedCase((20, 37), (20, 37), 2, 1, 33, 7, dtype=dtypes.float64, right=0),
    PackedCase((20, 37), (50, 3), 2, 1, 12, slopes=True),
]  # fmt: skip
