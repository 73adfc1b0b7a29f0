"""Training on the emulated GPU: the smaller models, a step or two of each."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import training_checks as training

pytestmark = pytest.mark.usefixtures("eager_cuda")


@pytest.mark.parametrize("check", training.CHECKS, ids=lambda c: c.__name__)
def test_training(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(("name", "optimizer"), [("mlp", "sgd"), ("gpt", "adamw")])
def test_models(name: str, optimizer: str) -> None:
    training.check_model(name, optimizer, steps=2)


def test_autocast() -> None:
    training.check_autocast("mlp", steps=2)


def test_long_run() -> None:
    training.long_run(120, compared=100)
