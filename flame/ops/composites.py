"""Functions of tensors that are a few lines of others; they differentiate by themselves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError, ShapeError
from flame.ops.arithmetic import mul
from flame.ops.autocast import autocasts
from flame.ops.comparison import where
from flame.ops.creation import full, linspace
from flame.ops.elementwise import common_dtype, floating
from flame.ops.joining import cat
from flame.ops.loops import broadcast_shapes
from flame.ops.op import constant
from flame.ops.reductions import sum_to
from flame.ops.shapes import expand, reshape, unsqueeze, wrap_dim

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "angle", "cdist", "conj", "conj_physical", "corrcoef", "cov", "cross", "dist", "frexp", "gcd",
    "gradient", "heaviside", "histc", "imag", "isreal", "kron", "lcm", "ldexp", "logspace",
    "nanquantile", "quantile", "real", "renorm", "resolve_conj", "resolve_neg",
]  # fmt: skip
METHODS = (
    "angle", "conj", "conj_physical", "corrcoef", "cov", "cross", "dist", "frexp", "gcd",
    "heaviside", "histc", "isreal", "kron", "lcm", "ldexp", "nanquantile", "quantile", "renorm",
    "resolve_conj", "resolve_neg", "sum_to_size",
)  # fmt: skip
IN_PLACE = ("gcd", "heaviside", "lcm", "ldexp", "renorm")


# --- real numbers among the complex ones ----------------------------------------------------------


def conj(input: Tensor) -> Tensor:
    """The tensor itself: FLAME's numbers are real."""
    return input


conj_physical = resolve_conj = resolve_neg = real = conj


def imag(input: Tensor) -> Tensor:
    """Raises DTypeError: a real tensor has no imaginary part in memory."""
    raise DTypeError(f"imag: a {input.dtype.name} tensor has no imaginary part")


def isreal(input: Tensor) -> Tensor:
    """True everywhere."""
    return full(input.shape, True, dtype=dtypes.bool_, device=input.device)


def angle(input: Tensor) -> Tensor:
    """0 for positive numbers, pi for negative ones, NaN for NaN."""
    floats = input if input.dtype.kind == "f" else input.to(floating(input.dtype))
    turned = where(floats < 0, math.pi, 0.0).to(floats.dtype)
    result: Tensor = where(floats.isnan(), floats, turned)
    return result


# --- numbers --------------------------------------------------------------------------------------


def heaviside(input: Tensor, values: Tensor) -> Tensor:
    """0 for negative numbers, 1 for positive ones, ``values`` for zeros. Dtypes must be equal."""
    if input.dtype is not values.dtype:
        raise DTypeError(f"heaviside: {input.dtype.name} and {values.dtype.name} must be equal")
    steps = (input > 0) if input.dtype.kind in "ub" else ~(input < 0)
    result: Tensor = where(input == 0, values, steps.to(input.dtype))
    return result


def ldexp(input: Tensor, other: Tensor) -> Tensor:
    """input * 2**other."""
    power = other.to(floating(other.dtype))
    return mul(input, power.exp2())


class Parts(NamedTuple):
    """What `frexp` gives."""

    mantissa: Tensor
    exponent: Tensor


@autocasts("plain")
def frexp(input: Tensor) -> Parts:
    """(mantissa, exponent) with input = mantissa * 2**exponent, 0.5 <= |mantissa| < 1."""
    if input.dtype.kind != "f":
        raise DTypeError(f"frexp takes floating tensors, got {input.dtype.name}")
    usual = input.isfinite() & (input != 0)
    safe = where(usual, input, 1.0)
    exponent = safe.detach().abs().log2().floor() + 1
    # the logarithm is rounded: correct by one where the mantissa left its range
    half = (exponent / 2).trunc()
    mantissa = safe * (-half).exp2() * (half - exponent).exp2()
    high = mantissa.detach().abs() >= 1
    low = mantissa.detach().abs() < 0.5
    exponent = exponent + high.to(exponent.dtype) - low.to(exponent.dtype)
    mantissa = where(high, mantissa / 2, where(low, mantissa * 2, mantissa))
    whole = where(usual, exponent, 0.0).to(dtypes.int32)
    return Parts(where(usual, mantissa, input), whole)


