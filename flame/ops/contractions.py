"""einsum: sums of products by subscripts, done as batched matrix products."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from flame.core.dtypes import promote_types
from flame.core.errors import ArgumentError, ShapeError
from flame.ops.autocast import autocasts
from flame.ops.products import matmul
from flame.ops.reductions import sum
from flame.ops.shapes import as_strided, expand, permute, reshape

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["einsum"]


@autocasts("lower")
def einsum(equation: str, *operands: Any) -> Tensor:
    """Sum of products in Einstein's notation, such as ``"bij,bjk->bik"``; ``...`` broadcasts.

    Operands are multiplied from left to right, each pair as one batched matrix product. Raises
    ArgumentError for subscripts that are no letters or do not fit, ShapeError for unequal sizes.
    """
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    inputs, output = _parse(equation, operands)
    sizes = _sizes(equation, inputs, operands)
    terms = [_diagonal(x, s) for x, s in zip(operands, inputs, strict=True)]
    while len(terms) > 1:
        left, right = terms[0], terms[1]
        later = set(output).union(*(labels for _, labels in terms[2:]))
        terms[:2] = [_multiply(left, right, later, sizes)]
    x, labels = terms[0]
    x, labels = _sum_out(x, labels, set(output))
    return permute(x, tuple(labels.index(label) for label in output)) if output else x


def _parse(equation: str, operands: tuple[Any, ...]) -> tuple[list[str], str]:
    """Labels of each operand and of the result; the dimensions of ``...`` become digits-like
    labels.
    """
    text = equation.replace(" ", "")
    left, arrow, right = text.partition("->")
    parts = left.split(",")
    if len(parts) != len(operands):
        raise ArgumentError(
            f"einsum: {equation!r} names {len(parts)} operands, {len(operands)} were given"
        )
    if not all(re.fullmatch(r"[a-zA-Z]*(\.\.\.)?[a-zA-Z]*", p) for p in [*parts, right]):
        raise ArgumentError(f"einsum: subscripts in {equation!r} must be letters and one '...'")
    extra = 0
    for part, x in zip(parts, operands, strict=True):
        letters = len(part.replace("...", ""))
        if letters > x.ndim or ("..." not in part and letters != x.ndim):
            raise ArgumentError(
                f"einsum: {part!r} has {letters} subscripts for a tensor of shape {x.shape}"
            )
        extra = max(extra, x.ndim - letters)
    dots = "".join(chr(0x2460 + i) for i in range(extra))
    inputs = []
    for part, x in zip(parts, operands, strict=True):
        count = x.ndim - len(part.replace("...", ""))
        inputs.append(part.replace("...", dots[extra - count :]))
    if arrow:
        output = right.replace("...", dots)
        unknown = set(output) - set("".join(inputs))
        if unknown or len(set(output)) != len(output):
            raise ArgumentError(f"einsum: the result {right!r} repeats or invents a subscript")
    else:
        joined = "".join(p.replace("...", "") for p in parts)
        output = dots + "".join(sorted(c for c in set(joined) if joined.count(c) == 1))
    return inputs, output


def _sizes(equation: str, inputs: list[str], operands: tuple[Any, ...]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for labels, x in zip(inputs, operands, strict=True):
        for label, size in zip(labels, x.shape, strict=True):
            known = sizes.setdefault(label, size)
            if known == 1:
                sizes[label] = size
            elif size not in (1, known):
                shapes = ", ".join(str(t.shape) for t in operands)
                raise ShapeError(
                    f"einsum {equation!r}: one subscript has sizes {known} and {size} in {shapes}"
                )
    return sizes


def _diagonal(x: Tensor, labels: str) -> tuple[Tensor, str]:
    """A label that stands twice walks both dimensions at once."""
    unique = "".join(dict.fromkeys(labels))
    if unique == labels:
        return x, labels
    x = x.contiguous()
    shape, strides = [], []
    for label in unique:
        axes = [i for i, other in enumerate(labels) if other == label]
        shape.append(x.shape[axes[0]])
        strides.append(math.fsum(x.stride(i) for i in axes))
    steps = tuple(int(s) for s in strides)
    return as_strided(x, shape=tuple(shape), strides=steps, offset=0), unique


def _sum_out(x: Tensor, labels: str, kept: set[str]) -> tuple[Tensor, str]:
    gone = [i for i, label in enumerate(labels) if label not in kept]
    if not gone:
        return x, labels
    return sum(x, gone), "".join(c for c in labels if c in kept)


def _multiply(
    left: tuple[Tensor, str], right: tuple[Tensor, str], later: set[str], sizes: dict[str, int]
) -> tuple[Tensor, str]:
    """One pair as (batch, rows, summed) @ (batch, summed, columns)."""
    a, a_labels = _sum_out(*left, later | set(right[1]))
    b, b_labels = _sum_out(*right, later | set(a_labels))
    if a.dtype is not b.dtype and a.dtype.kind != "f" and b.dtype.kind != "f":
        wide = promote_types(a.dtype, b.dtype)  # sums of integers are int64
        a, b = a.to(wide), b.to(wide)
    shared = [c for c in a_labels if c in b_labels]
    batch = [c for c in shared if c in later]
    summed = [c for c in shared if c not in later]
    rows = [c for c in a_labels if c not in shared]
    columns = [c for c in b_labels if c not in shared]
    a = _arrange(a, a_labels, (batch, rows, summed), sizes)
    b = _arrange(b, b_labels, (batch, summed, columns), sizes)
    labels = [*batch, *rows, *columns]
    return reshape(matmul(a, b), tuple(sizes[c] for c in labels)), "".join(labels)


def _arrange(
    x: Tensor, labels: str, groups: tuple[list[str], ...], sizes: dict[str, int]
) -> Tensor:
    """``x`` with each group of labels as one dimension; broadcast ones at their full size."""
    order = [c for group in groups for c in group]
    moved = permute(x, tuple(labels.index(c) for c in order)) if order else x
    full = expand(moved, tuple(sizes[c] for c in order)) if order else moved
    return reshape(full, tuple(math.prod(sizes[c] for c in group) for group in groups))
