"""Multi-head attention with PyTorch's parameter layout.

With one embedding size for queries, keys and values the three projections are stacked in
`in_proj_weight` (3E, E);
else they are `q_proj_weight` (E, E), `k_proj_weight` (E, kdim) and `v_proj_weight` (E, vdim).
Source: Vaswani et al., "Attention Is All You Need", 2017.
"""

from __future__ import annotations

import math

import flame
import flame.nn.functional as F
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError, ShapeError
from flame.nn import init
from flame.nn._arguments import Device
from flame.nn._linear import Linear
from flame.nn._pieces import chunks
from flame.nn.module import Module
from flame.nn.parameter import Parameter
from flame.tensor import Tensor

__all__ = ["MultiheadAttention", "additive_mask"]


class MultiheadAttention(Module):
    """softmax(q kᵀ / sqrt(E / heads)) v in `num_heads` slices of the embedding, between linear
    projections.

    query (L, N, E), key (S, N, kdim), value (S, N, vdim) -> output (L, N, E); with
    `batch_first` (N, L, E) and so on;
    without a batch (L, E).
    """

    in_proj_weight: Parameter | None
    q_proj_weight: Parameter | None
    k_proj_weight: Parameter | None
    v_proj_weight: Parameter | None
    in_proj_bias: Parameter | None
    bias_k: Parameter | None
    bias_v: Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Device = None,
        dtype: DType | None = None,
    ) -> None:
        super().__init__()
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ArgumentError(
                f"MultiheadAttention: embed_dim={embed_dim} must be a positive multiple of "
                f"num_heads={num_heads}"
            )
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn

        def parameter(*shape: int) -> Parameter:
            return Parameter(flame.empty(shape, device=device, dtype=dtype))

        same_size = self.kdim == embed_dim and self.vdim == embed_dim
        if same_size:
            self.in_proj_weight = parameter(3 * embed_dim, embed_dim)
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.q_proj_weight = parameter(embed_dim, embed_dim)
            self.k_proj_weight = parameter(embed_dim, self.kdim)
            self.v_proj_weight = parameter(embed_dim, self.vdim)
            self.register_parameter("in_proj_weight", None)
        self.register_parameter("in_proj_bias", parameter(3 * embed_dim) if bias else None)
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.register_parameter("bias_k", parameter(1, 1, embed_dim) if add_bias_kv else None)
        self.register_parameter("bias_v", parameter(1, 1, embed_dim) if add_bias_kv else None)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for weight in (
            self.in_proj_weight,
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
        ):
            if weight is not None:
                init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            init.zeros_(self.in_proj_bias)
        if self.out_proj.bias is not None:
            init.zeros_(self.out_proj.bias)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                init.xavier_normal_(extra)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; returns the output, and the weights (N, L, S) if `need_weights`, else None.

        Args:
            query, key, value: see the class.
            key_padding_mask: (N, S), True (or -inf, added) where a key must not be attended to.
            need_weights: whether to return the attention weights; without them the fused attention
                is used.
            attn_mask: (L, S) or (N * num_heads, L, S), True (or a number that is added) as above.
            average_attn_weights: return the mean of the weights over heads, else (N, num_heads, L,
                S).
            is_causal: says that `attn_mask` is the causal mask; it must be given all the same.

        Raises:
            ShapeError: sizes that do not go together.
        """
        if is_causal and attn_mask is None:
            raise ArgumentError(
                "MultiheadAttention: is_causal=True is a hint about attn_mask; give the mask "
                "itself too"
            )
        batched = query.ndim == 3
        self._check(query, key, value, batched=batched)
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            same_key, same_value = key is query, value is key
            query = query.transpose(0, 1)
            # Keep self-attention recognizable, so that its projections stay one product.
            key = query if same_key else key.transpose(0, 1)
            value = key if same_value else value.transpose(0, 1)
        output, weights = self._attend(
            query, key, value, key_padding_mask, attn_mask, need_weights=need_weights
        )
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor, *, batched: bool) -> None:
        shapes = [tuple(t.shape) for t in (query, key, value)]
        sizes = (self.embed_dim, self.kdim, self.vdim)
        batch = (0 if self.batch_first else 1) if batched else None
        length = (1 if self.batch_first else 0) if batched else 0
        fits = (
            query.ndim in (2, 3)
            and all(len(shape) == query.ndim for shape in shapes)
            and all(shape[-1] == size for shape, size in zip(shapes, sizes, strict=True))
            and shapes[1][length] == shapes[2][length]
            and (batch is None or len({shape[batch] for shape in shapes}) == 1)
        )
        if not fits:
            order = (
                "(N, L, E), (N, S, {}), (N, S, {})"
                if self.batch_first
                else "(L, N, E), (S, N, {}), (S, N, {})"
            )
            raise ShapeError(
                f"MultiheadAttention(embed_dim={self.embed_dim}, num_heads={self.num_heads}): "
                "expected query, "
                f"key and value of shapes {order.format(self.kdim, self.vdim)} with "
                f"E={self.embed_dim}, "
                f"got {shapes[0]}, {shapes[1]} and {shapes[2]}"
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three linear projections, as one product where they have the same input."""
        size = self.embed_dim
        bias = self.in_proj_bias
        weight = self.in_proj_weight
        if weight is not None and query is key and key is value:
            q, k, v = chunks(F.linear(query, weight, bias), 3, dim=-1)
            return q, k, v
        weights: list[Tensor | None] = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        if weight is not None:
            weights = [weight[i * size : (i + 1) * size] for i in range(3)]
        biases = [None if bias is None else bias[i * size : (i + 1) * size] for i in range(3)]
        q, k, v = (
            F.linear(source, w, b)
            for source, w, b in zip((query, key, value), weights, biases, strict=True)
            if w is not None
        )
        return q, k, v

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        *,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """All tensors batch first: (N, L, E), (N, S, kdim), (N, S, vdim)."""
        batch, length, _ = query.shape
        q, k, v = self._project(query, key, value)
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = flame.cat([k, self.bias_k.expand(batch, 1, -1)], dim=1)
            v = flame.cat([v, self.bias_v.expand(batch, 1, -1)], dim=1)
            extra += 1
        if self.add_zero_attn:
            zeros = flame.zeros((batch, 1, self.embed_dim), dtype=k.dtype, device=k.device)
            k, v = flame.cat([k, zeros], dim=1), flame.cat([v, zeros], dim=1)
            extra += 1
        mask = self._mask(attn_mask, key_padding_mask, q, key_length=key.shape[1], extra=extra)

        def heads(tensor: Tensor) -> Tensor:  # (N, L, E) -> (N, heads, L, E / heads)
            return tensor.reshape(batch, -1, self.num_heads, self.head_dim).transpose(1, 2)

        q, k, v = heads(q), heads(k), heads(v)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * (1.0 / math.sqrt(self.head_dim))) @ k.transpose(-2, -1)
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            if dropout > 0.0:
                weights = F.dropout(weights, dropout)
            result = weights @ v
        else:
            result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        result = result.transpose(1, 2).reshape(batch, length, self.embed_dim)
        return self.out_proj(result), weights

    def _mask(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        like: Tensor,
        *,
        key_length: int,
        extra: int,
    ) -> Tensor | None:
        """Both masks as one that is added to the scores (N or 1, heads or 1, L or 1, S + extra)."""
        batch, length, _ = like.shape
        mask: Tensor | None = None
        if attn_mask is not None:
            shape = tuple(attn_mask.shape)
            if shape not in ((length, key_length), (batch * self.num_heads, length, key_length)):
                raise ShapeError(
                    f"MultiheadAttention: attn_mask must be {(length, key_length)} or "
                    f"{(batch * self.num_heads, length, key_length)}, got {shape}"
                )
            mask = additive_mask(attn_mask, like.dtype)
            if mask.ndim == 3:
                mask = mask.reshape(batch, self.num_heads, length, key_length)
            else:
                mask = mask.reshape(1, 1, length, key_length)
        if key_padding_mask is not None:
            if tuple(key_padding_mask.shape) != (batch, key_length):
                raise ShapeError(
                    f"MultiheadAttention: key_padding_mask must be {(batch, key_length)}, "
                    f"got {tuple(key_padding_mask.shape)}"
                )
            padding = additive_mask(key_padding_mask, like.dtype)
            padding = padding.reshape(batch, 1, 1, key_length)
            mask = padding if mask is None else mask + padding
        # Keys that the module itself has added are always visible.
        return mask if mask is None or extra == 0 else F.pad(mask, (0, extra))


def additive_mask(mask: Tensor, dtype: DType) -> Tensor:
    """A mask that is added to scores: -inf where a boolean mask is True, and 0 elsewhere."""
    if mask.is_floating_point():
        result: Tensor = mask.to(dtype)
        return result
    if mask.dtype is not flame.bool:
        raise DTypeError(
            f"MultiheadAttention: a mask must be boolean or floating, got {mask.dtype}; "
            "convert it by mask.bool()"
        )
    zeros = flame.zeros(tuple(mask.shape), dtype=dtype, device=mask.device)
    hidden: Tensor = zeros.masked_fill(mask, -math.inf)
    return hidden
