"""GradScaler against PyTorch's over sequences with infinities, eager and compiled."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

import flame
from flame import amp, nn, optim
from flame.core.errors import (
    ArgumentError,
    DTypeError,
    FlameWarning,
    StateError,
    TraceError,
    UnsupportedError,
)

STEPS = 14
BAD = {0, 3, 4, 9}  # the steps whose gradients are not finite
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("Adam", {"lr": 0.02, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.02, "amsgrad": True}),
    ("AdamW", {"lr": 0.02}),
    ("RMSprop", {"lr": 0.02, "momentum": 0.5, "centered": True}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1}),
]


def inputs(bad: float = float("inf")) -> list[np.ndarray[Any, Any]]:
    draw = np.random.default_rng(1)
    found = [draw.standard_normal((5, 4), dtype=np.float32) for _ in range(STEPS)]
    for i in BAD:
        found[i][0, 0] = bad
    return found


class Run:
    """One library's layer, optimizer and scaler."""

    def __init__(self, library: Any, name: str, options: dict[str, Any], **scaling: Any) -> None:
        draw = np.random.default_rng(0)
        values = [draw.standard_normal(s).astype(np.float32) for s in ((3, 4), (3,))]
        self.library = library
        self.layer = library.nn.Linear(4, 3)
        with library.no_grad():
            for parameter, value in zip(self.layer.parameters(), values, strict=True):
                parameter.copy_(library.from_numpy(value))
        self.optimizer = getattr(library.optim, name)(self.layer.parameters(), **options)
        self.scaler = library.amp.GradScaler("cpu", **{"growth_interval": 3, **scaling})

    def step(self, x: Any) -> Any:
        self.optimizer.zero_grad()
        loss = (self.layer(x) ** 2).mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    def parameters(self) -> list[np.ndarray[Any, Any]]:
        return [p.detach().numpy().copy() for p in self.layer.parameters()]


def assert_close(run: Run, wanted: Run, message: str) -> None:
    for a, b in zip(run.parameters(), wanted.parameters(), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=message)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_a_sequence_with_infinities(name: str, options: dict[str, Any], bad: float) -> None:
    ours, theirs = Run(flame, name, options), Run(torch, name, options)
    compiled = Run(flame, name, options)
    step = flame.compile(compiled.step)
    scales = set()
    for i, x in enumerate(inputs(bad)):
        before = compiled.parameters()
        theirs.step(torch.from_numpy(x))
        ours.step(flame.from_numpy(x))
        step(flame.from_numpy(x))
        scales.add(ours.scaler.get_scale())
        assert ours.scaler.get_scale() == theirs.scaler.get_scale()
        assert compiled.scaler.state_dict() == theirs.scaler.state_dict()
        assert_close(ours, theirs, f"eager, step {i}")
        assert_close(compiled, theirs, f"compiled, step {i}")
        if i in BAD:
            for a, b in zip(before, compiled.parameters(), strict=True):
                np.testing.assert_array_equal(a, b)
    assert step.recordings == 1
    assert len(scales) > 2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_a_skipped_step_changes_no_bit(name: str, options: dict[str, Any], compiled: bool) -> None:
    run = Run(flame, name, options)
    step = flame.compile(run.step) if compiled else run.step
    good = flame.from_numpy(inputs()[1])
    bad = flame.from_numpy(inputs()[0])
    for _ in range(2):
        step(good)

    def state() -> list[np.ndarray[Any, Any]]:
        saved = run.optimizer.state_dict()["state"]
        tensors = [saved[i][key].numpy().copy() for i in saved for key in sorted(saved[i])]
        return [*run.parameters(), *tensors]

    before = state()
    step(bad)
    for a, b in zip(before, state(), strict=True):
        np.testing.assert_array_equal(a, b)
    step(good)
    assert any((a != b).any() for a, b in zip(before, state(), strict=True))


