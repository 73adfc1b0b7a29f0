"""Normalizations of channels-last images on the emulated device, against the CPU's results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
from flame.core import dtypes
from flame.core.dtypes import DType
from flame.nn import functional as F
from flame.ops import tiles

from .test_scans import close

pytestmark = pytest.mark.usefixtures("eager_cuda")

TOLERANCE = {
    dtypes.float64: 1e-10,
    dtypes.float32: 2e-5,
    dtypes.float16: 4e-3,
    dtypes.bfloat16: 3e-2,
}


def image(rng: Any, shape: tuple[int, ...], dtype: DType, offset: float = 0.0) -> flame.Tensor:
    """Channels-last in memory; channels differ in mean and scale."""
    scale = rng.uniform(0.5, 2.0, shape[1]).reshape(1, -1, *(1,) * (len(shape) - 2))
    made = rng.standard_normal(shape) * scale + scale + offset
    axes = (0, *range(2, len(shape)), 1)
    rows = flame.from_numpy(np.ascontiguousarray(made.transpose(axes)).astype(np.float32))
    back = (0, len(shape) - 1, *range(1, len(shape) - 1))
    return rows.to(dtype).permute(back)


def many_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "FEWEST", 8)
    monkeypatch.setattr(tiles, "SHORTEST", 1)


def run(
    x: flame.Tensor, weight: Any, bias: Any, grad: flame.Tensor, how: Any
) -> list[flame.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    given = iter(leaves)
    x, weight, bias = (None if t is None else next(given) for t in (x, weight, bias))
    y = how(x, weight, bias)
    y.backward(grad)
    return [y, *(t.grad for t in leaves)]


def compare(
    x: flame.Tensor, weight: Any, bias: Any, grad: flame.Tensor, how: Any, tolerance: float
) -> None:
    wanted = run(x, weight, bias, grad, how)
    moved = [None if t is None else t.to("cuda") for t in (x, weight, bias)]
    got = run(*moved, grad.to("cuda"), how)
    again = run(*moved, grad.to("cuda"), how)
    positions = x.numel() // x.shape[1]
    for number, (a, b, c) in enumerate(zip(got, wanted, again, strict=True)):
        scale = 1.0 if number < 2 else positions**0.5  # sums of as many terms
        close(a, b, tolerance * scale)
        np.testing.assert_array_equal(
            *(t.detach().cpu().to(dtypes.float64).numpy() for t in (a, c))
        )


SHAPES = [
    (3, 64, 20, 15), (4, 24, 9, 11), (2, 3, 30, 30), (2, 96, 17, 19), (1, 320, 25, 21),
    (2, 2048, 13, 13), (1, 2100, 17, 17), (5, 6, 300), (700, 40),
]  # fmt: skip


def in_turn(cases: list[Any]) -> list[Any]:
    """Each case with two dtypes, so that all dtypes come up."""
    every = list(TOLERANCE)
    return [(c, every[(i + j) % len(every)]) for i, c in enumerate(cases) for j in (0, 2)]


def batch_norm(x: Any, weight: Any, bias: Any) -> Any:
    return F.batch_norm(x, None, None, weight, bias, training=True)


@pytest.mark.parametrize(("shape", "dtype"), in_turn(SHAPES), ids=str)
def test_batch_norm(shape: tuple[int, ...], dtype: DType, monkeypatch: pytest.MonkeyPatch) -> None:
    many_runs(monkeypatch)
    rng = np.random.default_rng(0)
    x, grad = (image(rng, shape, dtype) for _ in range(2))
    weight, bias = (
        flame.from_numpy(rng.uniform(0.5, 1.5, shape[1]).astype(np.float32)) for _ in range(2)
    )
    if dtype is dtypes.float64:
        weight, bias = weight.to(dtype), bias.to(dtype)
    compare(x, weight, bias, grad, batch_norm, TOLERANCE[dtype])


def test_what_follows_batch_norm_joins_its_last_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    many_runs(monkeypatch)
    rng = np.random.default_rng(1)
    shape = (3, 64, 12, 10)
    x, other = (image(rng, shape, dtypes.bfloat16) for _ in range(2))
    weight, bias = (
        flame.from_numpy(rng.uniform(0.5, 1.5, 64).astype(np.float32)) for _ in range(2)
    )

    def step(x: Any, other: Any, weight: Any, bias: Any) -> Any:
        return (batch_norm(x, weight, bias) + other).relu()

    operands = [t.to("cuda") for t in (x, other, weight, bias)]
    compiled = flame.compile(step)
    with flame.no_grad():
        got, wanted = compiled(*operands), step(x, other, weight, bias)
    close(got, wanted, 3e-2)
    report = compiled.report()
    assert "1 tasks, 3 launches" in report
    assert "batch_norm_add_relu" in report


def test_runs_are_whole_tiles_and_reach_all_processors() -> None:
    """Of the images of a ResNet and a U-Net, (batch, positions, channels)."""
    for shape in ((1, 256 * 112 * 112, 64), (1, 256 * 49, 2048), (16, 4096, 320), (16, 256, 1280)):
        made = tiles.tiles_of(shape, 2)
        assert made.rows * made.part <= made.elements
        assert made.rows * shape[2] % 8 == 0
        assert made.step % made.rows == 0
        assert 100 < made.batch * made.runs * made.parts <= tiles.BLOCKS


def grouped(groups: int) -> Any:
    return lambda x, weight, bias: F.group_norm(x, groups, weight, bias)


GROUPED = [
    ((3, 64, 20, 15), 32), ((2, 24, 9, 11), 3), ((2, 6, 30, 30), 1), ((2, 320, 13, 11), 32),
    ((2, 2100, 9, 9), 7), ((3, 5, 300), 5), ((40, 32, 3, 3), 4),
]  # fmt: skip


@pytest.mark.parametrize(("case", "dtype"), in_turn(GROUPED), ids=str)
def test_group_norm(
    case: tuple[tuple[int, ...], int], dtype: DType, monkeypatch: pytest.MonkeyPatch
) -> None:
    many_runs(monkeypatch)
    shape, groups = case
    rng = np.random.default_rng(0)
    x, grad = (image(rng, shape, dtype) for _ in range(2))
    weight, bias = (
        flame.from_numpy(rng.uniform(0.5, 1.5, shape[1]).astype(np.float32)) for _ in range(2)
    )
    if dtype is dtypes.float64:
        weight, bias = weight.to(dtype), bias.to(dtype)
    compare(x, weight, bias, grad, grouped(groups), TOLERANCE[dtype])


def test_without_weight_and_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    many_runs(monkeypatch)
    rng = np.random.default_rng(0)
    x, grad = (image(rng, (2, 32, 20, 17), dtypes.float32) for _ in range(2))
    bias = flame.from_numpy(rng.uniform(0.5, 1.5, 32).astype(np.float32))
    for how in (batch_norm, grouped(4)):
        compare(x, None, None, grad, how, 2e-5)
        compare(x, None, bias, grad, how, 2e-5)


def test_variances_beside_large_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences are taken before they are squared."""
    many_runs(monkeypatch)
    x = image(np.random.default_rng(0), (2, 64, 30, 20), dtypes.float32, offset=1000.0)
    wide, there = x.to(dtypes.float64), x.to("cuda")
    for how in (batch_norm, grouped(32)):
        close(how(there, None, None).to(dtypes.float64), how(wide, None, None), 1e-3)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 64, 12, 10), dtypes.bfloat16), ((40, 5, 7, 7), dtypes.float32),
     ((2, 3, 300), dtypes.float64), ((1, 1100, 2, 2), dtypes.float16)],
    ids=str,
)  # fmt: skip
def test_batch_norm_of_row_major_images(shape: tuple[int, ...], dtype: DType) -> None:
    rng = np.random.default_rng(0)
    x, grad = (image(rng, shape, dtype).contiguous() for _ in range(2))
    weight, bias = (
        flame.from_numpy(rng.uniform(0.5, 1.5, shape[1]).astype(np.float32)) for _ in range(2)
    )
    if dtype is dtypes.float64:
        weight, bias = weight.to(dtype), bias.to(dtype)
    compare(x, weight, bias, grad, batch_norm, TOLERANCE[dtype])
    if dtype is dtypes.float32:
        compare(x, None, None, grad, batch_norm, TOLERANCE[dtype])


