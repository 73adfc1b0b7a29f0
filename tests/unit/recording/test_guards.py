"""What a compiled step depends on is noticed, or refused with the line that asks for it."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from typing import Any

import numpy as np
import pytest

import flame
import flame.nn as nn
import flame.optim as optim
from flame.core.errors import TraceError
from flame.optim import lr_scheduler

SCALE = 2.0


def array(*shape: int, seed: int = 0) -> flame.Tensor:
    return flame.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def scaled(x: Any) -> Any:
    return x * SCALE


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


# --- Python's own data ----------------------------------------------------------------------------


def test_globals_of_the_functions_that_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__("sys").modules[__name__]
    assert_follows(
        lambda x: scaled(x) + 1,
        [
            lambda: monkeypatch.setattr(module, "SCALE", 3.0),
            lambda: monkeypatch.setattr(module, "scaled", lambda x: x - 1),
        ],
        array(3),
    )


def test_names_in_inner_functions() -> None:
    factor = 2.0

    def outer(x: Any) -> Any:
        return sum((lambda y: y * factor)(x) for _ in range(2))

    def change() -> None:
        nonlocal factor
        factor = 5.0

    assert_follows(outer, [change], array(3))


def test_attributes_of_objects() -> None:
    options = types.SimpleNamespace(alpha=0.5, unused=1)
    options.inner = types.SimpleNamespace(beta=2.0)

    def function(x: Any) -> Any:
        return x * options.alpha + options.inner.beta

    assert_follows(
        function,
        [
            lambda: setattr(options, "alpha", 0.7),
            lambda: setattr(options.inner, "beta", 3.0),
        ],
        array(3),
    )
    compiled = flame.compile(function)
    compiled(array(3))
    options.unused = 2  # which the function does not name
    compiled(array(3))
    assert compiled.recordings == 1


def test_numbers_deep_in_containers() -> None:
    options: dict[str, Any] = {"scales": [1.0, 2.0], "inner": {"shift": 1.0}}
    blocks = [types.SimpleNamespace(power=2)]

    def function(x: Any) -> Any:
        return x ** blocks[0].power * options["scales"][1] + options["inner"]["shift"]

    def change_inner() -> None:
        options["inner"]["shift"] = 3.0

    def change_scale() -> None:
        options["scales"][1] = 5.0

    change_block = functools.partial(setattr, blocks[0], "power", 3)
    assert_follows(function, [change_inner, change_scale, change_block], array(3))


def test_attributes_of_the_object_itself_and_of_its_methods() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.rate, self.steps, self.last = 0.5, 0, None

        def scale(self, x: Any) -> Any:
            return x * self.rate

        def step(self, x: Any) -> Any:
            return self.scale(x) + 1

        def counting(self, x: Any) -> Any:
            self.steps += 1
            return x * 2

    trainer = Trainer()
    assert_follows(trainer.step, [lambda: setattr(trainer, "rate", 0.7)], array(3))
    compiled = flame.compile(trainer.step)
    for i in range(3):
        trainer.last = compiled(array(3, seed=i))  # kept by the user, after the call
    assert compiled.recordings == 1
    with pytest.raises(TraceError, match=r"test_guards\.py:\d+: the step changes 'steps'"):
        flame.compile(trainer.counting)(array(3))


def test_attributes_of_a_module_that_is_not_called() -> None:
    model = nn.Linear(3, 3)
    model.temperature = 2.0
    assert_follows(
        lambda x: x / model.temperature + model.bias.detach(),
        [lambda: setattr(model, "temperature", 4.0)],
        array(3),
    )


def test_arrays_that_are_changed_by_numpy() -> None:
    noise = np.ones(3, np.float32)
    whole = np.zeros((2, 3), np.float32)
    assert_follows(
        lambda x: x + flame.from_numpy(noise) * whole[1],
        [lambda: noise.fill(3.0), lambda: whole.fill(2.0)],
        array(3),
    )


def test_objects_among_the_arguments() -> None:
    class Options:
        alpha = 0.5

    options, model = Options(), nn.Linear(3, 3)
    options.alpha = 0.7

    def function(x: Any, options: Any, model: Any) -> Any:
        return model(x).detach() * options.alpha

    change = functools.partial(setattr, options, "alpha", 2.0)
    assert_follows(function, [change, lambda: model.eval()], array(3), options, model)


def test_partial_functions_and_objects_that_are_called() -> None:
    options = types.SimpleNamespace(alpha=0.5)

    class Scales:
        def __init__(self) -> None:
            self.factor = 2.0

        def __call__(self, x: Any) -> Any:
            return x * self.factor

    scales = Scales()
    assert_follows(scales, [lambda: setattr(scales, "factor", 3.0)], array(3))
    partial = functools.partial(lambda options, x: x * options.alpha, options)
    assert_follows(partial, [lambda: setattr(options, "alpha", 3.0)], array(3))

    @flame.no_grad()
    def decorated(x: Any) -> Any:
        return x + options.alpha

    assert_follows(decorated, [lambda: setattr(options, "alpha", 4.0)], array(3))


def test_modules_inside_of_modules() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 3), nn.Tanh()), "b": nn.ReLU()})

    def function(x: Any) -> Any:
        for each in model.values():
            x = each(x)
        return x.detach()

    def pop() -> None:
        model.pop("b")

    assert_follows(function, [lambda: model["a"].append(nn.Sigmoid()), pop], array(3))

    @flame.compile
    def grows(x: Any) -> Any:
        model["c"] = nn.Tanh()
        return model["c"](x)

    with pytest.raises(TraceError, match="other modules"):
        grows(array(3))


def test_copies_of_compiled_modules_are_their_own() -> None:
    model = flame.compile(nn.Linear(3, 3))
    x = array(3)
    first = model(x).detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin).__name__ == "CompiledLinear"
        assert twin.recordings == 0
        np.testing.assert_array_equal(twin(x).numpy(force=True), first.numpy())
        with flame.no_grad():
            twin.bias.add_(1)
        np.testing.assert_allclose(twin(x).numpy(force=True), first.numpy() + 1, rtol=1e-6)
        np.testing.assert_array_equal(model(x).numpy(force=True), first.numpy())


def test_an_optimizer_whose_step_is_python() -> None:
    class Descent(optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})
            self.calls = 0

        def step(self, closure: Any = None) -> None:
            with flame.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.sub_(p.grad * group["lr"])

    class Counting(Descent):
        def step(self, closure: Any = None) -> None:
            self.calls += 1
            super().step(closure)

    weight = array(3).requires_grad_()
    optimizer, counting = Descent([weight]), Counting([weight])

    def step(x: Any) -> Any:
        optimizer.zero_grad()
        (weight * x).sum().backward()
        optimizer.step()
        return weight.detach().clone()

    @flame.compile
    def counted(x: Any) -> None:
        (weight * x).sum().backward()
        counting.step()

    compiled = flame.compile(step)
    for rate in (0.1, 0.5):
        optimizer.param_groups[0]["lr"] = rate
        for i in range(2):
            x, before = array(3, seed=i), weight.numpy(force=True).copy()
            np.testing.assert_allclose(compiled(x).numpy(), before - rate * x.numpy(), 1e-5)
    assert compiled.recordings == 2
    with pytest.raises(TraceError, match=r"'calls' of 'counting', a Counting"):
        counted(array(3))


def test_rates_that_the_step_reads_or_sets() -> None:
    weight = array(3).requires_grad_()
    optimizer = optim.SGD([weight], lr=0.1)
    schedule = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def reads(x: Any) -> Any:
        return x * optimizer.param_groups[0]["lr"]

    def sets(x: Any) -> None:
        weight.grad = x
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.9
        optimizer.step()

    def logs(x: Any) -> Any:
        schedule.step()
        return {"rate": schedule.get_last_lr()[0]}

    def logs_the_group(x: Any) -> Any:
        schedule.step()
        return {"rate": optimizer.param_groups[0]["lr"]}

    assert_follows(reads, [schedule.step], array(3))
    for function, words in ((sets, "changes 'optimizer"), (logs, "rate of a schedule"),
                            (logs_the_group, "changes 'optimizer")):  # fmt: skip
        with pytest.raises(TraceError, match=rf"test_guards\.py:\d+: .*{words}"):
            flame.compile(function)(array(3))


def test_seeds_that_the_step_sets() -> None:
    state = flame.get_rng_state()

    def step(x: Any) -> Any:
        first = flame.rand(3)
        flame.manual_seed(5)
        second = flame.rand(3)
        flame.set_rng_state(state)
        return flame.stack([first, second, flame.rand(3)])

    compiled = flame.compile(step)
    for call in (0, 1, 2):
        flame.manual_seed(call)
        expected = step(array(3))
        flame.manual_seed(call)
        np.testing.assert_array_equal(compiled(array(3)).numpy(), expected.numpy())
    assert compiled.recordings == 1
    with pytest.raises(TraceError, match="state of a generator"):
        flame.compile(lambda x: x + flame.get_rng_state().sum())(array(3))


def test_gradients_that_are_zeroed_and_not_forgotten() -> None:
    weight = array(3).requires_grad_()
    optimizer = optim.SGD([weight], lr=0.0)

    @flame.compile
    def step(x: Any) -> None:
        optimizer.zero_grad(set_to_none=False)
        (weight * x).sum().backward()

    for i in range(5):
        x = array(3, seed=i)
        step(x)
        np.testing.assert_allclose(weight.grad.numpy(), x.numpy())
    assert step.recordings == 2  # without gradients, and with


def test_lists_among_the_arguments_are_not_changed() -> None:
    losses: list[Any] = []

    @flame.compile
    def step(x: Any, losses: list[Any]) -> Any:
        losses.append(1.0)
        return x

    with pytest.raises(TraceError, match="among its arguments"):
        step(array(3), losses)
    assert losses == []


def test_numbers_that_are_equal_and_not_the_same() -> None:
    divide = flame.compile(lambda x, y: x / (flame.zeros(2) + y))
    one = flame.ones(2)
    assert divide(one, 0.0).tolist() == [np.inf] * 2
    assert divide(one, 0).tolist() == [np.inf] * 2
    sign = flame.compile(lambda x, y: flame.copysign(x, y))
    assert sign(one, 0.0).tolist() == [1.0, 1.0]
    assert sign(one, -0.0).tolist() == [-1.0, -1.0]
    for _ in range(3):
        assert np.isnan(divide(one, float("nan")).numpy()).all()
    assert divide.recordings == 3


# --- values of tensors ----------------------------------------------------------------------------


def test_numbers_that_python_looked_at() -> None:
    temperature = flame.tensor(2.0)
    mask = flame.tensor([True, False, True])

    def function(x: Any) -> Any:
        if float(temperature) > 3:
            return x[mask].sum() * 2
        return x[mask].sum() / temperature.item()

    assert_follows(
        function,
        [
            lambda: temperature.fill_(3.0),
            lambda: temperature.fill_(5.0),
            lambda: mask.copy_(flame.tensor([True, True, True])),
        ],
        array(3),
    )


def test_numbers_that_the_step_changes_are_refused() -> None:
    counter = flame.zeros(())

    def after(x: Any) -> Any:
        counter.add_(1)
        return x * counter.item()

    def before(x: Any) -> Any:
        found = x * counter.item()
        counter.add_(1)
        return found

    for function in (after, before):
        with pytest.raises(TraceError, match=r"test_guards\.py:\d+: "):
            flame.compile(function)(array(3))
    assert counter.item() == 0
    large = flame.zeros(300, 300)
    with pytest.raises(TraceError, match="large"):
        flame.compile(lambda x: x * float(large.numpy().mean()))(array(3))