def test_counts_are_those_of_steps_taken() -> None:
    run = Run(flame, "Adam", {})
    for x in inputs():
        run.step(flame.from_numpy(x))
    state = run.optimizer.state_dict()["state"]
    assert {float(entry["step"].item()) for entry in state.values()} == {float(STEPS - len(BAD))}
    assert all(entry["step"].dtype is flame.float32 for entry in state.values())


def test_parameters_that_step_apart_are_counted_apart() -> None:
    def run(library: Any, array: Any) -> list[Any]:
        draw = np.random.default_rng(3)
        a, b = (array(draw.standard_normal(4).astype(np.float32)) for _ in range(2))
        a.requires_grad_()
        b.requires_grad_()
        optimizer = library.optim.Adam([a, b], lr=0.1)
        scaler = library.amp.GradScaler("cpu")
        for used in ("ab", "a", "inf", "b", "ab", "a"):
            optimizer.zero_grad()
            loss = (a * a).sum() * ("a" in used) if used != "b" else (b * b).sum()
            if used == "ab":
                loss = loss + (b * b).sum()
            if used == "inf":
                loss = ((a + b) * float("inf")).sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        state = optimizer.state_dict()["state"]
        return [*[t.detach().numpy() for t in (a, b)], *[float(s["step"]) for s in state.values()]]

    found = run(flame, flame.from_numpy)
    wanted = run(torch, torch.from_numpy)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
    assert found[2:] == [4.0, 3.0]


def test_steps_without_a_scaler_go_on_from_there() -> None:
    ours, theirs = (Run(lib, "Adam", {"lr": 0.02}) for lib in (flame, torch))
    for run, array in ((ours, flame.from_numpy), (theirs, torch.from_numpy)):
        for x in inputs()[:6]:
            run.step(array(x))
        for x in inputs()[5:8]:
            run.optimizer.zero_grad()
            (run.layer(array(x)) ** 2).mean().backward()
            run.optimizer.step()
    assert_close(ours, theirs, "plain steps after scaled ones")


def test_a_compiled_plain_step_notices_that_counts_moved() -> None:
    run, plain = Run(flame, "Adam", {"lr": 0.02}), Run(flame, "Adam", {"lr": 0.02})

    def unscaled(each: Run, x: Any) -> None:
        each.optimizer.zero_grad()
        (each.layer(x) ** 2).mean().backward()
        each.optimizer.step()

    compiled = flame.compile(lambda x: unscaled(run, x))
    x = flame.from_numpy(inputs()[1])
    for _ in range(2):
        compiled(x)
        unscaled(plain, x)
    run.step(x)
    unscaled(plain, x)
    compiled(x)
    unscaled(plain, x)
    assert_close(run, plain, "compiled before and after a scaled step")
    assert compiled.recordings == 2


def test_rates_of_a_schedule_reach_a_compiled_scaled_step() -> None:
    eager, compiled = (Run(flame, "AdamW", {"lr": 0.1}) for _ in range(2))

    def train(run: Run) -> Any:
        schedule = optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5)

        def step(x: Any) -> None:
            run.step(x)
            schedule.step()

        return step

    one, two = train(eager), flame.compile(train(compiled))
    for x in inputs()[:8]:
        one(flame.from_numpy(x))
        two(flame.from_numpy(x))
    assert two.recordings == 1
    assert_close(compiled, eager, "with a schedule")


def test_factors_that_change_reach_a_compiled_step() -> None:
    run = Run(flame, "SGD", {"lr": 0.1}, growth_interval=1)
    step = flame.compile(run.step)
    x = flame.from_numpy(inputs()[1])
    step(x)
    assert run.scaler.get_scale() == 2.0**17
    run.scaler.set_growth_factor(8.0)
    step(x)
    assert run.scaler.get_scale() == 2.0**20
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 4.0, "_growth_tracker": 0})
    step(x)
    assert run.scaler.get_scale() == 32.0
    assert step.recordings == 1


