"""Each schedule equals PyTorch's for 60 steps, alone, beside another, in sequence, and after a
resume.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import flame
from flame import optim
from flame.core.errors import ArgumentError, DTypeError, StateError, UnsupportedError

STEPS = 60
Build = Callable[[Any, Any], Any]  # (the module of schedules, an optimizer) -> a schedule


class Decay:
    """A rate function with state, which a state_dict keeps."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, epoch: int) -> float:
        return float(self.factor**epoch)


CASES: dict[str, Build] = {
    "lambda": lambda s, o: s.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "lambda-each": lambda s, o: s.LambdaLR(o, [lambda epoch: 0.9**epoch, Decay(0.8)]),
    "step": lambda s, o: s.StepLR(o, 7, 0.5),
    "step-1": lambda s, o: s.StepLR(o, 1),
    "multi-step": lambda s, o: s.MultiStepLR(o, [30, 10, 10, 45], 0.3),
    "constant": lambda s, o: s.ConstantLR(o, 0.25, 8),
    "constant-defaults": lambda s, o: s.ConstantLR(o),
    "linear": lambda s, o: s.LinearLR(o, 0.1, 0.8, 20),
    "linear-defaults": lambda s, o: s.LinearLR(o),
    "exponential": lambda s, o: s.ExponentialLR(o, 0.93),
    "cosine": lambda s, o: s.CosineAnnealingLR(o, 60, 1e-4),
    "cosine-over": lambda s, o: s.CosineAnnealingLR(o, 9, 0.01),
    "cosine-zero": lambda s, o: s.CosineAnnealingLR(o, 13),
    "cosine-1": lambda s, o: s.CosineAnnealingLR(o, 1, 0.01),
    "restarts": lambda s, o: s.CosineAnnealingWarmRestarts(o, 7, 1, 0.003),
    "restarts-longer": lambda s, o: s.CosineAnnealingWarmRestarts(o, 4, 2),
    "restarts-triple": lambda s, o: s.CosineAnnealingWarmRestarts(o, 1, 3, 0.001),
    "one-cycle": lambda s, o: s.OneCycleLR(o, 0.9, 60),
    "one-cycle-linear": lambda s, o: s.OneCycleLR(
        o, [0.9, 0.4], epochs=6, steps_per_epoch=10, anneal_strategy="linear", pct_start=0.25
    ),
    "one-cycle-three": lambda s, o: s.OneCycleLR(
        o, 0.9, 61, three_phase=True, div_factor=10.0, final_div_factor=100.0, pct_start=0.4
    ),
    "one-cycle-rate-only": lambda s, o: s.OneCycleLR(o, 0.9, 77, cycle_momentum=False),
    "warmup-cosine": lambda s, o: s.SequentialLR(
        o, [s.LinearLR(o, 0.1, 1.0, 10), s.CosineAnnealingLR(o, 50)], [10]
    ),
    "sequence-of-four": lambda s, o: s.SequentialLR(
        o,
        [
            s.ConstantLR(o, 0.1, 3),
            s.ExponentialLR(o, 0.9),
            s.CosineAnnealingWarmRestarts(o, 5, 2),
            s.StepLR(o, 4, 0.5),
        ],
        [5, 20, 41],
    ),
    "sequence-at-zero": lambda s, o: s.SequentialLR(
        o, [s.ConstantLR(o, 0.5, 3), s.ExponentialLR(o, 0.9)], [0]
    ),
    "sequence-lambda-one-cycle": lambda s, o: s.SequentialLR(
        o,
        [s.LambdaLR(o, lambda epoch: 1 + epoch), s.OneCycleLR(o, 0.7, 60, cycle_momentum=False)],
        [12],
    ),
    "sequence-multi-step": lambda s, o: s.SequentialLR(
        o, [s.MultiStepLR(o, [3, 6]), s.MultiStepLR(o, [0, 5]), s.LinearLR(o)], [10, 30]
    ),
    "chained": lambda s, o: s.ChainedScheduler([s.ConstantLR(o, 0.1, 7), s.ExponentialLR(o, 0.9)]),
    "chained-four": lambda s, o: s.ChainedScheduler(
        [
            s.LinearLR(o, 0.5, 1.0, 12),
            s.StepLR(o, 10, 0.5),
            s.MultiStepLR(o, [15, 25]),
            s.CosineAnnealingLR(o, 30, 1e-5),
        ],
        optimizer=o,
    ),
    "chained-in-sequence": lambda s, o: s.SequentialLR(
        o,
        [
            s.ChainedScheduler([s.LinearLR(o, 0.5, 1.0, 12), s.ExponentialLR(o, 0.9)]),
            s.CosineAnnealingLR(o, 30),
        ],
        [20],
    ),
}


