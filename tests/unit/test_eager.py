"""Machine code of eager calls: made quickly at first, and well once a call is made often."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import flame
from flame.compiler.pipeline import QUICK_BYTES
from flame.eager import TRIAL, Eager
from flame.ops.op import interpreter

pytestmark = pytest.mark.unit


@pytest.fixture
def eager() -> Eager:
    found = interpreter()
    assert isinstance(found, Eager)
    found.forget_plans()
    return found


CALLS: dict[str, Callable[[flame.Tensor], flame.Tensor]] = {
    "tanh": flame.tanh,
    "sum": lambda x: x.sum(1),
    "softmax": lambda x: x.softmax(1),
    "matmul": lambda x: x @ x.T,
    "transposed": lambda x: x.T * 2,
    "half": lambda x: (x.to(flame.bfloat16) + 1).float(),
    "cumsum": lambda x: x.cumsum(0),
}


@pytest.mark.parametrize("name", CALLS)
def test_both_kinds_of_code_give_the_same_bits(name: str, eager: Eager) -> None:
    x = flame.tensor(np.random.default_rng(0).standard_normal((7, 37)).astype(np.float32))
    results = [CALLS[name](x).numpy() for _ in range(TRIAL + 2)]
    assert not eager.trials, "calls made often still have quickly made code"
    assert eager.plans
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_quick_code_is_for_little_data(eager: Eager) -> None:
    flame.tanh(flame.ones(QUICK_BYTES // 4))
    assert not any(plan.op.name == "tanh" for plan, _ in eager.trials.values())
    flame.tanh(flame.ones(QUICK_BYTES // 8))
    assert [plan.op.name for plan, _ in eager.trials.values()].count("tanh") == 1


def test_plans_are_made_anew_when_forgotten(eager: Eager) -> None:
    x = flame.ones(3)
    for _ in range(TRIAL + 1):
        flame.tanh(x)
    eager.forget_plans()
    assert not eager.plans
    assert not eager.trials
    np.testing.assert_allclose(flame.tanh(x).numpy(), np.tanh(np.ones(3)), rtol=1e-6)
