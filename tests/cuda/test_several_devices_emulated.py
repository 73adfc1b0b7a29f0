"""What users do with more than one GPU, on two emulated ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from flame.ops.op import interpreter
from flame.runtime.cuda.driver import install_driver

from .emulation import EmulatedDriver
from .several_devices_checks import CHECKS


@pytest.fixture(scope="module", autouse=True)
def two_devices() -> Iterator[None]:
    before = install_driver(EmulatedDriver(devices=2))
    interpreter().forget_plans()
    yield
    interpreter().forget_plans()
    install_driver(before)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_several_devices(check: Callable[[], None]) -> None:
    check()
