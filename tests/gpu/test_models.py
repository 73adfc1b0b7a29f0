"""The zoo of models on a real GPU: the CPU's run, the eager and the compiled one agree."""

from __future__ import annotations

import pytest

from tests.cuda import training_checks as training
from tests.models.zoo import ZOO

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
@pytest.mark.parametrize("name", ZOO)
def test_models(name: str, optimizer: str) -> None:
    training.check_model(name, optimizer)


@pytest.mark.parametrize("name", ZOO)
def test_models_in_float32(name: str) -> None:
    training.check_model_in_float32(name, "sgd")


@pytest.mark.parametrize("name", ZOO)
def test_models_in_mixed_precision(name: str) -> None:
    training.check_autocast(name)
