"""What users do with more than one GPU, as calls that assert. The machine has cuda:0 and cuda:1;
cuda:0 is the current one before and after each check."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import flame
from flame import nn, optim
from flame.core.errors import DeviceError, IndexRangeError, StateError

CHECKS: list[Callable[[], None]] = []
FIRST, SECOND = "cuda:0", "cuda:1"


def check(function: Callable[[], None]) -> Callable[[], None]:
    """One of the checks that both kinds of device go through."""
    CHECKS.append(function)
    return function


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def on(device: str, *shape: int, seed: int = 0) -> Any:
    return flame.from_numpy(normal(*shape, seed=seed)).to(device)


def same(found: Any, expected: Any, **tolerance: float) -> None:
    np.testing.assert_allclose(found.detach().cpu().numpy(), np.asarray(expected), **tolerance)


# --- tensors --------------------------------------------------------------------------------------


@check
def devices_are_chosen() -> None:
    assert flame.cuda.device_count() >= 2
    assert flame.zeros(2, device="cuda").device == FIRST
    with flame.cuda.device(1):
        assert flame.cuda.current_device() == 1
        made = flame.zeros(2, device="cuda")
        assert made.device == SECOND
        assert flame.ones(2).cuda().device == SECOND
        assert flame.rand(3, device="cuda").device == SECOND
        with flame.cuda.device(FIRST):
            assert (made + 1).device == SECOND  # operands decide, not the current device
    assert flame.cuda.current_device() == 0
    flame.cuda.set_device(1)
    try:
        assert nn.Linear(2, 2, device="cuda").weight.device == SECOND
    finally:
        flame.cuda.set_device(0)
    for like in (flame.ones_like, flame.rand_like, flame.empty_like):
        assert like(made).device == SECOND
    assert made.new_full((2,), 3.0).get_device() == 1
    with pytest.raises(DeviceError, match="there is no device cuda:63"):
        flame.zeros(2, device="cuda:63")


@check
def kernels_of_every_kind_run_on_either_device() -> None:
    """Generated kernels, texts by hand, and products of the library; alternating."""
    a, b = normal(17, 23), normal(23, 9, seed=1)
    index = np.array([3, 1, 3, 16])
    for device in (FIRST, SECOND, FIRST, SECOND):
        x, y = flame.from_numpy(a).to(device), flame.from_numpy(b).to(device)
        chosen = flame.from_numpy(index).to(device)
        found = {
            "product": (x @ y, a @ b),
            "row": (x.softmax(1).sum(1), np.ones(17)),
            "sum": (x.sum(), a.sum()),
            "sort": (x.sort(1).values, np.sort(a, 1)),
            "scan": (x.cumsum(0), np.cumsum(a, 0)),
            "gather": (x[chosen], a[index]),
            "selection": (x[x > 0], a[a > 0]),
            "added": (flame.zeros(17, 23, device=device).index_add(0, chosen, x[:4]).sum(0),
                      a[:4].sum(0)),
            "number": (x * 2.5 + flame.tensor(1.0), a * 2.5 + 1),
        }  # fmt: skip
        for name, (made, expected) in found.items():
            assert made.device == device, name
            same(made, expected, rtol=1e-4, atol=1e-4)


@check
def copies_between_devices() -> None:
    host = normal(40, 30)
    x = flame.from_numpy(host).to(FIRST)
    for made in (x.to(SECOND), x.cuda(1), x.to(SECOND, non_blocking=True)):
        assert made.device == SECOND
        same(made, host)
        same(made.to(FIRST), host)
    same(x.t().to(SECOND), host.T)  # views, empty and 0-d tensors
    same(x[1::2, ::3].to(SECOND), host[1::2, ::3])
    same(x[:0].to(SECOND), host[:0])
    same(x.sum().to(SECOND), host.sum(), rtol=1e-4)
    assert x.to(SECOND, flame.float64).dtype is flame.float64
    half = x.to(SECOND, flame.bfloat16)
    assert (half.device, half.dtype) == (SECOND, flame.bfloat16)
    target = flame.zeros(30, 40, device=SECOND).t()
    target.copy_(x)
    target[0] = x[1]
    same(target[1:], host[1:])
    same(target[0], host[1])
    assert copy.deepcopy(target).device == SECOND
    source = flame.from_numpy(host).to(FIRST)
    there = source.to(SECOND)
    source.zero_()  # behind the copy, in stream order
    same(there, host)
    there.fill_(7)
    same(source, np.zeros((40, 30)))


@check
def devices_do_not_mix() -> None:
    x, y = flame.ones(3, device=FIRST), flame.ones(3, device=SECOND)
    for call in (
        lambda: x + y, lambda: y * x, lambda: flame.cat([x, y]), lambda: y.matmul(x),
        lambda: flame.where(x > 0, x, y), lambda: x.add_(y), lambda: flame.stack([y, x]),
        lambda: x.index_select(0, flame.tensor([0], device=SECOND)),
        lambda: nn.functional.linear(x, flame.ones(2, 3, device=SECOND)),
        lambda: nn.Linear(3, 2, device=SECOND)(x), lambda: x.masked_fill(y > 0, 1.0),
        lambda: x + flame.tensor(1.0, device=SECOND) * y,
    ):  # fmt: skip
        with pytest.raises(DeviceError) as raised:
            call()
        assert FIRST in str(raised.value)
        assert SECOND in str(raised.value)
    with pytest.raises(DeviceError):
        y.requires_grad_().grad = x
    same(y.detach() + flame.tensor(1.0), [2, 2, 2])  # numbers on the CPU mix with either


@check
def bad_indices_are_told_by_their_own_device() -> None:
    x = on(SECOND, 4, 5)
    made = x[flame.tensor([9], device=SECOND)]
    flame.cuda.synchronize(FIRST)
    with pytest.raises(IndexRangeError, match="9"):
        made.cpu()
    flame.cuda.synchronize(SECOND)


# --- autograd, modules, optimizers ----------------------------------------------------------------


@check
def gradients_cross_devices() -> None:
    host, weight = normal(5, 4), normal(4, 3, seed=1)
    found = []
    for first, second in (("cpu", "cpu"), (FIRST, SECOND), (SECOND, FIRST)):
        x = flame.from_numpy(host).to(first).requires_grad_()
        w = flame.from_numpy(weight).to(second).requires_grad_()
        y = (x.tanh().to(second) @ w).relu()
        z = y.to(first) + (x * x).sum(1, keepdim=True)
        (gx,) = flame.autograd.grad((z**2).sum(), x, create_graph=True)
        assert gx.device == first
        ((z**2).sum() + (gx**2).sum()).backward()
        assert x.grad.device == first
        assert w.grad.device == second
        found.append([t.detach().cpu().numpy() for t in (z, gx, x.grad, w.grad)])
    for other in found[1:]:
        for made, expected in zip(other, found[0], strict=True):
            np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)
    leaf = flame.ones(3, device=SECOND, requires_grad=True)
    leaf.cpu().to(FIRST).sum().backward()
    assert leaf.grad.device == SECOND
    same(leaf.grad, [1, 1, 1])


class Halves(nn.Module):
    """A network whose second half is on another device."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        flame.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU())
        self.second = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        self.first.to(first)
        self.second.to(second)
        self.places = first, second

    def forward(self, x: Any) -> Any:
        return self.second(self.first(x.to(self.places[0])).to(self.places[1]))


