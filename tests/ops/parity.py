"""Comparison of one call with PyTorch: values, gradients, and gradients of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import flame
from flame.tensor import Tensor


def to_flame(x: torch.Tensor) -> Tensor:
    """A copy of a tensor that NumPy knows."""
    made = flame.from_numpy(x.detach().numpy().copy())
    return made.requires_grad_() if x.requires_grad else made


def draw(*shape: int, seed: int = 0, grad: bool = True) -> torch.Tensor:
    """Normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed + 7 * len(shape))
    made = torch.randn(shape, dtype=torch.float64, generator=generator)
    return made.requires_grad_() if grad else made


def close(ours: Tensor, theirs: torch.Tensor, label: str, tolerance: float = 1e-8) -> None:
    assert ours.shape == tuple(theirs.shape), label
    np.testing.assert_allclose(
        ours.detach().numpy(),
        theirs.detach().numpy(force=True),
        tolerance,
        tolerance,
        err_msg=label,
    )


def agree(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    *operands: torch.Tensor | None,
    second: bool = True,
) -> None:
    """Raise AssertionError where FLAME differs; ``second``: second order gradients too."""
    mine = [None if x is None else to_flame(x) for x in operands]
    result, expected = ours(*mine), theirs(*operands)
    close(result, expected, "value")
    leaves = [x for x in operands if x is not None and x.requires_grad]
    my_leaves = [x for x in mine if x is not None and x.requires_grad]
    if not leaves:
        return
    weight = torch.linspace(0.5, 1.5, expected.numel(), dtype=expected.dtype)
    weight = weight.reshape(expected.shape).requires_grad_()
    my_weight = to_flame(weight)
    grads = torch.autograd.grad(expected, leaves, weight, create_graph=second)
    found = flame.autograd.grad(result, my_leaves, my_weight, create_graph=second)
    for position, (a, b) in enumerate(zip(found, grads, strict=True)):
        close(a, b, f"gradient {position}")
    if second:
        _second([*leaves, weight], [*my_leaves, my_weight], grads, found)


def _second(
    leaves: Sequence[torch.Tensor], mine: Sequence[Tensor], grads: Sequence[torch.Tensor],
    found: Sequence[Tensor],
) -> None:  # fmt: skip
    probes = [torch.cos(torch.arange(g.numel(), dtype=g.dtype)).reshape(g.shape) for g in grads]
    kept = [(g, f, p) for g, f, p in zip(grads, found, probes, strict=True) if g.requires_grad]
    expected = torch.autograd.grad(
        [g for g, _, _ in kept], leaves, [p for _, _, p in kept], allow_unused=True
    )
    again = flame.autograd.grad(
        [f for _, f, _ in kept], mine, [to_flame(p) for _, _, p in kept], allow_unused=True
    )
    for position, (a, b) in enumerate(zip(again, expected, strict=True)):
        if a is None or b is None:
            other = b if a is None else a
            assert other is None or not np.any(other.detach().numpy()), f"second {position}"
        else:
            close(a, b, f"second {position}", 1e-7)
