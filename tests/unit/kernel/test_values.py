"""Scalar values: folding, interning, and reading an index as a line."""

from __future__ import annotations

import pytest

from flame.core import dtypes
from flame.core.errors import CompileError
from flame.kernel.values import (
    Buffer,
    bitcast,
    cast,
    compare,
    const,
    is_const,
    linear,
    load,
    param,
    select,
    unary,
    var,
)

ROW, J, N = var("i"), var("j"), param("n")


def test_equal_values_are_one_object() -> None:
    assert (ROW * N + J) is (ROW * N + J)
    assert const(1) is const(1)
    assert const(0.0, dtypes.float32) is not const(-0.0, dtypes.float32)
    assert const(float("nan"), dtypes.float32) is const(float("nan"), dtypes.float32)


def test_identities_fold() -> None:
    assert ROW * 1 + 0 is ROW
    assert is_const(ROW * 0, 0)
    assert is_const(const(3) * 4 - 2, 10)
    assert select(const(True, dtypes.bool_), ROW, J) is ROW
    assert cast(const(2.5, dtypes.float32), dtypes.int64) is const(2)


def test_constants_wrap_to_their_width() -> None:
    assert is_const(const(300, dtypes.uint8), 44)
    assert is_const(const(-1, dtypes.uint32), 0xFFFFFFFF)
    assert is_const(const(128, dtypes.int8), -128)


def test_reads_an_index_as_slope_and_rest() -> None:
    slope, rest = linear(ROW * N + J + 3, "j") or (None, None)
    assert slope is const(1)
    assert rest is not None
    assert repr(rest) in ("add(mul(i, n), 3)", "add(3, mul(i, n))")
    slope, _ = linear((ROW + J) * N, "i") or (None, None)
    assert slope is N
    assert linear(ROW * ROW, "i") is None
    buffer = Buffer("x", dtypes.int64)
    assert linear(load(buffer, ROW), "i") is None


def test_types_are_checked() -> None:
    x, flag = param("x", dtypes.float64), compare("lt", ROW, J)
    with pytest.raises(CompileError, match="exp cannot take"):
        unary("exp", ROW)
    with pytest.raises(CompileError, match="cannot take"):
        unary("sqrt", flag)
    with pytest.raises(CompileError, match="width"):
        bitcast(x, dtypes.int32)
    with pytest.raises(CompileError, match="no truth value"):
        bool(flag)
