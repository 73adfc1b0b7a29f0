"""Scalar values by NumPy, against the references of the ops that they declare."""

from __future__ import annotations

import numpy as np
import pytest

import flame
from flame.core import dtypes
from flame.core.errors import CompileError
from flame.kernel import values
from flame.kernel.evaluate import evaluate
from flame.ops.elementwise import Elementwise
from flame.ops.op import OPS
from flame.testing.sampling import make_inputs

ELEMENTWISE = sorted(name for name, op in OPS.items() if isinstance(op, Elementwise))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_equals_the_reference(name: str) -> None:
    op = OPS[name]
    assert isinstance(op, Elementwise)
    for sample in op.samples:
        dtype = dtypes.int64 if name.startswith("bitwise") else dtypes.float64
        _, arrays = make_inputs(sample, dtype, layout="contiguous")
        with np.errstate(all="ignore"):
            wanted = op.reference(*arrays, **sample.attributes)
        found = op.evaluate(*arrays, **sample.attributes)
        if not isinstance(wanted, tuple):
            wanted, found = (wanted,), (found,)
        for a, b in zip(found, wanted, strict=True):
            tight = np.asarray(a).dtype == np.float64
            np.testing.assert_allclose(a, b, rtol=1e-9 if tight else 1e-4, atol=1e-9)


def test_rounds_at_every_instruction() -> None:
    x = values.param("x", dtypes.float32)
    (found,) = evaluate([(x + 1.0) - 1.0], {x: np.float32(1e-9)})
    assert found == 0
    assert found.dtype == np.float32


def test_memory_has_no_value() -> None:
    buffer = values.Buffer("b", dtypes.float32)
    with pytest.raises(CompileError, match="outside a kernel"):
        evaluate([values.load(buffer, values.const(0))], {})


def test_a_derived_op_has_a_reference() -> None:
    x = flame.tensor([0.5, 2.0])
    backward = OPS["tanh"].backward((True,), (x.type,))
    g, out = np.array([1, 2], np.float32), np.tanh(np.array([0.5, 2.0], np.float32))
    np.testing.assert_allclose(backward.reference(g, out), g * (1 - out * out), rtol=1e-6)