def our_optimizer(name: str = "SGD", **options: Any) -> Any:
    a, b = (flame.tensor(np.zeros(1, np.float32), requires_grad=True) for _ in range(2))
    return groups(getattr(optim, name), a, b, options)


def their_optimizer(name: str = "SGD", **options: Any) -> Any:
    a, b = (torch.zeros(1, requires_grad=True) for _ in range(2))
    return groups(getattr(torch.optim, name), a, b, options)


def groups(kind: Any, a: Any, b: Any, options: dict[str, Any]) -> Any:
    return kind([{"params": [a]}, {"params": [b], "lr": 0.05}], **{"lr": 0.5, **options})


def rates(optimizer: Any) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def assert_close(ours: list[float], theirs: list[float]) -> None:
    np.testing.assert_allclose(ours, [float(rate) for rate in theirs], rtol=1e-12, atol=1e-12)


def their_step(optimizer: Any, *schedules: Any) -> None:
    optimizer.step()
    for schedule in schedules:
        schedule.step()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_sixty_steps_equal_pytorch(name: str, kind: str) -> None:
    options = {"momentum": 0.9} if kind == "SGD" else {}
    a, b = our_optimizer(kind, **options), their_optimizer(kind, **options)
    ours = CASES[name](optim.lr_scheduler, a)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch takes its own first steps for a mistake
        theirs = CASES[name](torch.optim.lr_scheduler, b)
    for _ in range(STEPS):
        assert_close(rates(a), rates(b))
        assert_close(ours.get_last_lr(), theirs.get_last_lr())
        for key in ("momentum", "betas"):
            if key in a.param_groups[0]:
                values = [np.ravel(group[key]) for group in a.param_groups]
                expected = [np.ravel(group[key]) for group in b.param_groups]
                np.testing.assert_allclose(values, expected, rtol=1e-12)
        ours.step()
        their_step(b, theirs)
    assert_close(rates(a), rates(b))


@pytest.mark.parametrize("first", ["step", "constant", "linear", "exponential", "cosine-over"])
@pytest.mark.parametrize("second", ["multi-step", "linear-defaults", "exponential", "cosine"])
def test_schedules_side_by_side_equal_pytorch(first: str, second: str) -> None:
    a, b = our_optimizer(), their_optimizer()
    ours = [CASES[name](optim.lr_scheduler, a) for name in (first, second)]
    theirs = [CASES[name](torch.optim.lr_scheduler, b) for name in (first, second)]
    for _ in range(STEPS):
        assert_close(rates(a), rates(b))
        for schedule in ours:
            schedule.step()
        their_step(b, *theirs)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("at", [0, 9, 10, 27])
def test_resuming_equals_going_on(name: str, at: int) -> None:
    straight = our_optimizer(momentum=0.9)
    schedule = CASES[name](optim.lr_scheduler, straight)
    for _ in range(at):
        schedule.step()
    saved = json.loads(json.dumps(schedule.state_dict()))
    saved_optimizer = straight.state_dict()
    resumed = our_optimizer(momentum=0.9)
    other = CASES[name](optim.lr_scheduler, resumed)
    resumed.load_state_dict(saved_optimizer)
    other.load_state_dict(saved)
    assert other.get_last_lr() == schedule.get_last_lr()
    for _ in range(at, STEPS):
        schedule.step()
        other.step()
        assert rates(resumed) == rates(straight)


@pytest.mark.parametrize(
    "build",
    [
        lambda s, o, at: s.StepLR(o, 4, 0.5, last_epoch=at),
        lambda s, o, at: s.MultiStepLR(o, [9, 20], 0.5, last_epoch=at),
        lambda s, o, at: s.ConstantLR(o, 0.5, 12, last_epoch=at),
        lambda s, o, at: s.LinearLR(o, 0.5, 1.0, 12, last_epoch=at),
        lambda s, o, at: s.ExponentialLR(o, 0.9, last_epoch=at),
        lambda s, o, at: s.CosineAnnealingLR(o, 25, 0.001, last_epoch=at),
        lambda s, o, at: s.LambdaLR(o, lambda epoch: 0.9**epoch, last_epoch=at),
        lambda s, o, at: s.CosineAnnealingWarmRestarts(o, 30, last_epoch=at),
    ],
)
def test_beginning_at_an_epoch_equals_pytorch(build: Any) -> None:
    a, b = our_optimizer(), their_optimizer()
    for optimizer in (a, b):
        for group in optimizer.param_groups:
            group["initial_lr"] = 0.3
    ours = build(optim.lr_scheduler, a, 7)
    theirs = build(torch.optim.lr_scheduler, b, 7)
    for _ in range(20):
        assert_close(rates(a), rates(b))
        ours.step()
        their_step(b, theirs)


