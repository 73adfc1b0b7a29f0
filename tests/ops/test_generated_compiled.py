"""Tests generated from the op table: every sample of every op inside of `flame.compile`.

Values and gradients must be those of eager execution, at the recorded call and at a replay with
other data; eager execution itself is what `test_generated.py` checks.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import numpy as np
import pytest

import flame
import flame.ops
from flame.ops.op import OPS, Op, Sample
from flame.testing import LAYOUTS, check_compiled, dtypes_of
from flame.testing.sampling import draw

for module in pkgutil.walk_packages(flame.ops.__path__, "flame.ops."):
    importlib.import_module(module.name)

# The layouts and dtypes take turns, so that each sample is compiled once and all are seen.
CASES = [
    pytest.param(op, sample, i, id=f"{op.name}-{i}")
    for op in OPS.values()
    for i, sample in enumerate(op.samples)
]


@pytest.mark.parametrize(("op", "sample", "turn"), CASES)
def test_compiled_equals_eager(op: Op, sample: Sample, turn: int, tally: Any) -> None:
    choices = dtypes_of(sample)
    check_compiled(op, sample, choices[turn % len(choices)], LAYOUTS[turn % len(LAYOUTS)])
    tally(op)


def test_draws_are_made() -> None:
    """The sampling gives other data for another seed, or replays would not be tested."""
    (arg,) = OPS["tanh"].samples[0].inputs
    some, others = (draw(arg, flame.float32, np.random.default_rng(s)) for s in (0, 1))
    assert not np.array_equal(some, others)
