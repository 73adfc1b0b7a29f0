"""Tests generated from the op table: every op, against its reference and against finite
differences.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest

import flame.ops
from flame.core.errors import FlameError
from flame.ops.op import OPS, Op, Sample
from flame.testing import LAYOUTS, check_gradients, check_reference, dtypes_of
from flame.testing.sampling import is_differentiable

# Every module of ops, those too that `import flame` leaves to a later import: no op escapes.
for module in pkgutil.walk_packages(flame.ops.__path__, "flame.ops."):
    importlib.import_module(module.name)

CASES = [
    pytest.param(op, sample, id=f"{op.name}-{i}")
    for op in OPS.values()
    for i, sample in enumerate(op.samples)
]


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_equals_reference(op: Op, sample: Sample, tally: Any) -> None:
    for dtype in dtypes_of(sample):
        check_reference(op, sample, dtype)
        tally(op)


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_reads_views(op: Op, sample: Sample, tally: Any) -> None:
    dtype = dtypes_of(sample)[-1]
    for layout in LAYOUTS[1:]:
        check_reference(op, sample, dtype, layout)
        tally(op)


@pytest.mark.parametrize(
    ("op", "sample"), [case for case in CASES if case.values[0].differentiable]
)
def test_derivatives(op: Op, sample: Sample, tally: Any) -> None:
    for layout in ("contiguous", "permuted"):
        check_gradients(op, sample, layout)
        tally(op)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_has_samples(op: Op) -> None:
    assert op.samples, f"op {op.name} has no samples, so no test reaches it"
    if op.differentiable:
        operands = (x for sample in op.samples for x in sample.inputs)
        assert any(is_differentiable(op, x) for x in operands), (
            f"op {op.name} is differentiable, but no sample has a float operand"
        )


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_refuses_nonsense(op: Op) -> None:
    """Too many operands, and an operand that is neither a tensor nor a number, are FlameErrors."""
    sample = op.samples[0]
    with pytest.raises(FlameError):
        op(*("text" for _ in sample.inputs or "x"), **sample.attributes)
    if not op.variadic:
        with pytest.raises(FlameError):
            op(*[1.0] * (len(op.inputs) + 1), **sample.attributes)


def test_table_is_not_empty() -> None:
    assert len(OPS) > 40
