"""What optimizers need from the layers below, gathered in one place.

Everything an optimizer computes goes through these names and the operators of Tensor, so an update
can be traced into a kernel wherever they can.
"""

from __future__ import annotations

from flame.autograd.mode import enable_grad, no_grad
from flame.core.dtypes import float32, float64
from flame.creation import tensor
from flame.ops.comparison import maximum, where
from flame.ops.creation import full, full_like, zeros_like
from flame.ops.mathematics import sign, sqrt
from flame.ops.pointwise import pointwise
from flame.tensor import Tensor

__all__ = [
    "Tensor",
    "enable_grad",
    "float32",
    "float64",
    "full",
    "full_like",
    "maximum",
    "no_grad",
    "pointwise",
    "sign",
    "sqrt",
    "tensor",
    "where",
    "zeros_like",
]
