"""Every op of the table: its kernels as CUDA C++, run on the host, against its NumPy reference.

What is written is poisoned before, and guarded on both sides. Threads and blocks run in ascending
and in descending order, with the same bits as the result: so no barrier is missing that matters.
"""

from __future__ import annotations

import numpy as np
import pytest

from flame.ops.op import Op

from .host_compiler import HostLibrary
from .op_cases import Case, cases_of, compare, execute, expected, ops_with_kernels

TOGETHER = 24  # ops whose texts one call of g++ compiles

OPERATIONS = ops_with_kernels()
# Functions of the host, not kernels: a GPU has hand-written ones for these.
WITHOUT_KERNELS = {"argsort", "isin", "median_place", "mode_place", "searchsorted", "topk"}


class Libraries:
    """The compiled texts of groups of ops, made when the first of a group is asked for."""

    def __init__(self) -> None:
        self.cases: dict[str, list[Case]] = {}
        self.made: dict[int, HostLibrary] = {}

    def of(self, op: Op) -> tuple[list[Case], HostLibrary]:
        group = OPERATIONS.index(op) // TOGETHER
        if group not in self.made:
            ops = OPERATIONS[group * TOGETHER : (group + 1) * TOGETHER]
            self.cases |= {o.name: cases_of(o) for o in ops}
            texts = dict.fromkeys(t for o in ops for case in self.cases[o.name] for t in case.texts)
            self.made[group] = HostLibrary.of(list(texts))
        return self.cases[op.name], self.made[group]


@pytest.fixture(scope="module")
def libraries() -> Libraries:
    return Libraries()


@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: op.name)
def test_kernels_on_the_host(op: Op, libraries: Libraries) -> None:
    cases, library = libraries.of(op)
    assert bool(cases) != (op.name in WITHOUT_KERNELS)
    for case in cases:
        made = execute(case, library)
        again = execute(case, library, descending=True)
        for x, y in zip(made, again, strict=True):
            np.testing.assert_array_equal(
                x, y, err_msg=f"{case.label}: the order of threads matters"
            )
        compare(case, made, expected(case))
