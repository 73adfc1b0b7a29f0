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
    size = 1 << 40
    while size >= 1 << 20:
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


@pytest.mark.parametrize("dtype", [flame.float32, flame.float64, flame.float16, flame.bfloat16])
@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
def test_products_without_room_for_their_code_are_refused(
    dtype: flame.DType, compiling: bool
) -> None:
    """cuBLASLt itself may leave the result as it was, say nothing, and never work again."""
    product = flame.compile(flame.matmul) if compiling else flame.matmul
    random = np.random.default_rng(0)
    cases = []
    for m, n, k in [(130, 257, 33), (520, 512, 512)]:
        a, b = random.standard_normal((m, k)), random.standard_normal((k, n))
        x, y = (flame.tensor(values, dtype=dtype, device="cuda") for values in (a, b))
        cases.append((a, b, x, y))
    held = fill()
    for *_, x, y in cases:
        with pytest.raises(OutOfMemoryError):
            product(x, y)
    held.clear()
    for a, b, x, y in cases:
        found = product(x, y).to(flame.float64).cpu().numpy()
        assert np.linalg.norm(found - a @ b) < 0.02 * np.linalg.norm(a @ b)
