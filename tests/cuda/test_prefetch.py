"""Batches copied ahead: the same ones in the same order, with the state of those handed out."""

import gc

import numpy as np
import pytest

import flame
from flame.core.errors import ArgumentError, DeviceError, StateError
from flame.data import DataLoader, TensorDataset, prefetch_to_device
from flame.train.readings import Readings

pytestmark = pytest.mark.usefixtures("eager_cuda")


def loader(workers: int = 0, *, pin: bool = False) -> DataLoader:
    data = TensorDataset(flame.arange(22, dtype=flame.float32), flame.arange(22))
    generator = flame.Generator().manual_seed(5)
    return DataLoader(
        data, 4, shuffle=True, num_workers=workers, pin_memory=pin, generator=generator
    )


def values(batches: object) -> list[list[float]]:
    return [x.tolist() for x, _ in batches]  # type: ignore[attr-defined]  # an iterable of pairs


@pytest.mark.parametrize("ahead", [1, 2, 7])
@pytest.mark.parametrize(("workers", "pin"), [(0, False), (2, True)])
def test_batches_are_those_of_the_loader(workers: int, pin: bool, ahead: int) -> None:
    plain, batches = loader(), prefetch_to_device(loader(workers, pin=pin), "cuda", ahead=ahead)
    assert len(batches) == 6
    for _ in range(2):
        assert values(batches) == values(plain)
    for x, y in batches:
        assert x.device == y.device == "cuda:0"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 4, 5, 6])
def test_a_state_leaves_out_what_was_copied_ahead(workers: int, taken: int) -> None:
    plain, batches = loader(), prefetch_to_device(loader(workers), "cuda", ahead=3)
    for either in (values(plain), values(batches)):
        assert len(either) == 6
    here, there = iter(plain), iter(batches)
    for _ in range(taken):
        next(here), next(there)
    assert batches.state_dict() == plain.state_dict()
    again = prefetch_to_device(loader(workers), "cuda", ahead=2)
    again.load_state_dict(batches.state_dict())
    assert again.state_dict() == plain.state_dict()
    rest = values(again)
    assert rest == values(here)
    assert len(rest) == 6 - taken
    there.close()  # type: ignore[attr-defined]  # a generator


def test_a_batch_survives_its_iteration() -> None:
    batches = iter(prefetch_to_device(loader(), "cuda"))
    x, y = next(batches)
    kept = x.tolist()
    del batches
    gc.collect()
    flame.zeros(4, device="cuda")
    assert x.tolist() == kept
    assert y.is_cuda


def test_what_it_refuses() -> None:
    some = prefetch_to_device([flame.ones(2)], "cuda")
    np.testing.assert_array_equal(next(iter(some)).cpu().numpy(), [1, 1])
    with pytest.raises(StateError, match="list has no state_dict"):
        some.state_dict()
    with pytest.raises(StateError, match="list has no load_state_dict"):
        some.load_state_dict({})
    with pytest.raises(ArgumentError, match="ahead"):
        prefetch_to_device(loader(), "cuda", ahead=0)
    with pytest.raises(DeviceError, match="there is no device cuda:3"):
        prefetch_to_device(loader(), "cuda:3")
    with pytest.raises(DeviceError, match="pin_memory_device must name a GPU, got 'cpu'"):
        DataLoader([1], pin_memory=True, pin_memory_device="cpu")
    DataLoader([1], pin_memory=True, pin_memory_device="cuda:0")


def test_readings_are_some_steps_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    readings: Readings[int] = Readings("cuda:0", behind=2)
    monkeypatch.setattr("flame.cuda.Event.query", lambda self: False)  # a device that is slow
    read = []
    for step in range(5):
        readings.put(step, flame.tensor([step, 2.0 * step], device="cuda"))
        read.append(list(readings.take()))
    assert read == [[], [], [(0, [0.0, 0.0])], [(1, [1.0, 2.0])], [(2, [2.0, 4.0])]]
    assert list(readings.take(everything=True)) == [(3, [3.0, 6.0]), (4, [4.0, 8.0])]
    monkeypatch.undo()
    readings.put(5, flame.tensor([0.5], device="cuda"))
    assert list(readings.take()) == [(5, [0.5])]  # the emulated device is done at once
