"""Embedding: rows of a table by index."""

from __future__ import annotations

import flame
import flame.nn.functional as F
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, ShapeError, UnsupportedError
from flame.nn import init
from flame.nn._arguments import Device
from flame.nn.module import Module
from flame.nn.parameter import Parameter
from flame.tensor import Tensor

__all__ = ["Embedding"]


class Embedding(Module):
    """Rows of `weight` (num_embeddings, embedding_dim): indices (...) -> (..., embedding_dim).

    The row `padding_idx` starts at zero and gets no gradient. Rows start normal with mean 0 and
    deviation 1.
    """

    weight: Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Device = None,
        dtype: DType | None = None,
    ) -> None:
        super().__init__()
        if max_norm is not None or scale_grad_by_freq or sparse:
            raise UnsupportedError(
                "Embedding: max_norm, scale_grad_by_freq and sparse gradients do not exist here; "
                "clip or scale the rows of `weight` after the optimizer's step"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = _checked_padding(padding_idx, num_embeddings)
        shape = (num_embeddings, embedding_dim)
        if _weight is None:
            table = flame.empty(shape, device=device, dtype=dtype)
            self.weight = Parameter(table, requires_grad=not _freeze)
            self.reset_parameters()
        elif tuple(_weight.shape) == shape:
            self.weight = Parameter(_weight, requires_grad=not _freeze)
        else:
            raise ShapeError(
                f"Embedding: weight must be (num_embeddings, embedding_dim) = {shape}, "
                f"got {tuple(_weight.shape)}"
            )

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, padding_idx: int | None = None
    ) -> Embedding:
        """An embedding with the given table (num_embeddings, embedding_dim), trained only
        if not `freeze`.
        """
        if embeddings.ndim != 2:
            raise ShapeError(
                f"Embedding.from_pretrained: takes a matrix, got shape {tuple(embeddings.shape)}"
            )
        rows, columns = embeddings.shape
        return cls(rows, columns, padding_idx, _weight=embeddings, _freeze=freeze)

    def reset_parameters(self) -> None:
        """Draw new rows; the padding row is zero."""
        init.normal_(self.weight)
        if self.padding_idx is not None:
            with flame.no_grad():
                self.weight[self.padding_idx].zero_()

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight, padding_idx=self.padding_idx)

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        return text if self.padding_idx is None else f"{text}, padding_idx={self.padding_idx}"


def _checked_padding(padding_idx: int | None, count: int) -> int | None:
    if padding_idx is None:
        return None
    if not -count <= padding_idx < count:
        raise ArgumentError(
            f"Embedding: padding_idx={padding_idx} is out of range for {count} rows"
        )
    return padding_idx % count
