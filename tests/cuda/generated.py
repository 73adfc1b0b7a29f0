"""Checks of every op of the table on a CUDA device, as calls that assert.

Values against the op's reference, in all dtypes and layouts; gradients against the CPU's, and
against finite differences; inside of `flame.compile` against eager execution.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass

import flame.ops
from flame.core import dtypes
from flame.core.dtypes import DType
from flame.ops.op import OPS, Op, Sample
from flame.tensor import Tensor
from flame.testing import (
    LAYOUTS,
    check_compiled,
    check_gradients,
    check_reference,
    dtypes_of,
    make_inputs,
)
from flame.testing.compiled import HALF, compare_steps, step_of, weights_of, widened
from flame.testing.sampling import placed

for module in pkgutil.walk_packages(flame.ops.__path__, "flame.ops."):
    importlib.import_module(module.name)

KINDS = ("values", "layouts", "gradients", "derivatives", "compiled")


@dataclass(frozen=True)
class Check:
    """One sample of an op, in one dtype and layout."""

    kind: str
    op: Op
    sample: Sample
    dtype: DType
    layout: str

    def __call__(self) -> None:
        op, sample, dtype, layout = self.op, self.sample, self.dtype, self.layout
        if self.kind in ("values", "layouts"):
            check_reference(op, sample, dtype, layout, "cuda")
        elif self.kind == "gradients":
            check_against_cpu(op, sample, dtype, layout)
        elif self.kind == "derivatives":
            check_gradients(op, sample, layout, "cuda")
        else:
            check_compiled(op, sample, dtype, layout, "cuda")

    def __str__(self) -> str:
        number = self.op.samples.index(self.sample)
        return f"{self.kind} {self.op.name}-{number} {self.dtype.name} {self.layout}"


def checks_of(op: Op, kind: str, *, thorough: bool) -> Iterator[Check]:
    """thorough: all dtypes and layouts of all samples; else they take turns, so that each sample is
    checked once."""
    for number, sample in enumerate(op.samples):
        choices = dtypes_of(sample)
        turn = number + len(op.name)
        dtype, layout = choices[turn % len(choices)], LAYOUTS[turn % len(LAYOUTS)]
        if kind == "values":
            for each in choices if thorough else (dtype,):
                yield Check(kind, op, sample, each, "contiguous")
        elif kind == "layouts":
            for each in LAYOUTS[1:] if thorough else (LAYOUTS[1 + turn % 4],):
                yield Check(kind, op, sample, choices[-1], each)
        elif kind == "compiled":
            if op.moves:
                return  # a compiled step stays on one device
            yield Check(kind, op, sample, dtype, layout)
        elif op.differentiable and kind == "derivatives":
            yield Check(kind, op, sample, dtypes.float64, ("contiguous", "permuted")[turn % 2])
        elif op.differentiable:
            floats = [d for d in choices if d.kind == "f"]
            for each in floats if thorough else floats[turn % max(len(floats), 1) :][:1]:
                yield Check(kind, op, sample, each, layout)


def check_against_cpu(op: Op, sample: Sample, dtype: DType, layout: str) -> None:
    """Raise AssertionError unless values and gradients are those of the CPU."""
    operands, _ = make_inputs(sample, dtype, 0, layout)
    tensors = [x for x in operands if isinstance(x, Tensor)]
    weights = weights_of(op, sample, operands, 0)
    expected = step_of(op, sample, operands)(tensors, weights)
    exact = None
    if dtype in HALF:
        wide = step_of(op, sample, [widened(x) for x in operands])
        exact = wide([widened(x) for x in tensors], [widened(x) for x in weights])
    there, _ = make_inputs(sample, dtype, 0, layout, "cuda")
    step = step_of(op, sample, there, "cuda")
    found = step([x for x in there if isinstance(x, Tensor)], [placed(w, "cuda") for w in weights])
    for made in (*found[0], *found[1]):
        if op.name != "transfer":
            assert made is None or made.is_cuda, f"{op.name} gave a tensor on {made.device}"
    compare_steps(found, expected, exact, op, f"{op.name} {dtype.name} {layout}")


def ops_named(*names: str) -> list[Op]:
    return [OPS[name] for name in names]
