"""Views, joins, padding, scans and other changes of shape against PyTorch, on its own samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import flame
from flame.core.errors import FlameError

from .entries import cases, check_errors, check_first, check_second

LISTED = """
H T mH mT as_strided_copy atleast_1d atleast_2d atleast_3d block_diag broadcast_shapes
broadcast_tensors broadcast_to cartesian_prod cat chunk clone column_stack combinations
constant_pad_nd contiguous cummax cummin cumprod cumsum cumulative_trapezoid diag diag_embed
diagflat diagonal diagonal_copy diagonal_scatter diff dsplit dstack expand expand_as expand_copy
flatten flip fliplr flipud hsplit hstack logcumsumexp meshgrid movedim narrow narrow_copy
nn.functional.pad permute permute_copy ravel repeat repeat_interleave reshape reshape_as roll
rot90 select select_scatter slice_scatter split split_with_sizes split_with_sizes_copy squeeze
squeeze_copy stack t t_copy tensor_split tile trace transpose transpose_copy trapezoid trapz
tril tril_indices triu triu_indices unbind unbind_copy unflatten unfold unfold_copy unsafe_chunk
unsafe_split unsqueeze unsqueeze_copy view view_as view_copy vsplit vstack
"""
NAMES = LISTED.split()
NO_GRADIENT = {"broadcast_shapes", "tril_indices", "triu_indices"}
CASES = cases(NAMES)
pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's deprecations


@pytest.mark.parametrize("entry", CASES)
def test_equals_pytorch(entry: Any) -> None:
    check_first(entry)


@pytest.mark.parametrize("entry", [c for c in CASES if c.values[0].supports_gradgrad])
def test_second_derivatives(entry: Any) -> None:
    if entry.name not in NO_GRADIENT:
        check_second(entry)


@pytest.mark.parametrize("entry", [c for c in CASES if c.values[0].error_inputs_func])
def test_refuses_bad_input(entry: Any) -> None:
    check_errors(entry)


@pytest.mark.parametrize("shape", [(130, 70), (3, 65, 200), (2, 64, 3, 64), (1000, 9)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "int8"])
def test_transposing_copies(shape: tuple[int, ...], dtype: str) -> None:
    """Copies between layouts that go by tiles, with partial tiles at the edges."""
    array = np.arange(np.prod(shape)).reshape(shape) % 120
    x = flame.from_numpy(array).to(getattr(flame, dtype))
    for order in ((1, 0, *range(2, len(shape))), tuple(reversed(range(len(shape))))):
        found = x.permute(*order).contiguous()
        assert found.is_contiguous()
        np.testing.assert_array_equal(found.to(flame.float64).numpy(), array.transpose(order))


def test_views_share_memory() -> None:
    x = flame.zeros(4, 6)
    for view in (
        x.T,
        x[1],
        x[1:3, ::2],
        x.view(2, 12),
        x.diagonal(),
        x.unfold(1, 3, 1),
        x.select(1, 2),
        *x.split(2),
        *x.chunk(3, 1),
        *x.unbind(),
        x.flatten(),
        x.movedim(0, 1),
    ):
        assert view.storage is x.storage
    x.diagonal().copy_(flame.ones(4))
    assert x.sum().item() == 4


def test_bits_seen_as_another_dtype() -> None:
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    ours = flame.from_numpy(x)
    np.testing.assert_array_equal(ours.view(flame.int32).numpy(), x.view(np.int32))
    np.testing.assert_array_equal(ours.view(flame.int16).numpy(), x.view(np.int16))
    np.testing.assert_array_equal(ours.view(flame.int64).numpy(), x.view(np.int64))
    with pytest.raises(FlameError):
        ours.T.view(flame.int16)


def test_cat_promotes_and_skips_empty_vectors() -> None:
    parts = [torch.arange(3), torch.ones(2, dtype=torch.float16), torch.zeros(0)]
    ours = flame.cat([flame.from_numpy(p.numpy()) for p in parts])
    theirs = torch.cat(parts)
    assert str(ours.dtype).removeprefix("flame.") == str(theirs.dtype).removeprefix("torch.")
    np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_running_extremes_with_nan() -> None:
    x = np.array([1.0, 3.0, np.nan, 2.0, np.nan, 7.0], np.float32)
    for name in ("cummax", "cummin"):
        ours, theirs = (
            getattr(flame, name)(flame.from_numpy(x), 0),
            getattr(torch, name)(torch.from_numpy(x), 0),
        )
        np.testing.assert_array_equal(ours.values.numpy(), theirs.values.numpy())
        np.testing.assert_array_equal(ours.indices.numpy(), theirs.indices.numpy())
