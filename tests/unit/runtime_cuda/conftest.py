import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from flame.runtime.cuda.devices import set_current_device
from flame.runtime.cuda.driver import install_driver

from .fake import FakeDriver


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """A fake driver, installed, with an empty disk cache."""
    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path))
    made = FakeDriver()
    before = install_driver(made)
    yield made
    set_current_device(0)
    gc.collect()
    install_driver(before)