def _losses(model: Halves, optimizer: Any, steps: int) -> list[float]:
    losses = []
    for n in range(steps):
        optimizer.zero_grad()
        loss = (model(flame.from_numpy(normal(5, 6, seed=n))) ** 2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


@check
def one_optimizer_updates_parameters_on_two_devices() -> None:
    for make in (
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: optim.AdamW(p, lr=0.01),
    ):
        here, there = Halves("cpu", "cpu"), Halves(FIRST, SECOND)
        first, second = make(here.parameters()), make(there.parameters())
        np.testing.assert_allclose(_losses(there, second, 3), _losses(here, first, 3), rtol=1e-4)
        for p in there.parameters():
            buffers = [v for v in second.state[p].values() if getattr(v, "ndim", 0)]
            assert buffers
            assert all(b.device == p.device for b in buffers)
        again = Halves(FIRST, SECOND)
        again.load_state_dict(there.state_dict())
        third = make(again.parameters())
        third.load_state_dict(second.state_dict())
        np.testing.assert_allclose(_losses(again, third, 2), _losses(here, first, 2), rtol=1e-4)


@check
def losses_are_scaled_across_devices() -> None:
    made = []
    for places in (("cpu", "cpu"), (FIRST, SECOND)):
        model = Halves(*places)
        scaler = flame.amp.GradScaler(places[0], init_scale=2.0**10, growth_interval=2)
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        losses = []
        for n in range(4):
            optimizer.zero_grad()
            loss = (model(flame.from_numpy(normal(5, 6, seed=n))) ** 2).mean()
            scaler.scale(loss * float("inf") if n == 1 else loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        made.append([*losses, scaler.get_scale()])
    np.testing.assert_allclose(made[1], made[0], rtol=1e-4)


@check
def modules_move_between_devices() -> None:
    model = Halves("cpu", "cpu").first.to(SECOND)
    assert {str(t.device) for t in model.state_dict().values()} == {SECOND}
    x = on(SECOND, 3, 6)
    model(x).sum().backward()
    expected = model(x).detach().cpu().numpy()
    model.cuda(0)
    assert {str(p.grad.device) for p in model.parameters()} == {FIRST}
    same(model(x.to(FIRST)), expected, rtol=1e-5, atol=1e-6)


@check
def steps_compile_on_the_device_of_their_tensors() -> None:
    """The current device is 0 when the step is recorded, compiled, and run again."""
    losses = []
    for device in ("cpu", SECOND, FIRST):
        flame.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 4))
        model.to(device)
        optimizer = optim.AdamW(model.parameters(), lr=0.01)

        def train(x: Any, model: Any = model, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            loss = (model(x) ** 2).mean()
            loss.backward()
            optimizer.step()
            return loss

        step = flame.compile(train)
        flame.manual_seed(1)
        made = []
        for n in range(4):
            loss = step(flame.from_numpy(normal(5, 6, seed=n)).to(device))
            assert str(loss.device) == device
            assert flame.cuda.current_device() == 0
            made.append(loss.item())
        losses.append(made)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)