def test_beginning_at_an_epoch_needs_the_initial_rates() -> None:
    with pytest.raises(StateError, match="initial_lr"):
        optim.lr_scheduler.StepLR(our_optimizer(), 4, last_epoch=3)
    optimizer = our_optimizer()
    for group in optimizer.param_groups:
        group["initial_lr"] = 0.3
    with pytest.raises(StateError, match="max_lr"):
        optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10, cycle_momentum=False, last_epoch=3)


@pytest.mark.parametrize(
    "name", ["step", "multi-step", "constant", "linear", "exponential", "cosine-over", "lambda"]
)
def test_moving_to_an_epoch_equals_pytorch(name: str) -> None:
    a, b = our_optimizer(), their_optimizer()
    ours = CASES[name](optim.lr_scheduler, a)
    theirs = CASES[name](torch.optim.lr_scheduler, b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, as it means to take this form away
        for epoch in (3, 17, 8, 0, 45):
            ours.step(epoch)
            theirs.step(epoch)
            assert_close(rates(a), rates(b))


@pytest.mark.parametrize("multiple", [1, 2, 3])
def test_warm_restarts_take_fractions_of_epochs(multiple: int) -> None:
    a, b = our_optimizer(), their_optimizer()
    ours = optim.lr_scheduler.CosineAnnealingWarmRestarts(a, 3, multiple, 0.01)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(b, 3, multiple, 0.01)
    for quarter in (1, 5, 30, 11, 12, 13, 120, 121, 2):
        ours.step(quarter / 4)
        theirs.step(quarter / 4)
        assert_close(rates(a), rates(b))
    ours.step()
    theirs.step()
    assert_close(rates(a), rates(b))
    with pytest.raises(ArgumentError, match="at least 0"):
        ours.step(-1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "max", "patience": 2},
        {"patience": 1, "cooldown": 3, "factor": 0.5},
        {"patience": 0, "threshold": 0.05, "threshold_mode": "abs", "min_lr": [0.01, 0.02]},
        {"mode": "max", "threshold": 0.05, "threshold_mode": "abs", "patience": 3},
        {"patience": 0, "eps": 1e-3, "min_lr": 1e-3},
    ],
    ids=str,
)
def test_plateaus_equal_pytorch(options: dict[str, Any]) -> None:
    random = np.random.default_rng(3)
    metrics = [1 / (1 + 0.1 * i) + 0.1 * random.normal() for i in range(STEPS)]
    metrics[20] = math.nan
    a, b = our_optimizer(), their_optimizer()
    ours = optim.lr_scheduler.ReduceLROnPlateau(a, **options)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(b, **options)
    resumed_optimizer = our_optimizer()
    resumed = optim.lr_scheduler.ReduceLROnPlateau(resumed_optimizer)
    for i, metric in enumerate(metrics):
        if i == 25:
            resumed_optimizer.load_state_dict(a.state_dict())
            resumed.load_state_dict(json.loads(json.dumps(ours.state_dict())))
        ours.step(metric)
        if i >= 25:
            resumed.step(metric)
            assert rates(resumed_optimizer) == rates(a)
        theirs.step(metric)
        assert_close(rates(a), rates(b))
        assert ours.get_last_lr() == rates(a)
        assert ours.num_bad_epochs == theirs.num_bad_epochs
    assert min(rates(a)) < 0.05


def test_a_plateau_takes_a_tensor() -> None:
    optimizer = our_optimizer()
    schedule = optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    schedule.step(flame.tensor(1.0))
    schedule.step(flame.tensor(1.0))
    assert_close(rates(optimizer), [0.05, 0.005])


def test_a_rate_that_is_a_tensor_stays_that_tensor() -> None:
    rate = flame.tensor(0.5, dtype=flame.float64)
    parameter = flame.tensor(np.zeros(1), requires_grad=True)
    optimizer = optim.SGD([parameter], lr=rate)
    schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    schedule.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.125
    assert schedule.base_lrs == [0.5]


def test_the_returned_rates_are_a_copy() -> None:
    schedule = optim.lr_scheduler.ExponentialLR(our_optimizer(), 0.5)
    schedule.get_last_lr().clear()
    assert schedule.get_last_lr() == [0.5, 0.05]
    assert "ExponentialLR(last_epoch=0" in repr(schedule)


def test_a_schedule_of_ones_own_defines_get_lr() -> None:
    class Halving(optim.lr_scheduler.LRScheduler):
        def get_lr(self) -> list[float]:
            return [base * 0.5**self.last_epoch for base in self.base_lrs]

    optimizer = our_optimizer()
    schedule = Halving(optimizer)
    schedule.step()
    assert rates(optimizer) == [0.25, 0.025]
    with pytest.raises(UnsupportedError, match="get_lr"):
        optim.lr_scheduler.LRScheduler(optimizer)


