"""Tests generated from the op table: every sample of every op inside of `flame.compile`.

Values and gradients must be those of eager execution, at the recorded call and at a replay with
other data; eager execution itself is what `test_generated.py` checks.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import flame
import flame.ops
from flame.ops.op import OPS, Op, Sample
from flame.testing import LAYOUTS, dtypes_of
from flame.testing.references import TOLERANCE
from flame.testing.sampling import draw, is_differentiable, make_inputs

for module in pkgutil.walk_packages(flame.ops.__path__, "flame.ops."):
    importlib.import_module(module.name)

HALF = (flame.float16, flame.bfloat16)
# The layouts and dtypes take turns, so that each sample is compiled once and all are seen.
CASES = [
    pytest.param(op, sample, i, id=f"{op.name}-{i}")
    for op in OPS.values()
    for i, sample in enumerate(op.samples)
]


def step_of(op: Op, sample: Sample, operands: Sequence[Any]) -> Callable[..., Any]:
    """``step(tensors, weights)``: what the op gives, and gradients of its results."""
    places = [i for i, x in enumerate(operands) if isinstance(x, flame.Tensor)]
    differentiable = [i for i, x in enumerate(sample.inputs) if is_differentiable(op, x)]

    def step(tensors: Sequence[Any], weights: Sequence[Any]) -> Any:
        inputs = list(operands)
        for place, tensor in zip(places, tensors, strict=True):
            inputs[place] = tensor.detach()
            if op.differentiable and place in differentiable and tensor.is_floating_point():
                inputs[place].requires_grad_()
        made = op(*inputs, **sample.attributes)
        results = made if isinstance(made, tuple) else (made,)
        leaves = [x for x in inputs if isinstance(x, flame.Tensor) and x.requires_grad]
        wanted = [
            (r, w)
            for r, w in zip(results[: len(results) - op.extras], weights, strict=False)
            if r.requires_grad
        ]
        gradients: Sequence[Any] = ()
        if wanted:
            gradients = flame.autograd.grad(
                [r for r, _ in wanted], leaves, [w for _, w in wanted], allow_unused=True
            )
        return [r.detach() for r in results], list(gradients)

    return step


def weights_of(op: Op, sample: Sample, tensors: Sequence[Any], seed: int) -> list[Any]:
    """Gradients for the results, in their dtypes."""
    with flame.no_grad():
        made = op(*tensors, **sample.attributes)
    random = np.random.default_rng(1000 + seed)
    return [
        flame.from_numpy(np.asarray(random.uniform(-1, 1, r.shape), np.float64)).to(r.dtype)
        for r in (made if isinstance(made, tuple) else (made,))
    ]


def widened(x: Any) -> Any:
    """Half-width floats as float64."""
    return x.to(flame.float64) if isinstance(x, flame.Tensor) and x.dtype in HALF else x


def assert_equal(found: Any, expected: Any, exact: Any, op: Op, label: str) -> None:
    """Raise AssertionError where ``found`` is neither near ``expected`` nor near ``exact``.

    exact: of half-width floats, what a float64 computation gives, for a fused one does not round
    what lies between.
    """
    assert (found is None) == (expected is None), label
    if found is None:
        return
    assert found.dtype is expected.dtype, label
    got, want = found.numpy(), expected.numpy()
    assert got.shape == want.shape, label
    if found.dtype.kind != "f":
        np.testing.assert_array_equal(got, want, err_msg=label)
        return
    relative, absolute = (t * op.tolerance for t in TOLERANCE[found.dtype])
    got, want = got.astype(np.float64), want.astype(np.float64)
    scale = max(1.0, np.abs(want[np.isfinite(want)]).max(initial=0.0))
    if exact is not None:
        true = exact.numpy()
        near = np.isclose(got, true, rtol=relative, atol=absolute * scale, equal_nan=True)
        want = np.where(near, got, want)
    np.testing.assert_allclose(got, want, rtol=relative, atol=absolute * scale, err_msg=label)


@pytest.mark.parametrize(("op", "sample", "turn"), CASES)
def test_compiled_equals_eager(op: Op, sample: Sample, turn: int, tally: Any) -> None:
    choices = dtypes_of(sample)
    dtype = choices[turn % len(choices)]
    layout = LAYOUTS[turn % len(LAYOUTS)]
    operands, _ = make_inputs(sample, dtype, 0, layout)
    step = step_of(op, sample, operands)
    compiled = flame.compile(step)
    for seed in (0, 1):
        operands, _ = make_inputs(sample, dtype, seed, layout)
        tensors = [x for x in operands if isinstance(x, flame.Tensor)]
        weights = weights_of(op, sample, operands, seed)
        expected = step(tensors, weights)
        exact = expected
        if dtype in HALF:
            wide = step_of(op, sample, [widened(x) for x in operands])
            exact = wide([widened(x) for x in tensors], [widened(x) for x in weights])
        found = compiled(tensors, weights)
        for kind in (0, 1):
            assert len(found[kind]) == len(expected[kind])
            results = zip(found[kind], expected[kind], exact[kind], strict=True)
            for i, (a, b, c) in enumerate(results):
                label = f"{op.name} {dtype.name} {layout}: {('value', 'gradient')[kind]} {i}"
                assert_equal(a, b, c if dtype in HALF else None, op, label)
    assert compiled.recordings == 1
    tally(op)


def test_draws_are_made() -> None:
    """The sampling gives other data for another seed, or replays would not be tested."""
    (arg,) = OPS["tanh"].samples[0].inputs
    some, others = (draw(arg, flame.float32, np.random.default_rng(s)) for s in (0, 1))
    assert not np.array_equal(some, others)