def activated(norm: Any, activation: Any) -> Any:
    def step(x: Any, weight: Any, bias: Any, grad: Any) -> Any:
        leaves = [t for t in (x, weight, bias) if t is not None]
        activation(norm(x, weight, bias)).to(grad.dtype).backward(grad)
        found = [t.grad for t in leaves]
        for t in leaves:
            t.grad = None
        return found

    return step


@pytest.mark.parametrize(
    ("norm", "activation", "op"),
    [(batch_norm, F.relu, "batch_norm"), (grouped(32), F.silu, "group_norm"),
     (batch_norm, F.silu, "batch_norm"), (grouped(4), F.relu, "group_norm")],
    ids=["batch-relu", "group-silu", "batch-silu", "group-relu"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("shape", "bare"), [((3, 64, 20, 15), True), ((1, 2112, 13, 11), False)], ids=str
)
def test_gradients_through_activations_are_those_of_both(
    norm: Any, activation: Any, op: str, shape: tuple[int, ...], bare: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    many_runs(monkeypatch)
    rng = np.random.default_rng(3)
    x, grad = (image(rng, shape, dtypes.float32) for _ in range(2))
    parameters = [
        None if bare else flame.from_numpy(rng.uniform(0.5, 1.5, shape[1]).astype(np.float32))
        for _ in range(2)
    ]
    step = activated(norm, activation)
    wide = [None if t is None else t.to(dtypes.float64) for t in (x, *parameters)]
    wanted = step(
        *(None if t is None else t.requires_grad_() for t in wide), grad.to(dtypes.float64)
    )
    there = [
        None if t is None else t.detach().to("cuda").requires_grad_() for t in (x, *parameters)
    ]
    compiled = flame.compile(step)
    got = compiled(*there, grad.to("cuda"))
    assert f"{op}_activated_backward" in compiled.report()
    for number, (a, b) in enumerate(zip(got, wanted, strict=True)):
        close(a.to(dtypes.float64), b, 2e-5 * (1 if number == 0 else 30))
