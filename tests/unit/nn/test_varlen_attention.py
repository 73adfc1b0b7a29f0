"""`varlen_attn` against attention of each sequence by itself, in PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
from flame.core.errors import (
    ArgumentError,
    DTypeError,
    GradientError,
    IndexRangeError,
    ShapeError,
)
from flame.nn.attention import varlen_attn
from flame.ops.attention.packed_operation import attention_packed

torch = pytest.importorskip("torch")

QUERIES, OTHER_KEYS, LONGEST = (3, 0, 7, 1), (4, 2, 7, 0), 7
HEADS, WIDTH, VALUE_WIDTH = 4, 8, 6


def ends(lengths: tuple[int, ...]) -> Any:
    return np.cumsum([0, *lengths])


def visible(queries: int, keys: int, window: tuple[int, int]) -> Any:
    own, other = np.arange(queries)[:, None] + keys - queries, np.arange(keys)
    seen = np.ones((queries, keys), bool)
    if window[0] >= 0:
        seen &= other >= own - window[0]
    if window[1] >= 0:
        seen &= other <= own + window[1]
    return torch.from_numpy(seen)


def one_by_one(
    q: Any, k: Any, v: Any, keys: tuple[int, ...], window: tuple[int, int], slopes: Any = None
) -> Any:
    group, parts = HEADS // k.shape[1], []
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    lengths = (list(QUERIES), list(keys), list(keys))
    split = (t.transpose(0, 1).split(n, 1) for t, n in zip((q, k, v), lengths, strict=True))
    for one, its_keys, its_values in zip(*split, strict=True):
        seen = visible(one.shape[1], its_keys.shape[1], window)
        scores = one @ its_keys.transpose(1, 2) / WIDTH**0.5
        if slopes is not None:
            rows, columns = scores.shape[1:]
            own = torch.arange(rows)[:, None] + columns - rows
            scores = scores - slopes[:, None, None] * (own - torch.arange(columns)).abs()
        weights = torch.softmax(scores.masked_fill(~seen, -1e30), -1) * seen
        parts.append((weights @ its_values).transpose(0, 1))
    return torch.cat(parts)


def leaves(lib: Any, keys: tuple[int, ...], key_heads: int) -> list[Any]:
    random = np.random.default_rng(0)
    shapes = (
        (sum(QUERIES), HEADS, WIDTH), (sum(keys), key_heads, WIDTH),
        (sum(keys), key_heads, VALUE_WIDTH),
    )  # fmt: skip
    return [lib.tensor(random.standard_normal(s), requires_grad=True) for s in shapes]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("key_heads", [HEADS, HEADS // 2])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (1, 1), (0, -1)])
@pytest.mark.parametrize("own", [True, False], ids=["own keys", "other keys"])
def test_sequences_attend_to_their_own_keys(
    own: bool,
    window: tuple[int, int],
    key_heads: int,
    compiled: bool,
) -> None:
    keys = QUERIES if own else OTHER_KEYS
    ours, theirs = (leaves(lib, keys, key_heads) for lib in (flame, torch))

    def attend(*given: Any) -> Any:
        places = (given[3], None if own else given[4])
        grouped = key_heads < HEADS
        return varlen_attn(
            *given[:3], *places, LONGEST, LONGEST, window_size=window, enable_gqa=grouped
        )

    run = flame.compile(attend) if compiled else attend
    made = run(*ours, flame.tensor(ends(QUERIES)), flame.tensor(ends(keys)))
    expected = one_by_one(*theirs, keys, window)
    slopes = np.random.default_rng(1).standard_normal(tuple(made.shape))
    (made * flame.tensor(slopes)).sum().backward()
    (expected * torch.tensor(slopes)).sum().backward()
    np.testing.assert_allclose(made.detach(), expected.detach(), atol=1e-12)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.grad, other.grad, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 1)])
@pytest.mark.parametrize("own", [True, False], ids=["own keys", "other keys"])
def test_slopes_are_a_bias_of_the_distance(
    own: bool, window: tuple[int, int], compiled: bool
) -> None:
    keys = QUERIES if own else OTHER_KEYS
    ours, theirs = (leaves(lib, keys, HEADS // 2) for lib in (flame, torch))
    slopes = [0.5, 0.25, 0.125, 0.0625]

    def attend(*given: Any) -> Any:
        return varlen_attn(
            *given[:4], None if own else given[4], LONGEST, LONGEST, window_size=window,
            enable_gqa=True, alibi_slopes=given[5],
        )  # fmt: skip

    run = flame.compile(attend) if compiled else attend
    places = (flame.tensor(ends(QUERIES)), flame.tensor(ends(keys)))
    made = run(*ours, *places, flame.tensor(slopes))
    expected = one_by_one(*theirs, keys, window, torch.tensor(slopes, dtype=torch.float64))
    (made**2).sum().backward()
    (expected**2).sum().backward()
    np.testing.assert_allclose(made.detach(), expected.detach(), atol=1e-12)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.grad, other.grad, atol=1e-12)


@pytest.mark.parametrize("window", [(-1, 0), (2, 1)])
def test_the_operation_is_what_padding_gives(window: tuple[int, int]) -> None:
    """What GPUs run, and what the CPU does instead, in result and gradients of both orders."""
    places = [flame.tensor(ends(n), dtype=flame.int32) for n in (QUERIES, OTHER_KEYS)]
    slopes = flame.tensor([0.5, 0.25, 0.125, 0.0625])
    limits = {"max_q": LONGEST, "max_k": LONGEST}
    found: list[list[Any]] = []
    for packed in (True, False):
        given = leaves(flame, OTHER_KEYS, HEADS // 2)
        if packed:
            left, right = window
            made, _ = attention_packed(
                *given, *places, slopes, scale=WIDTH**-0.5, **limits, left=left, right=right
            )
        else:
            made = varlen_attn(
                *given, *places, **limits, window_size=window, enable_gqa=True, alibi_slopes=slopes
            )
        grads = flame.autograd.grad((made**3).sum(), given, create_graph=True)
        second = flame.autograd.grad(sum((g**2).sum() for g in grads), given)
        found.append([made, *grads, *second])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.detach(), other.detach(), rtol=1e-10, atol=1e-11)


def test_wrong_sequences() -> None:
    x, two = flame.ones(5, 2, 4), flame.tensor([0, 2, 5])
    with pytest.raises(IndexRangeError):
        varlen_attn(x, x, x, two, None, 2, 2)
    with pytest.raises(IndexRangeError):
        varlen_attn(x, x, x, two, two, 3, 2)
    with pytest.raises(ArgumentError, match="max_q 3 = max_k"):
        varlen_attn(x, x, x, two, None, 3, 2)
    with pytest.raises(ShapeError, match="as many sequences"):
        varlen_attn(x, x, x, two, flame.tensor([0, 5]), 3, 5)
    with pytest.raises(ShapeError, match=r"query \(T_q, H, E\)"):
        varlen_attn(x, x, x[:4], two, None, 3, 3)
    with pytest.raises(DTypeError, match="places of sequences are integers"):
        varlen_attn(x, x, x, two.float(), None, 3, 3)
    three, slopes = flame.ones(5, 3, 4), flame.ones(2, requires_grad=True)
    with pytest.raises(ShapeError, match="enable_gqa"):
        varlen_attn(x, x[:, :1], x[:, :1], two, None, 3, 3)
    with pytest.raises(ShapeError, match="2 query heads cannot share 3 key heads"):
        varlen_attn(x, three, three, two, None, 3, 3, enable_gqa=True)
    with pytest.raises(ShapeError, match=r"slopes are float32 \(2,\)"):
        varlen_attn(x, x, x, two, None, 3, 3, alibi_slopes=flame.ones(3))
    with pytest.raises(GradientError, match="alibi_slopes get no gradient"):
        varlen_attn(x, x, x, two, None, 3, 3, alibi_slopes=slopes)
    with pytest.raises(IndexRangeError, match="5 rows do not fit into 2 sequences"):
        varlen_attn(x, x, x, two, None, 2, 2)
    with pytest.raises(IndexRangeError):
        varlen_attn(x, x, x, flame.tensor([0, 2, 4]), None, 3, 3)


@pytest.mark.parametrize("places", [(0, 3, 2, 5), (1, 3, 3, 5), (0, 2, 3, 4), (0, 5, 5, 5)])
def test_the_operation_refuses_wrong_places(places: tuple[int, ...]) -> None:
    x, known = flame.ones(5, 2, 4), flame.tensor([0, 2, 3, 5], dtype=flame.int32)
    wrong = flame.tensor(places, dtype=flame.int32)
    for name, pair in (("q", (wrong, known)), ("k", (known, wrong))):
        with pytest.raises(IndexRangeError, match=f"cu_seq_{name}"):
            attention_packed(x, x, x, *pair, None, scale=1.0, max_q=4, max_k=4, left=-1, right=-1)
