"""Some entries of PyTorch's operator database on the emulated GPU; a real one runs them all."""

from __future__ import annotations

import pytest

from tests.ops import database

from .dry import get_ready

pytestmark = [pytest.mark.usefixtures("eager_cuda"), pytest.mark.filterwarnings("ignore")]

ENTRIES = database.shared_entries()
CHOSEN = (
    "gcd", "index_put", "nn.functional.avg_pool2d", "nn.functional.group_norm", "new_full",
    "scatter_reduce.mean", "std_mean", "take_along_dim",
)  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_entry(name: str) -> None:
    checks = list(database.checks_of(ENTRIES[name], 2, scope=database.GPU))
    get_ready([check for _, check in checks])
    tally = database.tally_of(checks)
    assert tally.passed
    assert not tally.errors, tally.errors[0]


def test_the_scope_reaches_the_entries() -> None:
    """All but those that the database has for complex numbers, or for cuDNN, alone."""
    unreached = {
        name
        for name, entry in ENTRIES.items()
        if not set(database.GPU.dtypes) & set(entry.supported_dtypes("cpu"))
    }
    alone = {"imag", "nn.functional.batch_norm.without_cudnn", "nn.functional.silu.complex"}
    assert unreached == alone
