"""Switching the recording on and off; anomaly mode."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

import flame
from flame import autograd
from flame.core.errors import FlameError, GradientError


def x() -> flame.Tensor:
    return flame.ones(2, requires_grad=True)


def records() -> bool:
    return bool((x() * 2).requires_grad)


def test_contexts() -> None:
    assert records()
    with flame.no_grad():
        assert not records()
        with flame.enable_grad():
            assert records()
        assert not records()
        with flame.set_grad_enabled(True):
            assert records()
        with flame.inference_mode():
            assert autograd.is_inference_mode_enabled()
    with flame.set_grad_enabled(False):
        assert not records()
    with flame.inference_mode():
        assert not records()
        assert not flame.is_grad_enabled()
        with flame.inference_mode(False):
            assert records()
    assert records()


def test_the_mode_is_restored_after_an_error() -> None:
    with pytest.raises(KeyError), flame.no_grad():
        raise KeyError
    assert records()


def test_as_a_function() -> None:
    flame.set_grad_enabled(False)
    try:
        assert not records()
    finally:
        flame.set_grad_enabled(True)
    assert records()


def test_decorators() -> None:
    @flame.no_grad()
    def without(argument: int) -> Any:
        """Its text."""
        return argument, records()

    @flame.no_grad
    def bare() -> bool:
        return records()

    @flame.inference_mode
    def inferring() -> bool:
        return records()

    @flame.set_grad_enabled(False)
    def switched() -> bool:
        return records()

    assert records()  # decorating changed nothing
    assert without(3) == (3, False)
    assert without.__doc__ == "Its text."
    assert not bare()
    assert not inferring()
    assert not switched()
    with flame.no_grad():
        assert flame.enable_grad()(records)()
    assert records()


def test_decorated_functions_may_recurse() -> None:
    @flame.no_grad()
    def down(n: int) -> bool:
        return records() or (n > 0 and down(n - 1))

    assert not down(3)
    assert records()


def test_a_decorated_generator_switches_its_own_body_alone() -> None:
    @flame.no_grad()
    def steps() -> Iterator[Any]:
        got = yield records()
        yield got, records()

    walk = steps()
    assert next(walk) is False
    assert records()
    assert walk.send(5) == (5, False)  # type: ignore[attr-defined]
    assert records()
    assert list(walk) == []


def test_one_context_object_nested_in_itself() -> None:
    mode = flame.no_grad()
    with mode:
        with mode:
            assert not records()
        assert not records()
    assert records()


def test_the_mode_belongs_to_the_thread() -> None:
    found = []
    with flame.no_grad():
        thread = threading.Thread(target=lambda: found.append(records()))
        thread.start()
        thread.join()
    assert found == [True]


def test_views_made_without_recording_have_no_history() -> None:
    a = x()
    with flame.no_grad():
        v = a[0]
    assert not v.requires_grad
    assert v.is_leaf


def test_anomaly_mode_names_the_forward_line() -> None:
    with autograd.detect_anomaly():
        a = flame.zeros(2, requires_grad=True)
        y = flame.sqrt(a)  # the line
        z = (y * 0).sum()
        with pytest.raises(GradientError, match=r"(?s)sqrt.*test_modes.py:\d+: y = flame.sqrt"):
            z.backward()


def test_anomaly_mode_in_backward_alone() -> None:
    a = flame.zeros(2, requires_grad=True)
    z = (flame.sqrt(a) * 0).sum()
    with autograd.detect_anomaly(), pytest.raises(GradientError, match="sqrt"):
        z.backward()


def test_anomaly_mode_names_the_line_of_any_error() -> None:
    with autograd.set_detect_anomaly(True):
        a = x()
        y = a * 1
        z = y.exp()
        z.add_(1)
        with pytest.raises(FlameError) as caught:
            z.sum().backward()
        assert any("test_modes.py" in note for note in caught.value.__notes__)
    assert not autograd.mode.mode.anomaly


def test_without_anomaly_mode_nan_passes() -> None:
    a = flame.zeros(1, requires_grad=True)
    (flame.sqrt(a) * 0).sum().backward()
    assert a.grad is not None
    assert a.grad.isnan().all()
