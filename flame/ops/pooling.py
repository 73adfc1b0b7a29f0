"""Pooling over windows: the largest element, the mean, the p-norm; adaptive windows; unpooling.

Inputs are (N, C, ...) or, without a batch, (C, ...). Means are maps of `flame.ops.bands`, one
dimension after the other in one kernel; maxima are `flame.ops.planes`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.core import dtypes
from flame.core.errors import ArgumentError, DTypeError, ShapeError
from flame.core.handle import is_tensor
from flame.core.types import Shape
from flame.ops.bands import Band, table
from flame.ops.conversion import convert
from flame.ops.convolution.arguments import per_dimension
from flame.ops.op import constant
from flame.ops.planes import Windows, max_pool
from flame.ops.reductions import mean
from flame.ops.resampling import apply, resample
from flame.ops.shapes import reshape, squeeze, unsqueeze

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_max_pool1d",
    "avg_pool1d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
]


# --- arguments ------------------------------------------------------------------------------------


def _batched(name: str, input: Tensor, rank: int) -> tuple[Tensor, bool]:
    """(N, C, ...) and whether it was so. Raises ShapeError for other ranks and empty dimensions."""
    if not is_tensor(input):
        raise DTypeError(f"{name} takes a tensor, got {type(input).__name__}")
    if input.ndim not in (rank + 1, rank + 2) or 0 in input.shape[-rank - 1 :]:
        raise ShapeError(
            f"{name} takes (N, C, ...) or (C, ...) with {rank} spatial dimensions that are not "
            f"empty, got {input.shape}"
        )
    return (input, True) if input.ndim == rank + 2 else (unsqueeze(input, 0), False)


def _windows(
    name: str, input: Tensor, rank: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any,
    *, ceil_mode: bool,
) -> tuple[Shape, Shape, Shape, Shape, Shape]:  # fmt: skip
    """(kernel, stride, padding, dilation, output sizes) for each spatial dimension."""
    kernel = per_dimension(name, "kernel_size", kernel_size, rank, 1)
    given = stride is not None and stride != () and stride != []
    steps = per_dimension(name, "stride", stride, rank, 1) if given else kernel
    pads = per_dimension(name, "padding", padding, rank, 0)
    spread = per_dimension(name, "dilation", dilation, rank, 1)
    sizes = []
    for n, k, s, p, d in zip(input.shape[-rank:], kernel, steps, pads, spread, strict=True):
        reach = d * (k - 1) + 1
        if 2 * p > reach:
            raise ArgumentError(
                f"{name}: padding {pads} is more than half of the kernel {kernel} with dilation "
                f"{spread}"
            )
        room = n + 2 * p - reach
        size = (room + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (size - 1) * s >= n + p:
            size -= 1  # a window must not begin in the padding behind the input
        if room < 0 and size < 1:
            raise ShapeError(
                f"{name}: a kernel {kernel} with dilation {spread} does not fit into the input "
                f"{input.shape} padded by {pads}"
            )
        sizes.append(size)
    return kernel, steps, pads, spread, tuple(sizes)


def _output_sizes(name: str, output_size: Any, input: Tensor, rank: int) -> Shape:
    """The wanted sizes; None keeps a dimension as it is."""
    given = list(output_size) if isinstance(output_size, (tuple, list)) else [output_size] * rank
    if len(given) == 1:
        given = given * rank
    if len(given) != rank:
        raise ShapeError(f"{name}: output_size {output_size!r} must have {rank} numbers")
    kept = [n if o is None else o for o, n in zip(given, input.shape[-rank:], strict=True)]
    return per_dimension(name, "output_size", kept, rank, 0)


# --- maxima ---------------------------------------------------------------------------------------


def _largest(input: Tensor, batched: bool, axes: tuple[Windows, ...], return_indices: bool) -> Any:
    if input.dtype.kind == "b":
        raise DTypeError("max pooling is not defined for bool tensors; convert them")
    values, index = max_pool(input, axes=axes)
    if not batched:
        values, index = squeeze(values, 0), squeeze(index, 0)
    return (values, convert(index, dtype=dtypes.int64)) if return_indices else values


def _max_pool(
    name: str, rank: int, input: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any,
    *, ceil_mode: bool, return_indices: bool,
) -> Any:  # fmt: skip
    x, batched = _batched(name, input, rank)
    found = _windows(name, x, rank, kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)
    axes = tuple(
        Windows(n, o, k, s, p, d) for n, k, s, p, d, o in zip(x.shape[2:], *found, strict=True)
    )
    return _largest(x, batched, axes, return_indices)


def max_pool1d(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    """The largest element of each window over L of (N, C, L); NaN wins. See `max_pool2d`."""
    return _max_pool(
        "max_pool1d", 1, input, kernel_size, stride, padding, dilation,
        ceil_mode=ceil_mode, return_indices=return_indices,
    )  # fmt: skip


def max_pool2d(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    """The largest element of each window over H, W of (N, C, H, W); NaN wins.

    ``stride`` is the kernel by default; padding never wins. With ``return_indices`` also the
    positions in the flattened H * W, int64. Raises ShapeError and ArgumentError where windows do
    not fit.
    """
    return _max_pool(
        "max_pool2d", 2, input, kernel_size, stride, padding, dilation,
        ceil_mode=ceil_mode, return_indices=return_indices,
    )  # fmt: skip


def max_pool3d(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    """The largest element of each window over D, H, W of (N, C, D, H, W); see `max_pool2d`."""
    return _max_pool(
        "max_pool3d", 3, input, kernel_size, stride, padding, dilation,
        ceil_mode=ceil_mode, return_indices=return_indices,
    )  # fmt: skip


def _adaptive_max(
    name: str, rank: int, input: Tensor, output_size: Any, return_indices: bool
) -> Any:
    x, batched = _batched(name, input, rank)
    sizes = _output_sizes(name, output_size, x, rank)
    axes = tuple(_even(n, o) for n, o in zip(x.shape[2:], sizes, strict=True))
    return _largest(x, batched, axes, return_indices)


def _even(inputs: int, outputs: int) -> Windows:
    """Adaptive windows, as windows of equal size where they are."""
    if outputs and inputs % outputs == 0:
        return Windows(inputs, outputs, inputs // outputs, inputs // outputs)
    return Windows(inputs, outputs)


def adaptive_max_pool1d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """The largest elements of ``output_size`` even windows over L of (N, C, L)."""
    return _adaptive_max("adaptive_max_pool1d", 1, input, output_size, return_indices)


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """The largest elements of even windows over H, W of (N, C, H, W); None keeps a dimension."""
    return _adaptive_max("adaptive_max_pool2d", 2, input, output_size, return_indices)


def adaptive_max_pool3d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """The largest elements of even windows over D, H, W of (N, C, D, H, W)."""
    return _adaptive_max("adaptive_max_pool3d", 3, input, output_size, return_indices)


# --- means ----------------------------------------------------------------------------------------


def _floating(name: str, input: Tensor) -> None:
    if input.dtype.kind != "f":
        raise DTypeError(f"{name} needs floating numbers, got {input.dtype.name}; convert them")


def _avg_pool(
    name: str, rank: int, input: Tensor, kernel_size: Any, stride: Any, padding: Any,
    *, ceil_mode: bool, count_include_pad: bool, divisor: int | None,
) -> Tensor:  # fmt: skip
    x, batched = _batched(name, input, rank)
    if divisor == 0:
        raise ArgumentError(f"{name}: divisor_override must not be 0")
    found = _windows(name, x, rank, kernel_size, stride, padding, 1, ceil_mode=ceil_mode)
    means, sums = [], []
    for n, k, s, p, _, o in zip(x.shape[2:], *found, strict=True):
        means.append(Band("mean", n, o, (k, s, p, float(count_include_pad), 0.0), True))
        sums.append(Band("mean", n, o, (k, s, p, float(count_include_pad), 1.0), True))
    result: Tensor
    if x.dtype.kind != "f":
        result = _whole_means(x, sums, means, divisor)
    elif divisor is None:
        result = apply(x, tuple(means))
    else:
        result = apply(x, tuple(sums)) / divisor
    return result if batched else squeeze(result, 0)


def _whole_means(x: Tensor, sums: list[Band], means: list[Band], divisor: int | None) -> Tensor:
    """Means of integers, rounded towards zero."""
    from flame.ops.arithmetic import div

    total: Tensor = resample(x, axes=tuple(sums))
    if divisor is not None:
        return div(total, divisor, rounding_mode="trunc")
    counts = np.ones((1,) * len(means), np.int64)
    for axis, band in enumerate(means):
        weights = table(band)[1].max(1)  # 1 / elements counted; 0 for a window of padding alone
        here = np.rint(1.0 / np.where(weights > 0, weights, 1.0)).astype(np.int64)
        counts = counts * here.reshape([-1 if i == axis else 1 for i in range(len(means))])
    return div(
        total, convert(constant(counts, device=x.device), dtype=x.dtype), rounding_mode="trunc"
    )


def avg_pool1d(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:  # fmt: skip
    """The mean of each window over L of (N, C, L); see `avg_pool2d`."""
    return _avg_pool(
        "avg_pool1d", 1, input, kernel_size, stride, padding, ceil_mode=ceil_mode,
        count_include_pad=count_include_pad, divisor=None,
    )  # fmt: skip


def avg_pool2d(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    """The mean of each window over H, W of (N, C, H, W).

    ``count_include_pad``: zeros of the padding count. ``divisor_override``: divides the sums
    instead of the counts. Raises ShapeError and ArgumentError where windows do not fit.
    """
    return _avg_pool(
        "avg_pool2d", 2, input, kernel_size, stride, padding, ceil_mode=ceil_mode,
        count_include_pad=count_include_pad, divisor=divisor_override,
    )  # fmt: skip


def avg_pool3d(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    """The mean of each window over D, H, W of (N, C, D, H, W); see `avg_pool2d`."""
    return _avg_pool(
        "avg_pool3d", 3, input, kernel_size, stride, padding, ceil_mode=ceil_mode,
        count_include_pad=count_include_pad, divisor=divisor_override,
    )  # fmt: skip


def _adaptive_mean(name: str, rank: int, input: Tensor, output_size: Any) -> Tensor:
    x, batched = _batched(name, input, rank)
    _floating(name, x)
    sizes = _output_sizes(name, output_size, x, rank)
    if all(o == 1 for o in sizes):
        result = mean(x, dim=tuple(range(2, rank + 2)), keepdim=True)
    else:
        axes = tuple(
            Band("adaptive", n, o, (), True) for n, o in zip(x.shape[2:], sizes, strict=True)
        )
        result = apply(x, axes)
    return result if batched else squeeze(result, 0)


def adaptive_avg_pool1d(input: Tensor, output_size: Any) -> Tensor:
    """The means of ``output_size`` even windows over L of (N, C, L)."""
    return _adaptive_mean("adaptive_avg_pool1d", 1, input, output_size)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """The means of even windows over H, W of (N, C, H, W); None keeps a dimension."""
    return _adaptive_mean("adaptive_avg_pool2d", 2, input, output_size)


def adaptive_avg_pool3d(input: Tensor, output_size: Any) -> Tensor:
    """The means of even windows over D, H, W of (N, C, D, H, W); None keeps a dimension."""
    return _adaptive_mean("adaptive_avg_pool3d", 3, input, output_size)


# --- p-norms --------------------------------------------------------------------------------------


def _lp_pool(
    name: str, rank: int, input: Tensor, norm_type: float, kernel_size: Any, stride: Any,
    *, ceil_mode: bool,
) -> Tensor:  # fmt: skip
    from flame.ops.activations import relu
    from flame.ops.mathematics import sign

    kernel = per_dimension(name, "kernel_size", kernel_size, rank, 1)
    power: Tensor = input**norm_type
    # the weights are 1 / kernel everywhere, also where ceil_mode lets a window end outside
    sums = _avg_pool(
        name, rank, power, kernel, stride, 0, ceil_mode=ceil_mode, count_include_pad=True,
        divisor=None,
    ) * math.prod(kernel)  # fmt: skip
    found: Tensor = (sign(sums) * relu(abs(sums))) ** (1.0 / norm_type)
    return found


def lp_pool1d(
    input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
) -> Tensor:
    """(sum of x**p)**(1/p) of each window over L of (N, C, L)."""
    return _lp_pool("lp_pool1d", 1, input, norm_type, kernel_size, stride, ceil_mode=ceil_mode)


def lp_pool2d(
    input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
) -> Tensor:
    """(sum of x**p)**(1/p) of each window over H, W of (N, C, H, W)."""
    return _lp_pool("lp_pool2d", 2, input, norm_type, kernel_size, stride, ceil_mode=ceil_mode)


def lp_pool3d(
    input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
) -> Tensor:
    """(sum of x**p)**(1/p) of each window over D, H, W of (N, C, D, H, W)."""
    return _lp_pool("lp_pool3d", 3, input, norm_type, kernel_size, stride, ceil_mode=ceil_mode)


# --- unpooling ------------------------------------------------------------------------------------


def _max_unpool(
    name: str, rank: int, input: Tensor, indices: Tensor, kernel_size: Any, stride: Any, padding:
    Any, output_size: Any,
) -> Tensor:  # fmt: skip
    from flame.ops.creation import zeros
    from flame.ops.scattering import scatter

    if indices.dtype is not dtypes.int64:
        raise DTypeError(f"{name}: indices must be int64, got {indices.dtype.name}")
    if indices.shape != input.shape:
        raise ShapeError(f"{name}: input {input.shape} and indices {indices.shape} must agree")
    x, batched = _batched(name, input, rank)
    kernel = per_dimension(name, "kernel_size", kernel_size, rank, 1)
    given = stride is not None and stride != () and stride != []
    steps = per_dimension(name, "stride", stride, rank, 1) if given else kernel
    pads = per_dimension(name, "padding", padding, rank, 0)
    usual = tuple(
        (n - 1) * s - 2 * p + k for n, s, p, k in zip(x.shape[2:], steps, pads, kernel, strict=True)
    )
    sizes = usual if output_size is None else tuple(output_size)[-rank:]
    if len(sizes) != rank or any(
        abs(n - u) >= s for n, u, s in zip(sizes, usual, steps, strict=True)
    ):
        raise ShapeError(f"{name}: output_size {output_size} is not within a stride of {usual}")
    n, c = x.shape[:2]
    count = math.prod(sizes)
    flat = reshape(x, (n, c, math.prod(x.shape[2:])))
    places = reshape(indices, flat.shape)
    spread = scatter(zeros((n, c, count), dtype=x.dtype, device=x.device), 2, places, flat)
    result = reshape(spread, (n, c, *sizes))
    return result if batched else squeeze(result, 0)


def max_unpool1d(
    input: Tensor, indices: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0,
    output_size: Any = None,
) -> Tensor:  # fmt: skip
    """Zeros with ``input`` at the positions that `max_pool1d` gave."""
    return _max_unpool("max_unpool1d", 1, input, indices, kernel_size, stride, padding, output_size)


def max_unpool2d(
    input: Tensor, indices: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0,
    output_size: Any = None,
) -> Tensor:  # fmt: skip
    """Zeros with ``input`` at the positions that `max_pool2d` gave. Raises IndexRangeError for bad
    ones.
    """
    return _max_unpool("max_unpool2d", 2, input, indices, kernel_size, stride, padding, output_size)


def max_unpool3d(
    input: Tensor, indices: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0,
    output_size: Any = None,
) -> Tensor:  # fmt: skip
    """Zeros with ``input`` at the positions that `max_pool3d` gave."""
    return _max_unpool("max_unpool3d", 3, input, indices, kernel_size, stride, padding, output_size)
