"""Changes of spatial size: interpolation, shuffles of channels into space, sliding blocks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flame.core import dtypes
from flame.core.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError
from flame.core.handle import is_tensor
from flame.core.types import Shape
from flame.ops.autocast import autocasts
from flame.ops.bands import Band, identity
from flame.ops.conversion import convert
from flame.ops.convolution.arguments import per_dimension
from flame.ops.resampling import apply
from flame.ops.shapes import permute, reshape, squeeze, unsqueeze
from flame.ops.sliding import add_blocks, block_counts, cut_blocks

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = ["pixel_shuffle", "pixel_unshuffle"]

_RANKS = {"nearest": (1, 2, 3), "nearest-exact": (1, 2, 3), "linear": (1,), "bilinear": (2,),
          "bicubic": (2,), "trilinear": (3,), "area": (1, 2, 3)}  # fmt: skip


# --- interpolation --------------------------------------------------------------------------------


def interpolate(
    input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: bool | None = None, recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:  # fmt: skip
    """(N, C, ...) with 1 to 3 spatial dimensions, resampled to ``size`` or by ``scale_factor``.

    mode: 'nearest', 'nearest-exact', 'linear', 'bilinear', 'bicubic', 'trilinear', 'area'.
    align_corners: the corner elements' centres stay in place (linear and cubic modes).
    recompute_scale_factor: positions follow from the resulting size, not from ``scale_factor``.
    Raises ShapeError and ArgumentError where mode, rank and sizes do not fit.
    """
    _check_mode(input, mode, align_corners, antialias=antialias)
    rank = input.ndim - 2
    sizes, scales = _sizes(input, size, scale_factor, recompute=bool(recompute_scale_factor))
    if input.dtype.kind != "f" and not mode.startswith("nearest"):
        raise DTypeError(
            f"interpolate: mode {mode!r} needs floating numbers, got {input.dtype.name}"
        )
    if mode == "area":
        from flame.ops import pooling

        pool = (
            pooling.adaptive_avg_pool1d,
            pooling.adaptive_avg_pool2d,
            pooling.adaptive_avg_pool3d,
        )
        return pool[rank - 1](input, sizes)
    return _resampled(input, mode, sizes, scales, align_corners=bool(align_corners))


@autocasts("float32")
def _resampled(
    input: Tensor, mode: str, sizes: Shape, scales: tuple[float | None, ...], *,
    align_corners: bool,
) -> Tensor:  # fmt: skip
    wide = input.dtype.itemsize == 8
    axes = tuple(
        _band(mode, n, o, scale, align=align_corners, wide=wide)
        for n, o, scale in zip(input.shape[2:], sizes, scales, strict=True)
    )
    result: Tensor = apply(input, axes)
    return result


def _check_mode(input: Any, mode: str, align_corners: bool | None, *, antialias: bool) -> None:
    if not is_tensor(input):
        raise DTypeError(f"interpolate takes a tensor, got {type(input).__name__}")
    if mode not in _RANKS:
        raise ArgumentError(f"interpolate: mode must be one of {tuple(_RANKS)}, got {mode!r}")
    if input.ndim - 2 not in _RANKS[mode]:
        ranks = " or ".join(str(r + 2) for r in _RANKS[mode])
        raise ShapeError(
            f"interpolate: mode {mode!r} takes inputs of {ranks} dimensions, got {input.shape}"
        )
    if align_corners is not None and not mode.endswith(("linear", "cubic")):
        raise ArgumentError(f"interpolate: align_corners has no meaning for mode {mode!r}")
    if antialias:
        raise UnsupportedError(
            "interpolate: antialias=True is not there; use mode='area' to shrink"
        )
    if 0 in input.shape[1:]:
        raise ShapeError(f"interpolate: {input.shape} has no elements to take positions from")


def _sizes(
    input: Tensor, size: Any, scale_factor: Any, *, recompute: bool
) -> tuple[Shape, tuple[float | None, ...]]:
    """(output sizes, scales to use for positions; None means the ratio of the sizes)."""
    rank = input.ndim - 2
    if (size is None) == (scale_factor is None):
        raise ArgumentError("interpolate: give either size or scale_factor")
    if size is not None:
        if recompute:
            raise ArgumentError("interpolate: recompute_scale_factor goes with scale_factor only")
        sizes = per_dimension("interpolate", "size", size, rank, 1)
        return sizes, (None,) * rank
    given = list(scale_factor) if isinstance(scale_factor, (tuple, list)) else [scale_factor] * rank
    if len(given) != rank:
        raise ShapeError(f"interpolate: scale_factor {scale_factor!r} must have {rank} numbers")
    factors = tuple(float(f) for f in given)
    sizes = tuple(math.floor(n * f) for n, f in zip(input.shape[2:], factors, strict=True))
    if any(s < 1 for s in sizes):
        raise ArgumentError(
            f"interpolate: scale_factor {scale_factor!r} leaves nothing of {input.shape}"
        )
    return sizes, (None,) * rank if recompute else factors


def _band(
    mode: str, inputs: int, outputs: int, scale: float | None, *, align: bool, wide: bool
) -> Band:
    ratio = 1.0 / scale if scale is not None and scale > 0 else inputs / outputs
    if mode.startswith("nearest"):
        if inputs == outputs:
            return identity(inputs)
        if outputs == 2 * inputs:
            ratio = 0.5
        return Band("nearest", inputs, outputs, (ratio, 0.5 if mode == "nearest-exact" else 0.0))
    if align:
        ratio = (inputs - 1) / (outputs - 1) if outputs > 1 else 0.0
    kind = "cubic" if mode == "bicubic" else "linear"
    return Band(kind, inputs, outputs, (ratio, float(align)), wide)


def upsample(
    input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: bool | None = None,
) -> Tensor:  # fmt: skip
    """As `interpolate`."""
    return interpolate(input, size, scale_factor, mode, align_corners)


def upsample_nearest(input: Tensor, size: Any = None, scale_factor: Any = None) -> Tensor:
    """As `interpolate` with mode 'nearest'."""
    return interpolate(input, size, scale_factor, "nearest")


def upsample_bilinear(input: Tensor, size: Any = None, scale_factor: Any = None) -> Tensor:
    """As `interpolate` with mode 'bilinear' and aligned corners."""
    return interpolate(input, size, scale_factor, "bilinear", True)


# --- shuffles -------------------------------------------------------------------------------------


def _factor(name: str, factor: Any) -> int:
    if not isinstance(factor, int) or factor < 1:
        raise ArgumentError(f"{name}: the factor must be a positive integer, got {factor!r}")
    return factor


def pixel_shuffle(input: Tensor, upscale_factor: int) -> Tensor:
    """(..., C * r * r, H, W) to (..., C, H * r, W * r)."""
    r = _factor("pixel_shuffle", upscale_factor)
    if input.ndim < 3 or input.shape[-3] % (r * r):
        raise ShapeError(
            f"pixel_shuffle: {input.shape} needs three dimensions, its channels divisible by "
            f"{r * r}"
        )
    *batch, c, h, w = input.shape
    lead = len(batch)
    x = reshape(input, (*batch, c // (r * r), r, r, h, w))
    order = (*range(lead), *(lead + i for i in (0, 3, 1, 4, 2)))
    return reshape(permute(x, order), (*batch, c // (r * r), h * r, w * r))


def pixel_unshuffle(input: Tensor, downscale_factor: int) -> Tensor:
    """(..., C, H * r, W * r) to (..., C * r * r, H, W); undoes `pixel_shuffle`."""
    r = _factor("pixel_unshuffle", downscale_factor)
    if input.ndim < 3 or input.shape[-1] % r or input.shape[-2] % r:
        raise ShapeError(
            f"pixel_unshuffle: {input.shape} needs three dimensions, height and width divisible "
            f"by {r}"
        )
    *batch, c, h, w = input.shape
    lead = len(batch)
    x = reshape(input, (*batch, c, h // r, r, w // r, r))
    order = (*range(lead), *(lead + i for i in (0, 2, 4, 1, 3)))
    return reshape(permute(x, order), (*batch, c * r * r, h // r, w // r))


# --- sliding blocks -------------------------------------------------------------------------------


def _form(
    name: str, kernel_size: Any, dilation: Any, padding: Any, stride: Any
) -> tuple[Shape, dict[str, Shape]]:
    """(kernel, the other sizes) for two spatial dimensions."""
    return per_dimension(name, "kernel_size", kernel_size, 2, 1), {
        "stride": per_dimension(name, "stride", stride, 2, 1),
        "padding": per_dimension(name, "padding", padding, 2, 0),
        "dilation": per_dimension(name, "dilation", dilation, 2, 1),
    }


def unfold(
    input: Tensor, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Tensor:
    """The sliding blocks of (N, C, H, W) as columns: (N, C * KH * KW, blocks); N is optional."""
    if input.ndim not in (3, 4) or 0 in input.shape[-3:]:
        raise ShapeError(f"unfold takes (N, C, H, W) or (C, H, W), got {input.shape}")
    kernel, form = _form("unfold", kernel_size, dilation, padding, stride)
    if input.dtype.kind == "b":
        bytes_ = convert(input, dtype=dtypes.uint8)
        columns = unfold(bytes_, kernel_size, dilation, padding, stride)
        return convert(columns, dtype=input.dtype)
    x = input if input.ndim == 4 else unsqueeze(input, 0)
    blocks = cut_blocks(x, kernel=kernel, **form)
    n, c, kh, kw, down, across = blocks.shape
    result = reshape(blocks, (n, c * kh * kw, down * across))
    return result if input.ndim == 4 else squeeze(result, 0)


def fold(
    input: Tensor, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0,
    stride: Any = 1,
) -> Tensor:  # fmt: skip
    """The transpose of `unfold`: blocks (N, C * KH * KW, blocks) added up to (N, C, H, W)."""
    if input.ndim not in (2, 3):
        raise ShapeError(f"fold takes (N, C * KH * KW, blocks) or without N, got {input.shape}")
    x = input if input.ndim == 3 else unsqueeze(input, 0)
    size = per_dimension("fold", "output_size", output_size, 2, 1)
    kernel, form = _form("fold", kernel_size, dilation, padding, stride)
    down, across = block_counts(size, kernel, **form)
    area = kernel[0] * kernel[1]
    if x.shape[1] % area or x.shape[2] != down * across:
        raise ShapeError(
            f"fold: {input.shape} must have a multiple of {area} rows and {down * across} blocks "
            f"for output {size}, kernel {kernel}"
        )
    blocks = reshape(x, (x.shape[0], x.shape[1] // area, *kernel, down, across))
    result: Tensor = add_blocks(blocks, size=size, **form)
    return result if input.ndim == 3 else squeeze(result, 0)
