"""Normalizations and softmax against PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as T

import flame
from flame.core.errors import ArgumentError, DTypeError, FlameError, ShapeError
from flame.nn import functional as F

from .database import function_of, op_db, run_entry
from .parity import agree, draw, to_flame

pytestmark = [
    pytest.mark.ops,
    pytest.mark.filterwarnings("ignore"),  # of PyTorch's own samples
]

NAMES = [
    "softmax",
    "log_softmax",
    "nn.functional.softmin",
    "nn.functional.layer_norm",
    "nn.functional.rms_norm",
    "nn.functional.group_norm",
    "nn.functional.batch_norm",
    "nn.functional.instance_norm",
    "nn.functional.normalize",
]
ENTRIES = [e for e in op_db if e.name in NAMES]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.name}-{e.variant_test_name}")
def test_database(entry: Any) -> None:
    assert function_of(entry) is not None
    tally = run_entry(entry, 12)
    assert not tally.errors, tally.errors[0]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(19,), (5, 19)])
def test_layer_and_rms_norm(shape: tuple[int, ...], affine: bool) -> None:
    x = draw(4, 5, 19)
    weight, bias = (draw(*shape, seed=s) if affine else None for s in (1, 2))
    agree(
        lambda x, w, b: F.layer_norm(x, shape, w, b), lambda x, w, b: T.layer_norm(x, shape, w, b),
        x, weight, bias,
    )  # fmt: skip
    agree(
        lambda x, w: F.rms_norm(x, shape, w, 1e-3), lambda x, w: T.rms_norm(x, shape, w, 1e-3),
        x, weight,
    )  # fmt: skip


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 5), (3, 6, 4, 5)])
def test_group_batch_and_instance_norm(shape: tuple[int, ...], affine: bool) -> None:
    x = draw(*shape)
    weight, bias = (draw(6, seed=s) if affine else None for s in (1, 2))
    mean, variance = draw(6, seed=3, grad=False), draw(6, seed=4, grad=False).abs() + 0.5
    agree(lambda *a: F.group_norm(a[0], 3, *a[1:]), lambda *a: T.group_norm(a[0], 3, *a[1:]),
          x, weight, bias)  # fmt: skip
    agree(
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
        lambda x, w, b: T.batch_norm(x, None, None, w, b, True),
        x, weight, bias,
    )  # fmt: skip
    agree(
        lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b, False),
        lambda x, m, v, w, b: T.batch_norm(x, m, v, w, b, False),
        x, mean, variance, weight, bias,
    )  # fmt: skip
    if len(shape) > 2:
        agree(lambda x, w, b: F.instance_norm(x, None, None, w, b),
              lambda x, w, b: T.instance_norm(x, None, None, w, b), x, weight, bias)  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (5, 9, 11, 6), (4, 8, 9, 70)])
def test_batch_norm_reads_channels_last(shape: tuple[int, ...]) -> None:
    channels = shape[-1]
    agree(
        lambda x, w, b: F.batch_norm(x.permute(0, 3, 1, 2), None, None, w, b, True),
        lambda x, w, b: T.batch_norm(x.permute(0, 3, 1, 2), None, None, w, b, True),
        draw(*shape), draw(channels, seed=1), draw(channels, seed=2),
    )  # fmt: skip


@pytest.mark.parametrize("norm", ["batch_norm", "instance_norm"])
def test_running_statistics(norm: str) -> None:
    x = draw(4, 6, 5, grad=False)
    means = torch.linspace(-1, 1, 6, dtype=torch.float64)
    variances = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    my_means, my_variances = to_flame(means), to_flame(variances)
    options = {"training": True} if norm == "batch_norm" else {"use_input_stats": True}
    for momentum in (0.1, 1 / 3):
        getattr(T, norm)(x, means, variances, momentum=momentum, **options)
        getattr(F, norm)(to_flame(x), my_means, my_variances, momentum=momentum, **options)
    np.testing.assert_allclose(my_means.numpy(), means.numpy(), 1e-12)
    np.testing.assert_allclose(my_variances.numpy(), variances.numpy(), 1e-12)


def test_statistics_do_not_cancel() -> None:
    x = (np.random.default_rng(0).standard_normal((8, 512)) + 4096).astype(np.float32)
    wide = x.astype(np.float64)
    want = (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
    np.testing.assert_allclose(F.layer_norm(flame.from_numpy(x), (512,)).numpy(), want, atol=2e-3)


def test_half_width_weights_may_be_wider() -> None:
    x = draw(6, 32, grad=False).float()
    weight = torch.linspace(0.5, 1.5, 32)
    made = F.layer_norm(to_flame(x).to(flame.bfloat16), (32,), to_flame(weight))
    assert made.dtype is flame.bfloat16
    want = T.layer_norm(x.bfloat16().float(), (32,), weight).numpy()
    np.testing.assert_allclose(made.to(flame.float32).numpy(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_softmax_of_every_dimension(dim: int) -> None:
    for name in ("softmax", "log_softmax"):
        agree(lambda x, n=name: getattr(flame, n)(x, dim),
              lambda x, n=name: getattr(torch, n)(x, dim), draw(3, 5, 17))  # fmt: skip
        agree(lambda x, n=name: getattr(flame, n)(x.permute(2, 0, 1), dim),
              lambda x, n=name: getattr(torch, n)(x.permute(2, 0, 1), dim),
              draw(3, 5, 17))  # fmt: skip


def test_softmax_at_infinity() -> None:
    inf = float("inf")
    rows = torch.tensor([[-inf, -inf], [inf, 0.0], [-inf, 0.0], [1e4, -1e4], [float("nan"), 0.0]])
    for name in ("softmax", "log_softmax"):
        made = getattr(flame, name)(to_flame(rows), 1).numpy()
        np.testing.assert_allclose(made, getattr(torch, name)(rows, 1).numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: F.layer_norm(x, (5,)), ShapeError),
        (lambda x: F.layer_norm(x, (4,), flame.ones((3,))), ShapeError),
        (lambda x: F.group_norm(x, 4), ShapeError),
        (lambda x: F.batch_norm(x, None, None), ArgumentError),
        (lambda x: F.batch_norm(x[:1, :, 0], None, None, training=True), ShapeError),
        (lambda x: F.batch_norm(x, flame.zeros((4,)), flame.ones((3,))), ShapeError),
        (lambda x: F.instance_norm(x[:, :, :1]), ShapeError),
        (lambda x: flame.softmax(x.to(flame.int64), 1), DTypeError),
        (lambda x: flame.softmax(x, 3), FlameError),
        (lambda x: F.layer_norm(x.to(flame.int64), (4,)), DTypeError),
    ],
)
def test_wrong_input(call: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        call(flame.ones((2, 3, 4)))
