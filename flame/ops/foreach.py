"""What training does to all gradients at once: a product in place, and a reduction of each.

Invariant: numbers are those of a call for each tensor. On a GPU the calls share launches, see
`Interpreter.foreach`; a recorder sees single calls, which its compiler fuses as it likes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flame.core.autocast import autocast
from flame.core.types import TensorType, on_device, tensor_type
from flame.ops.arithmetic import _mul
from flame.ops.joining import stack
from flame.ops.op import Op, empty_of, interpreter

if TYPE_CHECKING:
    from flame.tensor import Tensor


def scale_each_(tensors: Sequence[Tensor], factor: Tensor | float) -> None:
    """Multiply each tensor by a number, in place; it goes to the devices that they are on."""
    rows: dict[str, list[tuple[Tensor]]] = {}
    for t in tensors:
        rows.setdefault(t.type.device, []).append((t,))
    for device, own in rows.items():
        _mul.foreach(own, factor if isinstance(factor, float) else factor.to(device), out=own)


def reduce_each(op: Op, tensors: Sequence[Tensor], alone: Callable[[Tensor], Tensor]) -> Tensor:
    """(len(tensors),): a reduction over all elements of each; no gradient flows through it.

    alone: that of one tensor, where results differ in dtype or device. They are on the first one's.
    """
    kinds = {_result_of(op, type_) for type_ in {t.type for t in tensors}}
    if interpreter().recording or autocast.on or len(kinds) > 1:
        return stack([alone(t).to(tensors[0].device) for t in tensors])
    (kind,) = kinds
    made: Tensor = empty_of(on_device(tensor_type(kind.dtype, (len(tensors),)), kind.device))
    step = kind.dtype.itemsize
    out = [(made.wrap(made.storage, made.pointer + i * step, kind),) for i in range(len(tensors))]
    attributes = [_over_all(t.type.ndim) for t in tensors]
    op.foreach([(t,) for t in tensors], out=out, attributes=attributes)
    return made


@functools.cache
def _over_all(ndim: int) -> dict[str, Any]:
    return {"dims": tuple(range(ndim)), "keepdim": False}


def _result_of(op: Op, type_: TensorType) -> TensorType:
    made: TensorType = op.infer((type_,), **_over_all(type_.ndim))
    return on_device(made, type_.device)
