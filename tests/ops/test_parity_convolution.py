"""Convolutions against PyTorch: its database of operators, layouts, odd sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import flame
from flame.core.errors import ArgumentError, DTypeError, FlameError, ShapeError
from flame.nn import functional as F

from .entries import cases, check_errors, check_first, check_second
from .parity import agree, draw

pytestmark = [pytest.mark.ops, pytest.mark.filterwarnings("ignore")]

RANKS = (1, 2, 3)
ENTRIES = [f"nn.functional.conv{kind}{r}d" for kind in ("", "_transpose") for r in RANKS]


@pytest.mark.parametrize("entry", cases(ENTRIES))
def test_first_order(entry: Any) -> None:
    check_first(entry)


@pytest.mark.parametrize("entry", cases(ENTRIES))
def test_second_order(entry: Any) -> None:
    check_second(entry)


@pytest.mark.parametrize("entry", cases([f"nn.functional.conv{r}d" for r in RANKS]))
def test_errors(entry: Any) -> None:
    check_errors(entry)


# (input, weight, stride, padding, dilation, groups)
FORMS = [
    ((2, 16, 9, 9), (70, 16, 3, 3), 1, 1, 1, 1),  # channels beyond one block of lanes
    ((3, 33, 5, 7), (17, 33, 3, 2), (2, 1), (0, 1), (1, 2), 1),
    ((2, 48, 4, 4), (96, 24, 3, 3), 1, 1, 1, 2),
    ((1, 6, 12, 11), (6, 1, 5, 3), (2, 3), (2, 1), 1, 6),  # depthwise
    ((2, 4, 6, 6), (8, 1, 3, 3), 1, 2, 2, 4),
    ((2, 3, 30, 40), (5, 3, 7, 7), 4, 3, 1, 1),
    ((2, 5, 8, 8), (6, 5, 1, 1), 2, 0, 1, 1),  # phases without taps
    ((1, 2, 3, 3), (3, 2, 3, 3), 1, 4, 1, 1),  # rows of padding alone
    ((40, 8, 1, 1), (8, 8, 3, 3), 1, 1, 1, 1),  # many images of one position
]


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: Any) -> None:
    shape, weight, stride, padding, dilation, groups = form
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    operands = draw(*shape), draw(*weight, seed=1), draw(weight[0], seed=2)
    agree(
        lambda x, w, b: F.conv2d(x, w, b, **options),
        lambda x, w, b: torch.nn.functional.conv2d(x, w, b, **options),
        *operands,
    )


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize(("stride", "dilation", "groups"), [(2, 1, 1), (3, 2, 2), (1, 2, 4)])
def test_transposed(stride: int, dilation: int, groups: int, extra: int) -> None:
    if extra >= max(stride, dilation):
        pytest.skip("no such output_padding")
    options = {"stride": stride, "padding": 1, "output_padding": extra, "dilation": dilation,
               "groups": groups}  # fmt: skip
    operands = draw(2, 8, 5, 6), draw(8, 4, 3, 2, seed=1), draw(4 * groups, seed=2)
    agree(
        lambda x, w, b: F.conv_transpose2d(x, w, b, **options),
        lambda x, w, b: torch.nn.functional.conv_transpose2d(x, w, b, **options),
        *operands,
    )


def test_long_sums_in_float32() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 64, 16, 16)).astype(np.float32)
    w = (rng.standard_normal((64, 64, 3, 3)) / 24).astype(np.float32)
    found = F.conv2d(flame.from_numpy(x), flame.from_numpy(w), padding=1).numpy()
    exact = torch.nn.functional.conv2d(*(torch.from_numpy(a).double() for a in (x, w)), padding=1)
    np.testing.assert_allclose(found, exact.numpy(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_channels_last_stays_channels_last(padding: int, dtype: Any) -> None:
    rng = np.random.default_rng(1)
    x = np.moveaxis(rng.standard_normal((2, 6, 7, 20)).astype(dtype), -1, 1)
    w = rng.standard_normal((18, 20, 3, 3)).astype(dtype)
    found = F.conv2d(flame.from_numpy(x), flame.from_numpy(w), padding=padding)
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x).double(), torch.from_numpy(w).double(), padding=padding
    )
    assert found.type.strides[1] == 1
    tolerance = 2e-2 if dtype is np.float16 else 1e-4
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 5)])
def test_same_padding(kernel: tuple[int, int]) -> None:
    agree(
        lambda x, w: F.conv2d(x, w, padding="same", dilation=2),
        lambda x, w: torch.nn.functional.conv2d(x, w, padding="same", dilation=2),
        draw(2, 3, 6, 7),
        draw(4, 3, *kernel, seed=1),
    )


def test_results_do_not_depend_on_threads() -> None:
    rng = np.random.default_rng(2)
    x = flame.from_numpy(rng.standard_normal((8, 16, 16, 16)).astype(np.float32))
    w = flame.from_numpy(rng.standard_normal((32, 16, 3, 3)).astype(np.float32)).requires_grad_()
    runs = []
    for _ in range(3):
        (grad,) = flame.autograd.grad([F.conv2d(x, w, padding=1).sum()], [w])
        runs.append(grad.numpy())
    assert all((r == runs[0]).all() for r in runs)


def _zeros(*shape: int) -> Any:
    return flame.from_numpy(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: F.conv2d(_zeros(1, 3, 5, 5), _zeros(4, 2, 3, 3)), ShapeError),
        (lambda: F.conv2d(_zeros(1, 4, 5, 5), _zeros(3, 2, 3, 3), groups=2), ShapeError),
        (lambda: F.conv2d(_zeros(1, 3, 5, 5), _zeros(4, 3, 7, 7)), ShapeError),
        (lambda: F.conv2d(_zeros(1, 3, 5, 5), _zeros(4, 3, 3, 3), stride=0), ArgumentError),
        (lambda: F.conv2d(_zeros(1, 3, 5, 5), _zeros(4, 3, 3, 3), padding=-1), ArgumentError),
        (lambda: F.conv2d(_zeros(1, 3, 5, 5), _zeros(4, 3, 3, 3), padding="full"), ArgumentError),
        (
            lambda: F.conv2d(_zeros(1, 3, 5, 5), _zeros(4, 3, 3, 3), padding="same", stride=2),
            ArgumentError,
        ),
        (lambda: F.conv2d(_zeros(1, 3, 5, 5), _zeros(4, 3, 3, 3), _zeros(3)), ShapeError),
        (lambda: F.conv2d(_zeros(3, 5), _zeros(4, 3, 3, 3)), ShapeError),
        (lambda: F.conv2d(_zeros(1, 3, 5, 5), _zeros(4, 3, 3, 3), stride=(1, 2, 3)), ShapeError),
        (lambda: F.conv2d(_zeros(1, 3, 5, 5).double(), _zeros(4, 3, 3, 3)), DTypeError),
        (lambda: F.conv2d(None, _zeros(4, 3, 3, 3)), DTypeError),
        (
            lambda: F.conv_transpose2d(_zeros(1, 4, 5, 5), _zeros(4, 3, 3, 3), output_padding=1),
            ArgumentError,
        ),
        (lambda: F.conv_transpose2d(_zeros(1, 3, 5, 5), _zeros(4, 3, 3, 3)), ShapeError),
    ],
)
def test_refusals(call: Any, error: type[FlameError]) -> None:
    with pytest.raises(error, match=r"\S"):
        call()
