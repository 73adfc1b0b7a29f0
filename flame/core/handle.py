"""Handle: what operations work on, as far as they need to know. Tensor derives from it.

Invariant: it stands below the ops, so that an op can tell a tensor from a number without knowing
the class that users see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flame.core.types import TensorType

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from flame.tensor import Tensor


class Handle:
    """Typed, strided memory: ``storage`` holds it, ``pointer`` is where the first element lies."""

    storage: Any
    pointer: int
    type: TensorType


def is_tensor(obj: Any) -> TypeIs[Tensor]:
    """Whether ``obj`` is a FLAME tensor."""
    return isinstance(obj, Handle)
