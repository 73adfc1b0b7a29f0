"""Convolutions and their gradients in one, two and three dimensions.

`functions` checks what users give; `operation` declares the three ops; `geometry` is their
arithmetic; `packing`, `contraction` and `weight_gradient` are their kernels.
"""

from flame.ops.convolution.functions import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)

__all__ = [
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
]
