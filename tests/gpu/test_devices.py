"""What users do on a real GPU beside calling operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cuda.device_checks import CHECKS

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_devices(check: Callable[[], None]) -> None:
    check()
