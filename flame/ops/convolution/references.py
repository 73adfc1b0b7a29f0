"""What the operations of convolution mean, in NumPy, and where tests sample them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from flame.core.types import Shape
from flame.ops.op import Arg, Sample


def _wide(*arrays: Any) -> tuple[Any, ...]:
    """Half-width floats are summed in float32."""
    return tuple(
        None if a is None else a.astype(np.float32)
        if a.dtype.itemsize == 2 and a.dtype.kind not in "iu" else a
        for a in arrays
    )  # fmt: skip


def _reads(
    offsets: Shape, sizes: Shape, source: Shape, stride: Shape, padding: Shape, dilation: Shape
) -> tuple[Any, Any]:
    """(positions, source indices) of a tap, as open meshes: those that lie inside the source."""
    places, reads = [], []
    for tap, size, extent, s, p, d in zip(
        offsets, sizes, source, stride, padding, dilation, strict=True
    ):
        at = np.arange(size)
        index = at * s - p + tap * d
        inside = (index >= 0) & (index < extent)
        places.append(at[inside])
        reads.append(index[inside])
    return np.ix_(*places), np.ix_(*reads)


def _flat(a: Any) -> Any:
    return a.reshape(*a.shape[:2], math.prod(a.shape[2:]))


def convolution(
    x: Any, weight: Any, bias: Any = None, *, stride: Shape, padding: Shape, dilation: Shape,
    groups: int, size: Shape,
) -> Any:  # fmt: skip
    """y[n, o, j] = bias[o] + sum over c, t of x[n, c, j * stride - padding + t * dilation]
    weight[o, c, t].
    """
    dtype = x.dtype
    x, weight, bias = _wide(x, weight, bias)
    out = np.zeros((x.shape[0], weight.shape[0], *size), x.dtype)
    if bias is not None:
        out += bias.reshape(-1, *[1] * len(size))
    own, summed = weight.shape[0] // groups, weight.shape[1]
    for taps in itertools.product(*map(range, weight.shape[2:])):
        places, reads = _reads(taps, size, x.shape[2:], stride, padding, dilation)
        for g in range(groups):
            block = x[:, g * summed : (g + 1) * summed][(slice(None), slice(None), *reads)]
            w = weight[(slice(g * own, (g + 1) * own), slice(None), *taps)]
            part = out[:, g * own : (g + 1) * own]
            part[(slice(None), slice(None), *places)] += np.einsum("oc,nc...->no...", w, block)
    return out.astype(dtype)


def input_gradient(
    y: Any, weight: Any, bias: Any = None, *, stride: Shape, padding: Shape, dilation: Shape,
    groups: int, size: Shape,
) -> Any:  # fmt: skip
    """The sums of `convolution` turned round: what each input contributed, times y."""
    dtype = y.dtype
    y, weight, bias = _wide(y, weight, bias)
    out = np.zeros((y.shape[0], weight.shape[1] * groups, *size), y.dtype)
    if bias is not None:
        out += bias.reshape(-1, *[1] * len(size))
    own, summed = weight.shape[0] // groups, weight.shape[1]
    for taps in itertools.product(*map(range, weight.shape[2:])):
        places, reads = _reads(taps, y.shape[2:], size, stride, padding, dilation)
        for g in range(groups):
            block = y[:, g * own : (g + 1) * own][(slice(None), slice(None), *places)]
            w = weight[(slice(g * own, (g + 1) * own), slice(None), *taps)]
            part = out[:, g * summed : (g + 1) * summed]
            part[(slice(None), slice(None), *reads)] += np.einsum("oc,no...->nc...", w, block)
    return out.astype(dtype)


def weight_gradient(
    y: Any, x: Any, *, stride: Shape, padding: Shape, dilation: Shape, groups: int, size: Shape
) -> Any:
    """w[o, c, t] = sum over n, j of y[n, o, j] x[n, c, j * stride - padding + t * dilation]."""
    dtype = x.dtype
    y, x = _wide(y, x)
    own, summed = y.shape[1] // groups, x.shape[1] // groups
    out = np.zeros((y.shape[1], summed, *size), x.dtype)
    for taps in itertools.product(*map(range, size)):
        places, reads = _reads(taps, y.shape[2:], x.shape[2:], stride, padding, dilation)
        for g in range(groups):
            block = x[:, g * summed : (g + 1) * summed][(slice(None), slice(None), *reads)]
            other = y[:, g * own : (g + 1) * own][(slice(None), slice(None), *places)]
            block, other = (_flat(a) for a in (block, other))
            index: Any = (slice(g * own, (g + 1) * own), slice(None), *taps)
            out[index] = np.einsum("noj,ncj->oc", other, block)
    return out.astype(dtype)


# --- samples --------------------------------------------------------------------------------------

# (input, weight, stride, padding, dilation, groups)
_CASES: list[tuple[Shape, Shape, Shape, Shape, Shape, int]] = [
    ((2, 3, 7), (4, 3, 3), (1,), (1,), (1,), 1),
    ((1, 4, 9), (6, 2, 2), (2,), (0,), (3,), 2),
    ((2, 3, 6, 5), (4, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((2, 2, 7, 8), (3, 2, 3, 2), (2, 3), (1, 0), (1, 2), 1),
    ((1, 4, 5, 5), (4, 1, 3, 3), (1, 1), (1, 1), (1, 1), 4),
    ((2, 4, 6, 6), (8, 1, 3, 3), (2, 2), (1, 1), (1, 1), 4),
    ((3, 5, 4, 4), (2, 5, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((2, 3, 6, 6), (4, 3, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    ((1, 2, 4, 5, 4), (3, 2, 2, 3, 3), (1, 2, 1), (0, 1, 1), (1, 1, 1), 1),
    ((0, 2, 5, 5), (3, 2, 3, 3), (1, 1), (0, 0), (1, 1), 1),
    ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0), (1, 1), 1),
]


def _attributes(
    case: tuple[Shape, Shape, Shape, Shape, Shape, int],
) -> tuple[dict[str, Any], Shape]:
    x, w, stride, padding, dilation, groups = case
    size = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x[2:], w[2:], stride, padding, dilation, strict=True)
    )
    common = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return common, size


def convolution_samples() -> list[Sample]:
    """With and without bias."""
    found = []
    for i, case in enumerate(_CASES):
        attributes, size = _attributes(case)
        bias = Arg((case[1][0],)) if i % 2 else None
        found.append(Sample((Arg(case[0]), Arg(case[1]), bias), {**attributes, "size": size}))
    return found


def input_gradient_samples() -> list[Sample]:
    """From gradients of `convolution_samples`' results."""
    found = []
    for i, case in enumerate(_CASES):
        attributes, size = _attributes(case)
        y = (case[0][0], case[1][0], *size)
        bias = Arg((case[0][1],)) if i % 2 else None
        found.append(Sample((Arg(y), Arg(case[1]), bias), {**attributes, "size": case[0][2:]}))
    return found


def weight_gradient_samples() -> list[Sample]:
    """From gradients of `convolution_samples`' results."""
    found = []
    for case in _CASES:
        attributes, size = _attributes(case)
        y = (case[0][0], case[1][0], *size)
        found.append(Sample((Arg(y), Arg(case[0])), {**attributes, "size": case[1][2:]}))
    return found
