from collections.abc import Iterator
from pathlib import Path

import pytest

import flame


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A GPU, with an empty disk cache; skips where there is none."""
    if not flame.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path))
    yield
    flame.cuda.synchronize()
