"""The text of a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flame.core import dtypes

if TYPE_CHECKING:
    from flame.tensor import Tensor


def text_of(tensor: Tensor) -> str:
    """Values, then dtype and what autograd knows where they are not the default."""
    array = tensor.detach().cpu().numpy()
    if tensor.dtype is dtypes.bfloat16:
        array = array.astype(np.float32)
    values = np.array2string(
        array, separator=", ", precision=4, threshold=1000, edgeitems=3, prefix="tensor("
    )
    notes = []
    if tensor.numel() == 0 and tensor.shape != (0,):
        notes.append(f"size={tuple(tensor.shape)}")
    if tensor.dtype not in (dtypes.get_default_dtype(), dtypes.int64, dtypes.bool_):
        notes.append(f"dtype={tensor.dtype!r}")
    if tensor.is_cuda:
        notes.append(f"device={str(tensor.device)!r}")
    if tensor.grad_fn is not None:
        notes.append(f"grad_fn={tensor.grad_fn!r}")
    elif tensor.requires_grad:
        notes.append("requires_grad=True")
    return f"tensor({', '.join([values, *notes])})"
