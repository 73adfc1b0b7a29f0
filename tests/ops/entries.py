"""Entries of PyTorch's operator database as tests: first and second derivatives, bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

import flame
from flame.core.errors import FlameError

from . import database

LIMIT = 8  # samples of a dtype
SECOND = 3  # samples of which the second derivatives are compared


def cases(names: Iterable[str]) -> list[Any]:
    """The entries of these names, all their variants, as parameters of a test."""
    wanted = set(names)
    found = [e for e in database.op_db if e.name in wanted or database.full_name(e) in wanted]
    missing = wanted - {e.name for e in found} - {database.full_name(e) for e in found}
    assert not missing, f"not in the database: {sorted(missing)}"
    return [pytest.param(e, id=database.full_name(e)) for e in found]


def check_first(entry: Any, function: Callable[..., Any] | None = None) -> None:
    """Values, dtypes, shapes and gradients on the entry's samples."""
    function = function or database.function_of(entry)
    assert function is not None, "FLAME has no such function"
    ran = 0
    for dtype in database.CPU.dtypes:
        if dtype not in entry.supported_dtypes("cpu"):
            continue
        for sample in database.samples_of(entry, dtype, LIMIT):
            label = f"{database.full_name(entry)}({database.describe(sample)})"
            ran += database.run_sample(entry, function, sample, label)
    assert ran, "no sample could be compared"


def check_second(entry: Any, function: Callable[..., Any] | None = None) -> None:
    """Second derivatives, in float64."""
    function = function or database.function_of(entry)
    assert function is not None
    for sample in database.samples_of(entry, torch.float64, SECOND):
        label = f"{database.full_name(entry)}({database.describe(sample)})"
        try:
            operands, options, leaves = database.prepared(sample)
        except database.Unconvertible:
            continue
        theirs, their_leaves = database._call(entry.op, sample, database._own)
        wanted = _twice(torch.autograd.grad, theirs, their_leaves)
        if wanted is None:
            continue
        found = _twice(flame.autograd.grad, function(*operands, **options), leaves)
        assert found is not None, label
        for ours, expected in zip(found, wanted, strict=True):
            if ours is not None and expected is not None:
                database.compare(ours, expected, f"{label}: second derivative")


def _twice(grad: Callable[..., Any], results: Any, leaves: Any) -> Any:
    """Gradients of the sum of the sine of the gradients of the sum of the sine of the results."""
    outputs = [t for t in database.tensors_in(results) if t.requires_grad]
    if not outputs or not leaves:
        return None
    total = sum(t.sin().sum() for t in outputs)
    first = grad([total], leaves, create_graph=True, allow_unused=True)
    bent = [g.sin().sum() for g in first if g is not None and g.requires_grad]
    return grad([sum(bent)], leaves, allow_unused=True) if bent else None


def check_errors(entry: Any, function: Callable[..., Any] | None = None) -> None:
    """What PyTorch refuses raises a FlameError; ``out=`` is no argument here."""
    function = function or database.function_of(entry)
    assert function is not None
    for case in entry.error_inputs("cpu"):
        sample = case.sample_input
        if "out" in sample.kwargs:
            continue
        try:
            operands, options, _ = database.prepared(sample)
        except (database.Unconvertible, AttributeError):
            continue
        label = f"{database.full_name(entry)}({database.describe(sample)})"
        with pytest.raises(FlameError):
            pytest.fail(f"{label} was accepted: {function(*operands, **options)}")
