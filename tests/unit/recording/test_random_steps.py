"""Random steps, eager against compiled: values, gradients, state, at the recording and at replays.

How much may differ is measured: eagerly with inputs that differ by a rounding error. A failure
prints the step, which ``compare(start, numbers)`` runs again. $FLAME_RANDOM_STEPS sets how many
steps each shard tries.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as some
import numpy as np
import pytest

import flame

SHARDS = 25
EXAMPLES = int(os.environ.get("FLAME_RANDOM_STEPS", "6"))
CALLS = 2  # the recorded one, and a replay


def _load() -> Any:
    path = Path(__file__).parent / "random_steps.py"
    specification = importlib.util.spec_from_file_location("random_steps", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["random_steps"] = module
    specification.loader.exec_module(module)
    return module


steps = _load()


def outcome(world: Any, call: Any, arguments: list[Any]) -> list[Any]:
    """All that a call does, as arrays."""
    values, loss, gradients = call(*arguments)
    if loss.requires_grad:
        for leaf in world.parameters:
            leaf.grad = None
        loss.backward()
    held = [t.grad for t in (*world.parameters, *arguments)]
    found = [*values, loss, *gradients, *held, *world.tensors(), *arguments]
    return [None if t is None else t.numpy(force=True).copy() for t in found]


def shaken(tensors: list[Any], size: float) -> list[Any]:
    """The same tensors, each float a little larger or smaller."""
    random = np.random.default_rng(0)
    for tensor in tensors if size else ():
        if tensor.is_floating_point() and 0 not in tensor.stride():
            array = tensor.numpy(force=True)
            factor = 1 + size * random.choice([-1.0, 1.0], array.shape)
            array[...] = (array * factor).astype(array.dtype)
    return tensors


def outcomes(step: Any, *, compiling: bool = False, size: float = 0.0) -> list[list[Any]]:
    """What the calls of a step do. size: how much the inputs are shaken."""
    world = step.world()
    shaken(world.parameters, size)
    call = flame.compile(world.run) if compiling else world.run
    found = [outcome(world, call, shaken(step.arguments(turn), size)) for turn in range(CALLS)]
    assert not compiling or call.recordings == 1
    return found


def compare(start: int, numbers: list[int]) -> None:
    """Raise AssertionError where the compiled step does anything else than the step."""
    step = steps.Step(start, numbers)
    size, base = (2**-8, 4e-2) if step.half else (1e-6, 2e-5)
    expected, found = outcomes(step), outcomes(step, compiling=True)
    moved: list[list[Any]] = []
    for turn, i, label in places(expected):
        got, want = found[turn][i], expected[turn][i]
        assert (got is None) == (want is None), label
        if want is None:
            continue
        assert (got.dtype, got.shape) == (want.dtype, want.shape), label
        if is_near(got, want, base, 0.0):
            continue
        if got.dtype.kind in "bi":
            np.testing.assert_array_equal(got, want, label)
        moved = moved or outcomes(step, size=size)
        distance = largest(moved[turn][i].astype(float) - want)
        if not is_near(got, want, base, 20 * distance):
            np.testing.assert_allclose(got, want, rtol=base, err_msg=label)


def places(expected: list[list[Any]]) -> Any:
    """(call, result, words for them)"""
    for turn, results in enumerate(expected):
        for i in range(len(results)):
            yield turn, i, f"result {i} of {len(results)}, call {turn}"


def is_near(got: Any, want: Any, base: float, extra: float) -> bool:
    if got.dtype.kind in "bi":
        return np.array_equal(got, want)
    got, want = got.astype(float), want.astype(float)
    scale = max(1.0, largest(want))
    return np.allclose(got, want, rtol=base, atol=base * scale + extra, equal_nan=True)


def largest(values: Any) -> float:
    """Of the finite ones."""
    found: float = np.abs(values[np.isfinite(values)]).max(initial=0.0)
    return found


@pytest.mark.parametrize("shard", range(SHARDS))
def test_compiled_equals_eager(shard: int) -> None:
    number = some.integers(0, 2**32 - 1)

    @hypothesis.seed(shard)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(start=number, numbers=some.lists(number, min_size=3, max_size=12))
    def check(start: int, numbers: list[int]) -> None:
        compare(start, numbers)

    check()
