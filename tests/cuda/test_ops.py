"""Every op of the table: its kernels as CUDA C++, run on the host, against its NumPy reference.

What is written is poisoned before, and guarded on both sides. Threads and blocks run in ascending
and in descending order, with the same bits as the result: so no barrier is missing that matters.
"""

from __future__ import annotations

import numpy as np
import pytest

from flame.ops.op import Op

from .host_compiler import HostLibrary
from .op_cases import cases_of, compare, execute, expected, ops_with_kernels

OPERATIONS = ops_with_kernels()
# Functions of the host, not kernels: a GPU has hand-written ones for these.
WITHOUT_KERNELS = {
    "argsort", "attention_packed", "attention_packed_backward", "isin", "median_place",
    "mode_place", "searchsorted", "topk",
}  # fmt: skip


@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: op.name)
def test_kernels_on_the_host(op: Op) -> None:
    cases = cases_of(op)
    assert bool(cases) != (op.name in WITHOUT_KERNELS)
    library = HostLibrary.of(list(dict.fromkeys(t for case in cases for t in case.texts)))
    for case in cases:
        made = execute(case, library)
        again = execute(case, library, descending=True)
        for x, y in zip(made, again, strict=True):
            np.testing.assert_array_equal(
                x, y, err_msg=f"{case.label}: the order of threads matters"
            )
        compare(case, made, expected(case))
