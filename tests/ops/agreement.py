"""Tensors between PyTorch and FLAME, and whether what both computed is the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch

import flame
from flame.core import dtypes
from flame.tensor import Tensor

Array = np.ndarray[Any, Any]

DTYPES: Final[dict[torch.dtype, dtypes.DType]] = {
    torch.float64: dtypes.float64, torch.float32: dtypes.float32, torch.float16: dtypes.float16,
    torch.bfloat16: dtypes.bfloat16, torch.int64: dtypes.int64, torch.int32: dtypes.int32,
    torch.int16: dtypes.int16, torch.int8: dtypes.int8, torch.uint8: dtypes.uint8,
    torch.bool: dtypes.bool_,
}  # fmt: skip
HALF: Final = (torch.float16, torch.bfloat16)
WIDER: Final = {
    torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64,
}  # fmt: skip
TOLERANCE: Final = {  # (relative, absolute)
    torch.float64: (1e-7, 1e-9), torch.float32: (1e-4, 2e-5), torch.float16: (1e-2, 4e-3),
    torch.bfloat16: (4e-2, 3e-2),
}  # fmt: skip


class Unconvertible(Exception):
    """A sample holds what FLAME has no counterpart of: a complex tensor, a module."""


def from_torch(x: torch.Tensor, device: str = "cpu") -> Tensor:
    """A copy on the device, with the same strides where they can be kept."""
    x = x.detach().cpu()  # where there is a GPU, a few samples have operands on it
    if x.dtype not in DTYPES or x.layout is not torch.strided:
        raise Unconvertible(f"{x.dtype} {x.layout}")
    if x._is_zerotensor():
        x = torch.zeros(x.shape, dtype=x.dtype)
    x = x.resolve_neg()
    count = x.untyped_storage().nbytes() // x.element_size()
    memory = torch.as_strided(x, (count,), (1,), 0).clone()
    if x.dtype is torch.bfloat16:
        array = memory.view(torch.int16).numpy().view(dtypes.bfloat16.numpy)
    else:
        array = memory.numpy()
    whole = flame.from_numpy(array).to(device)
    offset = x.storage_offset()
    return flame.as_strided(whole, tuple(x.shape), x.stride(), offset).detach()


def to_flame(x: Any, device: str = "cpu") -> Any:
    """An argument of a sample as FLAME's, where PyTorch's is on the CPU."""
    if isinstance(x, torch.Tensor):
        made = from_torch(x, device)
        return made.requires_grad_() if x.requires_grad else made
    if isinstance(x, torch.dtype):
        if x not in DTYPES:
            raise Unconvertible(str(x))
        return DTYPES[x]
    if isinstance(x, torch.device) or (isinstance(x, str) and x == "cpu"):
        return device
    if isinstance(x, torch.memory_format):
        name = str(x).removeprefix("torch.")
        return getattr(flame, name, name)
    if isinstance(x, torch.Size):
        return tuple(x)
    if isinstance(x, (list, tuple)):
        return type(x)(to_flame(item, device) for item in x)
    if isinstance(x, dict):
        return {key: to_flame(value, device) for key, value in x.items()}
    if isinstance(x, (complex, torch.nn.Module)) or type(x).__module__.startswith("torch"):
        raise Unconvertible(type(x).__name__)
    return x


def tensors_in(x: Any) -> Iterator[Any]:
    """Tensors inside nested sequences, in order."""
    if isinstance(x, (Tensor, torch.Tensor)):
        yield x
    elif isinstance(x, (list, tuple)):
        for item in x:
            yield from tensors_in(item)
    elif isinstance(x, dict):
        for item in x.values():
            yield from tensors_in(item)


def values(x: Any) -> Array:
    """The values as an array; half-width floats as float32."""
    x = x.detach().cpu()
    if isinstance(x, Tensor):
        found: Array = (x.to(dtypes.float32) if x.dtype is dtypes.bfloat16 else x).numpy()
        return found
    if x._is_zerotensor():
        return np.zeros(tuple(x.shape), DTYPES[x.dtype].numpy)
    x = x.resolve_neg()
    return np.asarray((x.float() if x.dtype is torch.bfloat16 else x).numpy())


def compare(
    ours: Any, theirs: Any, label: str, *, with_values: bool = True,
    precision: torch.dtype | None = None, sums: bool = False,
) -> None:  # fmt: skip
    """Raise AssertionError where a result differs from PyTorch's.

    precision: the narrowest floating dtype of the arguments. sums: of many terms, so that errors
    are those of the largest.
    """
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, Tensor), f"{label}: a {type(ours).__name__}, not a tensor"
        if theirs.dtype not in DTYPES:
            raise Unconvertible(str(theirs.dtype))
        assert tuple(ours.shape) == tuple(theirs.shape), (
            f"{label}: shape {ours.shape}, expected {tuple(theirs.shape)}"
        )
        assert ours.dtype is DTYPES[theirs.dtype], f"{label}: {ours.dtype}, expected {theirs.dtype}"
        if with_values:
            want = values(theirs)
            relative, absolute = TOLERANCE.get(theirs.dtype, (0, 0))
            if theirs.is_floating_point() and precision is not None:
                relative, absolute = max(TOLERANCE[precision], (relative, absolute))
            # PyTorch rounds some sums of half-width floats after each step
            if (theirs.dtype in HALF or sums) and want.size:
                finite = np.abs(want[np.isfinite(want)])
                absolute *= max(1.0, float(finite.max(initial=0.0)))
            np.testing.assert_allclose(
                values(ours), want, rtol=relative, atol=absolute, err_msg=label
            )
        return
    if isinstance(theirs, (list, tuple)):
        assert isinstance(ours, (list, tuple)), f"{label}: a {type(ours).__name__}, not a sequence"
        assert len(ours) == len(theirs), f"{label}: {len(ours)} results, expected {len(theirs)}"
        for position, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            compare(a, b, f"{label} [{position}]", with_values=with_values, precision=precision)
        return
    if isinstance(theirs, torch.dtype):
        assert ours is DTYPES[theirs], label
    elif isinstance(theirs, float) and with_values:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=label)
    elif with_values:
        assert ours == theirs, f"{label}: {ours!r}, expected {theirs!r}"


def compare_gradients(
    ours: Any, theirs: Any, leaves: Sequence[Any], their_leaves: Sequence[Any], label: str,
    precision: torch.dtype | None,
) -> None:  # fmt: skip
    """Gradients of weighted sums of the results with respect to every leaf."""
    pairs = [
        (a, b) for a, b in zip(tensors_in(ours), tensors_in(theirs), strict=True)
        if b.requires_grad and b.dtype in DTYPES
    ]  # fmt: skip
    if not pairs:
        return
    weights = [
        torch.linspace(0.5, 1.5, b.numel(), dtype=b.dtype, device=b.device).reshape(b.shape)
        for _, b in pairs
    ]
    expected = torch.autograd.grad(
        [b for _, b in pairs], their_leaves, weights, retain_graph=True, allow_unused=True
    )
    for a, _ in pairs:
        assert a.requires_grad, f"{label}: the result does not require grad"
    found = flame.autograd.grad(
        [a for a, _ in pairs],
        leaves,
        [from_torch(w, str(a.device)) for w, (a, _) in zip(weights, pairs, strict=True)],
        retain_graph=True,  # a result may be compared with more than one answer
        allow_unused=True,
    )
    for position, (a, b, leaf) in enumerate(zip(found, expected, leaves, strict=True)):
        if b is None:
            assert a is None or not np.any(values(a)), f"{label}: gradient {position} is not None"
        elif a is None:
            assert not np.any(values(b)), f"{label}: no gradient {position}"
        else:
            assert a.device == leaf.device, f"{label}: gradient {position} is on {a.device}"
            compare(a, b, f"{label}: gradient {position}", precision=precision, sums=True)
