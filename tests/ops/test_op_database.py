"""PyTorch's operator database against FLAME: every entry whose function FLAME has under its name.

An entry that differs on purpose stands in `database.KNOWN` with its reason, and must differ: one
that passes has to leave the list. An entry that FLAME has no function for is not counted here.
"""

from __future__ import annotations

from typing import Final

import pytest

from . import database
from .database import KNOWN

LIMIT: Final = 4  # samples of each dtype, spread over all that the database has
LEAST: Final = 500  # entries that FLAME has functions for


ENTRIES: Final = database.shared_entries()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ENTRIES)
def test_entry(name: str) -> None:
    tally = database.run_entry(ENTRIES[name], LIMIT)
    if name in KNOWN:
        assert tally.errors, f"{name} agrees with PyTorch now; take it from the list of differences"
        pytest.skip(f"differs: {KNOWN[name]}")
    assert not tally.errors, f"{len(tally.errors)} samples differ; the first: {tally.errors[0]}"


def test_the_database_is_reached() -> None:
    assert len(ENTRIES) >= LEAST
    assert KNOWN.keys() <= ENTRIES.keys()
