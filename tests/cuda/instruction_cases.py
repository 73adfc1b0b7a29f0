"""Kernels of one instruction each, in every dtype that takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.types import tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder
from flame.kernel.values import Value

F32 = dtypes.float32
_FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -3.5, 7.25, 1e-30, -1e30, np.inf, -np.inf, np.nan]
_INTEGERS = [0, 1, -1, 2, -3, 7, 100, -100]
EDGES = {"f": _FLOATS, "i": _INTEGERS, "u": [0, 1, 2, 3, 7, 100, 200], "b": [False, True]}
COMPUTED = (dtypes.float32, dtypes.float64, dtypes.int64, dtypes.int32, dtypes.int16, dtypes.int8,
            dtypes.uint8, dtypes.uint32, dtypes.uint64, dtypes.bool_)  # fmt: skip


def numbers(dtype: DType) -> Any:
    with np.errstate(over="ignore"):
        found = np.array(EDGES[dtype.kind]).astype(dtype.numpy)
    if dtype.kind in "iu":
        found = np.concatenate([found, np.array(values.integer_range(dtype), dtype.numpy)])
    return found


def instructions() -> list[tuple[str, tuple[Value, ...], Value]]:
    """(name, parameters, value) of every instruction in every dtype that takes it."""
    made = []
    for dtype in COMPUTED:
        kind = "i" if dtype.kind == "u" else dtype.kind
        x, y = values.param("x", dtype), values.param("y", dtype)
        for op, kinds in values.UNARY.items():
            if kind in kinds:
                made.append((f"{op} {dtype}", (x,), values.unary(op, x)))
        for op, kinds in values.BINARY.items():
            if kind in kinds and op not in ("udiv", "urem", "shl", "shr"):
                made.append((f"{op} {dtype}", (x, y), values.binary(op, x, y)))
        made += [(f"{op} {dtype}", (x, y), values.compare(op, x, y)) for op in values.COMPARE]
        for target in (*COMPUTED, dtypes.float16, dtypes.bfloat16):
            if target is not dtype and not (dtype.kind == "f" and target.kind in "iu"):
                value = values.cast(x, target)
                made.append((f"cast {dtype} {target}", (x,), value))
    for half in (dtypes.float16, dtypes.bfloat16):
        x = values.param("x", half)
        made += [(f"cast {half} {t}", (x,), values.cast(x, t)) for t in (F32, dtypes.float64)]
    return made


def kernel_of(name: str, leaves: Sequence[Value], value: Value, count: int) -> BoundKernel:
    k = KernelBuilder("".join(c if c.isalnum() else "_" for c in name))
    inputs = [k.tensor("input", i, tensor_type(v.dtype, (count,))) for i, v in enumerate(leaves)]
    out = k.tensor("output", 0, tensor_type(value.dtype, (count,)))
    with k.parallel(1), k.vector(k.size(count)) as i:
        known = {leaf: x[i] for leaf, x in zip(leaves, inputs, strict=True)}
        k.store(out, (i,), _with(value, known))
    return k.bind()


def _with(value: Value, known: dict[Value, Value]) -> Value:
    args = tuple(known[a] for a in value.args)
    if value.op == "cast":
        return values.cast(*args, value.dtype)
    if value.op in values.COMPARE:
        return values.compare(value.op, *args)
    return (values.unary if len(args) == 1 else values.binary)(value.op, *args)


def kernels_of_many() -> list[BoundKernel]:
    """All instructions on each dtype in one kernel."""
    by_dtype: dict[DType, list[tuple[tuple[Value, ...], Value]]] = {}
    for _, leaves, value in instructions():
        by_dtype.setdefault(leaves[0].dtype, []).append((leaves, value))
    made = []
    for dtype, found in by_dtype.items():
        k = KernelBuilder(f"every_instruction_{dtype.name}")
        inputs = [k.tensor("input", i, tensor_type(dtype, (64,))) for i in range(2)]
        with k.parallel(64) as (p,):
            for number, (leaves, value) in enumerate(found):
                known = {leaf: x[p] for leaf, x in zip(leaves, inputs, strict=False)}
                out = k.tensor("output", number, tensor_type(value.dtype, (64,)))
                k.store(out, (p,), _with(value, known))
        made.append(k.bind())
    return made
