"""How exactly float32 matrix products are computed where the processor has a faster way."""

from __future__ import annotations

from typing import Final

from flame.core.errors import ArgumentError

PRECISIONS: Final = ("highest", "high", "medium")
_chosen = "highest"


def choose_float32_matmul_precision(precision: str) -> None:
    """Make ``precision`` what `get_float32_matmul_precision` returns."""
    global _chosen
    if precision not in PRECISIONS:
        raise ArgumentError(
            f"set_float32_matmul_precision: {precision!r} is none of {', '.join(PRECISIONS)}"
        )
    _chosen = precision


def get_float32_matmul_precision() -> str:
    """What `set_float32_matmul_precision` was last told; "highest" at first."""
    return _chosen
