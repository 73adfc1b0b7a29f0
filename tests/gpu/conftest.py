"""A GPU for the tests that ask for one."""

from __future__ import annotations

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
