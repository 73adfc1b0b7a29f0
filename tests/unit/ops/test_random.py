"""Random tensors: the published bits, distributions, independence, and dropout's gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import flame
from flame.core.errors import ArgumentError, DTypeError, FlameError, ShapeError, StateError
from flame.ops import philox
from flame.ops.dropouts import dropout, dropout1d, dropout2d, dropout3d, feature_dropout
from flame.tensor import Tensor

COUNT = 200_000


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    before = flame.get_rng_state()
    flame.manual_seed(1234)
    yield
    flame.set_rng_state(before)


def kolmogorov(values: np.ndarray, distribution: Callable[[Any], Any]) -> float:
    """The largest distance of the empirical distribution function from the true one, times sqrt(n).

    Above 2.2 with a probability of 1e-4 (Kolmogorov's limit: 2 exp(-2 d²)).
    """
    ordered = np.sort(values.astype(np.float64).ravel())
    n = ordered.size
    expected = distribution(ordered)
    above = np.arange(1, n + 1) / n - expected
    below = expected - np.arange(n) / n
    return float(max(above.max(), below.max()) * math.sqrt(n))


def normal_below(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation in units of its standard error."""
    a, b = a.ravel() - a.mean(), b.ravel() - b.mean()
    return float((a * b).mean() / (a.std() * b.std()) * math.sqrt(a.size))


# --- the bits -------------------------------------------------------------------------------------

# from the known-answer tests of Random123, the reference implementation of the paper's authors
VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_reference_gives_published_vectors(
    counter: list[int], key: list[int], expected: list[int]
) -> None:
    made = philox.reference_rounds([np.uint64(c) for c in counter], [np.uint64(k) for k in key])
    assert [int(w) for w in made] == expected


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, 2**64 - 1, -(2**63)])
@pytest.mark.parametrize("offset", [0, 2**32 - 10, 2**63 - 5])
def test_kernel_draws_the_reference_bits(seed: int, offset: int) -> None:
    generator = flame.Generator().manual_seed(seed)
    generator.reserve(offset)
    drawn = flame.randint(0, 2**32, (37,), generator=generator).numpy()
    words = philox.reference_words(seed % 2**64, 0, 1)  # the seed fits
    key = [np.uint64(seed % 2**32), np.uint64(seed // 2**32 % 2**32)]
    blocks = [(offset + i) % 2**64 for i in range(37)]
    counter = [np.array([b % 2**32 for b in blocks], np.uint64),
               np.array([b // 2**32 for b in blocks], np.uint64),
               np.zeros(37, np.uint64), np.zeros(37, np.uint64)]  # fmt: skip
    expected = philox.reference_rounds(counter, key)[0]
    assert words.shape == (1, 4)
    np.testing.assert_array_equal(drawn, expected.astype(np.int64))


def test_element_depends_on_its_position_alone() -> None:
    def state() -> flame.Generator:
        return flame.Generator().manual_seed(7)

    whole = flame.rand(1000, generator=state()).numpy()
    generator = state()
    parts = [flame.rand(n, generator=generator).numpy() for n in (1, 300, 0, 699)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    matrix = flame.empty(40, 25).T
    matrix.uniform_(generator=state())
    np.testing.assert_array_equal(matrix.numpy().ravel(), whole)


def test_half_widths_stay_below_one() -> None:
    for dtype in (flame.float16, flame.bfloat16):
        drawn = flame.rand(COUNT, dtype=dtype).to(flame.float32).numpy()
        assert drawn.max() < 1
        assert drawn.min() >= 0
        assert abs(drawn.mean() - 0.5) < 0.01


# --- the generator --------------------------------------------------------------------------------


def test_seed_repeats_and_state_goes_on() -> None:
    flame.manual_seed(5)
    first = flame.rand(10).numpy()
    state = flame.get_rng_state()
    second = flame.randn(10).numpy()
    flame.set_rng_state(state)
    np.testing.assert_array_equal(flame.randn(10).numpy(), second)
    flame.manual_seed(5)
    np.testing.assert_array_equal(flame.rand(10).numpy(), first)
    assert flame.initial_seed() == 5
    assert not np.array_equal(flame.rand(10).numpy(), first)


def test_generators_are_apart_from_the_default() -> None:
    flame.manual_seed(5)
    expected = flame.rand(4).numpy()
    flame.manual_seed(5)
    own = flame.Generator().manual_seed(9)
    flame.rand(100, generator=own)
    np.testing.assert_array_equal(flame.rand(4).numpy(), expected)
    assert own.initial_seed() == 9
    assert own.seed() == own.initial_seed()
    assert str(own.device) == "cpu"


def test_state_is_checked() -> None:
    generator = flame.Generator()
    for wrong in (flame.zeros(16), flame.zeros(3, dtype=flame.uint8)):
        with pytest.raises(StateError, match="uint8"):
            generator.set_state(wrong)
    with pytest.raises(ArgumentError, match="64 bits"):
        generator.manual_seed(2**64)
    with pytest.raises(DTypeError, match="integer"):
        generator.manual_seed(1.5)  # type: ignore[arg-type]


# --- distributions --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [flame.float32, flame.float64])
def test_rand_is_uniform(dtype: flame.DType) -> None:
    drawn = flame.rand(COUNT, dtype=dtype).numpy()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert kolmogorov(drawn, lambda x: x) < 2.2


@pytest.mark.parametrize("dtype", [flame.float32, flame.float64])
def test_randn_is_normal(dtype: flame.DType) -> None:
    drawn = flame.randn(COUNT, dtype=dtype).numpy()
    assert kolmogorov(drawn, normal_below) < 2.2
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (drawn.astype(np.float64) ** power).mean() - moment
        assert abs(error) < 4 * math.sqrt(spread / COUNT), power
    assert np.abs(drawn).max() > 4


def test_other_distributions() -> None:
    x = flame.empty(COUNT)
    assert kolmogorov(x.uniform_(-2, 3).numpy(), lambda v: (v + 2) / 5) < 2.2
    assert kolmogorov(x.normal_(1, 2).numpy(), lambda v: normal_below((v - 1) / 2)) < 2.2
    assert kolmogorov(x.exponential_(1.5).numpy(), lambda v: 1 - np.exp(-1.5 * v)) < 2.2
    assert x.numpy().min() > 0
    mean = flame.full((COUNT,), 3.0)
    assert kolmogorov(flame.normal(mean, 0.5).numpy(), lambda v: normal_below((v - 3) / 0.5)) < 2.2
    assert flame.normal(0.0, 1.0, (3, 4)).shape == (3, 4)


@pytest.mark.parametrize(("low", "high"), [(0, 10), (-7, 6), (5, 6), (0, 1000)])
def test_randint_is_uniform(low: int, high: int) -> None:
    drawn = flame.randint(low, high, (COUNT,)).numpy()
    assert drawn.min() >= low
    assert drawn.max() < high
    counts = np.bincount(drawn - low, minlength=high - low)
    expected = COUNT / (high - low)
    square = float(((counts - expected) ** 2 / expected).sum())
    freedom = high - low - 1
    assert square <= freedom + 4.5 * math.sqrt(2 * freedom) + 1e-9


def test_randint_of_wide_ranges() -> None:
    drawn = flame.randint(-(2**62), 2**62, (COUNT,)).numpy()
    assert kolmogorov(drawn, lambda v: (v + 2.0**62) / 2.0**63) < 2.2
    small = flame.empty(1000, dtype=flame.uint8).random_()
    assert set(range(256)) >= set(small.tolist())
    assert len(set(small.tolist())) > 200
    assert flame.empty(1000, dtype=flame.int64).random_().numpy().max() > 2**61
    assert set(flame.empty(100, dtype=flame.bool).random_().tolist()) == {True, False}
    assert flame.randint(5, (2, 3), dtype=flame.int32).dtype is flame.int32
    assert flame.randint_like(flame.zeros(4), 3).dtype is flame.float32


def test_bernoulli() -> None:
    chances = flame.full((COUNT,), 0.3)
    drawn = flame.bernoulli(chances).numpy()
    assert set(np.unique(drawn)) == {0.0, 1.0}
    assert abs(drawn.mean() - 0.3) < 4 * math.sqrt(0.21 / COUNT)
    assert not flame.bernoulli(flame.zeros(1000)).numpy().any()
    assert flame.bernoulli(flame.ones(1000)).numpy().all()
    flags = flame.empty(COUNT, dtype=flame.bool).bernoulli_(0.25).numpy()
    assert abs(flags.mean() - 0.25) < 4 * math.sqrt(0.1875 / COUNT)
    with pytest.raises(ArgumentError, match=r"\[0, 1\]"):
        flame.bernoulli(flame.tensor([0.5, 1.5]))
    with pytest.raises(ArgumentError, match=r"\[0, 1\]"):
        flame.bernoulli(flame.tensor([math.nan]))


def test_randperm() -> None:
    drawn = flame.randperm(1000).numpy()
    np.testing.assert_array_equal(np.sort(drawn), np.arange(1000))
    firsts = np.array([flame.randperm(5).numpy() for _ in range(2000)])
    for place in range(5):
        counts = np.bincount(firsts[:, place], minlength=5)
        assert ((counts - 400) ** 2 / 400).sum() < 4 + 4.5 * math.sqrt(8)
    assert flame.randperm(0).shape == (0,)


def test_multinomial_with_replacement() -> None:
    weights = np.array([[1.0, 0.0, 3.0, 4.0], [5.0, 1.0, 1.0, 1.0]])
    drawn = flame.multinomial(flame.from_numpy(weights), 50_000, replacement=True).numpy()
    assert drawn.shape == (2, 50_000)
    for row, share in zip(drawn, weights / weights.sum(1, keepdims=True), strict=True):
        found = np.bincount(row, minlength=4) / row.size
        assert np.all(np.abs(found - share) <= 4.5 * np.sqrt(share * (1 - share) / row.size))


def test_multinomial_without_replacement() -> None:
    weights = flame.tensor([[1.0, 2.0, 3.0, 4.0]]).expand(20_000, 4)
    drawn = flame.multinomial(weights, 2).numpy()
    assert np.all(drawn[:, 0] != drawn[:, 1])
    share = np.array([0.1, 0.2, 0.3, 0.4])
    second = sum(p * np.where(np.arange(4) == i, 0, share) / (1 - p) for i, p in enumerate(share))
    for column, expected in zip(drawn.T, (share, second), strict=True):
        found = np.bincount(column, minlength=4) / 20_000
        assert np.all(np.abs(found - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 20_000))
    everything = flame.multinomial(flame.tensor([0.0, 1.0, 2.0]), 3).tolist()
    assert sorted(everything) == [0, 1, 2]
    assert everything[-1] == 0


def test_multinomial_refuses() -> None:
    for weights, count in (
        ([-1.0, 2.0], 1),
        ([0.0, 0.0], 1),
        ([math.inf, 1.0], 1),
        ([1.0, 2.0], 3),
    ):
        with pytest.raises(ArgumentError, match="multinomial"):
            flame.multinomial(flame.tensor(weights), count)


# --- independence ---------------------------------------------------------------------------------


def test_draws_are_independent() -> None:
    first, second = flame.randn(COUNT).numpy(), flame.randn(COUNT).numpy()
    assert abs(correlation(first, second)) < 4
    assert abs(correlation(first[1:], first[:-1])) < 4
    assert abs(correlation(first**2, second**2)) < 4
    other = flame.Generator().manual_seed(1235)
    assert abs(correlation(flame.Generator().manual_seed(1234) and first,
                           flame.randn(COUNT, generator=other).numpy())) < 4  # fmt: skip


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_and_scales(p: float) -> None:
    kept = dropout(flame.ones(COUNT), p).numpy()
    np.testing.assert_allclose(np.unique(kept), [0, 1 / (1 - p)], rtol=1e-6)
    assert abs((kept != 0).mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / COUNT)
    again = dropout(flame.ones(COUNT), p).numpy()
    assert abs(correlation(kept, again)) < 4


def test_dropout_gradient_has_the_same_mask() -> None:
    x = flame.randn(300, 7).requires_grad_()
    y = dropout(x.T, 0.4)
    flame.rand(99)  # another draw in between must not change the mask
    (gradient,) = flame.autograd.engine.grad([y.sum()], [x], [None], True, True, False)
    mask = np.where(y.detach().numpy() != 0, 1 / 0.6, 0).T
    np.testing.assert_allclose(gradient.detach().numpy(), mask, rtol=1e-6)


def test_dropout_does_not_see_the_layout() -> None:
    x = flame.ones(30, 50)
    state = flame.get_rng_state()
    flat = dropout(x, 0.5).numpy()
    flame.set_rng_state(state)
    np.testing.assert_array_equal(dropout(flame.ones(50, 30).T, 0.5).numpy(), flat)
    words = philox.reference_shared(1234, 0, 1500)
    np.testing.assert_array_equal(flat.ravel() != 0, (words >> 8) * 2.0**-24 >= 0.5)


def test_dropout_edges() -> None:
    x = flame.ones(5)
    assert dropout(x, 0.5, False) is x
    assert dropout(x, 0.0) is x
    assert dropout(x, 1.0).tolist() == [0] * 5
    dropout(x, 1.0, True, True)
    assert x.tolist() == [0] * 5
    with pytest.raises(ArgumentError, match="p must lie"):
        dropout(x, 1.5)
    with pytest.raises(DTypeError, match="dropout"):
        dropout(flame.ones(3, dtype=flame.int64))


@pytest.mark.parametrize(
    ("function", "shape"),
    [(dropout1d, (30, 40, 5)), (dropout2d, (30, 40, 5, 2)), (dropout3d, (30, 40, 2, 3, 2)),
     (feature_dropout, (30, 40)), (dropout1d, (40, 5))],
)  # fmt: skip
def test_channels_are_dropped_whole(
    function: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    made = function(flame.ones(shape), 0.3).numpy()
    assert made.shape == shape
    lead = 1 if len(shape) == 2 and function is dropout1d else 2
    flat = made.reshape(math.prod(shape[:lead]), -1)
    assert np.all(flat == flat[:, :1])
    np.testing.assert_allclose(np.unique(flat), [0, 1 / 0.7], rtol=1e-6)


def test_bad_arguments() -> None:
    wrong: list[Callable[[], Any]] = [
        lambda: flame.randint(5, 5, (2,)), lambda: flame.rand(-1), lambda: flame.randperm(-1),
        lambda: flame.empty(3).normal_(0, -1), lambda: flame.empty(3).uniform_(2, 1),
        lambda: flame.empty(3).exponential_(0), lambda: flame.rand(2, dtype=flame.int64),
        lambda: flame.normal(0.0, 1.0), lambda: feature_dropout(flame.ones(3)),
    ]  # fmt: skip
    for call in wrong:
        with pytest.raises(FlameError):
            call()
    with pytest.raises(ShapeError):
        flame.rand(2, -3)