def test_milestones_of_pytorch_load() -> None:
    b = their_optimizer()
    theirs = torch.optim.lr_scheduler.MultiStepLR(b, [4, 4, 9])
    ours = optim.lr_scheduler.MultiStepLR(our_optimizer(), [1])
    ours.load_state_dict(theirs.state_dict())
    assert ours.milestones == [4, 4, 9]


# Errors


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda s, o: s.StepLR(o, 0), "step_size must be an int of at least 1"),
        (lambda s, o: s.LambdaLR(o, [abs]), "1 values, but the optimizer has 2 groups"),
        (lambda s, o: s.ConstantLR(o, 1.5), "factor must lie in"),
        (lambda s, o: s.ConstantLR(o, 0.0), "factor must lie in"),
        (lambda s, o: s.LinearLR(o, 0.0), "start_factor must lie in"),
        (lambda s, o: s.LinearLR(o, 0.5, 2.0), "end_factor must lie in"),
        (lambda s, o: s.CosineAnnealingLR(o, 0), "T_max must be at least 1"),
        (lambda s, o: s.CosineAnnealingWarmRestarts(o, 0), "T_0 must be"),
        (lambda s, o: s.CosineAnnealingWarmRestarts(o, 2, 0), "T_mult must be"),
        (lambda s, o: s.OneCycleLR(o, 0.1), "give total_steps"),
        (lambda s, o: s.OneCycleLR(o, 0.1, 0), "at least 1"),
        (lambda s, o: s.OneCycleLR(o, 0.1, 5, pct_start=2.0), "pct_start"),
        (lambda s, o: s.OneCycleLR(o, 0.1, 5, anneal_strategy="sine"), "anneal_strategy"),
        (lambda s, o: s.OneCycleLR(o, [0.1], 5), "max_lr has 1 values"),
        (lambda s, o: s.ReduceLROnPlateau(o, factor=1.0), "factor must lie in"),
        (lambda s, o: s.ReduceLROnPlateau(o, mode="up"), "mode must be"),
        (lambda s, o: s.ReduceLROnPlateau(o, threshold_mode="up"), "threshold_mode must be"),
        (lambda s, o: s.ReduceLROnPlateau(o, min_lr=[0.1]), "min_lr has 1 values"),
        (lambda s, o: s.SequentialLR(o, [], []), "at least one schedule"),
        (lambda s, o: s.SequentialLR(o, [s.StepLR(o, 1)], [3]), "need 0 milestones, got 1"),
        (lambda s, o: s.ChainedScheduler([s.ReduceLROnPlateau(o)]), "whose step needs a metric"),
        (lambda s, o: s.ChainedScheduler([s.StepLR(o, 1)], our_optimizer()), "another optimizer"),
    ],
)
def test_bad_values_are_refused(build: Build, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        build(optim.lr_scheduler, our_optimizer(momentum=0.9))


def test_other_misuse_is_refused() -> None:
    schedules = optim.lr_scheduler
    optimizer = our_optimizer()
    with pytest.raises(DTypeError, match="must be an optimizer"):
        schedules.StepLR([1], 3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="cycle_momentum=False"):
        schedules.OneCycleLR(our_optimizer("Adagrad"), 0.1, 5)
    chain = schedules.ChainedScheduler([schedules.StepLR(optimizer, 1)])
    with pytest.raises(UnsupportedError, match="only the first"):
        schedules.SequentialLR(optimizer, [schedules.StepLR(optimizer, 1), chain], [3])
    with pytest.raises(UnsupportedError, match="by number"):
        chain.step(3)
    cycle = schedules.OneCycleLR(optimizer, 0.1, 3, cycle_momentum=False)
    for _ in range(3):
        cycle.step()
    with pytest.raises(ArgumentError, match="after the last"):
        cycle.step()


def test_a_state_of_another_schedule_is_refused() -> None:
    schedules = optim.lr_scheduler
    cosine = schedules.CosineAnnealingLR(our_optimizer(), 5)
    with pytest.raises(StateError, match="missing T_max, eta_min"):
        cosine.load_state_dict(schedules.StepLR(our_optimizer(), 3).state_dict())
    single = optim.SGD([flame.tensor(np.zeros(1), requires_grad=True)])
    with pytest.raises(StateError, match="saved for 1 groups"):
        cosine.load_state_dict(schedules.CosineAnnealingLR(single, 5).state_dict())
    optimizer = our_optimizer()
    chain = schedules.ChainedScheduler([schedules.StepLR(optimizer, 1)])
    with pytest.raises(StateError, match="0 schedules saved, 1 here"):
        chain.load_state_dict(cosine.state_dict())
