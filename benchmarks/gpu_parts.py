"""What the models of the GPU benchmarks share, written once over a library."""

from __future__ import annotations

import math
from typing import Any


def split_heads(x: Any, parts: int, heads: int) -> tuple[Any, ...]:
    """(B, T, parts * C) -> ``parts`` of (B, heads, T, C / heads)."""
    b, t, c = x.shape
    pieces: tuple[Any, ...] = (
        x.reshape(b, t, parts, heads, c // parts // heads).permute(2, 0, 3, 1, 4).unbind(0)
    )
    return pieces


def join_heads(x: Any) -> Any:
    """(B, heads, T, C / heads) -> (B, T, C)."""
    b, heads, t, c = x.shape
    return x.transpose(1, 2).reshape(b, t, heads * c)


def sinusoids(lib: Any, time: Any, width: int) -> Any:
    """(N,) -> (N, width): cosines and sines of ``time`` at geometric rates from 1 to 1/10000."""
    half = width // 2
    rates = lib.exp(lib.arange(half, device=time.device) * (-math.log(10000.0) / half))
    angles = time[:, None] * rates
    return lib.cat([lib.cos(angles), lib.sin(angles)], 1)
