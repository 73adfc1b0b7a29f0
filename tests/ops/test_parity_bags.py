"""`embedding_bag` against PyTorch: values, gradients, and the same from a compiled step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
import flame.nn.functional
from flame.core.errors import ArgumentError, IndexRangeError, ShapeError

torch = pytest.importorskip("torch")

random = np.random.default_rng(0)
TABLE = random.standard_normal((7, 3)).astype(np.float32)
EQUAL, FLAT = random.integers(0, 7, (4, 5)), random.integers(0, 7, 12)
OFFSETS = np.array([0, 0, 3, 3, 8, 12])  # with empty bags


def outcome(
    lib: Any, indices: Any, offsets: Any, mode: str, *, compiled: bool, **options: Any
) -> Any:
    """The bags, and the gradients of the table and of the weights of samples."""

    def bags(*tensors: Any) -> Any:
        table, index, *rest = tensors
        given = {"offsets": rest.pop(0)} if offsets is not None else {}
        given |= {"per_sample_weights": rest.pop(0)} if rest else {}
        return lib.nn.functional.embedding_bag(index, table, mode=mode, **given, **options)

    leaves = [lib.tensor(TABLE, requires_grad=True)]
    if mode == "weighted":
        mode = "sum"
        factors = np.linspace(-1, 1, indices.size, dtype=np.float32).reshape(indices.shape)
        leaves.append(lib.tensor(factors, requires_grad=True))
    fixed = [lib.tensor(x) for x in (indices, offsets) if x is not None]
    run = lib.compile(bags) if compiled else bags
    made = run(leaves[0], *fixed, *leaves[1:])
    slopes = np.random.default_rng(1).standard_normal(tuple(made.shape)).astype(np.float32)
    (made * lib.tensor(slopes)).sum().backward()
    return [made.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted"])
@pytest.mark.parametrize("kind", ["equal", "ragged", "ended"])
def test_bags(kind: str, mode: str, padding_idx: int | None, compiled: bool) -> None:
    options: dict[str, Any] = {"padding_idx": padding_idx}
    if kind == "ended":
        options["include_last_offset"] = True
    given = (EQUAL, None) if kind == "equal" else (FLAT, OFFSETS)
    expected = outcome(torch, *given, mode, compiled=False, **options)
    for got, want in zip(
        outcome(flame, *given, mode, compiled=compiled, **options), expected, strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_wrong_bags() -> None:
    bag, table = flame.nn.functional.embedding_bag, flame.tensor(TABLE)
    flat, first = flame.tensor(FLAT), flame.tensor([0])
    with pytest.raises(ArgumentError, match="need offsets"):
        bag(flat, table)
    with pytest.raises(ArgumentError, match="mode must be sum, mean or max"):
        bag(flat, table, first, mode="min")
    with pytest.raises(ShapeError, match="weights of samples"):
        bag(flat, table, first, mode="sum", per_sample_weights=flame.ones(3))
    with pytest.raises(IndexRangeError):
        bag(flat, table, flame.tensor([1, 4]))
    with pytest.raises(IndexRangeError):
        bag(flat + 7, table, first)
