"""Whether trying several algorithms pays, and may be done.

FLAME_CUDA_TUNE=0 takes the first that a library's heuristics offer, and so does a wish for
deterministic algorithms, as a choice by time may differ between two machines.
"""

from __future__ import annotations

import os

from flame.core.determinism import are_deterministic_algorithms_enabled
from flame.core.dtypes import DType, bfloat16, float16, float32, float64

SMALL_SECONDS = 20e-6  # below it, what a trial could win is less than a launch costs

# Rough rates of an H100 in FLOP/s and bytes/s, for a guess at how long something takes.
_RATES = {float64: 50e12, float32: 45e12, float16: 600e12, bfloat16: 600e12}
_TENSOR_RATE = 350e12  # of float32 factors that may be rounded
_BANDWIDTH = 3e12


def seconds(flops: float, nbytes: float, dtype: DType, *, exact: bool) -> float:
    """A guess at a time; ``exact``: float32 products are float32."""
    rate = _TENSOR_RATE if dtype is float32 and not exact else _RATES[dtype]
    return max(flops / rate, nbytes / _BANDWIDTH)


def worth(guess: float) -> bool:
    """Whether something that takes so many seconds is to be tried out."""
    if os.environ.get("FLAME_CUDA_TUNE", "1") == "0" or are_deterministic_algorithms_enabled():
        return False
    return guess >= SMALL_SECONDS
