"""Many calls in few launches: optimizers and clipping on the emulated GPU, bit for bit as one by
one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

import flame
from flame import optim
from flame.compiler import foreach
from flame.core.errors import DeviceError, DTypeError, GradientError
from flame.eager import Eager
from flame.ops.op import OPS, interpreter
from flame.runtime.cuda.driver import driver

from .dry import get_ready
from .foreach_cases import (
    OPTIMIZERS,
    bits,
    check_same,
    clipped,
    made,
    numbers,
    one_by_one,
    trained,
)

DTYPES = ((flame.float64, flame.bfloat16), (flame.float16, flame.float32))
pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(scope="module", autouse=True)
def kernels(eager_cuda: None) -> None:
    """What most tests need, compiled at once."""
    works = [lambda m=m: trained(m, made(), 1) for m in OPTIMIZERS.values()]
    works += [lambda d=d: trained(OPTIMIZERS["AdamW"], made(dtypes=d), 1) for d in DTYPES]
    works += [lambda p=p: clipped(p) for p in (1.0, 2.0, float("inf"))]

    def apart() -> None:
        with one_by_one():
            for work in works:
                work()

    get_ready([*works, apart])


def launches(work: Callable[[], Any]) -> list[str]:
    before = len(driver().launches)  # type: ignore[attr-defined]
    work()
    return list(driver().launches[before:])  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bits_are_those_of_single_launches(name: str) -> None:
    check_same(OPTIMIZERS[name])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bits_on_the_cpu(name: str) -> None:
    check_same(OPTIMIZERS[name], devices=("cpu",))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(dtypes: Any) -> None:
    check_same(OPTIMIZERS["AdamW"], dtypes=dtypes)


def test_large_and_small() -> None:
    shapes = ((1,), (1500, 1000), (3,), (700,), (1100, 999))
    check_same(OPTIMIZERS["SGD-momentum"], steps=1, shapes=shapes)


def test_launches_are_few() -> None:
    parameters = made([(n + 2,) for n in range(40)])
    for p in parameters:
        p.grad = flame.ones_like(p)
    optimizer = optim.AdamW(parameters)
    optimizer.step()
    assert len(launches(optimizer.step)) == 1
    with one_by_one():
        assert len(launches(optimizer.step)) == 40


def test_more_parameters_than_a_table_holds() -> None:
    count = 900

    def run() -> tuple[int, Any]:
        buffer, gradient = (flame.from_numpy(numbers((count,), i)).to("cuda") for i in range(2))
        parameters = [buffer[i : i + 1].detach().requires_grad_() for i in range(count)]
        for i, p in enumerate(parameters):
            p.grad = gradient[i : i + 1]
        optimizer = optim.SGD(parameters, lr=0.1)
        return len(launches(optimizer.step)), buffer

    launched, together = run()
    assert launched == 2
    with one_by_one():
        launched, apart = run()
    assert launched == count
    assert bits([together]) == bits([apart])


def test_groups_have_their_own_numbers() -> None:
    def make(parameters: list[Any]) -> Any:
        groups = [{"params": parameters[:4], "lr": 0.5}, {"params": parameters[4:]}]
        return optim.AdamW(groups, lr=0.1, weight_decay=0.2)

    check_same(make)


def test_a_rate_on_the_cpu_is_moved_once() -> None:
    parameters = [flame.ones(n, device="cuda").requires_grad_() for n in range(2, 30)]
    for p in parameters:
        p.grad = flame.ones_like(p)
    optimizer = optim.SGD(parameters, lr=flame.tensor(0.25))
    assert len(launches(optimizer.step)) == 1
    assert all((p == 0.75).all().item() for p in parameters)


@pytest.mark.parametrize("infinite", [False, True])
def test_steps_that_the_device_may_skip(infinite: bool) -> None:
    def make(parameters: list[Any]) -> Any:
        optimizer = optim.AdamW(parameters, lr=0.1)
        step = optimizer.step

        def scaled() -> None:
            optimizer.found_inf = flame.full((), float(infinite), device="cuda")
            step()

        optimizer.step = scaled  # type: ignore[assignment]
        return optimizer

    before = bits(made())
    together = made()
    trained(make, together)
    with one_by_one():
        apart = made()
        trained(make, apart)
    assert bits(together) == bits(apart)
    assert (bits(together) == before) is infinite


def test_scaled_steps_are_few_launches() -> None:
    parameters = made([(n + 2,) for n in range(50)])
    for p in parameters:
        p.grad = flame.ones_like(p)
    optimizer = optim.AdamW(parameters)
    scaler = flame.amp.GradScaler("cuda", init_scale=4.0)

    def step() -> None:
        scaler.scale(flame.ones((), device="cuda"))
        scaler.step(optimizer)
        scaler.update()

    step()
    assert len(launches(step)) < 30


def test_parameters_that_are_views_of_one_buffer() -> None:
    def make() -> tuple[Any, list[Any]]:
        buffer = flame.from_numpy(numbers((300,), 0)).to("cuda")
        gradient = flame.from_numpy(numbers((300,), 1)).to("cuda")
        parts = [(0, 10), (10, 11), (11, 100), (150, 300)]
        parameters = [buffer[a:b].detach().requires_grad_() for a, b in parts]
        for p, (a, b) in zip(parameters, parts, strict=True):
            p.grad = gradient[a:b]
        return buffer, parameters

    buffer, parameters = make()
    optimizer = OPTIMIZERS["SGD-momentum"](parameters)
    optimizer.step()
    assert len(launches(optimizer.step)) <= 2
    with one_by_one():
        other, alone = make()
        optimizer = OPTIMIZERS["SGD-momentum"](alone)
        optimizer.step()
        optimizer.step()
    assert bits([buffer]) == bits([other])


def test_parameters_that_overlap_are_updated_in_order() -> None:
    def run() -> Any:
        buffer = flame.ones(20, device="cuda")
        parameters = [buffer[a : a + 8].detach().requires_grad_() for a in (0, 4, 12)]
        for p in parameters:
            p.grad = p.detach()  # what one update writes, the next one's gradient is
        optim.SGD(parameters, lr=0.5).step()
        return buffer

    together = run()
    with one_by_one():
        assert bits([together]) == bits([run()])
    assert together.cpu().numpy()[4] == 0.25


def test_a_gradient_of_a_wrong_device_changes_nothing() -> None:
    parameters = [flame.ones(3, device="cuda").requires_grad_() for _ in range(3)]
    for p in parameters:
        p.grad = flame.ones_like(p)
    parameters[2]._grad = flame.ones(3)
    with pytest.raises(DeviceError, match="sgd_update: operands are on cpu and cuda:0"):
        optim.SGD(parameters, lr=0.5).step()
    assert all((p == 1.0).all().item() for p in parameters)


def test_several_devices(make_emulated_cuda: Callable[..., Any]) -> None:
    eager = interpreter()
    assert isinstance(eager, Eager)
    eager.forget_plans()
    make_emulated_cuda(devices=2)
    try:
        devices = ("cuda:0", "cuda:1", "cpu")
        check_same(OPTIMIZERS["AdamW"], devices=devices)
        parameters = [flame.ones(3, device=d).requires_grad_() for d in devices for _ in range(9)]
        for p in parameters:
            p.grad = flame.ones_like(p)
        optimizer = optim.SGD(parameters, lr=flame.tensor(0.25))
        assert len(launches(optimizer.step)) == 2
        assert all((p == 0.75).all().item() for p in parameters)
    finally:
        eager.forget_plans()


def test_a_stream_of_the_users() -> None:
    parameters = made()
    stream = flame.cuda.Stream()
    optimizer = optim.AdamW(parameters)
    with flame.cuda.stream(stream), mock.patch.object(driver(), "launch") as launch:
        optimizer.step()
    assert {call.args[4] for call in launch.call_args_list} == {stream.cuda_stream}


def test_the_tape_sees_updates() -> None:
    parameters = [flame.ones(3, device="cuda").requires_grad_() for _ in range(3)]
    losses = [(p * p).sum() for p in parameters]
    for p in parameters:
        p.grad = flame.ones_like(p)
    optim.SGD(parameters, lr=0.5).step()
    assert all(p.is_leaf and p.requires_grad for p in parameters)
    with pytest.raises(GradientError):
        losses[0].backward()


@pytest.mark.parametrize("order", [1.0, 2.0, float("inf")])
def test_clipping(order: float) -> None:
    norm, together = clipped(order)
    with one_by_one():
        wanted, apart = clipped(order)
    assert bits([norm]) == bits([wanted])
    gradients = [p.grad for p in together if p.grad is not None]
    assert bits(gradients) == bits([p.grad for p in apart if p.grad is not None])
    arrays = [g.cpu().numpy().astype(np.float64).ravel() for g in gradients]
    np.testing.assert_allclose(np.linalg.norm(np.concatenate(arrays), order), 0.5, rtol=1e-4)


def test_clipping_is_few_launches() -> None:
    parameters = made([(n + 2,) for n in range(60)])
    for p in parameters:
        p.grad = flame.ones_like(p)
    clip = flame.nn.utils.clip_grad_norm_
    clip(parameters, 1.0)
    assert len(launches(lambda: clip(parameters, 1.0))) < 20


def test_gradients_that_are_one_tensor_are_scaled_twice() -> None:
    parameters = [flame.ones(4, device="cuda").requires_grad_() for _ in range(3)]
    parameters[0].grad = parameters[1].grad = flame.ones(4, device="cuda")
    parameters[2].grad = flame.ones(4, device="cuda")
    flame.nn.utils.clip_grads_with_norm_(parameters, 1.0, flame.tensor(2.0, device="cuda"))
    np.testing.assert_allclose(parameters[0].grad.cpu().numpy(), 0.25, rtol=1e-5)
    np.testing.assert_allclose(parameters[2].grad.cpu().numpy(), 0.5, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_gradient_is_found(bad: float) -> None:
    from flame.ops.statistics import any_nonfinite

    tensors = [flame.ones(n, device="cuda") for n in (3, 1, 700, 20)]
    assert not any_nonfinite(tensors).item()
    tensors[2][600] = bad
    assert any_nonfinite(tensors).item()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_calls_of_a_library_go_one_by_one(device: str) -> None:
    pairs = [(flame.ones(4, n, device=device), flame.ones(n, 5, device=device)) for n in (3, 8)]
    out = [(flame.zeros(4, 5, device=device),) for _ in pairs]
    before = [x.storage.version for (x,) in out]
    with flame.no_grad():
        OPS["matmul"].foreach(pairs, out=out)
    assert [x.storage.version for (x,) in out] == [n + 1 for n in before]
    assert [(x == n).all().item() for (x,), n in zip(out, (3.0, 8.0), strict=True)] == [True, True]


def test_integers_have_no_norm() -> None:
    with pytest.raises(DTypeError, match="vector_norm needs a floating tensor"):
        flame.nn.utils.get_total_norm([flame.ones(3, dtype=flame.int32) for _ in range(2)])


def test_lists_that_change_with_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreach, "MAX_LISTS", 4)
    eager = interpreter()
    assert isinstance(eager, Eager)
    eager.forget_plans()
    parameters = [flame.ones(3, device="cuda").requires_grad_() for _ in range(8)]
    optimizer = optim.SGD(parameters, lr=0.5)
    for count in range(2, len(parameters)):
        for i, p in enumerate(parameters):
            p.grad = flame.ones_like(p) if i < count else None
        with mock.patch.object(foreach, "_on_gpu", wraps=foreach._on_gpu) as prepared:
            optimizer.step()
        assert prepared.call_count == (count == 2)
    assert len(eager.lists._lists) == 4
    assert (parameters[2] == 1.0 - 0.5 * 5).all().item()
