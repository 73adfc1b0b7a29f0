"""Masks: elements replaced, chosen and counted by conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import DTypeError, ShapeError
from flame.core.handle import is_tensor
from flame.core.types import TensorType
from flame.kernel import values
from flame.kernel.values import Value
from flame.ops.elementwise import Elementwise, elementwise
from flame.ops.loops import broadcast_shapes
from flame.ops.op import Arg, Sample, Types, constant
from flame.ops.shapes import expand, reshape

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["argwhere", "count_nonzero", "masked_fill", "masked_scatter", "masked_select", "nonzero"]
METHODS = (*__all__, "masked_fill_")
IN_PLACE = ("masked_scatter",)


def _rule(name: str, types: Types) -> tuple[Sequence[DType], Sequence[DType]]:
    """x and the value in x's dtype."""
    x, mask, _ = types
    if not isinstance(x, TensorType):
        raise DTypeError(f"{name}: the first operand must be a tensor")
    if isinstance(mask, TensorType) and mask.dtype is not dtypes.bool_:
        raise DTypeError(f"{name}: the mask must be bool, got {mask.dtype.name}")
    return [x.dtype, dtypes.bool_, x.dtype], [x.dtype]


def _choose(x: Value, mask: Value, value: Value) -> Value:
    return values.select(mask, value, x)


def _where_rule(name: str, types: Types) -> tuple[Sequence[DType], Sequence[DType]]:
    x, _ = types
    if not isinstance(x, TensorType):
        raise DTypeError(f"{name}: the first operand must be a tensor")
    return [x.dtype, dtypes.bool_], [x.dtype]


# x where a mask holds (or does not), else 0: what the gradients of masked_fill are
_kept: Elementwise = elementwise(
    "keep_where", lambda x, mask: values.select(mask, x, 0), inputs=("x", "mask"), rule=_where_rule,
    vjp=(lambda g, mask: _kept(g, mask), None),
    reference=lambda x, mask: np.where(mask, x, np.zeros((), x.dtype)),
    samples=[Sample((Arg((5, 7)), Arg((7,), kind="bool")))],
)  # fmt: skip
_dropped: Elementwise = elementwise(
    "keep_unless",
    lambda x, mask: values.select(mask, 0, x),
    inputs=("x", "mask"),
    rule=_where_rule,
    vjp=(lambda g, mask: _dropped(g, mask), None),
    reference=lambda x, mask: np.where(mask, np.zeros((), x.dtype), x),
    samples=[Sample((Arg((5, 7)), Arg((7,), kind="bool")))],
)

_masked_fill = elementwise(
    "masked_fill", _choose, inputs=("x", "mask", "value"), rule=_rule,
    vjp=(lambda g, mask: _dropped(g, mask), None, lambda g, mask: _kept(g, mask)),
    reference=lambda x, mask, value: np.where(mask, np.asarray(value, x.dtype), x),
    samples=[Sample((Arg((5, 7)), Arg((7,), kind="bool"), Arg(()))),
             Sample((Arg((0, 3)), Arg((0, 3), kind="bool"), 2)),
             Sample((Arg(()), Arg((), kind="bool"), Arg(())))],
)  # fmt: skip


def _check(name: str, input: Tensor, mask: Any, value: Any) -> Any:
    if not is_tensor(mask) or mask.dtype is not dtypes.bool_:
        found = mask.dtype.name if is_tensor(mask) else type(mask).__name__
        raise DTypeError(f"{name}: the mask must be a bool tensor, got {found}")
    if is_tensor(value) and value.ndim:
        raise ShapeError(f"{name}: the value must be a number or a 0-d tensor, got {value.shape}")
    kind = value.dtype.kind if is_tensor(value) else "f" if isinstance(value, float) else "i"
    if kind == "f" and input.dtype.kind != "f":
        raise DTypeError(f"{name}: a floating value for a {input.dtype.name} tensor; convert one")
    return value


def masked_fill(input: Tensor, mask: Tensor, value: Any) -> Tensor:
    """``value`` (a number or 0-d tensor) where ``mask`` holds, ``input`` elsewhere; broadcast."""
    result: Tensor = _masked_fill(input, mask, _check("masked_fill", input, mask, value))
    return result


def masked_fill_(input: Tensor, mask: Tensor, value: Any) -> Tensor:
    """`masked_fill` in place."""
    if not (is_tensor(value) or isinstance(value, (float, int, bool))):
        value = value.item()
    _masked_fill.into((input,), input, mask, value)
    return input


def masked_select(input: Tensor, mask: Tensor) -> Tensor:
    """The elements where ``mask`` holds, in row-major order; both are broadcast."""
    _check("masked_select", input, mask, 0)
    shape = broadcast_shapes("masked_select", [input.shape, mask.shape])
    whole, chosen = expand(input, shape), expand(mask, shape)
    if not shape:
        whole, chosen = reshape(whole, (1,)), reshape(chosen, (1,))
    found: Tensor = whole[chosen]
    return found


def masked_scatter(input: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The elements where ``mask`` holds replaced by those of ``source``, one after the other."""
    from flame.ops.subscript import index_put

    _check("masked_scatter", input, mask, 0)
    if source.dtype is not input.dtype:
        raise DTypeError(
            f"masked_scatter: values of {source.dtype.name} for a {input.dtype.name} tensor"
        )
    shape = broadcast_shapes("masked_scatter", [input.shape, mask.shape])
    whole, chosen = expand(input, shape), expand(mask, shape)
    if not shape:
        return reshape(masked_scatter(reshape(input, (1,)), reshape(mask, (1,)), source), ())
    places = nonzero(chosen, as_tuple=True)
    count = places[0].shape[0]
    if source.numel() < count:
        raise ShapeError(
            f"masked_scatter: {count} elements to replace, but only {source.numel()} values"
        )
    return index_put(whole, places, reshape(source, (-1,))[:count])


def nonzero(input: Tensor, *, as_tuple: bool = False) -> Any:
    """The coordinates of non-zero elements, a row each; or a tensor for each dimension, as a tuple.

    How many there are depends on the data, so the host waits for it.
    """
    if input.is_cuda:
        from flame.ops.compaction import places

        rows = places(input if input.ndim or not as_tuple else reshape(input, (1,)))
        return tuple(rows.select(1, d) for d in range(rows.shape[1])) if as_tuple else rows
    array = input.detach().numpy()
    if as_tuple:
        found = np.nonzero(np.atleast_1d(array))
        return tuple(constant(np.ascontiguousarray(f)) for f in found)
    return constant(np.ascontiguousarray(np.argwhere(array)))


def argwhere(input: Tensor) -> Tensor:
    """As `nonzero`."""
    found: Tensor = nonzero(input)
    return found


def count_nonzero(input: Tensor, dim: Any = None) -> Tensor:
    """How many elements are not zero, over all or the given dimensions; int64."""
    from flame.ops.reductions import sum as total

    return total(input != 0, dim)
