"""A pytest plugin: one of several processes runs its share of the tests.

``python -m pytest -p tests.shards --shard 2/8`` runs the tests whose names hash to the second of
eight parts, so that processes share the work without talking to one another.
"""

from __future__ import annotations

import zlib

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="run the tests of part I of N")


def part_of(name: str, parts: int) -> int:
    """The part, from 1, that a test is in. The same in every process."""
    return zlib.crc32(name.encode()) % parts + 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    given = config.getoption("--shard")
    if given is None:
        return
    try:
        part, parts = map(int, given.split("/"))
    except ValueError:
        part = parts = 0
    if not 1 <= part <= parts:
        raise pytest.UsageError(f"--shard takes I/N with I from 1 to N, got {given!r}")
    others = [item for item in items if part_of(item.nodeid, parts) != part]
    items[:] = [item for item in items if part_of(item.nodeid, parts) == part]
    if others:
        config.hook.pytest_deselected(items=others)
