"""Devices of the emulation for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from flame.ops.op import interpreter
from flame.runtime.cuda.driver import install_driver

from .emulation import EmulatedDriver


@pytest.fixture
def make_emulated_cuda() -> Iterator[Callable[..., EmulatedDriver]]:
    """Installs an `EmulatedDriver` made with the given arguments; the one before comes back."""
    before = install_driver(None)

    def make(**options: int) -> EmulatedDriver:
        driver = EmulatedDriver(**options)
        install_driver(driver)
        return driver

    yield make
    install_driver(before)


@pytest.fixture
def emulated_cuda(make_emulated_cuda: Callable[..., EmulatedDriver]) -> EmulatedDriver:
    """One emulated device of a GiB, as the driver of this process."""
    return make_emulated_cuda()


@pytest.fixture(scope="module")
def eager_cuda() -> Iterator[None]:
    """One emulated device for the eager calls of a module: their plans hold on to the driver."""
    before = install_driver(EmulatedDriver())
    interpreter().forget_plans()
    yield
    interpreter().forget_plans()
    install_driver(before)
