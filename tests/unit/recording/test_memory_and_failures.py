"""Memory that a compiled step shares, failures that leave nothing behind, threads, signatures."""

from __future__ import annotations

import gc
import threading
import warnings
from typing import Any

import numpy as np
import pytest

import flame
import flame.nn as nn
import flame.optim as optim
from flame.core.errors import FlameError, IndexRangeError, TraceError
from flame.nn import functional
from flame.optim import lr_scheduler
from flame.runtime.cpu.allocator import ALLOCATOR


def array(*shape: int, seed: int = 0) -> flame.Tensor:
    return flame.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def assert_follows(function: Any, changes: list[Any], *arguments: Any) -> None:
    """Compiled, the function gives what it gives uncompiled, after each change too."""
    compiled = flame.compile(function)
    for change in [lambda: None, *changes]:
        change()
        for _ in range(2):
            np.testing.assert_allclose(
                compiled(*arguments).numpy(), function(*arguments).numpy(), rtol=1e-6
            )
    assert compiled.recordings == 1 + len(changes)


# --- memory ---------------------------------------------------------------------------------------


def test_replaced_memory_of_a_tensor_is_noticed() -> None:
    weight = array(3).requires_grad_()

    def change() -> None:
        weight.data = array(3, seed=7)

    assert_follows(lambda x: (x * weight).detach(), [change], array(3))
    with pytest.raises(TraceError, match=r"\.data of a tensor from outside"):
        flame.compile(lambda x: setattr(weight, "data", x * 2))(array(3))
    assert weight.numpy(force=True).shape == (3,)


def test_arguments_that_share_memory_with_what_is_changed() -> None:
    state = flame.zeros(4, 3)

    @flame.compile
    def step(x: Any) -> Any:
        state.add_(1)
        return x * 2

    step(array(2, 3))
    for x in (state[:2], state[1:3]):
        with pytest.raises(TraceError, match="shares memory"):
            step(x)
    assert state.sum().item() == 12  # the step that was refused has done nothing

    @flame.compile
    def change(x: Any, y: Any) -> Any:
        x.mul_(2)
        return x + y

    x = array(3)
    with pytest.raises(TraceError, match="another argument"):
        change(x, x)
    weight = array(3).requires_grad_()
    with pytest.raises(TraceError, match="gives a gradient"):
        flame.compile(lambda x: (x * weight).sum().backward())(weight)


def test_arguments_that_are_the_same_are_read() -> None:
    x = array(3)
    add = flame.compile(lambda x, y: (x + y, x))
    for _ in range(2):
        total, same = add(x, x)
        np.testing.assert_allclose(total.numpy(), x.numpy() * 2)
        assert same is x


def test_results_that_are_views_of_each_other_and_of_state() -> None:
    state = flame.zeros(2, 3)

    @flame.compile
    def step(x: Any) -> Any:
        y = x * 2
        state.add_(1)
        return y, y[0], y.t(), state[1], state

    for i in range(3):
        y, row, turned, part, whole = step(array(2, 3, seed=i))
        y.fill_(5.0)
        assert row.tolist() == [5.0] * 3
        assert turned.shape == (3, 2)
        assert turned.sum().item() == 30
        assert whole is state
        assert part.tolist() == [i + 1.0] * 3
        assert part.storage is state.storage


def test_parts_of_parameters_that_are_returned() -> None:
    model = nn.Linear(3, 3)
    compiled = flame.compile(lambda x: (model.weight[0], model.weight, model.weight.t() * x))
    for _ in range(2):
        row, weight, product = compiled(flame.ones(3))
        assert weight is model.weight
        (row.sum() * 2 + product.sum()).backward()
        expected = np.ones((3, 3), np.float32)
        expected[0] += 2
        np.testing.assert_allclose(model.weight.grad.numpy(), expected)
        model.zero_grad()


def test_arguments_with_a_history() -> None:
    """A backward pass in the step goes on into the history that an argument came with."""
    gradients = []
    for compiling in (False, True):
        first, second = array(3, 3, seed=1).requires_grad_(), array(3, seed=2).requires_grad_()

        def step(x: Any, second: Any = second) -> Any:
            loss = (x * second).square().sum()
            loss.backward()
            return loss.detach()

        call = flame.compile(step) if compiling else step
        for i in range(3):
            call((array(2, 3, seed=i) @ first).tanh())
        gradients.append([first.grad.numpy().copy(), second.grad.numpy().copy()])
    for found, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_memory_met_through_a_part_first() -> None:
    whole = flame.zeros(4, 6)
    part, turned = whole[1:3, ::2], whole.t()

    def step(x: Any) -> Any:
        part.add_(x)
        turned[0].mul_(2)
        whole[:, 1] += turned[2]
        return part.sum() + whole.sum() + turned[3:].sum()

    compiled = flame.compile(step)
    for i in range(3):
        x = array(2, 3, seed=i)
        before = whole.clone()
        expected = step(x)
        after = whole.clone()
        whole.copy_(before)
        np.testing.assert_allclose(compiled(x).numpy(), expected.numpy(), rtol=1e-5)
        np.testing.assert_allclose(whole.numpy(), after.numpy(), rtol=1e-6)
    assert compiled.recordings == 1


