"""PyTorch's operator database against FLAME on a real GPU: values and gradients in three floating
dtypes, values of integers and bools. PyTorch computes on the CPU.

Several processes (pytest -n 16) share the work well.
"""

from __future__ import annotations

import pytest
import torch

from tests.cuda.dry import get_ready
from tests.ops import database

pytestmark = pytest.mark.usefixtures("gpu")

# Entries that differ from PyTorch before 2.13, with the reason.
OLDER = {"unravel_index": "coordinates were int64, whatever the dtype of the index"}
# Among the few values that half-width floats have, some samples have equal ones.
REPLACED = "PyTorch counts an element that is replaced among the equal ones that share a gradient"
EQUAL = dict.fromkeys(("index_reduce.amax", "index_reduce.amin"), REPLACED)
LIMIT = 3  # samples of each dtype, spread over all that the database has
ENTRIES = database.shared_entries()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ENTRIES)
def test_entry(name: str) -> None:
    checks = list(database.checks_of(ENTRIES[name], LIMIT, scope=database.GPU))
    get_ready([check for _, check in checks])
    tally = database.tally_of(checks)
    if name in database.KNOWN:  # whether any of these few samples differs is not said
        pytest.skip(f"differs: {database.KNOWN[name]}")
    if name in OLDER and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip(f"differs from an older PyTorch: {OLDER[name]}")
    if tally.errors and name in EQUAL and all("gradient" in error for error in tally.errors):
        pytest.skip(f"differs: {EQUAL[name]}")
    assert not tally.errors, f"{len(tally.errors)} samples differ; the first: {tally.errors[0]}"
