"""What users do with tensors, modules, optimizers and data on a GPU beside calling operations."""

from __future__ import annotations

import copy
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flame
import flame.checkpoint
import flame.data
from flame import nn, optim
from flame.core.errors import DeviceError, GradientError, IndexRangeError
from flame.nn.attention import varlen_attn
from flame.testing import gradcheck

CHECKS: list[Callable[[], None]] = []


def check(function: Callable[[], None]) -> Callable[[], None]:
    """One of the checks that both kinds of device go through."""
    CHECKS.append(function)
    return function


def on_gpu(*shape: int, seed: int = 0) -> Any:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return flame.from_numpy(values).cuda()


def same(found: Any, expected: Any, **tolerance: float) -> None:
    np.testing.assert_allclose(found.detach().cpu().numpy(), np.asarray(expected), **tolerance)


# --- tensors --------------------------------------------------------------------------------------


@check
def tensors_are_made_on_the_device() -> None:
    made = {
        "zeros": flame.zeros(2, 3, device="cuda"), "full": flame.full((2,), 7, device="cuda"),
        "arange": flame.arange(5, device="cuda"), "eye": flame.eye(3, device="cuda"),
        "linspace": flame.linspace(0, 1, 5, device="cuda"),
        "tensor": flame.tensor([[1.5, 2.0]], device="cuda"),
        "asarray": flame.asarray([1, 2], device="cuda"),
        "scalar": flame.scalar_tensor(2.0, device="cuda"),
    }  # fmt: skip
    x = made["zeros"]
    made |= {
        "ones_like": flame.ones_like(x), "new_full": x.new_full((2,), 3.0),
        "new_tensor": x.new_tensor([1.0]), "rand_like": flame.rand_like(x),
        "randn_like": flame.randn_like(x), "randint_like": flame.randint_like(x, 5),
        "empty_like": flame.empty_like(x), "tril_indices": flame.tril_indices(3, 3, device="cuda"),
        "one_hot": nn.functional.one_hot(made["arange"], 5), "window": flame.tril(made["eye"]),
        "cat": flame.cat([x, x]), "where": flame.where(x > 0, x, 1.0),
    }  # fmt: skip
    for name, t in made.items():
        assert t.is_cuda, name
        assert t.device == "cuda:0", name
        assert t.device.type == "cuda", name
        assert t.get_device() == 0, name
    same(made["arange"], np.arange(5))
    same(made["eye"], np.eye(3))
    assert flame.zeros(2).device == "cpu"


@check
def tensors_move() -> None:
    x = flame.arange(12.0).reshape(3, 4)
    there = x.to("cuda")
    assert there.to("cuda") is there
    assert there.cpu().device == "cpu"
    assert there.to(flame.float64).is_cuda
    assert x.to(there).is_cuda
    assert x.type_as(there).is_cuda
    assert there.to("cpu", flame.int32).dtype is flame.int32
    same(there.t(), x.numpy().T)
    same(x.t().cuda(), x.numpy().T)
    same(x[:, ::2].cuda(), x.numpy()[:, ::2])
    same(x[:0].cuda(), x.numpy()[:0])
    same(flame.tensor(3.0).cuda(), 3.0)
    assert there.to("cuda", copy=True) is not there
    leaf = flame.ones(3, requires_grad=True)
    (leaf.cuda() * 2).sum().backward()
    assert leaf.grad.device == "cpu"
    same(leaf.grad, [2, 2, 2])


@check
def values_are_read() -> None:
    x = on_gpu(2, 3)
    assert x.sum().item() == pytest.approx(x.cpu().sum().item(), rel=1e-6)
    assert x.tolist() == x.cpu().tolist()
    assert "device='cuda:0'" in repr(x)
    assert re.sub(r", device='cuda:0'", "", repr(x)) == repr(x.cpu())
    assert f"{x.sum():.3f}" == f"{x.cpu().sum():.3f}"
    assert bool((x == x).all())
    assert float(x[0, 0]) == x.cpu().numpy()[0, 0]
    assert [float(r[0]) for r in x] == x.cpu()[:, 0].tolist()
    for refused in (x.numpy, lambda: np.asarray(x), lambda: np.from_dlpack(x), x.__dlpack__):
        with pytest.raises(DeviceError, match=r"\.cpu\(\)"):
            refused()
    with pytest.raises(GradientError):
        x.clone().requires_grad_().numpy()


