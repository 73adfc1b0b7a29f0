"""`varlen_attn` against attention of each sequence by itself, in PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
from flame.core.errors import ArgumentError, DTypeError, IndexRangeError, ShapeError
from flame.nn.attention import varlen_attn

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


def one_by_one(q: Any, k: Any, v: Any, keys: tuple[int, ...], window: tuple[int, int]) -> Any:
    group, parts = HEADS // k.shape[1], []
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    lengths = (list(QUERIES), list(keys), list(keys))
    split = (t.transpose(0, 1).split(n, 1) for t, n in zip((q, k, v), lengths, strict=True))
    for one, its_keys, its_values in zip(*split, strict=True):
        seen = visible(one.shape[1], its_keys.shape[1], window)
        scores = one @ its_keys.transpose(1, 2) / WIDTH**0.5
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
