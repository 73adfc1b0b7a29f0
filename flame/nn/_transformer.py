"""The transformer encoder with PyTorch's parameter layout.

Source: Vaswani et al., "Attention Is All You Need", 2017; norm_first as in Xiong et al., "On Layer
Normalization in the
Transformer Architecture", 2020.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import flame.nn.functional as F
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError
from flame.nn._arguments import Device
from flame.nn._containers import ModuleList
from flame.nn._dropout import Dropout
from flame.nn._linear import Linear
from flame.nn._multihead_attention import MultiheadAttention
from flame.nn._normalization import LayerNorm
from flame.nn.module import Module
from flame.tensor import Tensor

__all__ = ["TransformerEncoder", "TransformerEncoderLayer"]

Activation = Callable[[Tensor], Tensor]


class TransformerEncoderLayer(Module):
    """Self-attention and a two-layer network, each with a residual connection, dropout and
    layer norm.

    (L, N, d_model) -> (L, N, d_model); with `batch_first` (N, L, d_model); without a batch (L,
    d_model).
    `norm_first` normalizes before each part instead of after the sum.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Device = None,
        dtype: DType | None = None,
    ) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(
            d_model,
            nhead,
            dropout=dropout,
            bias=bias,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        self.linear1 = Linear(d_model, dim_feedforward, bias=bias, device=device, dtype=dtype)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, bias=bias, device=device, dtype=dtype)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, device=device, dtype=dtype)
        self.norm2 = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, device=device, dtype=dtype)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)
        self.activation = _activation(activation) if isinstance(activation, str) else activation

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Encode one layer; masks as in MultiheadAttention."""

        def attend(x: Tensor) -> Tensor:
            output, _ = self.self_attn(
                x,
                x,
                x,
                attn_mask=src_mask,
                key_padding_mask=src_key_padding_mask,
                need_weights=False,
                is_causal=is_causal,
            )
            result: Tensor = self.dropout1(output)
            return result

        def feed_forward(x: Tensor) -> Tensor:
            hidden = self.dropout(self.activation(self.linear1(x)))
            result: Tensor = self.dropout2(self.linear2(hidden))
            return result

        x = src
        if self.norm_first:
            x = x + attend(self.norm1(x))
            return x + feed_forward(self.norm2(x))
        x = self.norm1(x + attend(x))
        output: Tensor = self.norm2(x + feed_forward(x))
        return output


class TransformerEncoder(Module):
    """`num_layers` copies of `encoder_layer` one after the other, then `norm` if given.

    `enable_nested_tensor` and `mask_check` steer a speed-up of PyTorch's and have no effect here.
    """

    def __init__(
        self,
        encoder_layer: TransformerEncoderLayer,
        num_layers: int,
        norm: Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__()
        self.layers = ModuleList(copy.deepcopy(encoder_layer) for _ in range(num_layers))
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Encode; masks as in MultiheadAttention. `is_causal` is a hint about `mask`."""
        x = src
        for layer in self.layers:
            x = layer(
                x,
                src_mask=mask,
                src_key_padding_mask=src_key_padding_mask,
                is_causal=bool(is_causal) and mask is not None,
            )
        return x if self.norm is None else self.norm(x)


def _activation(name: str) -> Activation:
    if name == "relu":
        return F.relu
    if name == "gelu":
        return F.gelu
    raise ArgumentError(
        f"TransformerEncoderLayer: activation must be 'relu', 'gelu' or a function, got {name!r}"
    )
