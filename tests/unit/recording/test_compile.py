"""`flame.compile`: what a compiled function does is what the function does, call after call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import flame
import flame.nn as nn
import flame.optim as optim
from flame.core.errors import FlameWarning, GradientError, IndexRangeError
from flame.eager import Eager
from flame.nn import functional

Setup = Callable[[], tuple[Any, Callable[..., Any]]]


def array(*shape: int, seed: int = 0) -> flame.Tensor:
    return flame.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def state_of(model: Any) -> dict[str, np.ndarray]:
    return {name: t.numpy().copy() for name, t in model.state_dict().items()}


def both(setup: Setup, batches: list[tuple[Any, ...]]) -> Any:
    """Run eagerly and compiled from the same start; all results and states must be equal bits."""
    model, step = setup()
    flame.manual_seed(3)
    expected = [step(*batch) for batch in batches]
    other, again = setup()
    compiled = flame.compile(again)
    flame.manual_seed(3)
    found = [compiled(*batch) for batch in batches]
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b.numpy(force=True), a.numpy(force=True), rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(state_of(model).items(), state_of(other).values(), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6, err_msg=name)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            np.testing.assert_allclose(q.grad.numpy(), p.grad.numpy(), rtol=1e-3, atol=1e-6)
    return compiled


def net() -> Any:
    flame.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )


def batches(count: int = 5, size: int = 8) -> list[tuple[Any, ...]]:
    return [(array(size, 6, seed=i), array(size, 3, seed=100 + i)) for i in range(count)]


def trainer(make_optimizer: Callable[[Any], Any], **options: Any) -> Setup:
    """A setup whose step uses all that its options name."""

    def setup() -> tuple[Any, Callable[..., Any]]:
        model = net()
        optimizer = make_optimizer(model.parameters())
        scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

        def step(x: Any, y: Any) -> Any:
            if not options.get("zero_last"):
                optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            if options.get("clip"):
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            if options.get("schedule"):
                scheduler.step()
            if options.get("zero_last"):
                optimizer.zero_grad()
            return loss

        return model, step

    return setup


OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.05),
    "momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    compiled = both(trainer(OPTIMIZERS[name]), batches())
    assert compiled.recordings == 1


@pytest.mark.parametrize("options", [{"clip": True}, {"schedule": True}, {"zero_last": True}])
def test_clipping_schedules_and_zeroing(options: dict[str, bool]) -> None:
    compiled = both(trainer(OPTIMIZERS["adamw"], **options), batches())
    assert compiled.recordings == 1


def test_later_calls_run_no_operation_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    _, step = trainer(OPTIMIZERS["adamw"], clip=True, schedule=True)()
    compiled = flame.compile(step)
    (x, y), *rest = batches()
    compiled(x, y)
    calls = []
    apply = Eager.apply
    monkeypatch.setattr(Eager, "apply", lambda *a, **k: calls.append(a[1]) or apply(*a, **k))
    losses = [compiled(*batch) for batch in rest]
    assert calls == []
    assert len({loss.item() for loss in losses}) == len(rest)
    assert compiled.recordings == 1


def test_a_new_shape_is_recorded_anew_and_the_old_one_is_kept() -> None:
    compiled = both(
        trainer(OPTIMIZERS["sgd"]), [*batches(2), *batches(2, 5), *batches(2), *batches(1, 5)]
    )
    assert compiled.recordings == 2


def test_gradients_accumulate_over_calls() -> None:
    def setup() -> tuple[Any, Callable[..., Any]]:
        model = net()

        def step(x: Any, y: Any) -> Any:
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        return model, step

    compiled = both(setup, batches(6))
    assert compiled.recordings == 2  # without gradients, and with


def test_training_and_evaluation_are_different_programs() -> None:
    model = net()
    forward = flame.compile(lambda x: model(x))
    x = array(8, 6)
    model.eval()
    quiet = forward(x).numpy(force=True)
    np.testing.assert_allclose(quiet, model(x).numpy(force=True), rtol=1e-5, atol=1e-6)
    model.train()
    flame.manual_seed(0)
    noisy = forward(x)
    flame.manual_seed(0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert not np.allclose(noisy.numpy(force=True), quiet)
    model.load_state_dict(before)
    model.eval()
    forward(x)
    assert forward.recordings == 2


def test_a_step_that_sets_the_mode_itself() -> None:
    model = net()

    @flame.compile
    def step(x: Any) -> Any:
        model.train()
        return model(x).detach()

    for _ in range(3):
        model.eval()
        step(array(8, 6))
        assert model.training
    assert step.recordings == 1


def test_moving_average_of_the_weights() -> None:
    def setup() -> tuple[Any, Callable[..., Any]]:
        model = nn.Linear(6, 3)
        flame.manual_seed(0)
        nn.init.normal_(model.weight)
        nn.init.zeros_(model.bias)
        model.register_buffer("average", model.weight.detach().clone())
        optimizer = optim.SGD(model.parameters(), lr=0.1)

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            with flame.no_grad():
                model.average.lerp_(model.weight, 0.1)
            return loss

        return model, step

    both(setup, batches())


def test_checkpointed_regions_draw_the_same_numbers_again() -> None:
    def setup() -> tuple[Any, Callable[..., Any]]:
        model = net()
        optimizer = optim.SGD(model.parameters(), lr=0.1)

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            hidden = flame.autograd.checkpoint(model[:4], x)
            loss = functional.mse_loss(model[4](hidden), y)
            loss.backward()
            optimizer.step()
            return loss

        return model, step

    both(setup, batches())


def test_hooks_and_custom_functions_are_recorded() -> None:
    class Doubled(flame.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            (x,) = ctx.saved_tensors
            return 3 * g * x

    def setup() -> tuple[Any, Callable[..., Any]]:
        flame.manual_seed(1)
        model = nn.Linear(6, 3)
        model.weight.register_hook(lambda g: g * 0.5)

        def step(x: Any, y: Any) -> Any:
            model.zero_grad()
            loss = (Doubled.apply(model(x)) - y).square().mean()
            loss.backward()
            return loss

        return model, step

    both(setup, batches())


def test_in_place_writes_into_parts() -> None:
    def setup() -> tuple[Any, Callable[..., Any]]:
        model = nn.Linear(2, 2)
        model.register_buffer("memory", flame.zeros(4, 6))

        def step(x: Any, y: Any) -> Any:
            with flame.no_grad():
                model.memory[1:3] += x[:2]
                model.memory[:, 0].mul_(2.0).add_(1.0)
                part = model.memory.t()[2]
                part.copy_(part + 1)
            return model.memory.sum() + part.sum()

        return model, step

    flame.manual_seed(0)
    setup_once = setup
    model, step = setup_once()
    other, again = setup_once()
    compiled = flame.compile(again)
    for x, y in batches(4):
        np.testing.assert_allclose(compiled(x, y).numpy(), step(x, y).numpy(), rtol=1e-6)
    np.testing.assert_allclose(other.memory.numpy(), model.memory.numpy(), rtol=1e-6)


def test_structures_in_and_out() -> None:
    @flame.compile
    def step(inputs: dict[str, Any], *, scale: float) -> Any:
        a, (b, c) = inputs["a"], inputs["rest"]
        return {"sum": a + b, "pair": (a * scale, [c, c.sum()]), "text": "done", "none": None}

    inputs = {"a": array(3), "rest": (array(3, seed=1), array(2, 2, seed=2))}
    found = step(inputs, scale=2.0)
    np.testing.assert_array_equal(found["sum"].numpy(), (inputs["a"] + inputs["rest"][0]).numpy())
    np.testing.assert_array_equal(found["pair"][0].numpy(), (inputs["a"] * 2.0).numpy())
    assert found["pair"][1][0] is inputs["rest"][1]
    assert found["text"] == "done"
    assert found["none"] is None
    assert step(inputs, scale=3.0)["pair"][0].numpy() == pytest.approx(inputs["a"].numpy() * 3)
    assert step.recordings == 2


def test_results_of_calls_do_not_share_memory() -> None:
    double = flame.compile(lambda x: x * 2)
    first = double(array(5))
    kept = first.numpy().copy()
    double(array(5, seed=1))
    np.testing.assert_array_equal(first.numpy(), kept)
    same = flame.compile(lambda x: (x + 0, x.clone()))
    x = array(4)
    a, b = same(x)
    a.add_(1)
    b.add_(2)
    np.testing.assert_array_equal(b.numpy(), x.numpy() + 2)


def test_a_module_compiles_and_gradients_flow_out_of_it() -> None:
    model, expected = net(), net()
    compiled = flame.compile(model)
    assert isinstance(compiled, nn.Sequential)
    assert list(compiled.state_dict()) == list(expected.state_dict())
    optimizers = [optim.AdamW(m.parameters(), lr=0.01) for m in (model, expected)]
    for x, y in batches():
        losses = []
        x = x.requires_grad_()
        for forward, optimizer in zip((compiled, expected), optimizers, strict=True):
            flame.manual_seed(5)
            optimizer.zero_grad()
            x.grad = None
            loss = functional.mse_loss(forward(x), y)
            loss.backward()
            optimizer.step()
            losses.append((loss.item(), x.grad.numpy().copy()))
        assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
        np.testing.assert_allclose(losses[0][1], losses[1][1], rtol=1e-4, atol=1e-6)
    compiled.eval()
    assert not model.training


def test_backward_twice_and_changed_weights_are_refused() -> None:
    model = nn.Linear(3, 1)
    compiled = flame.compile(model)
    loss = compiled(array(2, 3)).sum()
    loss.backward()
    with pytest.raises(GradientError, match="retain_graph"):
        loss.backward()
    loss = compiled(array(2, 3).requires_grad_()).sum()
    with flame.no_grad():
        model.weight.add_(1)
    with pytest.raises(GradientError, match="changed in place"):
        loss.backward()


def test_methods_have_programs_of_their_instances() -> None:
    class Scaler:
        def __init__(self, factor: float) -> None:
            self.factor = flame.tensor(factor)

        @flame.compile
        def scale(self, x: Any) -> Any:
            return x * self.factor

    x = array(3)
    two, three = Scaler(2.0), Scaler(3.0)
    for scaler, factor in ((two, 2), (three, 3), (two, 2)):
        np.testing.assert_allclose(scaler.scale(x).numpy(), x.numpy() * factor)


def test_a_replaced_tensor_and_a_changed_number_are_noticed() -> None:
    holder = {"w": array(3)}
    factor = 2.0

    def step(x: Any) -> Any:
        return x * holder["w"] * factor

    compiled = flame.compile(step)
    x = array(3, seed=5)
    compiled(x)
    holder["w"] = array(3, seed=9)
    np.testing.assert_allclose(compiled(x).numpy(), step(x).numpy())
    factor = 5.0
    np.testing.assert_allclose(compiled(x).numpy(), step(x).numpy())
    with flame.no_grad():
        holder["w"].mul_(3)
    np.testing.assert_allclose(compiled(x).numpy(), step(x).numpy())
    assert compiled.recordings == 3


def test_a_rate_that_the_user_changes_is_used() -> None:
    model = nn.Linear(6, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.1)

    @flame.compile
    def step(x: Any, y: Any) -> None:
        optimizer.zero_grad()
        functional.mse_loss(model(x), y).backward()
        optimizer.step()

    ((x, y),) = batches(1)
    step(x, y)
    optimizer.param_groups[0]["lr"] = 0.0
    before = state_of(model)
    step(x, y)
    for name, value in state_of(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_loaded_state_is_used() -> None:
    def run(compiling: bool) -> np.ndarray:
        model, step = trainer(OPTIMIZERS["adamw"])()
        made = flame.compile(step) if compiling else step
        for x, y in batches(2):
            flame.manual_seed(0)
            made(x, y)
        saved = {k: v.clone() for k, v in model.state_dict().items()}
        for x, y in batches(2):
            made(x, y)
        model.load_state_dict(saved)
        for x, y in batches(2):
            flame.manual_seed(0)
            made(x, y)
        return np.concatenate([p.numpy(force=True).ravel() for p in model.parameters()])

    np.testing.assert_allclose(run(compiling=True), run(compiling=False), rtol=1e-4, atol=1e-6)


def test_bad_data_raise_and_leave_the_weights_alone() -> None:
    table = nn.Embedding(5, 3)
    optimizer = optim.SGD(table.parameters(), lr=0.1)

    @flame.compile
    def step(i: Any) -> Any:
        optimizer.zero_grad()
        loss = table(i).square().sum()
        loss.backward()
        optimizer.step()
        return loss

    step(flame.tensor([0, 1, 2]))
    before = table.weight.numpy(force=True).copy()
    with pytest.raises(IndexRangeError, match="out of range"):
        step(flame.tensor([0, 7, 2]))
    np.testing.assert_array_equal(table.weight.numpy(force=True), before)
    step(flame.tensor([0, 4, 2]))
    assert not np.array_equal(table.weight.numpy(force=True), before)


def test_signatures_are_bounded_and_that_is_told() -> None:
    from flame.recording import function

    double = flame.compile(lambda x: x * 2)
    for n in range(1, function.MAX_SIGNATURES + 1):
        double(array(n))
    with pytest.warns(FlameWarning, match="signatures"):
        double(array(function.MAX_SIGNATURES + 1))
    assert len(double.programs) == function.MAX_SIGNATURES


def test_random_tensors_differ_from_call_to_call_and_repeat_by_seed() -> None:
    draw = flame.compile(lambda x: x + flame.randn(4))
    x = flame.zeros(4)
    flame.manual_seed(7)
    found = [draw(x).numpy() for _ in range(3)]
    flame.manual_seed(7)
    expected = [(x + flame.randn(4)).numpy() for _ in range(3)]
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found[0], found[1])


def test_an_argument_changed_in_place() -> None:
    @flame.compile
    def step(x: Any) -> Any:
        x.mul_(2)
        return x.sum()

    x = array(4)
    values = x.numpy().copy()
    assert step(x).item() == pytest.approx(values.sum() * 2, rel=1e-5)
    np.testing.assert_allclose(x.numpy(), values * 2)
    step(x)
    np.testing.assert_allclose(x.numpy(), values * 4)


def test_strided_arguments() -> None:
    add = flame.compile(lambda x, y: (x + y).sum(0))
    base = array(6, 8)
    for x, y in ((base.t()[:4], base[2:, :1].t()), (base.t()[4:], base[2:, 1:2].t())):
        x, y = x[:, :4], y
        np.testing.assert_allclose(add(x, y).numpy(), (x + y).sum(0).numpy(), rtol=1e-6)
