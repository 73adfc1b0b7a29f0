"""Draws operands for a Sample, in any dtype and memory layout.

Invariant: the values depend on the seed and the sample alone, so the same call can be made in
several layouts and compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.device import check_device
from flame.core.dtypes import DType
from flame.core.types import contiguous_strides, on_device, tensor_type
from flame.ops.op import Arg, Op, Sample
from flame.runtime import transfer
from flame.runtime.storage import Storage
from flame.tensor import Tensor, from_array

LAYOUTS: Final = ("contiguous", "permuted", "sliced", "offset", "expanded")
FIXED: Final = {"int32": dtypes.int32, "float32": dtypes.float32}  # dtypes, by an Arg's kind
OFFSETS: Final = {"sliced": 1, "offset": 3}  # elements before the first one, by layout


def dtypes_of(sample: Sample) -> Sequence[DType]:
    """The dtypes that a sample's Args can take together."""
    kinds = {a.kind for a in args_of(sample)}
    if "float" in kinds:
        return dtypes.FLOATING
    if "double" in kinds:
        return (dtypes.float32, dtypes.float64)
    if "any" in kinds:
        return (
            dtypes.float32,
            dtypes.float64,
            dtypes.bfloat16,
            dtypes.int64,
            dtypes.int32,
            dtypes.uint8,
        )
    if "int" in kinds:
        return (dtypes.int64, dtypes.int32, dtypes.int16, dtypes.int8, dtypes.uint8)
    return (dtypes.float32,)


def args_of(sample: Sample) -> list[Arg]:
    """The Args of a sample, those inside lists too."""
    found: list[Arg] = []
    for x in sample.inputs:
        found += [a for a in (x if isinstance(x, (list, tuple)) else [x]) if isinstance(a, Arg)]
    return found


def draw(arg: Arg, dtype: DType, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Values for one Arg, in ``dtype`` where its kind leaves the choice."""
    if arg.kind == "bool":
        return rng.random(arg.shape) < 0.5
    if arg.kind == "index":
        return np.asarray(
            rng.integers(int(arg.low), max(int(arg.high), int(arg.low) + 1), arg.shape), np.int64
        )
    count = int(np.prod(arg.shape))
    dtype = FIXED.get(arg.kind, dtype)
    if arg.values:
        return np.asarray(arg.values, dtype.numpy).reshape(arg.shape)
    if arg.distinct:
        values = arg.low + (arg.high - arg.low) * (rng.permutation(count) + 0.5) / max(count, 1)
        values = values.reshape(arg.shape)
    else:
        values = rng.uniform(arg.low, arg.high, arg.shape)
    for point in arg.avoid:
        near = np.abs(values - point) < 0.05
        values = np.where(near, point + np.where(values < point, -0.05, 0.05), values)
    if dtype.kind == "f":
        return np.asarray(values, dtype.numpy)
    if dtype.kind == "u" or (dtype.kind == "i" and arg.kind == "any" and arg.low >= 0):
        return np.asarray(np.abs(np.rint(values)), dtype.numpy)
    return np.asarray(np.rint(values), dtype.numpy)


def make_inputs(
    sample: Sample, dtype: DType, seed: int = 0, layout: str = "contiguous", device: str = "cpu"
) -> tuple[list[Any], list[Any]]:
    """(operands for the op on a device, the same for its NumPy reference)."""
    rng = np.random.default_rng(seed)
    operands: list[Any] = []
    arrays: list[Any] = []
    for x in sample.inputs:
        if isinstance(x, Arg):
            tensor, array = _pair(x, dtype, rng, layout)
            operands.append(placed(tensor, device, OFFSETS.get(layout, 0)))
            arrays.append(array)
        else:
            operands.append(x)
            arrays.append(x)
    return operands, arrays


def _pair(
    arg: Arg, dtype: DType, rng: np.random.Generator, layout: str
) -> tuple[Tensor, np.ndarray[Any, Any]]:
    array = draw(arg, dtype, rng)
    if (
        layout == "expanded"
        and not arg.contiguous
        and array.ndim
        and array.shape[0] > 1
        and not arg.distinct
        and not arg.values
    ):
        array = np.ascontiguousarray(np.broadcast_to(array[:1], array.shape))
    return lay_out(array, "contiguous" if arg.contiguous else layout), array


def lay_out(array: np.ndarray[Any, Any], layout: str) -> Tensor:
    """A tensor with the values of ``array`` in a memory layout of this name."""
    dtype = dtypes.from_numpy(array.dtype)
    rank = array.ndim
    if layout == "expanded" and rank and array.shape[0] > 1 and (array == array[:1]).all():
        base = from_array(np.ascontiguousarray(array[:1]))
        strides = (0, *contiguous_strides(array.shape)[1:])
        return Tensor.wrap(base.storage, base.pointer, tensor_type(dtype, array.shape, strides))
    if layout == "permuted" and rank > 1:
        order = list(reversed(range(rank)))
        turned = np.ascontiguousarray(array.transpose(order))
        return from_array(turned.transpose(order))
    if layout == "sliced" and rank:
        wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1] + 1), array.dtype)
        view = wide[..., 1::2] if array.shape[-1] else wide[..., :0]
        view[...] = array
        return from_array(view)
    if layout == "offset":
        flat = np.zeros(array.size + 3, array.dtype)
        view = flat[3:].reshape(array.shape)
        view[...] = array
        return from_array(view)
    return from_array(np.array(array, order="C", copy=True))


def placed(tensor: Tensor, device: str, offset: int = 0) -> Tensor:
    """The same values with the same strides on a device: ``offset`` elements from the start of its
    memory if it is copied, itself if it is there."""
    place = check_device(device)
    if place == tensor.type.device:
        return tensor
    type_ = on_device(tensor.type, place)
    size = type_.dtype.itemsize
    storage = Storage.allocate((offset + type_.span) * size, place)
    made = Tensor.wrap(storage, storage.pointer + offset * size, type_)
    transfer.move(made, tensor)
    return made


def attributes_on(op: Op, sample: Sample, device: str) -> dict[str, Any]:
    """The sample's attributes; for ops that make tensors from numbers, with the device."""
    attributes = dict(sample.attributes)
    if device != "cpu" and not op.takes_tensors:
        attributes["device"] = check_device(device)
    return attributes


def is_differentiable(op: Op, arg: Any) -> bool:
    """Whether tests take derivatives with respect to this operand of a sample."""
    return isinstance(arg, Arg) and arg.kind in ("float", "double") and arg.differentiable