@check
def copies_cross_devices() -> None:
    here, there = flame.arange(6.0).reshape(2, 3), flame.zeros(2, 3, device="cuda")
    there.copy_(here)
    same(there, here.numpy())
    back = flame.zeros(3, 2).t()
    back.copy_(there)
    same(back, here.numpy())
    there[0].copy_(flame.tensor([7, 8, 9]))
    same(there[0], [7, 8, 9])
    there[1] = flame.tensor(5.0)
    there[:, 1] = flame.tensor([1.0, 2.0])
    same(there, [[7, 1, 9], [5, 2, 5]])
    there.fill_(2)
    there.zero_()
    same(there, np.zeros((2, 3)))


@check
def devices_do_not_mix() -> None:
    x, y = flame.ones(3, device="cuda"), flame.ones(3)
    for call in (
        lambda: x + y, lambda: y * x, lambda: flame.cat([x, y]), lambda: x.matmul(y),
        lambda: flame.where(x > 0, x, y), lambda: x.add_(y), lambda: y.add_(x),
        lambda: x.index_select(0, flame.tensor([0])), lambda: x.gather(0, flame.tensor([0])),
        lambda: nn.functional.linear(x, flame.ones(2, 3)),
        lambda: flame.stack([x, y]), lambda: x.masked_fill(y > 0, 1.0),
    ):  # fmt: skip
        with pytest.raises(DeviceError) as raised:
            call()
        assert "cpu" in str(raised.value)
        assert "cuda:0" in str(raised.value)
    with pytest.raises(DeviceError):
        y.requires_grad_().grad = x


@check
def numbers_on_the_cpu_mix() -> None:
    x, number = on_gpu(3), flame.tensor(2.0)
    same(x * number, x.cpu().numpy() * 2)
    same(number - x, 2 - x.cpu().numpy())
    same(flame.where(x > number, x, number), np.maximum(x.cpu().numpy(), 2))
    x.mul_(number)
    assert x.is_cuda
    factor = flame.tensor(3.0, requires_grad=True)
    (x * factor).sum().backward()
    assert factor.grad.device == "cpu"
    same(factor.grad, x.cpu().sum().item(), rtol=1e-6)


@check
def index_tensors_may_be_on_the_cpu() -> None:
    x = on_gpu(4, 5)
    host = x.cpu().numpy()
    rows, columns = flame.tensor([2, 0, -1]), np.array([1, 1, 4])
    same(x[rows], host[[2, 0, -1]])
    same(x[rows.cuda()], host[[2, 0, -1]])
    same(x[rows, columns], host[[2, 0, -1], [1, 1, 4]])
    same(x[[0, 1], :2], host[[0, 1], :2])
    same(x[:, rows], host[:, [2, 0, -1]])
    x[rows] = 0.0
    x[flame.tensor([1]), 2:] = flame.ones(3, device="cuda")
    host = host.copy()
    host[[2, 0, -1]] = 0
    host[1, 2:] = 1
    same(x, host)
    leaf = flame.ones(4, 5, device="cuda", requires_grad=True)
    (leaf[rows] * 2).sum().backward()
    same(leaf.grad[:, 0], [2, 0, 2, 2])


@check
def indices_out_of_range_are_told_at_the_next_wait() -> None:
    x = on_gpu(4, 5)
    with pytest.raises(IndexRangeError, match="7"):
        x[flame.tensor([7], device="cuda")].cpu()
    with pytest.raises(IndexRangeError, match="9"):
        nn.functional.embedding(flame.tensor([1, 9], device="cuda"), x).sum().item()
    same(x.sum(), x.cpu().numpy().sum(), rtol=1e-5)
    flame.cuda.synchronize()


@check
def views_and_writes_in_place() -> None:
    x = on_gpu(4, 6)
    host = x.cpu().numpy().copy()
    x[1:3, ::2] += 1
    host[1:3, ::2] += 1
    x.t()[0].mul_(3)
    host[:, 0] *= 3
    x.view(2, 12)[0, 5:] = -1
    host.reshape(2, 12)[0, 5:] = -1
    x.diagonal().clamp_(min=0)
    np.fill_diagonal(host, np.maximum(np.diagonal(host), 0))
    same(x, host, rtol=1e-6)
    leaf = flame.ones(3, device="cuda", requires_grad=True)
    y = leaf * 2
    z = y.exp()
    z.add_(1)
    with pytest.raises(GradientError, match=r"in place|changed"):
        z.sum().backward()


