"""What a compiled step cannot do raises TraceError, and names the line of the user's code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import flame
import flame.nn as nn
from flame.core.errors import ArgumentError, DTypeError, FlameError, TraceError

outside: list[Any] = []
table: dict[str, Any] = {}


def prints(x: Any) -> Any:
    y = x * 2
    print(y)  # here
    return y


def formats(x: Any) -> Any:
    y = x * 2
    return f"{y:.3f}"  # here


def branches(x: Any) -> Any:
    if x.sum() > 0:  # here
        return x
    return -x


def loops_by_value(x: Any) -> Any:
    while x.max() < 10.0:  # here
        x = x * 2
    return x


def takes_item(x: Any) -> Any:
    return x * x.mean().item()  # here


def to_numpy(x: Any) -> Any:
    return (x + 1).numpy()  # here


def shape_by_data(x: Any) -> Any:
    return x[x > 0].sum()  # here


def counts_nonzero(x: Any) -> Any:
    return flame.nonzero(x)  # here


def range_by_data(x: Any) -> Any:
    return sum(range(int(x[0])))  # here


def appends(x: Any) -> Any:
    loss = x.sum()
    outside.append(loss.detach())  # here
    return loss


def appends_a_number(x: Any) -> Any:
    outside.append(1)  # here
    return x.sum()


def keeps_under_a_key(x: Any) -> Any:
    table["last"] = x.sum()  # here
    return x


CASES = [
    prints,
    formats,
    branches,
    loops_by_value,
    takes_item,
    to_numpy,
    shape_by_data,
    counts_nonzero,
    range_by_data,
    appends,
    appends_a_number,
    keeps_under_a_key,
]


@pytest.fixture(autouse=True)
def _clean() -> Any:
    yield
    outside.clear()
    table.clear()


def line_of(function: Callable[..., Any]) -> int:
    lines, start = inspect.getsourcelines(function)
    return start + next(i for i, line in enumerate(lines) if "# here" in line)


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_the_line_is_named(function: Callable[..., Any]) -> None:
    compiled = flame.compile(function)
    with pytest.raises(TraceError) as caught:
        compiled(flame.tensor([1.0, 2.0, 3.0]))
    assert f"test_misuse.py:{line_of(function)}" in str(caught.value)
    assert isinstance(caught.value, RuntimeError)
    # what was tried leaves nothing behind: operations run again at once
    assert (flame.tensor([1.0]) + 1).item() == 2.0


def test_a_tensor_kept_in_a_module_is_refused() -> None:
    class Keeps(nn.Module):
        def forward(self, x: Any) -> Any:
            self.last = x * 2
            return self.last + 1

    with pytest.raises(TraceError, match="kept after it"):
        flame.compile(Keeps())(flame.tensor([1.0]))


def test_a_module_that_counts_in_python_is_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Any) -> Any:
            self.calls += 1
            return x * 2

    with pytest.raises(TraceError, match=r"Counts\.calls"):
        flame.compile(Counts())(flame.tensor([1.0]))


def test_the_gradients_are_as_before_after_a_failure() -> None:
    weight = flame.tensor([1.0, 2.0]).requires_grad_()

    @flame.compile
    def step(x: Any) -> Any:
        loss = (weight * x).sum()
        loss.backward()
        return loss.item()

    with pytest.raises(TraceError):
        step(flame.tensor([1.0, 2.0]))
    assert weight.grad is None


def test_arguments_that_cannot_be_compared() -> None:
    import numpy as np

    double = flame.compile(lambda x: x * 2)
    with pytest.raises(DTypeError, match="from_numpy"):
        double(np.zeros(3))
    with pytest.raises(ArgumentError, match="function or a module"):
        flame.compile(3)


def test_an_error_of_the_step_itself_comes_through() -> None:
    compiled = flame.compile(lambda x, y: x @ y)
    with pytest.raises(FlameError, match="matmul"):
        compiled(flame.zeros(2, 3), flame.zeros(2, 3))
    with pytest.raises(ZeroDivisionError):
        flame.compile(lambda x: x * (1 / 0))(flame.zeros(2))
