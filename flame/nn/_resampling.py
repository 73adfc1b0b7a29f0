"""Layers that change the size of images: Upsample, PixelShuffle, PixelUnshuffle. They have no
parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import flame.nn.functional as F
from flame.nn._arguments import Size
from flame.nn.module import Module
from flame.tensor import Tensor

__all__ = ["PixelShuffle", "PixelUnshuffle", "Upsample"]


class Upsample(Module):
    """Resizes (N, C, ...) to `size`, or by `scale_factor`: mode 'nearest', 'linear',
    'bilinear', ...
    """

    def __init__(
        self,
        size: Size | None = None,
        scale_factor: float | Sequence[float] | None = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.scale_factor: float | tuple[float, ...] | None
        if scale_factor is None:
            self.scale_factor = None
        elif isinstance(scale_factor, int | float):
            self.scale_factor = float(scale_factor)
        else:
            self.scale_factor = tuple(float(factor) for factor in scale_factor)
        self.mode = mode
        self.align_corners = align_corners
        self.recompute_scale_factor = recompute_scale_factor

    def forward(self, input: Tensor) -> Tensor:
        return F.interpolate(
            input,
            self.size,
            self.scale_factor,
            self.mode,
            self.align_corners,
            self.recompute_scale_factor,
        )

    def extra_repr(self) -> str:
        target = (
            f"size={self.size}"
            if self.scale_factor is None
            else f"scale_factor={self.scale_factor}"
        )
        return f"{target}, mode={self.mode!r}"


class PixelShuffle(Module):
    """(N, C·r², H, W) -> (N, C, H·r, W·r) with r = `upscale_factor`.

    Source: Shi et al., "Real-Time Single Image and Video Super-Resolution", 2016.
    """

    def __init__(self, upscale_factor: int) -> None:
        super().__init__()
        self.upscale_factor = upscale_factor

    def forward(self, input: Tensor) -> Tensor:
        return F.pixel_shuffle(input, self.upscale_factor)

    def extra_repr(self) -> str:
        return f"upscale_factor={self.upscale_factor}"


class PixelUnshuffle(Module):
    """(N, C, H·r, W·r) -> (N, C·r², H, W) with r = `downscale_factor`: the inverse of
    PixelShuffle.
    """

    def __init__(self, downscale_factor: int) -> None:
        super().__init__()
        self.downscale_factor = downscale_factor

    def forward(self, input: Tensor) -> Tensor:
        return F.pixel_unshuffle(input, self.downscale_factor)

    def extra_repr(self) -> str:
        return f"downscale_factor={self.downscale_factor}"
