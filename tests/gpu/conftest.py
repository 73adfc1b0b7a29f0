"""A GPU for the tests that ask for one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

import flame


@pytest.fixture
def gpu() -> Iterator[None]:
    """An NVIDIA GPU; skips where there is none."""
    if not flame.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    yield
    flame.cuda.synchronize()


@pytest.fixture(autouse=True)
def memory_for_others() -> Iterator[None]:
    """Gives back what pools keep after each test, as several processes share the GPU's memory."""
    yield
    if flame.cuda.is_available():
        flame.cuda.empty_cache()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        for item in items:
            if item.get_closest_marker("alone"):
                item.add_marker(pytest.mark.skip("takes all memory: pytest tests/gpu -m alone"))
