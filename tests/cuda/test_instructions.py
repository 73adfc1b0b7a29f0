"""The scalar instructions in CUDA C++, run on the host, against their meaning by NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.kernel import values
from flame.kernel.evaluate import evaluate
from flame.render.cuda import render

from .host_compiler import HostLibrary
from .instruction_cases import instructions, kernel_of, numbers
from .op_cases import run_bound as run


def test_instructions_mean_what_numpy_says() -> None:
    cases = []
    for name, leaves, value in instructions():
        grid = np.meshgrid(*(numbers(v.dtype) for v in leaves), indexing="ij")
        arrays = [np.ascontiguousarray(g.reshape(-1)) for g in grid]
        bound = kernel_of(name, leaves, value, len(arrays[0]))
        cases.append((name, leaves, value, arrays, bound, render(bound)))
    library = HostLibrary.of([launch.text for *_, launch in cases])
    wrong = []
    for name, leaves, value, arrays, bound, launch in cases:
        made = np.zeros(len(arrays[0]), value.dtype.numpy)
        run(launch, bound, *arrays, made, library=library)
        (want,) = evaluate([value], dict(zip(leaves, arrays, strict=True)))
        if not agrees(name, arrays, made, want):
            wrong.append(name)
    assert not wrong


def agrees(name: str, arrays: list[Any], made: Any, want: Any) -> bool:
    op = name.split()[0]
    if op in ("floordiv", "mod"):  # NumPy warns, and differs, where the divisor is 0
        safe = arrays[1] != 0
        if not (made[~safe] == 0).all():
            return False
        made, want = made[safe], want[safe]
    if op == "pow" and arrays[0].dtype.kind == "i":  # 0 to a negative power: 0, as PyTorch
        safe = ~((arrays[0] == 0) & (arrays[1] < 0))
        made, want = made[safe], want[safe]
    if made.dtype.kind not in "fV":
        return bool((made == want).all())
    exact = made.dtype == np.float64 and all(a.dtype != np.float32 for a in arrays)
    made, want = made.astype(np.float64), want.astype(np.float64)
    return bool(np.allclose(made, want, rtol=1e-14 if exact else 1e-6, atol=0, equal_nan=True))


@pytest.mark.parametrize("source", [dtypes.float32, dtypes.float64])
def test_casts_to_integers_stay_in_range(source: DType) -> None:
    """Numbers out of range saturate at 32 or 64 bits, then wrap; NaN is 0, as on the CPU."""
    x = np.array([1.9, -1.9, 3e9, -3e9, 1e30, -1e30, np.nan, np.inf], source.numpy)
    whole = {32: 2**31 - 1, 64: 2**63 - 1}
    for target, bits in ((dtypes.int32, 32), (dtypes.int64, 64), (dtypes.int8, 32),
                         (dtypes.uint8, 32), (dtypes.uint32, 64)):  # fmt: skip
        leaf = values.param("x", source)
        bound = kernel_of(f"cast_{source}_{target}", (leaf,), values.cast(leaf, target), len(x))
        made = np.zeros(len(x), target.numpy)
        run(render(bound), bound, x, made)
        top = whole[bits]
        exact = [0 if v != v else max(-top - 1, min(top, int(v) if np.isfinite(v) else
                 (top if v > 0 else -top - 1))) for v in x.tolist()]  # fmt: skip
        mask = (1 << target.bits) - 1
        assert [int(m) & mask for m in made] == [e & mask for e in exact]
