"""Drawing indices by weight.

With replacement: the inverse of the distribution function at uniform numbers. Without: the largest
of weight / exponential number, whose order is that of drawing one after the other (Efraimidis and
Spirakis, "Weighted random sampling with a reservoir", 2006).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flame.core import dtypes
from flame.core.errors import ArgumentError, DTypeError, ShapeError

if TYPE_CHECKING:
    from flame.ops.generator import Generator
    from flame.tensor import Tensor

__all__ = ["draw"]


def draw(weights: Tensor, count: int, replacement: bool, generator: Generator | None) -> Tensor:
    """See `flame.multinomial`."""
    _check(weights, count, replacement)
    weights = weights.detach()
    if weights.dtype.itemsize < 4:
        weights = weights.to(dtypes.float32)
    if replacement:
        return _with_replacement(weights, count, generator)
    from flame.ops.random import rand_like
    from flame.ops.sorting import topk

    # -log(1 - u) is exponential, and never 0 where u is not; 0 weights come last
    waiting = -(1 - rand_like(weights, generator=generator)).log()
    order: Tensor = topk(weights / waiting.clamp(min=1e-37), count)[1]
    return order


def _with_replacement(weights: Tensor, count: int, generator: Generator | None) -> Tensor:
    from flame.ops.random import rand
    from flame.ops.scans import cumsum
    from flame.ops.sorting import searchsorted

    steps = cumsum(weights.to(dtypes.float64), -1)
    total = steps[..., -1:]
    chance = rand(
        (*weights.shape[:-1], count), generator=generator, dtype=dtypes.float64,
        device=weights.device,
    )  # fmt: skip
    found = searchsorted(steps, chance * total, right=True)
    return found.clamp(max=weights.shape[-1] - 1)


def _check(weights: Tensor, count: int, replacement: bool) -> None:
    if weights.ndim not in (1, 2):
        raise ShapeError(f"multinomial takes weights (n,) or (m, n), got {weights.shape}")
    if weights.dtype.kind != "f":
        raise DTypeError(f"multinomial takes floating weights, got {weights.dtype.name}")
    if count <= 0:
        raise ArgumentError(f"multinomial: num_samples must be above 0, got {count}")
    if not weights.numel():
        raise ShapeError(f"multinomial: nothing to draw from in weights of shape {weights.shape}")
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ArgumentError("multinomial: weights must be finite and not negative")
    if not bool((weights.sum(-1) > 0).all()):
        raise ArgumentError("multinomial: the weights of a row must not all be 0")
    if replacement:
        return
    if count > weights.shape[-1]:
        raise ArgumentError(
            f"multinomial: {count} samples from {weights.shape[-1]} without replacement; pass "
            "replacement=True, or draw fewer"
        )