@check
def hooks_and_retained_gradients() -> None:
    x = flame.ones(3, device="cuda", requires_grad=True)
    seen: list[Any] = []
    y = x * 3
    y.retain_grad()
    y.register_hook(lambda g: g * 2)
    x.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad.device))
    y.sum().backward()
    same(x.grad, [6, 6, 6])
    same(y.grad, [2, 2, 2])
    assert seen == ["cuda:0"]
    (gradient,) = flame.autograd.grad((x**3).sum(), x, create_graph=True)
    gradient.sum().backward()
    same(x.grad, [12, 12, 12])


@check
def gradients_are_checked() -> None:
    x = flame.rand(3, 4, dtype=flame.float64, device="cuda")
    assert gradcheck(lambda a: (a.exp() * a.softmax(-1)).sum(0), [x])


# --- randomness -----------------------------------------------------------------------------------


@check
def one_seed_gives_the_same_numbers_on_both_devices() -> None:
    weights = flame.tensor([[0.1, 0.2, 0.7], [0.4, 0.4, 0.2]])
    linear = nn.Linear(4, 4)

    def draws(device: str) -> dict[str, Any]:
        flame.manual_seed(5)
        ones = flame.ones(64, device=device)
        made = {
            "rand": flame.rand(100, device=device), "randn": flame.randn(7, 9, device=device),
            "randint": flame.randint(0, 1000, (50,), device=device),
            "rand_like": flame.rand_like(ones), "bernoulli": flame.bernoulli(ones * 0.3),
            "dropout": nn.functional.dropout(ones, 0.4),
            "normal": flame.normal(ones, ones * 0.5), "uniform_": ones.clone().uniform_(-1, 1),
            "exponential_": ones.clone().exponential_(2.0),
            "half": flame.randn(33, dtype=flame.float16, device=device),
            "double": flame.randn(33, dtype=flame.float64, device=device),
            "random_": flame.zeros(20, dtype=flame.int64, device=device).random_(10),
            "multinomial": flame.multinomial(weights.to(device), 6, replacement=True),
            "choice": flame.multinomial(weights.to(device), 2),
            "randperm": flame.randperm(30, device=device),
        }  # fmt: skip
        layer = copy.deepcopy(linear).to(device)
        for initial in (nn.init.kaiming_uniform_, nn.init.orthogonal_, nn.init.trunc_normal_):
            made[initial.__name__] = initial(layer.weight).detach().clone()
        return made

    here, there = draws("cpu"), draws("cuda")
    for name, expected in here.items():
        assert there[name].is_cuda, name
        np.testing.assert_allclose(
            there[name].cpu().numpy().astype(np.float64), expected.numpy().astype(np.float64),
            rtol=2e-3 if name == "half" else 1e-5, atol=1e-6, err_msg=name,
        )  # fmt: skip


@check
def generators_draw_on_their_device() -> None:
    generator = flame.Generator(device="cuda").manual_seed(3)
    assert generator.device == "cuda:0"
    state = generator.get_state()
    first = flame.rand(5, generator=generator, device="cuda")
    generator.set_state(state)
    same(flame.rand(5, generator=generator, device="cuda"), first.cpu().numpy())
    with pytest.raises(DeviceError, match=r"cuda:0.*cpu"):
        flame.rand(5, generator=generator)
    with pytest.raises(DeviceError, match=r"cpu.*cuda:0"):
        flame.rand(5, generator=flame.Generator(), device="cuda")


# --- state ----------------------------------------------------------------------------------------


@check
def tensors_are_copied_and_pickled() -> None:
    x = on_gpu(3, 4).t().requires_grad_()
    for made in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), copy.copy(x)):
        assert made.is_cuda
        assert made.requires_grad
        same(made, x.detach().cpu().numpy())
    half = on_gpu(5).bfloat16()
    assert pickle.loads(pickle.dumps(half)).dtype is flame.bfloat16
    assert copy.deepcopy(x).data_ptr() != x.data_ptr()


def _model() -> Any:
    flame.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    )


@check
def bags_and_packed_sequences_agree_with_the_cpu() -> None:
    table, rows = on_gpu(7, 3), on_gpu(11, 2, 8, seed=1)
    places, starts = flame.tensor([1, 1, 6, 0, 2, 5]), flame.tensor([0, 0, 4])
    ends = flame.tensor([0, 3, 3, 10, 11])
    found: list[list[Any]] = []
    for device in ("cpu", "cuda"):
        weight, x = (t.detach().to(device).requires_grad_() for t in (table, rows))
        made = [
            nn.functional.embedding_bag(places.to(device), weight, starts.to(device), mode=mode)
            for mode in ("sum", "mean", "max")
        ]
        made += [
            varlen_attn(x, x, x, ends.to(device), None, 7, 7, window_size=window)
            for window in ((-1, -1), (-1, 0), (2, 0))
        ]
        sum((y * y).sum() for y in made).backward()
        found.append([t.detach().cpu().numpy() for t in (*made, weight.grad, x.grad)])
    for cpu, gpu in zip(*found, strict=True):
        np.testing.assert_allclose(gpu, cpu, rtol=1e-4, atol=1e-5)


