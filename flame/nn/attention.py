"""Functions of attention beside `flame.nn.functional.scaled_dot_product_attention`."""

from flame.ops.attention.packed import varlen_attn

__all__ = ["varlen_attn"]
