"""A GPU whose memory is used up. No other process should need it meanwhile."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import flame
from flame.core.errors import OutOfMemoryError
from flame.runtime.cuda.memory import device_memory
from flame.runtime.storage import Storage

pytestmark = pytest.mark.alone


def fill() -> list[Storage]:
    """What takes all memory but a few MiB."""
    held: list[Storage] = []
    flame.cuda.empty_cache()
    size = 1 << (flame.cuda.mem_get_info()[0].bit_length() - 1)
    while size >= 1 << 22:
        try:
            held.append(Storage.allocate(size, "cuda:0"))
        except OutOfMemoryError:
            size //= 2
    return held


def test_memory_that_was_freed_meets_a_shortage() -> None:
    """Memory in cycles, and memory of another size that the pool kept, is found again."""
    flame.cuda.empty_cache()
    part = flame.cuda.mem_get_info()[0] // 10
    gc.disable()
    try:
        for _ in range(7):
            cycle: list[object] = [Storage.allocate(part, "cuda:0")]
            cycle.append(cycle)
        del cycle
        Storage.allocate(part * 6, "cuda:0")
    finally:
        gc.enable()
    assert device_memory(0).statistics().retries >= 1


def test_products_without_room_for_their_code_are_refused_and_then_right() -> None:
    """Left alone, cuBLASLt fails from then on: it does not load a kernel a second time."""
    compiled = flame.compile(flame.matmul)
    random = np.random.default_rng(0)
    cases = []
    for m, n, k in [(130, 257, 33), (520, 512, 512)]:
        for dtype in (flame.float32, flame.bfloat16):
            a, b = random.standard_normal((m, k)), random.standard_normal((k, n))
            x, y = (flame.tensor(values, dtype=dtype, device="cuda") for values in (a, b))
            cases += [(a @ b, x, y, product) for product in (flame.matmul, compiled)]
    held = fill()
    for _, x, y, product in cases:
        with pytest.raises(OutOfMemoryError):
            product(x, y)
    held.clear()
    for wanted, x, y, product in cases:
        found = product(x, y).to(flame.float64).cpu().numpy()
        assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)