@check
def modules_move() -> None:
    model = _model()
    parameters = list(model.parameters())
    assert model.to("cuda") is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(t.is_cuda for t in model.state_dict().values())
    x = on_gpu(2, 3, 4, 4)
    model(x).sum().backward()
    assert all(p.grad.is_cuda for p in parameters)
    model.cpu()
    assert all(p.grad.device == "cpu" for p in parameters)
    with pytest.raises(DeviceError, match="cuda:0"):
        model(x)
    assert all(t.is_cuda for t in nn.Linear(2, 2, device="cuda").parameters())
    half = nn.Linear(2, 2).to("cuda", flame.bfloat16)
    assert half.weight.is_cuda
    assert half.weight.dtype is flame.bfloat16
    assert copy.deepcopy(model.cuda())[0].weight.is_cuda


@check
def states_are_loaded_across_devices() -> None:
    model, other = _model().cuda(), _model()
    for p in model.parameters():
        p.detach().normal_()
    other.load_state_dict(model.state_dict())
    assert all(t.device == "cpu" for t in other.state_dict().values())
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        same(a, b.numpy())
    model.load_state_dict(_model().state_dict())
    assert all(t.is_cuda for t in model.state_dict().values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        flame.checkpoint.save(other.cuda().state_dict(), path)
        model.load_state_dict(flame.checkpoint.load(path))
    assert all(t.is_cuda for t in model.state_dict().values())
    same(model[0].weight, other[0].weight.detach().cpu().numpy())


def _train(model: Any, optimizer: Any, steps: int, device: str) -> list[float]:
    losses = []
    for n in range(steps):
        x = flame.from_numpy(
            np.random.default_rng(n).standard_normal((4, 3, 4, 4)).astype(np.float32)
        )
        optimizer.zero_grad()
        loss = (model(x.to(device)) ** 2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@check
def optimizers_follow_their_parameters() -> None:
    for make in (
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: optim.AdamW(p, lr=0.01),
        lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    ):
        here, there = _model(), _model()
        first, second = make(here.parameters()), make(there.parameters())
        there.cuda()  # after the optimizer was made
        expected = _train(here, first, 3, "cpu")
        np.testing.assert_allclose(_train(there, second, 3, "cuda"), expected, rtol=1e-4)
        buffers = [v for s in second.state.values() for v in s.values() if hasattr(v, "is_cuda")]
        assert buffers
        assert all(b.is_cuda for b in buffers)
        again = _model().cuda()
        again.load_state_dict(here.state_dict())
        third = make(again.parameters())
        third.load_state_dict(first.state_dict())  # from the CPU
        expected = _train(here, first, 2, "cpu")
        np.testing.assert_allclose(_train(again, third, 2, "cuda"), expected, rtol=1e-4)
        pickle.loads(pickle.dumps(third.state_dict()))


@check
def data_is_brought_to_the_device() -> None:
    images = flame.arange(24.0).reshape(8, 3)
    data = flame.data.TensorDataset(images, flame.arange(8))
    for workers in (0, 2):
        loader = flame.data.DataLoader(data, batch_size=3, num_workers=workers, pin_memory=True)
        seen = []
        for x, y in loader:
            assert x.is_pinned()
            assert y.is_pinned()
            seen.append((x.to("cuda", non_blocking=True), y.cuda(non_blocking=True)))
        same(flame.cat([x for x, _ in seen]), images.numpy())
        same(flame.cat([y for _, y in seen]), np.arange(8))
        moved = list(flame.data.prefetch_to_device(loader, "cuda"))
        assert all(t.is_cuda for batch in moved for t in batch)
        same(flame.cat([x for x, _ in moved]), images.numpy())
    pinned = images.pin_memory()
    assert pinned.is_pinned()
    assert not images.is_pinned()
    same(pinned, images.numpy())
    assert pinned.pin_memory() is pinned
    back = flame.zeros(8, 3).pin_memory()
    back.copy_(pinned.cuda(), non_blocking=True)
    flame.cuda.synchronize()
    same(back, images.numpy())