def test_a_history_on_a_tensor_from_outside_is_refused() -> None:
    weight, hidden = array(3).requires_grad_(), flame.zeros(3)

    @flame.compile
    def step(x: Any) -> Any:
        hidden.add_(weight * x)
        return hidden.sum().detach()

    with pytest.raises(TraceError, match="history"):
        step(array(3))
    assert hidden.node is None
    assert not hidden.requires_grad


# --- failures -------------------------------------------------------------------------------------


def test_what_fails_takes_back_counts_schedules_and_random_numbers() -> None:
    table = nn.Embedding(5, 3)
    optimizer = optim.Adam(table.parameters(), lr=0.1)
    schedule = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    fails = False

    def step(i: Any) -> Any:
        optimizer.zero_grad()
        loss = (table(i) * flame.rand(3)).square().sum()
        loss.backward()
        optimizer.step()
        schedule.step()
        if fails:
            raise ZeroDivisionError
        return loss

    def state() -> Any:
        counts = [entry["step"] for entry in optimizer.state.values()]
        rates = [group["lr"] for group in optimizer.param_groups]
        weights = table.weight.numpy(force=True).copy()
        draws = flame.get_rng_state().tolist()
        return [counts, rates, schedule.last_epoch, draws, weights.tolist()]

    good, bad = flame.tensor([0, 1]), flame.tensor([0, 9])
    compiled = flame.compile(step)
    fails, start = True, state()
    with pytest.raises(ZeroDivisionError):  # in the middle of the recording
        compiled(good)
    assert state() == start
    fails = False
    with pytest.raises(IndexRangeError):  # at the first run
        compiled(bad)
    assert state() == start
    compiled(good)
    before = state()
    assert before[:3] == [[1], [0.05], 1]
    with pytest.raises(IndexRangeError):  # at a replay
        compiled(bad)
    assert state() == before
    compiled(good)
    assert state()[:3] == [[2], [0.025], 2]


def test_what_turns_out_stale_is_not_counted_twice() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    one, other = (optim.Adam(m.parameters(), lr=0.1) for m in (first, second))

    @flame.compile
    def step(x: Any) -> None:
        one.zero_grad()
        other.zero_grad()
        (second(first(x)) + flame.rand(3)).sum().backward()
        one.step()
        other.step()

    step(array(3))
    other.param_groups[0]["amsgrad"] = True  # noticed after `one` has counted
    before = flame.get_rng_state().numpy().copy()
    step(array(3))
    assert {entry["step"] for entry in one.state.values()} == {2}
    assert {entry["step"] for entry in other.state.values()} == {2}
    assert step.recordings == 2
    moved = np.frombuffer(flame.get_rng_state().numpy().tobytes(), np.uint64)[1]
    assert moved - np.frombuffer(before.tobytes(), np.uint64)[1] == 3


def test_flags_are_as_before_after_a_failure() -> None:
    model = nn.Linear(3, 3)

    @flame.compile
    def step(x: Any) -> Any:
        model.requires_grad_(False)
        return model(x).sum().item()

    with pytest.raises(TraceError):
        step(array(3))
    assert all(p.requires_grad for p in model.parameters())


def test_tensors_of_a_failed_recording_raise() -> None:
    kept: list[Any] = []

    @flame.compile
    def step(x: Any) -> Any:
        y = x * 2
        kept.extend([y, y[0], x])
        return float(y.sum())

    with pytest.raises(TraceError):
        step(array(3))
    for tensor in kept:
        for use in (lambda t: t + 1, lambda t: t.numpy(), lambda t: t.shape, lambda t: t[0]):
            with pytest.raises(TraceError, match="recording failed"):
                use(tensor)
        assert "failed" in repr(tensor)
    kept.clear()


def test_generator_functions_are_refused() -> None:
    @flame.compile
    def parts(x: Any) -> Any:
        yield x * 2

    with pytest.raises(TraceError, match="kept after it"):
        parts(array(3))


# --- threads and memory ---------------------------------------------------------------------------


def test_threads_record_and_run_at_once() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
    shared = flame.compile(model)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            own = flame.compile(lambda x: model(x).softmax(-1) * number)
            with flame.no_grad():
                for i in range(20):
                    x = array(1 + (i + number) % 3, 6, seed=i)
                    expected = model(x)
                    np.testing.assert_allclose(shared(x).numpy(), expected.numpy(), 1e-5, 1e-6)
                    wanted = (expected.softmax(-1) * number).numpy()
                    np.testing.assert_allclose(own(x).numpy(), wanted, 1e-5, 1e-6)
            assert own.recordings == 3
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_many_signatures_hold_no_more_memory() -> None:
    """Programs that are dropped give back their arenas, results and constants."""

    @flame.compile
    def step(x: Any, scale: float) -> Any:
        return ((x * scale).sin() @ x.t()).softmax(-1).sum(0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = []
        for i in range(100):
            step(array(256, 256 + i % 4), float(i))
            if i in (69, 99):
                gc.collect()
                held.append(ALLOCATOR.statistics().allocated)
    assert len(step.programs) == 64
    assert held[1] - held[0] < 1 << 20


def test_errors_are_of_flame() -> None:
    with pytest.raises(FlameError):
        flame.compile(lambda x: functional.one_hot(x))(flame.tensor([1, 2]))
