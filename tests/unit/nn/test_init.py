"""First values: ranges, moments and structure, of `init` and of the layers' defaults."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import flame
from flame import nn
from flame.core.errors import ArgumentError, ShapeError
from flame.nn import init


@pytest.fixture(autouse=True)
def _seed() -> None:
    flame.manual_seed(0)


def values(tensor: flame.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def test_uniform_and_normal() -> None:
    x = nn.Parameter(flame.empty(200, 100))
    assert init.uniform_(x, -2.0, 4.0) is x
    v = values(x)
    assert v.min() >= -2.0
    assert v.max() < 4.0
    assert v.mean() == pytest.approx(1.0, abs=0.05)
    assert v.std() == pytest.approx(6 / math.sqrt(12), rel=0.02)
    v = values(init.normal_(x, 3.0, 0.5))
    assert v.mean() == pytest.approx(3.0, abs=0.02)
    assert v.std() == pytest.approx(0.5, rel=0.02)
    assert x.requires_grad
    assert x.is_leaf


def test_truncated_normal() -> None:
    x = init.trunc_normal_(flame.empty(200, 100), mean=1.0, std=2.0, a=-1.0, b=2.0)
    v = values(x)
    assert v.min() >= -1.0
    assert v.max() <= 2.0
    # Moments of the normal distribution N(1, 4) between -1 and 2.
    low, high = -1.0, 0.5
    phi = [math.exp(-z * z / 2) / math.sqrt(2 * math.pi) for z in (low, high)]
    mass = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
    assert v.mean() == pytest.approx(1.0 + 2.0 * (phi[0] - phi[1]) / mass, abs=0.02)
    far = values(init.trunc_normal_(flame.empty(1000), std=1.0, a=4.0, b=5.0))
    assert far.min() >= 4.0
    assert far.max() <= 5.0
    assert values(init.trunc_normal_(flame.empty(3), mean=9.0, std=0.0)).tolist() == [2.0] * 3
    with pytest.raises(ArgumentError, match="a < b"):
        init.trunc_normal_(flame.empty(3), a=1.0, b=1.0)


def test_inverse_error_function() -> None:
    y = np.array([-1.0, -0.999999, -0.7, -1e-9, 0.0, 0.3, 0.95, 0.9999999, 1.0])
    x = init._inverse_erf(flame.from_numpy(y)).numpy()
    np.testing.assert_allclose(np.vectorize(math.erf)(x), y, rtol=1e-12, atol=1e-18)


def test_constants() -> None:
    x = flame.empty(2, 3)
    assert values(init.constant_(x, 0.3)).tolist() == np.full((2, 3), 0.3, np.float32).tolist()
    assert values(init.ones_(x)).sum() == 6.0
    assert values(init.zeros_(x)).sum() == 0.0
    np.testing.assert_array_equal(values(init.eye_(x)), np.eye(2, 3))
    with pytest.raises(ShapeError, match="matrix"):
        init.eye_(flame.empty(2))


def test_dirac_keeps_channels() -> None:
    for shape, groups in (((4, 3, 3), 1), ((4, 2, 3, 3), 2), ((2, 3, 3, 3, 3), 1)):
        torch = pytest.importorskip("torch")
        found = values(init.dirac_(flame.empty(*shape), groups))
        expected = torch.nn.init.dirac_(torch.empty(*shape), groups)
        np.testing.assert_array_equal(found, expected.numpy())
    with pytest.raises(ShapeError, match="3, 4 or 5"):
        init.dirac_(flame.empty(2, 2))
    with pytest.raises(ArgumentError, match="groups"):
        init.dirac_(flame.empty(3, 2, 2), 2)


def test_gains() -> None:
    torch = pytest.importorskip("torch")
    for name in ("linear", "conv2d", "sigmoid", "tanh", "relu", "leaky_relu", "selu"):
        assert init.calculate_gain(name) == torch.nn.init.calculate_gain(name)
    assert init.calculate_gain("leaky_relu", 0.3) == torch.nn.init.calculate_gain("leaky_relu", 0.3)
    with pytest.raises(ArgumentError, match="softmax"):
        init.calculate_gain("softmax")


# In a weight of (64, 32, 3, 3): fan in 288, fan out 576.
SCALED: list[tuple[Callable[..., Any], dict[str, Any], float]] = [
    (init.xavier_uniform_, {"gain": 2.0}, 2.0 * math.sqrt(2 / 864)),
    (init.xavier_normal_, {"gain": 2.0}, 2.0 * math.sqrt(2 / 864)),
    (init.kaiming_uniform_, {"nonlinearity": "relu"}, math.sqrt(2 / 288)),
    (init.kaiming_normal_, {"mode": "fan_out", "a": 0.5}, math.sqrt(2 / 1.25 / 576)),
]


@pytest.mark.parametrize(("fill", "options", "deviation"), SCALED)
def test_scaled(fill: Callable[..., Any], options: dict[str, Any], deviation: float) -> None:
    v = values(fill(flame.empty(64, 32, 3, 3), **options))
    assert v.mean() == pytest.approx(0.0, abs=0.05 * deviation)
    assert v.std() == pytest.approx(deviation, rel=0.02)
    if fill.__name__.endswith("uniform_"):
        assert np.abs(v).max() <= deviation * math.sqrt(3) * 1.000001
    with pytest.raises(ShapeError, match="two or more"):
        fill(flame.empty(3))
    assert fill(flame.empty(3, 0)).shape == (3, 0)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 2, 3)])
def test_orthogonal(shape: tuple[int, ...]) -> None:
    matrix = values(init.orthogonal_(flame.empty(*shape), gain=2.0)).reshape(shape[0], -1)
    small = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    np.testing.assert_allclose(small, 4.0 * np.eye(len(small)), atol=1e-5)


def test_generator() -> None:
    for fill in (
        init.uniform_,
        init.normal_,
        init.trunc_normal_,
        init.xavier_uniform_,
        init.xavier_normal_,
        init.kaiming_uniform_,
        init.kaiming_normal_,
        init.orthogonal_,
    ):
        drawn = []
        for _ in range(2):
            generator = flame.Generator().manual_seed(5)
            drawn.append(values(fill(flame.empty(4, 3), generator=generator)))
        np.testing.assert_array_equal(*drawn)
        assert not np.array_equal(drawn[0], values(fill(flame.empty(4, 3))))


# Layer, and the bound of the uniform distribution of each parameter.
DEFAULTS = [
    (lambda nn: nn.Linear(400, 50), {"weight": 1 / 20, "bias": 1 / 20}),
    (lambda nn: nn.Conv2d(36, 40, 3, groups=4), {"weight": 1 / 9, "bias": 1 / 9}),
    (lambda nn: nn.ConvTranspose2d(40, 36, 3, groups=4), {"weight": 1 / 9, "bias": 1 / 9}),
    (lambda nn: nn.Bilinear(100, 3, 40), {"weight": 1 / 10, "bias": 1 / 10}),
    (lambda nn: nn.LSTM(30, 100), {"weight_ih_l0": 1 / 10, "bias_hh_l0": 1 / 10}),
    (lambda nn: nn.GRUCell(30, 100), {"weight_hh": 1 / 10, "bias_ih": 1 / 10}),
    (lambda nn: nn.MultiheadAttention(60, 3), {"in_proj_weight": math.sqrt(6 / 240)}),
]


@pytest.mark.parametrize(("build", "bounds"), DEFAULTS)
def test_layers_start_within_pytorchs_bounds(build: Any, bounds: dict[str, float]) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    for layer in (build(nn), build(torch.nn)):  # both, so that the bounds themselves are checked
        state = layer.state_dict()
        for name, bound in bounds.items():
            v = state[name].numpy()
            assert np.abs(v).max() <= bound * 1.000001
            assert np.abs(v).max() > bound * 0.85
            if v.size > 1000:
                assert v.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_layers_that_start_constant_or_normal() -> None:
    table = nn.Embedding(300, 40, padding_idx=1)
    v = values(table.weight)
    assert v.std() == pytest.approx(1.0, rel=0.03)
    assert (v[1] == 0).all()
    norm = nn.BatchNorm2d(3)
    assert values(norm.weight).tolist() == [1.0] * 3
    assert values(norm.bias).tolist() == [0.0] * 3
    attention = nn.MultiheadAttention(6, 2, add_bias_kv=True)
    assert (values(attention.in_proj_bias) == 0).all()
    assert (values(attention.out_proj.bias) == 0).all()
    assert (values(attention.bias_k) != 0).all()


def test_embedding_from_pretrained() -> None:
    table = flame.arange(6, dtype=flame.float32).reshape(3, 2)
    layer = nn.Embedding.from_pretrained(table)
    assert not layer.weight.requires_grad
    np.testing.assert_array_equal(layer(flame.tensor([2])).numpy(), [[4.0, 5.0]])
    assert nn.Embedding.from_pretrained(table, freeze=False).weight.requires_grad
    with pytest.raises(ShapeError, match="matrix"):
        nn.Embedding.from_pretrained(flame.ones(3))
