"""Parameter: a tensor that a Module registers by itself when it becomes one of its attributes.

A parameter is always a leaf: it owns its data's storage handle and has no history, so that an
optimizer may update it in place.
"""

from __future__ import annotations

from flame.tensor import Tensor

__all__ = ["Parameter"]


class Parameter(Tensor):
    """A tensor that is trained.

    Args:
        data: the tensor whose storage the parameter shares; its history is cut.
        requires_grad: whether gradients are computed for it.
    """
