"""A tensor in pieces, whose gradients come back in one piece.

Taken by indexing, every piece would make a gradient of the whole tensor's size in backward, and all
of these would be summed. Pieces that are not used get zeros of their own size.
"""

from __future__ import annotations

from typing import Any

import flame
from flame.autograd import Function
from flame.tensor import Tensor

__all__ = ["chunks", "time_steps"]


class _Chunks(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, count: int, dim: int) -> Any:
        ctx.dim = dim
        return tuple(tensor.detach().chunk(count, dim))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return flame.cat(gradients, ctx.dim), None, None


class _TimeSteps(Function):
    @staticmethod
    def forward(ctx: Any, sequence: Tensor) -> Any:
        return tuple(sequence.detach().unbind(0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return flame.stack(gradients)


def chunks(tensor: Tensor, count: int, dim: int) -> tuple[Tensor, ...]:
    """`count` views of equal size along `dim`."""
    pieces: tuple[Tensor, ...] = _Chunks.apply(tensor, count, dim)
    return pieces


def time_steps(sequence: Tensor) -> tuple[Tensor, ...]:
    """The entries (N, C) of a sequence (L, N, C)."""
    if sequence.shape[0] == 0:
        return ()
    steps: tuple[Tensor, ...] = _TimeSteps.apply(sequence)
    return steps
