"""Convolutions and their gradients in one, two and three dimensions.

`functions` checks what users give; `operation` declares the three ops and chooses their kernels;
`geometry` is their arithmetic. `winograd` and `winograd_gradient` are for 3 x 3 kernels with
strides 1 and 2 in float32, `pointwise` and `pointwise_gradient` for 1 x 1 kernels, `depthwise` for
groups of few channels; `packing`, `contraction` and `weight_gradient` are direct sums for the rest.
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
