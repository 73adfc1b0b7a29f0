"""Products of small integers against PyTorch: of which dtype they are, and that none is refused.
Divisors of the integers that have Euclid's algorithm take most steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import flame

from .agreement import compare, to_flame

CALLS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "addbmm": lambda lib, x, y: lib.addbmm(x[0, :, :2], x, y),
    "bilinear": lambda lib, x, y: lib.nn.functional.bilinear(x[0], x[0], lib.cat([x, x], 1)[:, :3]),
    "einsum of two": lambda lib, x, y: lib.einsum("bij,bjk->bik", x, y),
    "einsum of a sum": lambda lib, x, y: lib.einsum("...ik, ...j -> ij", x, y[0, :, 0]),
    "einsum of one": lambda lib, x, y: lib.einsum("bij->j", x),
    "tensordot": lambda lib, x, y: lib.tensordot(x[:, :, :1], y, ([2], [1])),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
@pytest.mark.parametrize("name", CALLS)
def test_products(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 5, (2, 2, 3), dtype=dtype, generator=generator)
    y = torch.randint(0, 5, (2, 3, 2), dtype=dtype, generator=generator)
    call = CALLS[name]
    compare(call(flame, to_flame(x), to_flame(y)), call(torch, x, y), name)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_divisors_that_take_most_steps(dtype: torch.dtype) -> None:
    """Neighbours among Fibonacci's numbers, in either order and with either sign."""
    numbers = [1, 2]
    while numbers[-1] + numbers[-2] <= torch.iinfo(dtype).max:
        numbers.append(sum(numbers[-2:]))
    *_, small, large = numbers
    x = torch.tensor([large, small, large, 0, 0], dtype=dtype)
    y = torch.tensor([small, large, 0, large, 0], dtype=dtype)
    for a in (x, -x) if dtype.is_signed else (x,):
        compare(flame.gcd(to_flame(a), to_flame(y)), torch.gcd(a, y), "gcd")
