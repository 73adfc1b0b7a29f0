"""Indexing, scatters, embedding and sorting against PyTorch, on its own samples and on
subscripts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import flame
from flame.core.errors import FlameError, IndexRangeError
from flame.ops.embedding import embedding

from . import database
from .entries import cases, check_errors, check_first, check_second

LISTED = """
__getitem__ argsort argwhere bucketize count_nonzero gather index_add index_copy index_fill
index_put index_reduce index_select isin masked_fill masked_scatter masked_select median msort
nanmedian nn.functional.embedding nn.functional.one_hot nonzero nonzero_static put scatter
scatter_add scatter_reduce searchsorted sort take take_along_dim unique unique_consecutive
unravel_index
"""
NAMES = LISTED.split()
TIES = ["topk", "kthvalue", "mode"]  # which of equal elements is named is left open
CASES = cases(NAMES)
NO_GRADIENT = {"nn.functional.one_hot"}
pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's deprecations


def _function(entry: Any) -> Callable[..., Any] | None:
    if entry.name == "nn.functional.embedding":  # its samples give the weight first
        return lambda weight, index, **options: embedding(index, weight, **options)
    return database.function_of(entry)


@pytest.mark.parametrize("entry", CASES)
def test_equals_pytorch(entry: Any) -> None:
    check_first(entry, _function(entry))


@pytest.mark.parametrize("entry", [c for c in CASES if c.values[0].supports_gradgrad])
def test_second_derivatives(entry: Any) -> None:
    if entry.name not in NO_GRADIENT:
        check_second(entry, _function(entry))


@pytest.mark.parametrize("entry", [c for c in CASES if c.values[0].error_inputs_func])
def test_refuses_bad_input(entry: Any) -> None:
    check_errors(entry, _function(entry))


@pytest.mark.parametrize("entry", cases(TIES))
def test_selections_up_to_ties(entry: Any) -> None:
    function = database.function_of(entry)
    assert function is not None
    for dtype in (torch.float64, torch.int64):
        for sample in database.samples_of(entry, dtype, 10):
            operands, options, _ = database.prepared(sample)
            ours, theirs = (
                function(*operands, **options),
                entry.op(sample.input, *sample.args, **sample.kwargs),
            )
            database.compare(ours.values, theirs.values, database.describe(sample))
            assert ours.indices.shape == tuple(theirs.indices.shape)


A = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
ROWS = np.array([True, False, True, False, True])
SUBSCRIPTS: list[Any] = [
    0,
    -1,
    slice(None),
    slice(1, 5, 2),
    slice(-3, None),
    (0, 1),
    (..., 2),
    (slice(1, 3), None, 3),
    None,
    (slice(None), [0, 2, 2]),
    ([0, 1], [2, -1]),
    ([0, 1], slice(None), [2, 3]),
    (1, slice(None), [2, 3]),
    (slice(0, 4, 2), [[0, 1], [2, 3]]),
    A[:, :, 0] > 0.5,
    ROWS,
    (ROWS, 0),
    (slice(None), [True, False, True, False, True, False]),
    (ROWS, slice(None), [1, 2, 3]),
    (..., np.array([1, 2])),
    (np.array([[0], [1]]), np.array([[2, 3]])),
    (None, [1, 2]),
    ([],),
    True,
    False,
    (0, True),
    slice(3, 3),
    (np.array(2), [0, 1]),
    (2, None, [0, 1], ..., 3),
    A > 0.5,
    np.int64(2),
    (np.array([1, 2], np.int32),),
]


def _as(library: Any, index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_as(library, i) for i in index)
    if isinstance(index, np.ndarray):
        return library.from_numpy(index.copy())
    if isinstance(index, list):
        return library.tensor(index, dtype=None if index else library.int64)
    return index


@pytest.mark.parametrize("index", SUBSCRIPTS, ids=lambda i: str(i).replace("\n", "")[:60])
def test_subscripts(index: Any) -> None:
    """Reading, writing a tensor and a number, and the gradients of reading and of writing."""
    rng = np.random.default_rng(1)
    ours, theirs = (
        flame.from_numpy(A.copy()).requires_grad_(),
        torch.from_numpy(A.copy()).requires_grad_(),
    )
    our_index, their_index = _as(flame, index), _as(torch, index)
    got, want = ours[our_index], theirs[their_index]
    np.testing.assert_array_equal(got.detach().numpy(), want.detach().numpy())
    assert got.shape == tuple(want.shape)
    value = rng.random(want.shape).astype(np.float32)
    v, w = (
        flame.from_numpy(value.copy()).requires_grad_(),
        torch.from_numpy(value.copy()).requires_grad_(),
    )
    (got * v).sum().backward()
    (want * w).sum().backward()
    np.testing.assert_allclose(ours.grad.numpy(), theirs.grad.numpy(), rtol=1e-6)
    a, b = ours * 2, theirs * 2
    a[our_index] = v
    b[their_index] = w
    np.testing.assert_array_equal(a.detach().numpy(), b.detach().numpy())
    ours.grad = theirs.grad = v.grad = w.grad = None
    (a * a).sum().backward()
    (b * b).sum().backward()
    for x, y in ((ours, theirs), (v, w)):  # no gradient and a gradient of zeros are one
        found = np.zeros(x.shape) if x.grad is None else x.grad.numpy()
        expected = np.zeros(x.shape) if y.grad is None else y.grad.numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    with flame.no_grad(), torch.no_grad():
        a[our_index] = 3
        b[their_index] = 3
    np.testing.assert_array_equal(a.detach().numpy(), b.detach().numpy())


@pytest.mark.parametrize(
    "index", [7, -6, (0, 0, 0, 0), (..., ...), [0, 5], ([0, -7],), 1.5, "a", slice(None, None, -1),
              np.array([True, False]), np.zeros((5, 3), bool), ([0, 1], [0, 1, 2])],
    ids=str,
)  # fmt: skip
def test_bad_subscripts(index: Any) -> None:
    x = flame.from_numpy(A.copy())
    with pytest.raises(FlameError):
        _ = x[_as(flame, index)]
    with pytest.raises(FlameError):
        x[_as(flame, index)] = 0.0


def test_bad_index_names_op_dimension_and_size() -> None:
    x = flame.zeros(4, 3)
    with pytest.raises(
        IndexRangeError, match=r"index_select: index 9 .* dimension 1, which has size 3"
    ):
        x.index_select(1, flame.tensor([0, 9]))
    with pytest.raises(
        IndexRangeError, match=r"embedding: index -1 .* dimension 0, which has size 4"
    ):
        embedding(flame.tensor([[-1]]), x)
    with pytest.raises(IndexRangeError, match=r"index 4 .* dimension 0, which has size 4"):
        x[flame.tensor([4]), flame.tensor([1])]


def test_values_that_do_not_fit() -> None:
    x = flame.zeros(4, 3)
    with pytest.raises(FlameError):
        x[flame.tensor([0, 1])] = flame.zeros(3, 3)
    with pytest.raises(FlameError):
        x[1:3] = flame.zeros(4)


def test_repeated_indices_accumulate_the_same_each_time() -> None:
    rng = np.random.default_rng(0)
    index = flame.from_numpy(rng.integers(0, 7, 4000))
    source = flame.from_numpy(rng.standard_normal((4000, 200)).astype(np.float32))
    first = flame.zeros(7, 200).index_add(0, index, source).numpy()
    for _ in range(3):
        again = flame.zeros(7, 200).index_add(0, index, source).numpy()
        assert (first == again).all()
    exact = np.zeros((7, 200))
    np.add.at(exact, index.numpy(), source.numpy().astype(np.float64))
    np.testing.assert_allclose(first, exact, atol=1e-3)


@pytest.mark.parametrize("name", ["index_add_", "index_copy_", "scatter_", "scatter_add_"])
def test_in_place_forms(name: str) -> None:
    rng = np.random.default_rng(0)
    x, source = rng.random((6, 4)).astype(np.float32), rng.random((3, 4)).astype(np.float32)
    index = (
        np.array([4, 0, 2]) if name.startswith("index") else np.array([[4], [0], [2]]).repeat(4, 1)
    )
    results = []
    for library in (flame, torch):
        base = library.from_numpy(x.copy()).requires_grad_()
        values = library.from_numpy(source.copy()).requires_grad_()
        made = base * 1
        assert getattr(made, name)(0, library.from_numpy(index), values) is made
        (made * made).sum().backward()
        results.append([t.detach().numpy() for t in (made, base.grad, values.grad)])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_in_place_forms_written_back() -> None:
    x = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
    index = np.array([[0, 2], [1, 1]])
    for name, args in [
        ("scatter_", (1, "index", "source", "multiply")),
        ("scatter_reduce_", (1, "index", "source", "amax")),
        ("index_fill_", (1, "row", -1.0)), ("put_", ("index", "source")),
        ("masked_fill_", ("mask", 9.0)), ("masked_scatter_", ("mask", "source")),
        ("index_put_", (("row", "row"), "pair")), ("cumsum_", (1,)), ("tril_", ()),
    ]:  # fmt: skip
        results = []
        for library in (flame, torch):
            known = {
                "index": library.from_numpy(index),
                "row": library.from_numpy(index[1] * 0 + [0, 1]),
                "source": library.from_numpy(np.array([[7.0, 8.0], [9.0, 10.0]], np.float32)),
                "mask": library.from_numpy(x > 2.5), "pair": library.from_numpy(x[0, :2] * 10),
            }  # fmt: skip
            made = library.from_numpy(x.copy())

            def given(a: Any, known: Any = known) -> Any:
                if isinstance(a, tuple):
                    return tuple(map(given, a))
                return known.get(a, a) if isinstance(a, str) else a

            options = {"reduce": "multiply"} if name == "scatter_" else {}
            arguments = args[:3] if name == "scatter_" else args
            assert getattr(made, name)(*map(given, arguments), **options) is made
            results.append(made.numpy())
        np.testing.assert_array_equal(*results, err_msg=name)


def test_sorting_puts_nan_last() -> None:
    x = np.array([[3.0, np.nan, 1.0, -np.inf, np.nan, 2.0]], np.float32)
    ours, theirs = flame.from_numpy(x), torch.from_numpy(x)
    for descending in (False, True):
        a, b = ours.sort(descending=descending), theirs.sort(descending=descending, stable=True)
        np.testing.assert_array_equal(a.values.numpy(), b.values.numpy())
        np.testing.assert_array_equal(a.indices.numpy(), b.indices.numpy())
    np.testing.assert_array_equal(ours.topk(3).values.numpy(), theirs.topk(3).values.numpy())
    np.testing.assert_array_equal(ours.median().numpy(), theirs.median().numpy())