def gcd(input: Tensor, other: Tensor) -> Tensor:
    """Greatest common divisors of integers, by Euclid's algorithm."""
    a, b = _whole("gcd", input, other)
    for _ in range(3 * a.dtype.bits // 2 + 2):  # more steps than it ever takes (Lamé, 1844)
        if not bool((b != 0).any()):
            break
        rest = a.fmod(where(b != 0, b, 1))
        a, b = where(b != 0, b, a), where(b != 0, rest, 0)
    return a


def lcm(input: Tensor, other: Tensor) -> Tensor:
    """Least common multiples of integers."""
    a, b = _whole("lcm", input, other)
    divisor = gcd(a, b)
    return (a.div(where(divisor == 0, 1, divisor), rounding_mode="trunc") * b).abs()


def _whole(name: str, input: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    dtype = common_dtype((input.type, other.type))
    if not dtype.is_integer:
        raise DTypeError(f"{name} takes integer tensors, got {dtype.name}")
    shape = broadcast_shapes(name, [input.shape, other.shape])
    a, b = (expand(t.to(dtype).abs(), shape) for t in (input, other))
    return a, b


def logspace(
    start: Any, end: Any, steps: int, base: float = 10.0, *, dtype: DType | None = None,
    device: Any = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """``steps`` powers of ``base``, with exponents evenly from ``start`` to ``end``."""
    wanted = dtype or dtypes.get_default_dtype()
    whole = not wanted.is_floating_point
    ends = [t.item() if hasattr(t, "storage") else t for t in (start, end)]
    ends = [math.trunc(t) for t in ends] if whole else ends
    exponents = linspace(ends[0], ends[1], steps, dtype=dtypes.float64, device=device)
    made: Tensor = (exponents * 0 + float(base)).pow(exponents).to(wanted)
    return made.requires_grad_() if requires_grad else made


# --- distances ------------------------------------------------------------------------------------


@autocasts("float32")
def dist(input: Tensor, other: Tensor, p: float = 2) -> Tensor:
    """The p-norm of the difference."""
    from flame.ops.norms import norm

    difference: Tensor = input - other
    return norm(difference, p)


@autocasts("float32")
def cdist(
    x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None
) -> Tensor:  # fmt: skip
    """p-norms between all rows of x1 (..., P, M) and of x2 (..., R, M): (..., P, R)."""
    if x1.ndim < 2 or x2.ndim < 2 or x1.shape[-1] != x2.shape[-1]:
        raise ShapeError(f"cdist: {x1.shape} and {x2.shape} must be (..., P, M) and (..., R, M)")
    if p < 0:
        raise ArgumentError(f"cdist: p must not be negative, got {p}")
    return rows_norm(unsqueeze(x1, -2) - unsqueeze(x2, -3), float(p))


def rows_norm(difference: Tensor, p: float) -> Tensor:
    """p-norms along the last dimension, whose gradients are 0 where the norm is 0."""
    size = difference.abs()
    if p == 0:
        return (size * 0 + (size != 0).to(size.dtype)).sum(-1)  # its gradient is 0
    if p == 1 or not size.shape[-1]:
        return size.sum(-1)
    if p == math.inf:
        return size.amax(-1)
    total = (size * size).sum(-1) if p == 2 else where(size > 0, size, 1.0).pow(p).mul(
        (size > 0).to(size.dtype)
    ).sum(-1)  # fmt: skip
    root = where(total > 0, total, 1.0).pow(1 / p)
    result: Tensor = where(total > 0, root, 0.0).to(size.dtype)
    return result


@autocasts("float32")
def renorm(input: Tensor, p: float, dim: int, maxnorm: float) -> Tensor:
    """Slices along ``dim`` scaled down to a p-norm of at most ``maxnorm``."""
    from flame.ops.norms import vector_norm

    dim = wrap_dim("renorm", dim, input.ndim)
    others = [d for d in range(input.ndim) if d != dim]
    wide = input.to(dtypes.float32) if input.dtype.itemsize == 2 else input
    size = vector_norm(wide, p, others, keepdim=True)
    factor = where(size > maxnorm, maxnorm / (size + 1e-7), 1.0)
    return mul(input, factor.to(input.dtype))


# --- products -------------------------------------------------------------------------------------


def cross(input: Tensor, other: Tensor, dim: int | None = None) -> Tensor:
    """Vector products along a dimension of size 3 (the first such, by default)."""
    shape = broadcast_shapes("cross", [input.shape, other.shape])
    if dim is None:
        found = [d for d, size in enumerate(shape) if size == 3]
        if not found:
            raise ShapeError(f"cross: no dimension of {shape} has size 3")
        dim = found[0]
    dim = wrap_dim("cross", dim, len(shape))
    if input.ndim != other.ndim or shape[dim] != 3 or input.shape[dim] != other.shape[dim]:
        raise ShapeError(f"cross: {input.shape} and {other.shape} need size 3 in dimension {dim}")
    return mul(input.roll(-1, dim), other.roll(1, dim)) - mul(
        input.roll(1, dim), other.roll(-1, dim)
    )


def kron(input: Tensor, other: Tensor) -> Tensor:
    """Kronecker product: every element of ``input`` times the whole of ``other``."""
    rank = max(input.ndim, other.ndim)
    a = (1,) * (rank - input.ndim) + input.shape
    b = (1,) * (rank - other.ndim) + other.shape
    left = reshape(input, [n for size in a for n in (size, 1)])
    right = reshape(other, [n for size in b for n in (1, size)])
    return reshape(mul(left, right), [m * n for m, n in zip(a, b, strict=True)])


# --- statistics -----------------------------------------------------------------------------------


def cov(
    input: Tensor, *, correction: int = 1, fweights: Tensor | None = None,
    aweights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Covariances of variables (rows) over observations (columns), which may have weights."""
    if input.ndim > 2:
        raise ShapeError(f"cov takes at most 2 dimensions, got shape {input.shape}")
    x = reshape(input, (1, -1)) if input.ndim < 2 else input
    x = x if x.dtype.kind == "f" else x.to(floating(x.dtype))
    weights = _weights(x, fweights, aweights)
    count: Any = x.shape[1]
    if weights is None:
        centred = x - x.mean(1, keepdim=True)
        weighted = centred
    else:
        count = weights.sum()
        centred = x - (x * weights).sum(1, keepdim=True) / count
        weighted = centred * weights
        if aweights is not None and correction:
            count = count - correction * (weights * aweights).sum() / count
        else:
            count = count - correction
    if weights is None:
        freedom: Any = max(count - correction, 0)
        made = weighted.matmul(centred.t()) / freedom
    else:
        made = weighted.matmul(centred.t()) / count.clamp(min=0)
    result: Tensor = made.squeeze()
    return result


def _weights(x: Tensor, fweights: Any, aweights: Any) -> Any:
    for name, given, kinds in (("fweights", fweights, "iu"), ("aweights", aweights, "f")):
        if given is None:
            continue
        if given.shape != x.shape[1:]:
            raise ShapeError(f"cov: {name} {given.shape} must be one for each column of {x.shape}")
        if given.dtype.kind not in kinds:
            raise DTypeError(f"cov: {name} cannot be {given.dtype.name}")
    if fweights is None:
        return aweights
    return fweights.to(x.dtype) if aweights is None else fweights * aweights


def corrcoef(input: Tensor) -> Tensor:
    """Correlations of variables (rows)."""
    c = cov(input)
    if not c.ndim:
        return c / c
    scale = c.diagonal().sqrt()
    return (c / unsqueeze(scale, 1) / scale).clamp(-1, 1)


def quantile(
    input: Tensor, q: Any, dim: int | None = None, keepdim: bool = False, *,
    interpolation: str = "linear",
) -> Tensor:  # fmt: skip
    """Quantiles along ``dim`` (of all, without). Several ``q`` stand in a new first dimension.

    interpolation: "linear", "lower", "higher", "midpoint" or "nearest".
    """
    return _quantile("quantile", input, q, dim, interpolation, keepdim=keepdim, ignore_nan=False)


def nanquantile(
    input: Tensor, q: Any, dim: int | None = None, keepdim: bool = False, *,
    interpolation: str = "linear",
) -> Tensor:  # fmt: skip
    """`quantile` of the elements that are not NaN."""
    return _quantile("nanquantile", input, q, dim, interpolation, keepdim=keepdim, ignore_nan=True)


def _quantile(
    name: str, input: Tensor, q: Any, dim: int | None, interpolation: str, *, keepdim: bool,
    ignore_nan: bool,
) -> Tensor:  # fmt: skip
    if input.dtype not in (dtypes.float32, dtypes.float64) or not input.numel():
        raise DTypeError(f"{name} takes float32 or float64 elements, got {input.type!r}")
    if interpolation not in ("linear", "lower", "higher", "midpoint", "nearest"):
        raise ArgumentError(f"{name}: {interpolation!r} is no interpolation")
    points: Tensor = (
        q if hasattr(q, "storage") else constant(q, dtype=input.dtype, device=input.device)
    )
    if points.ndim > 1 or bool(((points < 0) | (points > 1)).any()):
        raise ArgumentError(f"{name}: q must be one or several numbers from 0 to 1")
    rank = input.ndim
    along = 0 if dim is None else wrap_dim(name, dim, rank)
    rows = reshape(input, (-1,)) if dim is None or not rank else input.movedim(along, -1)
    ordered = rows.sort(-1)[0]  # NaN stand last
    missing = rows.isnan()
    last: Any = rows.shape[-1] - 1
    if ignore_nan:
        last = ((~missing).sum(-1, keepdim=True) - 1).clamp(min=0).to(input.dtype)
    place = reshape(points, (-1,)) * last
    place = expand(place, (*rows.shape[:-1], points.numel()))
    made = _between(ordered, place, interpolation)
    bad = missing.all(-1, keepdim=True) if ignore_nan else missing.any(-1, keepdim=True)
    made = where(bad, math.nan, made).to(input.dtype).movedim(-1, 0)
    if keepdim:
        sizes = [1] * rank if dim is None else list(input.shape)
        if dim is not None and rank:
            sizes[along] = 1
        made = reshape(made, (points.numel(), *sizes))
    return made if points.ndim else made[0]


def _between(ordered: Tensor, place: Tensor, interpolation: str) -> Tensor:
    """Elements of sorted rows at places that may lie between two of them."""
    low, high = place.floor(), place.ceil()
    if interpolation in ("lower", "higher", "nearest"):
        chosen = {"lower": low, "higher": high, "nearest": place.round()}[interpolation]
        return ordered.gather(-1, chosen.to(dtypes.int64))
    below, above = (ordered.gather(-1, t.to(dtypes.int64)) for t in (low, high))
    weight: Any = place - low if interpolation == "linear" else 0.5
    return below.lerp(above, weight)


def histc(input: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """Counts of elements in ``bins`` equal intervals from ``min`` to ``max``.

    Equal limits stand for those of the elements. Elements outside, and NaN, are not counted.
    """
    if bins <= 0 or max < min:
        raise ArgumentError(f"histc: bins {bins} must be positive, and min {min} <= max {max}")
    flat = reshape(input.detach(), (-1,))
    low, high = min, max
    if low == high and flat.numel():
        low, high = flat.min().item(), flat.max().item()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ArgumentError(f"histc: the range from {low} to {high} is not finite")
    if low == high:
        low, high = low - 1, high + 1
    wide = flat if flat.dtype.itemsize == 2 else flat.to(dtypes.float64)
    inside = (wide >= low) & (wide <= high)
    place = ((wide - low) * bins / (high - low)).floor().clamp(0, bins - 1)
    place = where(inside, place, 0.0).to(dtypes.int64)
    counts = full((bins,), 0.0, dtype=dtypes.float64, device=input.device)
    counts.index_add_(0, place, inside.to(dtypes.float64))
    made: Tensor = counts.to(input.dtype)
    return made


def gradient(
    input: Tensor, *, spacing: Any = 1, dim: Any = None, edge_order: int = 1
) -> tuple[Tensor, ...]:
    """Derivatives along dimensions by differences: second order inside, ``edge_order`` at the ends.

    spacing: one number for all, one for each dimension, or a tensor of coordinates for each.
    """
    given = range(input.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    dims = [wrap_dim("gradient", d, input.ndim) for d in given]
    spacing = 1 if spacing is None else spacing
    steps = list(spacing) if isinstance(spacing, (list, tuple)) else [spacing] * len(dims)
    if len(steps) != len(dims):
        raise ArgumentError(f"gradient: {len(steps)} spacings for {len(dims)} dimensions")
    if edge_order not in (1, 2):
        raise ArgumentError(f"gradient: edge_order must be 1 or 2, got {edge_order}")
    for d in dims:
        if input.shape[d] <= edge_order:
            least = edge_order + 1
            raise ShapeError(f"gradient: dimension {d} of {input.shape} needs {least} points")
    return tuple(_slope(input, d, s, edge_order) for d, s in zip(dims, steps, strict=True))


def _slope(x: Tensor, dim: int, spacing: Any, edge_order: int) -> Tensor:
    """By Taylor's formula with uneven distances before (a) and behind (b) each point."""
    size = x.shape[dim]
    if hasattr(spacing, "storage") and spacing.ndim:
        steps = spacing[1:] - spacing[:-1]
    else:
        step = spacing.item() if hasattr(spacing, "storage") else spacing
        steps = full((size - 1,), step, dtype=floating(x.dtype), device=x.device)
    h = reshape(steps, [-1 if d == dim else 1 for d in range(x.ndim)])
    first = x.narrow(dim, 1, size - 1) - x.narrow(dim, 0, size - 1)
    slopes = first / h
    parts = []
    if size > 2:
        a, b = h.narrow(dim, 0, size - 2), h.narrow(dim, 1, size - 2)
        before, behind = slopes.narrow(dim, 0, size - 2), slopes.narrow(dim, 1, size - 2)
        parts = [(before * b + behind * a) / (a + b)]
    left, right = slopes.narrow(dim, 0, 1), slopes.narrow(dim, size - 2, 1)
    if edge_order == 2:
        a, b = h.narrow(dim, 0, 1), h.narrow(dim, 1, 1)
        left = left + (left - slopes.narrow(dim, 1, 1)) * (a / (a + b))
        a, b = h.narrow(dim, size - 2, 1), h.narrow(dim, size - 3, 1)
        right = right + (right - slopes.narrow(dim, size - 3, 1)) * (a / (a + b))
    return cat([left, *parts, right], dim)


def sum_to_size(self: Tensor, *size: Any) -> Tensor:
    """Summed to a shape that broadcasts to this one."""
    from flame.ops.creation import shape_of

    shape = shape_of(*size)
    if broadcast_shapes("sum_to_size", [shape, self.shape]) != self.shape:
        raise ShapeError(f"sum_to_size: {shape} does not broadcast to {self.shape}")
    result: Tensor = sum_to(self, shape) if shape else self.sum()
    return result
