"""Parameter: a tensor that a Module registers by itself when it becomes one of its attributes.

A parameter is a leaf: it shares the memory of the tensor it was made from, but none of its history.
"""

from __future__ import annotations

from flame.core.errors import DTypeError
from flame.tensor import Tensor

__all__ = ["Parameter"]


class Parameter(Tensor):
    """A tensor that is trained.

    Args:
        data: the tensor whose memory the parameter shares; None is an empty one.
        requires_grad: whether gradients are accumulated into `grad`.
    """

    def __init__(self, data: Tensor | None = None, requires_grad: bool = True) -> None:
        if data is None:
            super().__init__()
        elif isinstance(data, Tensor):
            self.storage, self.pointer, self.type = data.storage, data.pointer, data.type
        else:
            raise DTypeError(
                f"Parameter: takes a flame.Tensor, got {type(data).__name__}; "
                "make one by flame.tensor"
            )
        self.requires_grad_(requires_grad)

    def __repr__(self) -> str:
        return "Parameter containing:\n" + super().__repr__()
