"""The tiers of the suite: a test's tier is the folder it stands in. Closing lines count them."""

from collections import Counter, defaultdict
from pathlib import Path

import pytest

TIERS = ("tiny", "unit", "ops", "text", "cuda", "models", "train", "gpu")
ROOT = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update", action="store_true", help="rewrite the golden texts")


def tier_of(path: Path) -> str:
    """The folder below ``tests`` that ``path`` stands in."""
    return path.relative_to(ROOT).parts[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tier = tier_of(item.path)
        if tier not in TIERS:
            raise pytest.UsageError(
                f"{item.path} is in no tier; move it below tests/{{{','.join(TIERS)}}}"
            )
        item.add_marker(tier)
    # What takes minutes begins first: at the end one worker would be alone with it.
    items.sort(key=lambda item: tier_of(item.path) != "train")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in ("passed", "failed", "error", "skipped", "xfailed"):
        for report in terminalreporter.stats.get(outcome, []):
            parts = report.nodeid.replace("\\", "/").split("/")
            counts[parts[1] if parts[0] == "tests" and len(parts) > 1 else parts[0]][outcome] += 1
    for tier in TIERS:
        if tier in counts:
            told = ", ".join(f"{count} {outcome}" for outcome, count in counts[tier].items())
            terminalreporter.write_line(f"{tier}: {told}")
