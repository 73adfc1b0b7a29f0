"""Named results of ops that give values and the places they came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from flame.tensor import Tensor


class ValuesIndices(NamedTuple):
    """What sort, topk, max over a dimension and their kin return."""

    values: Tensor
    indices: Tensor
