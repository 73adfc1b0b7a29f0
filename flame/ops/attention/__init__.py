"""Scaled dot-product attention.

`functions` is what users call; `operation` declares the ops; `forward` and `backward` are their
kernels, made of the register tiles in `tiles`; `dropping` draws in them, `masked_softmax` serves
dropout on the CPU, which has all probabilities in memory. `packed` is for sequences of several
lengths: `packed_operation` declares its ops, `packing` pads where no kernel reads such sequences.
"""

from flame.ops.attention.functions import (
    scaled_dot_product_attention as scaled_dot_product_attention,
)

__all__: list[str] = []
