"""Training on a real GPU: what is around the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cuda import training_checks as training

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.mark.parametrize("check", training.CHECKS, ids=lambda c: c.__name__)
def test_training(check: Callable[[], None]) -> None:
    check()


def test_ten_thousand_steps() -> None:
    training.long_run(10_000, compared=2000)
