"""What a step of training may do, eager against compiled: call after call the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import flame
import flame.nn as nn
import flame.optim as optim
from flame.core.errors import TraceError
from flame.nn import functional
from flame.optim import lr_scheduler

# (tensors whose values are compared after each call, the step, what Python does before call i)
Setup = Callable[[], tuple[Sequence[Any], Callable[..., Any]]]


def array(*shape: int, seed: int = 0) -> flame.Tensor:
    return flame.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def numbers(result: Any) -> list[Any]:
    """The arrays of a result, in order."""
    if isinstance(result, flame.Tensor):
        return [result.numpy(force=True).copy()]
    if isinstance(result, dict):
        return [x for each in result.values() for x in numbers(each)]
    if isinstance(result, (list, tuple)):
        return [x for each in result for x in numbers(each)]
    return []


def both(
    setup: Setup,
    calls: int = 5,
    recordings: int = 1,
    between: Callable[[Any, int], None] | None = None,
    arguments: Callable[[int], Sequence[Any]] | None = None,
) -> Any:
    """Eagerly and compiled from the same start. ``between(step, i)`` comes before call i."""
    found, compiled = [], None
    for compiling in (False, True):
        flame.manual_seed(1)
        tensors, step = setup()
        call = compiled = flame.compile(step) if compiling else step
        flame.manual_seed(2)
        history = []
        for i in range(calls):
            if between is not None:
                between(step, i)
            given = (array(8, 6, seed=i), array(8, 3, seed=50 + i))
            result = call(*(given if arguments is None else arguments(i)))
            gradients = [t.grad for t in tensors]
            missing = [g is None for g in gradients]
            history.append([numbers(result), numbers(list(tensors)), missing, numbers(gradients)])
        found.append(history)
    for i, (expected, got) in enumerate(zip(*found, strict=True)):
        assert got[2] == expected[2], f"call {i}: which gradients there are"
        for kind in (0, 1, 3):
            assert len(got[kind]) == len(expected[kind])
            for number, (a, b) in enumerate(zip(got[kind], expected[kind], strict=True)):
                label = f"call {i}, {('results', 'tensors', '', 'gradients')[kind]} {number}"
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6, err_msg=label)
    assert compiled.recordings == recordings, compiled
    return compiled


def net(*, dropout: float = 0.1) -> Any:
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3)
    )


def tensors_of(*models: Any) -> list[Any]:
    return [t for m in models for t in (*m.parameters(), *m.buffers())]


def test_gradients_of_micro_batches_add_up() -> None:
    def setup() -> Any:
        model = net()
        # eps: the bias before the batch norm has a gradient of nothing but rounding
        optimizer = optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            total = 0.0
            for part, target in zip(x.split(2), y.split(2), strict=True):
                loss = functional.mse_loss(model(part), target) / 4
                loss.backward()
                total = total + loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return total

        return tensors_of(model), step

    both(setup)


def test_two_optimizers_of_a_generator_and_a_critic() -> None:
    def setup() -> Any:
        generator, critic = (
            nn.Linear(6, 3),
            nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)),
        )
        ours = optim.Adam(generator.parameters(), lr=0.01, betas=(0.5, 0.9))
        theirs = optim.RMSprop(critic.parameters(), lr=0.01)

        def step(noise: Any, real: Any) -> Any:
            theirs.zero_grad()
            fake = generator(noise)
            loss = critic(fake.detach()).mean() - critic(real).mean()
            loss.backward()
            theirs.step()
            ours.zero_grad()
            score = -critic(fake).mean()
            score.backward()
            ours.step()
            return loss, score

        return tensors_of(generator, critic), step

    both(setup)


def test_flags_that_the_step_sets_itself() -> None:
    def setup() -> Any:
        generator, critic = nn.Linear(6, 3), nn.Linear(3, 1)
        ours = optim.SGD(generator.parameters(), lr=0.01)
        theirs = optim.SGD(critic.parameters(), lr=0.01)

        def step(noise: Any, real: Any) -> Any:
            critic.requires_grad_(True)
            theirs.zero_grad()
            fake = generator(noise)
            (critic(fake.detach()) - critic(real)).mean().backward()
            theirs.step()
            critic.requires_grad_(False)
            ours.zero_grad()
            score = -critic(fake).mean()
            score.backward()
            ours.step()
            return score

        return tensors_of(generator, critic), step

    compiled = both(setup, recordings=2)  # the flags are others at the second call
    assert len(compiled.programs) == 2


def test_groups_with_rates_of_their_own_and_frozen_layers() -> None:
    def setup() -> Any:
        model = net()
        model[0].requires_grad_(False)
        groups = [
            {"params": model[1].parameters(), "lr": 0.1, "weight_decay": 0.1},
            {"params": model[4].parameters()},
        ]
        optimizer = optim.SGD(groups, lr=0.01, momentum=0.9, dampening=0.2)
        scheduler = lr_scheduler.LambdaLR(optimizer, [lambda n: 0.9**n, lambda n: 1 / (1 + n)])

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            return loss

        return tensors_of(model), step

    both(setup)


def test_tied_weights() -> None:
    def setup() -> Any:
        first, last = nn.Linear(6, 6), nn.Linear(6, 6)
        last.weight = first.weight
        head = nn.Linear(6, 3)
        parameters = [*first.parameters(), last.bias, *head.parameters()]
        optimizer = optim.Adam(parameters, lr=0.01)

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            loss = functional.mse_loss(head(last(first(x).tanh())), y)
            loss.backward()
            optimizer.step()
            return loss

        return parameters, step

    both(setup)


def test_a_gradient_penalty() -> None:
    def setup() -> Any:
        critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = optim.Adam(critic.parameters(), lr=0.01)

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            points = x.detach().requires_grad_()
            score = critic(points)
            (slope,) = flame.autograd.grad(score.sum(), [points], create_graph=True)
            penalty = ((slope.norm(dim=1) - 1) ** 2).mean()
            loss = score.mean() + 10 * penalty
            loss.backward()
            optimizer.step()
            return {"loss": loss, "penalty": penalty, "slope": slope.detach()}

        return tensors_of(critic), step

    both(setup)


def test_regions_without_gradients_and_a_teacher() -> None:
    def setup() -> Any:
        model, teacher = net(), net()
        teacher.requires_grad_(False)
        teacher.load_state_dict(model.state_dict())
        optimizer = optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            with flame.no_grad():
                target = teacher(x).softmax(-1)
            logits = model(x)
            loss = functional.cross_entropy(logits, target) + functional.mse_loss(logits, y)
            loss.backward()
            optimizer.step()
            with flame.no_grad():
                for mine, its in zip(model.parameters(), teacher.parameters(), strict=True):
                    its.lerp_(mine, 0.1)
                for mine, its in zip(model.buffers(), teacher.buffers(), strict=True):
                    its.copy_(mine)
            return loss, logits.detach()

        return tensors_of(model, teacher), step

    both(setup)


def test_a_recurrent_network_that_carries_its_state() -> None:
    def setup() -> Any:
        model = nn.LSTM(6, 5, num_layers=2, dropout=0.1)
        head = nn.Linear(5, 3)
        hidden, cell = flame.zeros(2, 5), flame.zeros(2, 5)
        optimizer = optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            output, (h, c) = model(x, (hidden, cell))
            loss = functional.mse_loss(head(output), y)
            loss.backward()
            nn.utils.clip_grad_value_(model.parameters(), 0.1)
            optimizer.step()
            with flame.no_grad():
                hidden.copy_(h.detach())
                cell.copy_(c.detach())
            return loss

        return [*tensors_of(model, head), hidden, cell], step

    both(setup)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.5**n),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.5)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("place", ["after", "before"])
@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str, rule: str, kind: str, place: str) -> None:
    """Of rates that are numbers and of rates that are tensors, stepped after and before."""

    def setup() -> Any:
        model = nn.Linear(6, 3)
        rate = 0.1 if kind == "number" else flame.tensor(0.1)
        if rule == "sgd":
            optimizer: Any = optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        else:
            optimizer = optim.AdamW(model.parameters(), lr=rate)
        scheduler = SCHEDULES[name](optimizer)

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            if place == "before":
                scheduler.step()
            optimizer.step()
            if place == "after":
                scheduler.step()
            return loss

        return tensors_of(model), step

    both(setup, calls=6)


def test_a_schedule_by_a_metric_of_the_step_is_refused() -> None:
    model = nn.Linear(6, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer)

    @flame.compile
    def step(x: Any, y: Any) -> None:
        loss = functional.mse_loss(model(x), y)
        scheduler.step(loss)  # here

    with pytest.raises(TraceError, match=r"test_training_steps\.py:\d+"):
        step(array(8, 6), array(8, 3))
    assert scheduler.last_epoch == 0


def test_a_rate_that_the_step_reads_and_a_schedule_fills_is_refused() -> None:
    model = nn.Linear(6, 3)
    optimizer = optim.SGD(model.parameters(), lr=flame.tensor(0.1))
    scheduler = lr_scheduler.StepLR(optimizer, 1)

    @flame.compile
    def step(x: Any) -> Any:
        shown = optimizer.param_groups[0]["lr"] * 1
        scheduler.step()
        return x.sum() * shown

    with pytest.raises(TraceError, match="has read before"):
        step(array(8, 6))
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.1)
    assert scheduler.last_epoch == 0


def test_groups_added_between_calls() -> None:
    optimizers = []

    def setup() -> Any:
        model = net()
        optimizer = optim.AdamW(model[4].parameters(), lr=0.01)
        optimizers.append((optimizer, model))

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        return tensors_of(model), step

    def between(step: Any, i: int) -> None:
        optimizer, model = optimizers[-1]
        if i == 3:
            optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.1})

    both(setup, between=between, recordings=3)  # the second finds gradients of the first layer


models: list[Any] = []


def changing(change: Callable[[Any], None], recordings: int) -> Any:
    """A model that is changed before its third call."""

    def setup() -> Any:
        model = net(dropout=0.0)
        models.append(model)
        optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            x = x.to(model[0].weight.dtype)
            loss = functional.mse_loss(model(x).float(), y)
            loss.backward()
            optimizer.step()
            return loss

        return tensors_of(model), step

    def between(step: Any, i: int) -> None:
        if i == 2:
            change(models[-1])

    return both(setup, between=between, recordings=recordings)


def _load(model: Any) -> None:
    model.load_state_dict({k: v * 0.5 if v.is_floating_point() else v for k, v in
                           copy.deepcopy(model.state_dict()).items()})  # fmt: skip


def _replace_weight(model: Any) -> None:
    model[0].weight.data = model[0].weight.detach() * 0.5


def _hook(model: Any) -> None:
    model[0].weight.register_hook(lambda g: g * 0.5)


def _freeze(model: Any) -> None:
    model[0].requires_grad_(False)


def _assign(model: Any) -> None:
    model[2] = nn.ReLU()


def test_changes_of_a_model_between_calls() -> None:
    changing(_load, recordings=1)
    changing(_replace_weight, recordings=2)
    changing(_hook, recordings=2)
    changing(_freeze, recordings=2)
    changing(_assign, recordings=2)


def test_another_dtype_between_calls() -> None:
    """Without an optimizer, whose state would keep the old dtype."""
    model = net(dropout=0.0).eval()
    compiled = flame.compile(lambda x: model(x.to(model[0].weight.dtype)))
    with flame.no_grad():
        for dtype in (flame.float32, flame.float64, flame.bfloat16):
            model.to(dtype)
            for seed in (1, 2):
                x = array(4, 6, seed=seed)
                found, expected = compiled(x), model(x.to(dtype))
                assert found.dtype is dtype
                tolerance = 5e-2 if dtype is flame.bfloat16 else 1e-5
                np.testing.assert_allclose(
                    found.float().numpy(), expected.float().numpy(), tolerance, tolerance
                )
    assert compiled.recordings == 3


def test_with_and_without_gradients_in_turns() -> None:
    model = net(dropout=0.0).eval()
    compiled = flame.compile(model)
    for i in range(4):
        x = array(4, 6, seed=i)
        if i % 2:
            with flame.no_grad():
                found = compiled(x)
            assert not found.requires_grad
        else:
            found = compiled(x)
            model.zero_grad()
            found.sum().backward()
            grads = [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
            model(x).sum().backward()
            for p, g in zip(model.parameters(), grads, strict=True):
                np.testing.assert_allclose(g.numpy(), p.grad.numpy(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            found.numpy(force=True), model(x).numpy(force=True), rtol=1e-5, atol=1e-6
        )
    assert compiled.recordings == 2


def test_a_compiled_function_inside_another() -> None:
    def setup() -> Any:
        model = net()
        forward = flame.compile(model)
        optimizer = optim.SGD(model.parameters(), lr=0.1)

        @flame.compile
        def loss_of(x: Any, y: Any) -> Any:
            return functional.mse_loss(forward(x), y)

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            loss = loss_of(x, y)
            loss.backward()
            optimizer.step()
            return loss

        return tensors_of(model), step

    both(setup)


def test_a_compiled_module_in_a_checkpointed_region() -> None:
    found = []
    for compiling in (False, True):
        flame.manual_seed(1)
        model = net(dropout=0.5)
        forward = flame.compile(model) if compiling else model
        x = array(8, 6).requires_grad_()
        out = flame.autograd.checkpoint(forward, x)
        out.sum().backward()
        found.append([out.detach().numpy(), x.grad.numpy(), model[0].weight.grad.numpy()])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_batches_of_two_sizes_from_a_loader() -> None:
    data = flame.data.TensorDataset(array(22, 6, seed=1), array(22, 3, seed=2))
    loader = flame.data.DataLoader(data, batch_size=8)
    given = [tuple(batch) for _ in range(3) for batch in loader]

    def setup() -> Any:
        model = net()
        optimizer = optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        return tensors_of(model), step

    both(setup, calls=9, recordings=2, arguments=lambda i: given[i])


def test_python_numbers_as_arguments() -> None:
    def setup() -> Any:
        weight = array(6, 3).requires_grad_()

        def step(x: Any, scale: float, power: int, flip: bool) -> Any:
            weight.grad = None
            loss = ((x @ weight) ** power * scale).mean() * (-1 if flip else 1)
            loss.backward()
            return loss

        return [weight], step

    choices = [(0.5, 2, False), (2.0, 2, False), (0.5, 3, True), (0.5, 2, False)]
    both(setup, calls=4, recordings=3, arguments=lambda i: (array(8, 6, seed=i), *choices[i]))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Lion"])
def test_optimizers_are_the_same_bits(name: str) -> None:
    """Nothing is summed in another order here, so nothing may differ."""
    weights = []
    for compiling in (False, True):
        weight = array(37, 5).requires_grad_()
        optimizer = getattr(optim, name)([weight], lr=0.01, weight_decay=0.1)

        def step(gradient: Any, weight: Any = weight, optimizer: Any = optimizer) -> None:
            weight.grad = gradient
            optimizer.step()

        call = flame.compile(step) if compiling else step
        for i in range(5):
            gradient = array(37, 5, seed=i)
            call(gradient)
            assert weight.grad is gradient
        weights.append(weight.numpy(force=True).copy())
    np.testing.assert_array_equal(*weights)


def test_counts_of_steps_that_differ_between_parameters() -> None:
    def setup() -> tuple[Sequence[Any], Callable[..., Any]]:
        parameters = [array(4, seed=i).requires_grad_() for i in range(5)]
        optimizer = optim.AdamW(parameters, lr=0.1)
        for i, p in enumerate(parameters):
            p.grad = None if i % 2 else flame.ones_like(p)
        optimizer.step()  # the second and the fourth fall behind

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            loss = sum((p * x[0, :4] * p).sum() for p in parameters)
            loss.backward()
            optimizer.step()
            return loss

        return parameters, step

    both(setup)


def test_custom_functions_retained_gradients_and_hooks() -> None:
    class Clipped(flame.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, bound: float) -> Any:
            ctx.save_for_backward(x)
            ctx.bound = bound
            return x.clamp(-bound, bound)

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            (x,) = ctx.saved_tensors
            return g * (x.abs() < 2 * ctx.bound), None

    def setup() -> Any:
        model = nn.Linear(6, 3)
        model.weight.register_hook(lambda g: g.clamp(-0.1, 0.1))
        optimizer = optim.SGD(model.parameters(), lr=0.1)

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            hidden = model(x)
            hidden.retain_grad()
            out = Clipped.apply(hidden, 0.5)
            out.register_hook(lambda g: g * 0.5)
            loss = functional.mse_loss(out, y)
            loss.backward()
            optimizer.step()
            return loss, hidden.grad

        return tensors_of(model), step

    both(setup)


def test_second_derivatives_by_products() -> None:
    """A product with the Hessian, by differentiating twice inside of the step."""

    def setup() -> Any:
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        parameters = list(model.parameters())

        def step(x: Any, y: Any) -> Any:
            loss = functional.mse_loss(model(x), y)
            grads = flame.autograd.grad(loss, parameters, create_graph=True)
            total = sum((g * g.detach()).sum() for g in grads)
            products = flame.autograd.grad(total, parameters)
            with flame.no_grad():
                for p, h in zip(parameters, products, strict=True):
                    p.sub_(h, alpha=0.1)
            return loss, products

        return parameters, step

    both(setup)
