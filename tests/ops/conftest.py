"""Counts the generated cases, so that a run says how much of the op table it reached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

_cases: Counter[str] = Counter()


@pytest.fixture
def tally() -> Callable[[Any], None]:
    def count(op: Any) -> None:
        _cases[op.name] += 1

    return count


def pytest_sessionfinish(session: pytest.Session) -> None:
    workers = getattr(session.config, "workeroutput", None)
    if workers is not None:
        workers["op_cases"] = dict(_cases)


def pytest_testnodedown(node: Any, error: Any) -> None:
    _cases.update(getattr(node, "workeroutput", {}).get("op_cases", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _cases:
        total = sum(_cases.values())
        terminalreporter.write_line(
            f"op table: {len(_cases)} ops reached by {total} generated cases"
        )
