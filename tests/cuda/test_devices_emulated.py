"""What users do on a GPU, on the emulated one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .device_checks import CHECKS

pytestmark = pytest.mark.usefixtures("eager_cuda")


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_devices(check: Callable[[], None]) -> None:
    check()
