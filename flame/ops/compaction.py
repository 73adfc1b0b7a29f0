"""Results whose size depends on the data, found on a device: counted there, then written there.

One number is read by the host, the count; the tensor itself stays where it is. Like all reads of
values this cannot be recorded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core import dtypes
from flame.core.errors import ShapeError
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering
from flame.kernel.values import Value, const
from flame.ops.creation import arange, full
from flame.ops.indexing import gather, index_select
from flame.ops.joining import cat
from flame.ops.loops import BLOCK
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Op, Sample, Types
from flame.ops.scans import cumsum
from flame.ops.scattering import scatter
from flame.ops.shapes import reshape

if TYPE_CHECKING:
    from flame.tensor import Tensor


def _infer_chosen(types: Types, *, shape: Shape, rows: int, fill: int) -> TensorType:
    mask, running = types
    if not isinstance(mask, TensorType) or not isinstance(running, TensorType):
        raise ShapeError("chosen_places needs a mask and its running sum")
    if mask.shape != running.shape or mask.ndim != 1:
        raise ShapeError(f"chosen_places: a mask {mask} with a running sum {running}")
    return tensor_type(dtypes.int64, (rows, len(shape)), None, mask.device)


def _lower_chosen(
    types: Types, outputs: tuple[TensorType, ...], *, shape: Shape, rows: int, fill: int
) -> Lowering:
    """Row running[i] - 1 of the result is the place of element i, where the mask holds."""
    mask, running = types
    (out,) = outputs
    assert isinstance(mask, TensorType)
    assert isinstance(running, TensorType)
    first = KernelBuilder("chosen_places_fill")
    target = first.tensor("output", 0, tensor_type(out.dtype, (out.numel,)))
    with first.parallel(-(-out.numel // BLOCK), work=BLOCK) as (block,):
        start = block * BLOCK
        with first.vector(values.binary("min", first.size(out.numel) - start, const(BLOCK))) as v:
            first.store(target, (start + v,), const(fill, dtypes.int64))
    k = KernelBuilder("chosen_places")
    here, before = k.tensor("input", 0, mask), k.tensor("input", 1, running)
    target = k.tensor("output", 0, out)
    count = mask.numel
    with k.parallel(-(-count // BLOCK), work=BLOCK) as (block,):
        start = block * BLOCK
        with k.vector(values.binary("min", k.size(count) - start, const(BLOCK))) as v:
            at = start + v
            row = before[at] - 1
            wanted = values.binary("and", here[at], row < k.size(rows))
            writes: list[tuple[Any, tuple[Value, ...], Value]] = []
            rest = at
            for d in reversed(range(len(shape))):
                size = k.size(shape[d])
                place = values.binary("urem", rest, size) if d else rest
                rest = values.binary("udiv", rest, size)
                writes.append((target, (row, const(d)), place))
            k.store_all(writes, wanted)
    return Lowering((first.bind(), k.bind()))


def _chosen_reference(mask: Any, running: Any, *, shape: Shape, rows: int, fill: int) -> Any:
    found = np.argwhere(np.reshape(mask, shape))
    made = np.full((rows, len(shape)), fill, np.int64)
    for place, row in zip(found, running[mask] - 1, strict=True):
        if 0 <= row < rows:
            made[row] = place
    return made


_chosen = Op(
    "chosen_places",
    inputs=("mask", "running"),
    infer=_infer_chosen,
    lower=_lower_chosen,
    vjp=NOT_DIFFERENTIABLE,
    reference=_chosen_reference,
    # rows would collide where the second operand is no running sum of the first
    samples=[
        Sample(
            (Arg((1,), kind="bool"), Arg((1,), 1, 2, kind="index")),
            {"shape": (1, 1), "rows": 2, "fill": -1},
        )
    ],
)


def places(input: Tensor, size: int | None = None, fill: int = -1) -> Tensor:
    """(n, ndim) int64: the coordinates of the elements that are not zero, in row-major order.

    size: how many rows the result has instead, filled up with ``fill``; then nothing is read by the
    host.
    """
    mask = input.detach()
    if mask.dtype is not dtypes.bool_:
        mask = mask != 0
    mask = reshape(mask, (-1,)).contiguous()
    if not mask.numel():
        return full((size or 0, input.ndim), fill, dtype=dtypes.int64, device=input.device)
    running = cumsum(mask, 0)
    rows = int(running[-1].item()) if size is None else size
    if not rows or not input.ndim:
        return full((rows, input.ndim), fill, dtype=dtypes.int64, device=input.device)
    found: Tensor = _chosen(mask, running, shape=tuple(input.shape), rows=rows, fill=fill)
    return found


def distinct(fresh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(starts, run of each element, lengths) of runs; fresh (n): whether one begins."""
    count = fresh.shape[0]
    running = cumsum(fresh, 0) - 1
    starts = reshape(places(fresh), (-1,))
    end = full((1,), count, dtype=dtypes.int64, device=fresh.device)
    following = cat([starts, end], 0)
    return starts, running, following[1:] - starts


def differs(lines: Tensor) -> Tensor:
    """(n): whether a line differs from the one before it; lines (n, ...), n at least 1."""
    first = full((1,), True, dtype=dtypes.bool_, device=lines.device)
    change = lines[1:] != lines[:-1]
    if change.ndim > 1:
        change = change.flatten(1).any(1)
    return cat([first, change], 0)


def order_of_lines(lines: Tensor) -> Tensor:
    """The stable order of lines (n, k), by the first number, where that is equal by the next one,
    and so on: k sorts, from the last number to the first."""
    from flame.ops.sorting import argsort

    order = arange(lines.shape[0], device=lines.device)
    for column in reversed(range(lines.shape[1])):
        found = argsort(index_select(lines.select(1, column), 0, order), 0)
        order = gather(order, 0, found)
    return order


def inverse_of(order: Tensor, running: Tensor) -> Tensor:
    """The run of each element in its first place, of the runs in sorted order."""
    made: Tensor = scatter(running, 0, order, running)
    return made


def repeated(counts: Tensor) -> Tensor:
    """0 counts[0] times, 1 counts[1] times, and so on; counts not negative."""
    from flame.ops.sorting import searchsorted

    ends = cumsum(counts, 0)
    total = int(ends[-1].item()) if counts.numel() else 0
    return searchsorted(ends, arange(total, device=counts.device), right=True)