@check
def one_function_compiles_for_either_device() -> None:
    @flame.compile
    def step(x: Any) -> Any:
        return (x.softmax(-1) * x).sum(-1)

    host = normal(4, 7)
    expected = step(flame.from_numpy(host)).numpy()
    for device in (FIRST, SECOND, FIRST, SECOND):
        made = step(flame.from_numpy(host).to(device))
        assert made.device == device
        same(made, expected, rtol=1e-5, atol=1e-6)
        with flame.cuda.device(1):
            same(step(flame.from_numpy(host).to(device)), expected, rtol=1e-5, atol=1e-6)


# --- streams, memory, randomness ------------------------------------------------------------------


@check
def streams_and_events_of_both_devices() -> None:
    first, second = flame.cuda.Stream(0), flame.cuda.Stream(SECOND)
    assert (first.device, second.device) == (FIRST, SECOND)
    host = normal(1000)
    with flame.cuda.stream(second):
        assert flame.cuda.current_device() == 1
        assert flame.cuda.current_stream(1) == second
        x = flame.from_numpy(host).to("cuda") * 2
    assert x.device == SECOND
    assert flame.cuda.current_device() == 0
    assert flame.cuda.current_stream(1) == flame.cuda.default_stream(1)
    done = second.record_event()
    assert done.device == SECOND
    first.wait_event(done)  # across devices
    flame.cuda.current_stream(1).wait_event(done)
    x.record_stream(flame.cuda.current_stream(1))
    with flame.cuda.stream(first):
        y = x.to(FIRST) + 1
    first.synchronize()
    same(y, host * 2 + 1, rtol=1e-6)
    done.synchronize()
    assert done.query()
    with pytest.raises(StateError, match="cannot be recorded on cuda:0"):
        done.record(first)
    begin, end = (flame.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(second)
    end.record(second)
    flame.cuda.synchronize(SECOND)
    assert begin.elapsed_time(end) >= 0
    flame.cuda.current_stream(FIRST).wait_stream(second)


@check
def memory_is_counted_for_each_device() -> None:
    gc.collect()
    before = [flame.cuda.memory_allocated(d) for d in (0, 1)]
    flame.cuda.reset_peak_memory_stats(SECOND)
    held = flame.zeros(1 << 18, device=SECOND)
    assert flame.cuda.memory_allocated() == before[0]
    assert flame.cuda.memory_allocated(1) == before[1] + (1 << 20)
    assert "float32 (262144,)" in flame.cuda.memory_summary(SECOND)
    assert "float32 (262144,)" not in flame.cuda.memory_summary(FIRST)
    del held
    assert flame.cuda.memory_allocated(SECOND) == before[1]
    assert flame.cuda.max_memory_allocated(SECOND) >= before[1] + (1 << 20)
    with flame.cuda.device(1):
        assert flame.cuda.memory_allocated() == before[1]
    free, total = flame.cuda.mem_get_info(1)
    assert 0 < free <= total
    flame.cuda.empty_cache()


@check
def memory_of_another_device_is_freed_at_any_line() -> None:
    """Garbage in cycles goes when the collector comes by, be it between two launches."""
    x = on(FIRST, 50)
    expected = x.cpu().numpy()
    threshold = gc.get_threshold()
    gc.set_threshold(5)
    try:
        for _ in range(30):
            cycle: list[Any] = [flame.zeros(10, device=SECOND)]
            cycle[0].record_stream(flame.cuda.Stream(1))
            cycle.append(cycle)
            del cycle
            x = x + 1
    finally:
        gc.set_threshold(*threshold)
    same(x, expected + 30, rtol=1e-5)


@check
def one_seed_gives_the_same_numbers_on_each_device() -> None:
    drawn = []
    for device in (FIRST, SECOND, "cpu"):
        flame.manual_seed(11)
        ones = flame.ones(64, device=device)
        made = [
            flame.rand(100, device=device), flame.randn(7, device=device),
            nn.functional.dropout(ones, 0.4), flame.randperm(20, device=device),
        ]  # fmt: skip
        assert all(t.device == device for t in made)
        drawn.append([t.cpu().numpy() for t in made])
    for other in drawn[1:]:
        for a, b in zip(drawn[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    flame.manual_seed(11)  # one generator serves all: what one device took, another does not get
    again = [flame.rand(100, device=FIRST), flame.rand(100, device=SECOND)]
    same(again[0], drawn[0][0])
    assert not np.array_equal(again[1].cpu().numpy(), drawn[0][0])
    own = flame.Generator(device=SECOND).manual_seed(11)
    same(flame.rand(100, generator=own, device=SECOND), drawn[0][0])
    with pytest.raises(DeviceError, match=r"cuda:1.*cuda:0"):
        flame.rand(5, generator=own, device=FIRST)


@check
def threads_work_on_devices_of_their_own() -> None:
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        flame.cuda.set_device(number)
        x = flame.full((1000,), float(number), device="cuda", requires_grad=True)
        for _ in range(5):
            (x * x).sum().backward()
        found[number] = x.grad

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert flame.cuda.current_device() == 0
    for number in (0, 1):
        assert found[number].get_device() == number
        same(found[number], np.full(1000, 10.0 * number))
