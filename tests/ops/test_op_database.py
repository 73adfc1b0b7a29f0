"""PyTorch's operator database against FLAME: every entry whose function FLAME has under its name.

An entry that differs on purpose stands in KNOWN with its reason, and must differ: one that passes
has to leave the list. An entry that FLAME has no function for is not counted here.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, Final

import pytest

pytest.importorskip("torch")

LIMIT: Final = 4  # samples of each dtype, spread over all that the database has
LEAST: Final = 500  # entries that FLAME has functions for


def _load() -> Any:
    path = Path(__file__).with_name("database.py")
    specification = importlib.util.spec_from_file_location("op_database", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["op_database"] = module
    specification.loader.exec_module(module)
    return module


database = _load()
ENTRIES: Final = {
    database.full_name(e): e for e in database.op_db if database.function_of(e) is not None
}

KNOWN: Final[dict[str, str]] = {
    "as_strided_scatter": "PyTorch gives the overwritten elements a gradient that is not zero",
    "linalg.matrix_norm": "orders that need singular values raise UnsupportedError",
    "linalg.matrix_power": "negative powers raise UnsupportedError",
    "linalg.norm": "orders that need singular values raise UnsupportedError",
    "linalg.norm.subgradients_at_zero": "orders that need singular values raise UnsupportedError",
    "norm.nuc": "the nuclear norm raises UnsupportedError",
}


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