def test_unscaling_before_clipping() -> None:
    def run(library: Any, array: Any) -> Run:
        made = Run(library, "SGD", {"lr": 0.1})
        for x in inputs()[:6]:
            made.optimizer.zero_grad()
            made.scaler.scale((made.layer(array(x)) ** 2).mean()).backward()
            made.scaler.unscale_(made.optimizer)
            library.nn.utils.clip_grad_norm_(made.layer.parameters(), 0.5)
            made.scaler.step(made.optimizer)
            made.scaler.update()
        return made

    assert_close(run(flame, flame.from_numpy), run(torch, torch.from_numpy), "clipped")


def test_gradients_are_unscaled_in_place() -> None:
    run = Run(flame, "SGD", {"lr": 0.0})
    x = flame.from_numpy(inputs()[1])
    (wanted,) = flame.autograd.grad([(run.layer(x) ** 2).mean()], [run.layer.weight])
    run.step(x)
    np.testing.assert_allclose(run.layer.weight.grad.numpy(), wanted.numpy(), rtol=1e-6)


def test_two_optimizers_share_a_scale() -> None:
    def run(library: Any, array: Any) -> list[Any]:
        first, second = Run(library, "SGD", {"lr": 0.1}), Run(library, "Adam", {"lr": 0.1})
        scaler = library.amp.GradScaler("cpu", growth_interval=3)
        scales = []
        for x in inputs()[:6]:
            first.optimizer.zero_grad()
            second.optimizer.zero_grad()
            finite = np.nan_to_num(x, posinf=1.0)
            losses = [
                (first.layer(array(finite)) ** 2).mean(),
                (second.layer(array(x)) ** 2).mean(),
            ]
            for loss in scaler.scale(losses):
                loss.backward()
            scaler.step(first.optimizer)
            scaler.step(second.optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return [scales, *first.parameters(), *second.parameters()]

    for a, b in zip(run(flame, flame.from_numpy), run(torch, torch.from_numpy), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_an_optimizer_that_does_not_say_how_it_counts_is_refused() -> None:
    class Warming(optim.SGD):
        def _scalars(self, group: Any, step: int) -> Any:
            return (0.1 * step, *super()._scalars(group, step)[1:])

    p = flame.ones(3).requires_grad_()
    optimizer, scaler = Warming([p], lr=0.1), amp.GradScaler("cpu")
    scaler.scale(p.sum()).backward()
    with pytest.raises(UnsupportedError, match="define `_counted`"):
        scaler.step(optimizer)
    assert optimizer.found_inf is None


def test_an_optimizer_with_a_step_of_its_own() -> None:
    class Sign(optim.Optimizer):
        def step(self, closure: Any = None) -> Any:
            with flame.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.sub_(p.grad.sign() * 0.1)
            return "taken"

    p = flame.ones(3).requires_grad_()
    optimizer, scaler = Sign([p], {}), amp.GradScaler("cpu")
    scaler.scale(p.sum()).backward()
    assert scaler.step(optimizer) == "taken"
    scaler.update()
    p.grad = None
    scaler.scale((p * float("inf")).sum()).backward()
    assert scaler.step(optimizer) is None
    np.testing.assert_allclose(p.detach().numpy(), np.full(3, 0.9), rtol=1e-6)


# --- state ----------------------------------------------------------------------------------------


def test_state_dicts_interchange() -> None:
    ours, theirs = Run(flame, "SGD", {"lr": 0.1}), Run(torch, "SGD", {"lr": 0.1})
    assert ours.scaler.state_dict() == theirs.scaler.state_dict()
    for x in inputs()[:3]:
        ours.step(flame.from_numpy(x))
    theirs.scaler.load_state_dict(ours.scaler.state_dict())
    assert theirs.scaler.state_dict() == ours.scaler.state_dict()
    fresh = amp.GradScaler("cpu", init_scale=2.0)
    fresh.load_state_dict(theirs.scaler.state_dict())
    assert fresh.state_dict() == theirs.scaler.state_dict()
    fresh.scale(flame.ones(()))
    assert fresh.state_dict() == theirs.scaler.state_dict()


def test_optimizer_states_interchange() -> None:
    ours, theirs = Run(flame, "Adam", {"lr": 0.02}), Run(torch, "Adam", {"lr": 0.02})
    for x in inputs()[:6]:
        ours.step(flame.from_numpy(x))
        theirs.step(torch.from_numpy(x))
    saved = theirs.optimizer.state_dict()
    loaded = Run(flame, "Adam", {"lr": 0.02})
    with flame.no_grad():
        for p, value in zip(loaded.layer.parameters(), theirs.parameters(), strict=True):
            p.copy_(flame.from_numpy(value))
    as_arrays = {
        "state": {i: {k: v.numpy() for k, v in s.items()} for i, s in saved["state"].items()},
        "param_groups": saved["param_groups"],
    }
    loaded.optimizer.load_state_dict(as_arrays)
    for x in inputs()[6:9]:
        for run, array in ((ours, flame.from_numpy), (theirs, torch.from_numpy)):
            run.step(array(x))
        loaded.step(flame.from_numpy(x))
    assert_close(ours, theirs, "without a break")
    assert_close(loaded, theirs, "from a state_dict")


def test_settings() -> None:
    scaler, theirs = amp.GradScaler("cpu"), torch.amp.GradScaler("cpu")
    for made in (scaler, theirs):
        assert (made.get_scale(), made.get_growth_factor()) == (65536.0, 2.0)
        assert (made.get_backoff_factor(), made.get_growth_interval()) == (0.5, 2000)
        made.set_growth_factor(3.0)
        made.set_backoff_factor(0.25)
        made.set_growth_interval(7)
    assert scaler.state_dict() == theirs.state_dict()
    assert scaler.is_enabled()
    scaler.scale(flame.ones(3))
    scaler.update(8.0)
    assert scaler.get_scale() == 8.0
    scaler.update(flame.tensor([16.0]))
    assert scaler.get_scale() == 16.0


def test_the_scale_stops_growing_before_it_is_infinite() -> None:
    run, theirs = (
        Run(lib, "SGD", {"lr": 0.0}, init_scale=2.0**126, growth_interval=1)
        for lib in (flame, torch)
    )
    x = np.full((5, 4), 1e-20, np.float32)
    for each, array in ((run, flame.from_numpy), (theirs, torch.from_numpy)):
        with each.library.no_grad():
            for p in each.layer.parameters():
                p.mul_(1e-20)
        for _ in range(4):
            each.step(array(x))
    assert run.scaler.get_scale() == theirs.scaler.get_scale() == 2.0**127


def test_scale_takes_nested_outputs() -> None:
    scaler = amp.GradScaler("cpu", init_scale=4.0)
    x = flame.ones(2)
    pair = scaler.scale((x, [x, x]))
    assert isinstance(pair, tuple)
    assert isinstance(pair[1], list)
    np.testing.assert_array_equal(pair[1][0].numpy(), [4.0, 4.0])
    assert scaler.scale(x.bfloat16()).dtype is flame.bfloat16


# --- errors ---------------------------------------------------------------------------------------


def test_disabled() -> None:
    scaler = amp.GradScaler("cpu", enabled=False)
    x, p = flame.ones(2), flame.ones(2).requires_grad_()
    optimizer = optim.SGD([p], lr=0.5)
    assert scaler.scale(x) is x
    p.sum().backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    np.testing.assert_array_equal(p.detach().numpy(), [0.5, 0.5])
    assert scaler.state_dict() == {}
    assert scaler.get_scale() == 1.0
    assert not scaler.is_enabled()
    scaler.load_state_dict({})
    with pytest.raises(StateError, match="empty"):
        amp.GradScaler("cpu").load_state_dict({})
    with pytest.raises(StateError, match="missing scale"):
        amp.GradScaler("cpu").load_state_dict({"growth_factor": 2.0})


def test_a_device_that_is_not_there_disables_it() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        scaler = amp.GradScaler("cuda:77")
    assert [w.category for w in told] == [FlameWarning]
    assert not scaler.is_enabled()


def test_bad_factors() -> None:
    for options in ({"growth_factor": 1.0}, {"backoff_factor": 1.0}):
        with pytest.raises(ArgumentError, match="must be"):
            amp.GradScaler("cpu", **options)


def test_calls_in_the_wrong_order() -> None:
    p = flame.ones(2).requires_grad_()
    optimizer, scaler = optim.SGD([p], lr=0.5), amp.GradScaler("cpu")
    for call in (
        lambda: scaler.unscale_(optimizer), lambda: scaler.step(optimizer), scaler.update
    ):  # fmt: skip
        with pytest.raises(StateError, match="_scale is None"):
            call()
    scaler.scale(p.sum()).backward()
    with pytest.raises(StateError, match="No inf checks"):
        scaler.update()
    scaler.unscale_(optimizer)
    with pytest.raises(StateError, match="already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(StateError, match="already been called"):
        scaler.step(optimizer)
    with pytest.raises(StateError, match="after step"):
        scaler.unscale_(optimizer)
    scaler.update()
    with pytest.raises(StateError, match="has a gradient"):
        scaler.step(optim.SGD([flame.ones(2).requires_grad_()], lr=0.5))


def test_bad_arguments() -> None:
    p = flame.ones(2, dtype=flame.float16).requires_grad_()
    optimizer, scaler = optim.SGD([p], lr=0.5), amp.GradScaler("cpu")
    scaler.scale(p.sum()).backward()
    with pytest.raises(ArgumentError, match="FP16"):
        scaler.unscale_(optimizer)
    with pytest.raises(ArgumentError, match="closure"):
        scaler.step(optimizer, lambda: None)
    with pytest.raises(DTypeError, match="iterable"):
        scaler.scale(3.0)
    for bad in ("2", flame.ones((), dtype=flame.float64)):
        with pytest.raises(DTypeError, match="new_scale"):
            scaler.update(bad)
    with pytest.raises(ArgumentError, match="one element"):
        scaler.update(flame.ones(2))


def test_in_a_compiled_step_the_whole_cycle_belongs_together() -> None:
    run = Run(flame, "SGD", {"lr": 0.1})

    @flame.compile
    def without_update(x: Any) -> None:
        run.optimizer.zero_grad()
        run.scaler.scale((run.layer(x) ** 2).mean()).backward()
        run.scaler.step(run.optimizer)

    @flame.compile
    def with_a_look(x: Any) -> float:
        run.step(x)
        return run.scaler.get_scale()

    x = flame.from_numpy(inputs()[1])
    before = run.parameters()
    for step in (without_update, with_a_look):
        with pytest.raises(TraceError):
            step(x)
        for a, b in zip(before, run.parameters(), strict=True):
            np.testing.assert_array_equal(a, b)
    run.step(x)  # and nothing is left of what failed
    assert run.scaler.get_scale() == 65536.0


def test_nonfinite_numbers_are_found() -> None:
    from flame.ops.statistics import has_nonfinite

    for shape in ((), (7,), (3, 70), (300, 300)):
        for bad in (0.0, float("inf"), -float("inf"), float("nan")):
            for dtype in (flame.float32, flame.bfloat16, flame.float16, flame.float64):
                values = np.full(shape, 60000.0 if dtype is flame.float16 else 3e38, np.float64)
                values.reshape(-1)[-1] = bad
                x = flame.tensor(values, dtype=dtype)
                assert bool(has_nonfinite(x)) is not np.isfinite(bad)
    assert not bool(has_nonfinite(flame.zeros((0, 3))))


def test_a_model_keeps_its_layers() -> None:
    """bfloat16 regions and scaling go together, though bfloat16 needs none."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer, scaler = optim.AdamW(model.parameters(), lr=0.02), amp.GradScaler("cpu")
    x = flame.from_numpy(np.random.default_rng(0).standard_normal((64, 4), dtype=np.float32))

    @flame.compile
    def step() -> flame.Tensor:
        optimizer.zero_grad()
        with flame.autocast("cpu", dtype=flame.float16):
            loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss

    losses = [step().item() for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert step.recordings == 1
