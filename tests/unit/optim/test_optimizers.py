"""Each optimizer with each option: 20 steps equal PyTorch's; its errors; its state."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import flame
from flame import optim
from flame.core.errors import (
    ArgumentError,
    DTypeError,
    GradientError,
    ShapeError,
    StateError,
    UnsupportedError,
)

STEPS = 20
SHAPES = [(3, 4), (5,), (2, 1, 3), (), (0, 2)]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.05, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.5, "dampening": 0.9, "maximize": True}),
    ("Adam", {}),
    ("Adam", {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.02, "amsgrad": True}),
    ("Adam", {"lr": 0.02, "amsgrad": True, "maximize": True, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("Adam", {"lr": 0.02, "betas": (0.0, 0.0)}),
    ("AdamW", {}),
    ("AdamW", {"lr": 0.02, "weight_decay": 0.3, "maximize": True}),
    ("AdamW", {"lr": 0.02, "weight_decay": 0.0}),
    ("AdamW", {"lr": 0.02, "amsgrad": True, "betas": (0.5, 0.6)}),
    ("RMSprop", {}),
    ("RMSprop", {"lr": 0.02, "alpha": 0.9, "weight_decay": 0.1, "maximize": True}),
    ("RMSprop", {"lr": 0.02, "momentum": 0.9}),
    ("RMSprop", {"lr": 0.02, "centered": True, "alpha": 0.9}),
    ("RMSprop", {"lr": 0.02, "centered": True, "momentum": 0.5, "eps": 1e-3}),
    ("Adagrad", {}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.2, "weight_decay": 0.1, "eps": 1e-6}),
    ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5, "maximize": True}),
]
LION_CASES: list[dict[str, Any]] = [
    {},
    {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.2},
    {"lr": 0.01, "maximize": True},
]


def identifier(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={option}" for name, option in value.items()) or "defaults"
    return str(value)


def values(dtype: Any, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [np.asarray(random.normal(size=shape), dtype=dtype) for shape in SHAPES]


def gradients(dtype: Any, step: int) -> list[np.ndarray]:
    return values(dtype, 1000 + step)


def flame_parameters(dtype: Any, seed: int = 0) -> list[flame.Tensor]:
    return [flame.tensor(value, requires_grad=True) for value in values(dtype, seed)]


def torch_parameters(dtype: Any, seed: int = 0) -> list[torch.Tensor]:
    return [torch.tensor(value, requires_grad=True) for value in values(dtype, seed)]


def advance(optimizer: Any, parameters: list[Any], make: Any, dtype: Any, steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(parameters, gradients(dtype, step), strict=True):
            parameter.grad = make(gradient)
        optimizer.step()


def assert_equal(ours: list[Any], theirs: list[Any], dtype: Any) -> None:
    tolerance = (
        {"rtol": 2e-6, "atol": 2e-6} if dtype == np.float32 else {"rtol": 1e-12, "atol": 1e-12}
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), **tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=identifier)
def test_twenty_steps_equal_pytorch(name: str, options: dict[str, Any], dtype: Any) -> None:
    ours, theirs = flame_parameters(dtype), torch_parameters(dtype)
    a = getattr(optim, name)(ours, **options)
    b = getattr(torch.optim, name)(theirs, **options)
    advance(a, ours, flame.tensor, dtype, range(STEPS))
    advance(b, theirs, torch.tensor, dtype, range(STEPS))
    assert_equal(ours, theirs, dtype)
    saved, expected = a.state_dict(), b.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    assert list(saved["state"]) == list(expected["state"])
    for number, state in expected["state"].items():
        assert list(saved["state"][number]) == list(state)
        for key, value in state.items():
            assert tuple(saved["state"][number][key].shape) == tuple(value.shape)
            assert_equal([saved["state"][number][key]], [value], dtype)


@pytest.mark.parametrize("options", LION_CASES, ids=identifier)
def test_lion_follows_its_paper(options: dict[str, Any]) -> None:
    defaults = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, "maximize": False}
    chosen = {**defaults, **options}
    beta1, beta2 = chosen["betas"]
    parameters = flame_parameters(np.float64)
    advance(optim.Lion(parameters, **options), parameters, flame.tensor, np.float64, range(STEPS))
    expected = values(np.float64, 0)
    momentum = [np.zeros_like(value) for value in expected]
    for step in range(STEPS):
        for i, gradient in enumerate(gradients(np.float64, step)):
            g = -gradient if chosen["maximize"] else gradient
            move = np.sign(beta1 * momentum[i] + (1 - beta1) * g)
            expected[i] = expected[i] - chosen["lr"] * (move + chosen["weight_decay"] * expected[i])
            momentum[i] = beta2 * momentum[i] + (1 - beta2) * g
    for parameter, value in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "options"), CASES, ids=identifier)
def test_a_state_dict_of_pytorch_loads_and_goes_on(name: str, options: dict[str, Any]) -> None:
    theirs = torch_parameters(np.float32)
    b = getattr(torch.optim, name)(theirs, **options)
    advance(b, theirs, torch.tensor, np.float32, range(5))
    ours = [flame.tensor(value.detach().numpy(), requires_grad=True) for value in theirs]
    a = getattr(optim, name)(ours)
    a.load_state_dict(as_numpy(b.state_dict()))
    advance(a, ours, flame.tensor, np.float32, range(5, 12))
    advance(b, theirs, torch.tensor, np.float32, range(5, 12))
    assert_equal(ours, theirs, np.float32)


def as_numpy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy().copy()
    if isinstance(value, dict):
        return {key: as_numpy(entry) for key, entry in value.items()}
    return [as_numpy(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("name", "options"), [*CASES, *[("Lion", options) for options in LION_CASES]], ids=identifier
)
def test_resuming_equals_going_on_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    kind = getattr(optim, name)
    straight = flame_parameters(np.float32)
    optimizer = kind(straight, **options)
    advance(optimizer, straight, flame.tensor, np.float32, range(6))
    resumed = [
        flame.tensor(value.detach().numpy().copy(), requires_grad=True) for value in straight
    ]
    other = kind(resumed)
    other.load_state_dict(optimizer.state_dict())
    for a, p in ((optimizer, straight), (other, resumed)):
        advance(a, p, flame.tensor, np.float32, range(6, STEPS))
    for a, b in zip(straight, resumed, strict=True):
        assert a.detach().numpy().tobytes() == b.detach().numpy().tobytes()


def test_groups_have_options_of_their_own_and_gradients_may_be_missing() -> None:
    def run(module: Any, make: Any) -> list[np.ndarray]:
        parameters = [make(value) for value in values(np.float32, 0)]
        for parameter in parameters:
            parameter.requires_grad_()
        optimizer = module.AdamW(
            [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2]}], lr=0.01
        )
        optimizer.add_param_group({"params": parameters[3:], "weight_decay": 0.5})
        for step in range(STEPS):
            for position, (p, g) in enumerate(
                zip(parameters, gradients(np.float32, step), strict=True)
            ):
                p.grad = None if (step + position) % 3 == 0 else make(g)
            optimizer.step()
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01, 0.01]
        return [parameter.detach().numpy() for parameter in parameters]

    for a, b in zip(run(optim, flame.tensor), run(torch.optim, torch.tensor), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Lion"])
def test_the_learning_rate_may_be_a_tensor_and_change(name: str) -> None:
    kind = getattr(optim, name)
    plain, tensor = flame_parameters(np.float64), flame_parameters(np.float64)
    a = kind(plain, lr=0.5)
    rate = flame.tensor(0.5, dtype=flame.float64)
    b = kind(tensor, lr=rate)
    advance(a, plain, flame.tensor, np.float64, range(3))
    advance(b, tensor, flame.tensor, np.float64, range(3))
    a.param_groups[0]["lr"] = 0.25
    rate.fill_(0.25)
    advance(a, plain, flame.tensor, np.float64, range(3, 6))
    advance(b, tensor, flame.tensor, np.float64, range(3, 6))
    for x, y in zip(plain, tensor, strict=True):
        np.testing.assert_allclose(x.detach().numpy(), y.detach().numpy(), rtol=1e-12, atol=1e-14)


def test_a_closure_runs_once_with_gradients_enabled() -> None:
    parameter = flame.tensor(np.ones(3, np.float32), requires_grad=True)
    optimizer = optim.SGD([parameter], lr=0.5)
    calls = []

    def closure() -> flame.Tensor:
        optimizer.zero_grad()
        loss = (parameter * parameter).sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    with flame.no_grad():
        loss = optimizer.step(closure)
    assert calls == [3.0]
    assert loss.item() == 3.0
    np.testing.assert_array_equal(parameter.detach().numpy(), np.zeros(3))


def test_zero_grad_forgets_or_fills() -> None:
    parameter = flame.tensor(np.ones(2, np.float32), requires_grad=True)
    without = flame.tensor(np.ones(2, np.float32), requires_grad=True)
    optimizer = optim.SGD([parameter, without], lr=0.5)
    parameter.grad = flame.tensor(np.full(2, 7.0, np.float32))
    optimizer.zero_grad(set_to_none=False)
    assert parameter.grad.tolist() == [0.0, 0.0]
    assert without.grad is None
    optimizer.zero_grad()
    assert parameter.grad is None


def test_an_update_is_in_place_and_records_nothing() -> None:
    parameter = flame.tensor(np.ones(4, np.float32), requires_grad=True)
    same = parameter.detach()
    optimizer = optim.AdamW([parameter], lr=0.1)
    parameter.grad = flame.tensor(np.ones(4, np.float32))
    optimizer.step()
    assert parameter.is_leaf
    assert parameter.requires_grad
    np.testing.assert_array_equal(same.numpy(), parameter.detach().numpy())
    assert (same.numpy() < 1).all()


def test_a_transposed_gradient_is_read_by_its_strides() -> None:
    random = np.random.default_rng(0)
    start, gradient = random.normal(size=(3, 4)), random.normal(size=(4, 3))
    a = flame.tensor(start, requires_grad=True)
    b = torch.tensor(start, requires_grad=True)
    a.grad, b.grad = flame.tensor(gradient).T, torch.tensor(gradient).T
    optim.Adam([a]).step()
    torch.optim.Adam([b]).step()
    np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=1e-12)


def test_a_gradient_of_another_shape_or_dtype_is_refused() -> None:
    parameter = flame.tensor(np.ones(3, np.float32), requires_grad=True)
    optimizer = optim.SGD([parameter], lr=0.5)
    for wrong in (np.ones(1, np.float32), np.ones(3, np.float64)):
        with pytest.raises((ShapeError, DTypeError, GradientError), match="gradient"):
            step_with(optimizer, parameter, flame.tensor(wrong))
    assert parameter.tolist() == [1.0, 1.0, 1.0]


def step_with(optimizer: optim.Optimizer, parameter: Any, gradient: flame.Tensor) -> None:
    parameter.grad = gradient
    optimizer.step()


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion", "RMSprop", "Adagrad"])
def test_half_width_parameters_follow_the_full_ones(name: str) -> None:
    options = {"lr": 0.05, **({"momentum": 0.9} if name == "SGD" else {})}
    full = flame_parameters(np.float32)
    half = [
        flame.tensor(value, dtype=flame.bfloat16, requires_grad=True)
        for value in values(np.float32, 0)
    ]
    kind = getattr(optim, name)
    advance(kind(full, **options), full, flame.tensor, np.float32, range(STEPS))
    advance(
        kind(half, **options),
        half,
        lambda gradient: flame.tensor(gradient, dtype=flame.bfloat16),
        np.float32,
        range(STEPS),
    )
    for a, b in zip(full, half, strict=True):
        assert b.dtype is flame.bfloat16
        narrow = b.detach().numpy().astype(np.float32)
        np.testing.assert_allclose(narrow, a.detach().numpy(), rtol=0.05, atol=0.2)


def test_centered_rmsprop_survives_equal_gradients() -> None:
    parameter = flame.tensor(np.ones(1000, np.float32), requires_grad=True)
    optimizer = optim.RMSprop([parameter], lr=1e-3, centered=True, alpha=0.5, eps=1.0)
    for _ in range(60):
        parameter.grad = flame.tensor(np.linspace(0.1, 10, 1000, dtype=np.float32))
        optimizer.step()
    assert np.isfinite(parameter.detach().numpy()).all()


def test_names_are_kept() -> None:
    parameters = flame_parameters(np.float32)
    named = [(f"layer.{i}", parameter) for i, parameter in enumerate(parameters)]
    optimizer = optim.SGD(named, lr=0.1)
    group = optimizer.state_dict()["param_groups"][0]
    assert group["param_names"] == [name for name, _ in named]
    assert optimizer.param_groups[0]["params"][0] is parameters[0]
    with pytest.raises(ArgumentError, match="a name with every parameter or with none"):
        optim.SGD([named[0], parameters[1]])


def test_repr_lists_groups_and_options() -> None:
    text = repr(optim.SGD(flame_parameters(np.float32), lr=0.25, momentum=0.5))
    assert "SGD" in text
    assert "group 0: 5 tensors, 24 numbers" in text
    assert "lr: 0.25" in text
    assert "momentum: 0.5" in text


# Errors


def one() -> Iterator[flame.Tensor]:
    return iter([flame.tensor(np.ones(2, np.float32), requires_grad=True)])


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("SGD", {"lr": -0.1}, "lr must be finite and at least 0"),
        ("SGD", {"lr": float("nan")}, "lr must be"),
        ("SGD", {"momentum": -1.0}, "momentum must be"),
        ("SGD", {"weight_decay": -1.0}, "weight_decay must be"),
        ("SGD", {"nesterov": True}, "nesterov needs momentum"),
        ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov needs momentum"),
        ("Adam", {"betas": (1.0, 0.9)}, r"betas\[0\] must lie in \[0, 1\)"),
        ("Adam", {"betas": (0.9, -0.1)}, r"betas\[1\] must lie"),
        ("Adam", {"betas": 0.9}, "betas must be two numbers"),
        ("AdamW", {"eps": -1e-8}, "AdamW: eps must be"),
        ("RMSprop", {"alpha": 1.5}, r"alpha must lie in \[0, 1\]"),
        ("Adagrad", {"lr_decay": -1}, "lr_decay must be"),
        ("Lion", {"weight_decay": -1}, "weight_decay must be"),
    ],
    ids=identifier,
)
def test_bad_values_are_refused(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        getattr(optim, name)(one(), **options)
    with pytest.raises(ArgumentError, match=match):
        getattr(optim, name)([{"params": list(one()), **options}])


def test_what_cannot_be_optimized_is_refused() -> None:
    (leaf,) = one()
    with pytest.raises(ArgumentError, match="got no parameters"):
        optim.SGD([])
    with pytest.raises(ArgumentError, match="empty parameter group"):
        optim.SGD([{"params": []}])
    with pytest.raises(ArgumentError, match='needs the key "params"'):
        optim.SGD([{"lr": 0.1}])
    with pytest.raises(DTypeError, match="put it into a list"):
        optim.SGD(leaf)  # type: ignore[arg-type]
    with pytest.raises(DTypeError, match="a set of parameters"):
        optim.SGD({leaf})
    with pytest.raises(DTypeError, match="must be a tensor, got int"):
        optim.SGD([3])  # type: ignore[list-item]
    with pytest.raises(DTypeError, match="int64"):
        optim.SGD([flame.tensor(np.arange(3))])
    with pytest.raises(ArgumentError, match="is no leaf"):
        optim.SGD([leaf * 2])
    with pytest.raises(ArgumentError, match="was already given"):
        optim.SGD([leaf, leaf])
    with pytest.raises(ArgumentError, match="was already given"):
        optim.SGD([{"params": leaf}, {"params": leaf}])
    with pytest.raises(UnsupportedError, match="differentiable"):
        optim.Adam([leaf], differentiable=True)
    with pytest.raises(DTypeError, match="lr must be a number"):
        optim.SGD([leaf], lr="fast")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="one element"):
        optim.SGD([leaf], lr=flame.tensor(np.ones(2)))
    optim.SGD([leaf], foreach=True, fused=True)
    leaf.grad = flame.tensor(np.ones(2, np.float32))
    with pytest.raises(UnsupportedError, match="_update"):
        optim.Optimizer([leaf], {}).step()


def test_a_state_dict_that_does_not_fit_changes_nothing() -> None:
    parameters = flame_parameters(np.float32)
    optimizer = optim.Adam(parameters, lr=0.25)
    advance(optimizer, parameters, flame.tensor, np.float32, range(3))
    before = flatten(optimizer.state_dict())
    good = as_arrays(optimizer.state_dict())

    def broken(change: Any) -> dict[str, Any]:
        saved = copy.deepcopy(good)
        change(saved)
        return saved

    cases: list[tuple[Any, str]] = [
        (lambda s: s.pop("state"), '"state" is missing'),
        (
            lambda s: s["param_groups"].append(s["param_groups"][0]),
            "2 parameter groups saved, 1 here",
        ),
        (lambda s: s["param_groups"][0]["params"].pop(), "4 parameters saved, 5 here"),
        (
            lambda s: s["state"][0].update(exp_avg=np.zeros((4, 3))),
            r"exp_avg: shape \(4, 3\) saved",
        ),
        (lambda s: s["state"].update({9: {}}), "parameter 9, which is in no group"),
        (lambda s: s["state"][0].update(step=1.5), "whole number"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "lr must be"),
    ]
    for change, match in cases:
        with pytest.raises((StateError, ArgumentError), match=match):
            optimizer.load_state_dict(broken(change))
        assert flatten(optimizer.state_dict()) == before


def as_arrays(value: Any) -> Any:
    if isinstance(value, flame.Tensor):
        return value.detach().numpy().copy()
    if isinstance(value, dict):
        return {key: as_arrays(entry) for key, entry in value.items()}
    return [as_arrays(entry) for entry in value] if isinstance(value, list) else value


def flatten(value: Any) -> str:
    with np.printoptions(floatmode="unique", threshold=10**6):
        return repr(as_arrays(value))


def test_a_loaded_state_is_a_copy_in_the_dtype_of_its_parameter() -> None:
    source = flame_parameters(np.float64)
    optimizer = optim.Adam(source)
    advance(optimizer, source, flame.tensor, np.float64, range(2))
    target = flame_parameters(np.float32)
    other = optim.Adam(target)
    other.load_state_dict(optimizer.state_dict())
    average = other.state[target[0]]["exp_avg"]
    assert average.dtype is flame.float32
    kept = average.numpy().copy()
    advance(optimizer, source, flame.tensor, np.float64, range(2, 4))
    np.testing.assert_array_equal(average.numpy(), kept)


def test_an_optimizer_of_ones_own_may_override_step() -> None:
    class Descent(optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            with flame.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.sub_(parameter.grad * group["lr"])

    (leaf,) = one()
    leaf.grad = flame.tensor(np.ones(2, np.float32))
    Descent([leaf], {"lr": 0.25}).step()
    assert leaf.tolist() == [0.75, 0.75]
