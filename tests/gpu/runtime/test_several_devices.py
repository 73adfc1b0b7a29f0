"""What users do with more than one real GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import flame
from tests.cuda.several_devices_checks import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.skipif(flame.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_several_devices(check: Callable[[], None]) -> None:
    check()
