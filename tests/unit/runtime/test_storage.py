"""Storage: who owns bytes, and for how long."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from flame.core.errors import ArgumentError
from flame.runtime.cpu.allocator import ALLOCATOR, rounded
from flame.runtime.storage import Storage

pytestmark = pytest.mark.unit


def test_an_owned_block_goes_back_when_the_storage_dies() -> None:
    before = ALLOCATOR.statistics().allocated
    storage = Storage.allocate(1000)
    assert (storage.nbytes, storage.version, storage.device) == (1000, 0, "cpu")
    assert storage.owner is None
    assert ALLOCATOR.statistics().allocated == before + rounded(1000)
    del storage
    assert ALLOCATOR.statistics().allocated == before


def test_a_borrowed_block_keeps_its_owner_and_is_not_freed() -> None:
    before = ALLOCATOR.statistics().allocated
    array = np.arange(10.0)
    owner = weakref.ref(array)
    storage = Storage.borrow(array.ctypes.data, array.nbytes, array)
    del array
    assert owner() is not None
    np.testing.assert_array_equal(storage.as_numpy("f8", (10,), (1,)), np.arange(10.0))
    del storage
    gc.collect()
    assert owner() is None
    assert ALLOCATOR.statistics().allocated == before
    with pytest.raises(ArgumentError, match="owner"):
        Storage.borrow(64, 64, None)


def test_a_view_shares_memory_and_keeps_the_storage() -> None:
    storage = Storage.allocate(24 * 4)
    alive = weakref.ref(storage)
    flat = storage.as_numpy(np.float32, (24,), (1,))
    flat[:] = np.arange(24)
    view = storage.as_numpy(np.float32, (3, 2), (8, 2), 5)
    np.testing.assert_array_equal(view, [[5, 7], [13, 15], [21, 23]])
    view[0, 0] = -1
    assert flat[5] == -1
    del storage, flat
    gc.collect()
    assert alive() is not None
    assert view[2, 1] == 23
    del view
    gc.collect()
    assert alive() is None


def test_views_of_every_rank_and_dtype() -> None:
    storage = Storage.allocate(64)
    storage.as_numpy(np.uint8, (64,), (1,))[:] = 0
    scalar = storage.as_numpy(np.int64, (), (), 7)
    scalar[...] = 9
    assert storage.as_numpy(np.int64, (8,), (1,))[7] == 9
    half = storage.as_numpy(ml_dtypes.bfloat16, (2, 3), (3, 1))
    half[:] = 1.5
    assert half.dtype == ml_dtypes.bfloat16
    assert (half.astype(np.float32) == 1.5).all()
    spread = storage.as_numpy(ml_dtypes.bfloat16, (4, 5), (0, 0))
    assert (spread.astype(np.float32) == 1.5).all()
    for shape in ((0,), (3, 0, 2)):
        assert storage.as_numpy(np.float32, shape, (1,) * len(shape)).shape == shape
    assert Storage.allocate(0).as_numpy(np.float32, (0, 4), (4, 1)).shape == (0, 4)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [((17,), (1,), 0), ((4,), (5,), 1), ((1,), (1,), -1), ((2,), (-1,), 3), ((), (), 16)],
)
def test_a_view_outside_the_storage_raises(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> None:
    with pytest.raises(ArgumentError, match="outside a storage of 64 bytes"):
        Storage.allocate(64).as_numpy(np.float32, shape, strides, offset)


def test_repr() -> None:
    assert "owned" in repr(Storage.allocate(8))
    assert "borrowed from bytearray" in repr(Storage.borrow(64, 1, bytearray(1)))


def test_storages_that_outlive_the_modules(run_python: Callable[..., object]) -> None:
    done = run_python(
        "import sys\n"
        "from flame.runtime.storage import Storage\n"
        "sys.keep = [Storage.allocate(n) for n in range(100)]\n"
        "cycle = [Storage.allocate(5)]; cycle.append(cycle)\n"
    )
    assert done.stderr == ""  # type: ignore[attr-defined]
