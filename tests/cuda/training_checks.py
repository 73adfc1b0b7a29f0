"""Training on a GPU, as calls that assert: models against the CPU, eager = compiled = replayed."""

from __future__ import annotations

import contextlib
import copy
import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest

import flame
from flame import nn, optim
from flame.core.errors import FlameError, IndexRangeError, OutOfMemoryError
from flame.recording.function import CompiledFunction
from tests.models.zoo import ZOO

OPTIMIZERS = {
    "sgd": lambda entry, p: optim.SGD(p, lr=entry.sgd_rate, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda entry, p: optim.AdamW(p, lr=entry.adamw_rate, weight_decay=0.01, eps=1e-4),
}
CHECKS: list[Callable[[], None]] = []


def check(function: Callable[[], None]) -> Callable[[], None]:
    """One of the checks that both kinds of device go through."""
    CHECKS.append(function)
    return function


# --- models ---------------------------------------------------------------------------------------


class Run:
    """A model of the zoo in training. precision: "32", "64" (all in float64), "bf16" (autocast)."""

    def __init__(
        self, name: str, optimizer: str, device: str, *, compiling: bool = False, steps: int = 4,
        precision: str = "32", parameters: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        entry = ZOO[name]
        flame.manual_seed(0)
        model = self.model = entry.build(flame)
        if precision == "64":
            model.double()
        if parameters is not None:
            model.load_state_dict(parameters)
        model.to(device)
        made = self.optimizer = OPTIMIZERS[optimizer](entry, model.parameters())
        self.device, self.double = device, precision == "64"

        def step(*batch: Any) -> Any:
            *inputs, target = batch
            made.zero_grad()
            with flame.autocast(device.partition(":")[0], enabled=precision == "bf16"):
                loss = entry.loss(flame, model(*inputs), target)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            made.step()
            return loss, norm

        self.step = flame.compile(step) if compiling else step
        random = np.random.default_rng(0)
        found = [self.step(*self._batch(entry.batch(random))) for _ in range(steps)]
        self.losses = [loss.item() for loss, _ in found]
        self.norms = [norm.item() for _, norm in found]

    def _batch(self, arrays: Sequence[Any]) -> list[Any]:
        return [
            flame.from_numpy(
                np.ascontiguousarray(
                    a.astype(np.float64) if self.double and a.dtype.kind == "f" else a
                )
            ).to(self.device)
            for a in arrays
        ]

    def state(self) -> dict[str, Any]:
        return {k: v.cpu().numpy().astype(np.float64) for k, v in self.model.state_dict().items()}


def assert_same_runs(found: Run, expected: Run, start: dict[str, Any], relative: float) -> None:
    """Losses, norms of gradients, and how the parameters moved."""
    assert np.isfinite(expected.losses).all()
    np.testing.assert_allclose(found.losses, expected.losses, rtol=relative)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=30 * relative)
    wanted = expected.state()
    for name, value in found.state().items():
        moved = np.linalg.norm(wanted[name] - start[name])
        distance = np.linalg.norm(value - wanted[name])
        assert distance <= 300 * relative * moved + 1e-5, f"{name}: {distance} of {moved}"


def initial(name: str) -> dict[str, Any]:
    flame.manual_seed(0)
    model = ZOO[name].build(flame)
    return {k: v.numpy().astype(np.float64) for k, v in model.state_dict().items()}


def check_model(name: str, optimizer: str, *, steps: int = 4) -> None:
    """The CPU's run, the GPU's eager and compiled ones agree; a compiled step is recorded once.

    In float64, where rounding cannot hide or feign a difference.
    """
    start = initial(name)
    there = Run(name, optimizer, "cuda", steps=steps, precision="64")
    compiled = Run(name, optimizer, "cuda", steps=steps, precision="64", compiling=True)
    here = Run(name, optimizer, "cpu", steps=steps, precision="64")
    assert compiled.step.recordings == 1
    assert all(p.is_cuda and p.grad.is_cuda for p in there.model.parameters())
    assert_same_runs(there, here, start, 1e-7)
    assert_same_runs(compiled, there, start, 1e-7)


def check_model_in_float32(name: str, optimizer: str, *, steps: int = 4) -> None:
    """As `check_model`, in the precision of training, within its rounding."""
    there = Run(name, optimizer, "cuda", steps=steps)
    compiled = Run(name, optimizer, "cuda", steps=steps, compiling=True)
    here = Run(name, optimizer, "cpu", steps=steps)
    np.testing.assert_allclose(there.losses, here.losses, rtol=2e-3)
    np.testing.assert_allclose(compiled.losses, there.losses, rtol=2e-3)


def check_autocast(name: str, *, steps: int = 4) -> None:
    """Training in bfloat16 follows float32 and is the same compiled."""
    plain = Run(name, "sgd", "cuda", steps=steps)
    eager = Run(name, "sgd", "cuda", steps=steps, precision="bf16")
    compiled = Run(name, "sgd", "cuda", steps=steps, precision="bf16", compiling=True)
    assert eager.losses != plain.losses, "nothing was computed in bfloat16"
    np.testing.assert_allclose(eager.losses, plain.losses, rtol=0.05)
    np.testing.assert_allclose(compiled.losses, eager.losses, rtol=0.05)
    assert all(p.dtype is flame.float32 for p in eager.model.parameters())


# --- steps ----------------------------------------------------------------------------------------


def network(seed: int = 0, dropout: float = 0.0) -> Any:
    """(N, 8) -> (N, 4), on the GPU."""
    flame.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 4)
    ).cuda()  # fmt: skip


def batch(n: int, size: int = 6) -> tuple[Any, Any]:
    random = np.random.default_rng(n)
    x = random.standard_normal((size, 8)).astype(np.float32)
    return flame.from_numpy(x).cuda(), flame.from_numpy(random.integers(0, 4, size)).cuda()


class Trainer:
    """A small network with a step, eager or compiled."""

    def __init__(self, *, compiling: bool, dropout: float = 0.0) -> None:
        self.model = network(dropout=dropout)
        self.optimizer = optim.AdamW(self.model.parameters(), lr=1e-3)
        self.step: Any = flame.compile(self._step) if compiling else self._step

    def _step(self, x: Any, y: Any) -> Any:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss


def long_run(steps: int, compared: int) -> None:
    """Many compiled steps take no more memory than a few, and go where eager steps go."""
    eager, compiled = Trainer(compiling=False), Trainer(compiling=True)
    before, last, expected = 0, 0.0, 0.0
    for n in range(steps):
        loss = compiled.step(*batch(n % 10))
        if n % 50 == 0 or n == compared - 1:
            last = loss.item() if n < compared else last
            assert np.isfinite(loss.item())
        if n == 20:
            gc.collect()
            flame.cuda.synchronize()
            before = flame.cuda.memory_allocated()
    end = loss.item()
    del loss
    gc.collect()
    flame.cuda.synchronize()
    assert flame.cuda.memory_allocated() <= before
    for n in range(compared):
        expected = eager.step(*batch(n % 10)).item()
    np.testing.assert_allclose(last, expected, rtol=1e-3)
    assert end <= last
    assert compiled.step.recordings == 1


@check
def dropout_is_replayed_with_other_masks() -> None:
    eager = Trainer(compiling=False, dropout=0.5)
    compiled = Trainer(compiling=True, dropout=0.5)
    losses = []
    for trainer in (eager, compiled):
        flame.manual_seed(3)
        losses.append([trainer.step(*batch(0)).item() for _ in range(4)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    model = network(dropout=0.5)
    forward = flame.compile(lambda x: model[2](x))
    ones = flame.ones(200, device="cuda")
    flame.manual_seed(0)
    masks = [forward(ones).cpu().numpy() for _ in range(3)]
    assert not np.array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[1], masks[2])
    flame.manual_seed(0)
    np.testing.assert_array_equal(forward(ones).cpu().numpy(), masks[0])


@check
def a_right_step_is_replayed_task_by_task() -> None:
    trainer = Trainer(compiling=True, dropout=0.5)
    trainer.step(*batch(0))
    before = {k: v.cpu().numpy() for k, v in trainer.model.state_dict().items()}
    found = trainer.step.replay(*batch(0))
    assert found.difference is None, found.difference
    assert found.nan is None
    for name, value in trainer.model.state_dict().items():
        np.testing.assert_array_equal(value.cpu().numpy(), before[name])


@check
def replays_name_the_line_of_the_first_nan() -> None:
    def shifted(x: flame.Tensor) -> flame.Tensor:
        return (flame.log(x * 2 - 10.0) + 1).sum()

    step, x = flame.compile(shifted), flame.tensor([1.0, 20.0], device="cuda")
    step(x)
    found = step.replay(x).nan
    assert found is not None
    assert found.node.op.name == "log"
    assert found.node.line.endswith(f"training_checks.py:{shifted.__code__.co_firstlineno + 1}")


@check
def signatures_are_recorded_apart() -> None:
    eager, compiled = Trainer(compiling=False), Trainer(compiling=True)
    for n, size in enumerate((6, 3, 6, 1, 3)):
        data = batch(n, size)
        found, expected = compiled.step(*data).item(), eager.step(*data).item()
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert compiled.step.recordings == 3
    compiled.model.eval()
    compiled.step(*batch(9))
    assert compiled.step.recordings == 4


@check
def state_is_seen_outside_of_the_step() -> None:
    compiled = Trainer(compiling=True)
    compiled.step(*batch(0))
    weight = compiled.model[0].weight
    before = weight.detach().cpu().numpy().copy()
    compiled.step(*batch(1))
    assert not np.array_equal(weight.detach().cpu().numpy(), before)
    saved = copy.deepcopy(compiled.model.state_dict())
    first = compiled.step(*batch(2)).item()
    compiled.model.load_state_dict(saved)
    assert compiled.step(*batch(2)).item() == pytest.approx(first, rel=1e-6)
    weight.grad.zero_()
    with flame.no_grad():
        weight.zero_()
    eager = Trainer(compiling=False)
    eager.model.load_state_dict(compiled.model.state_dict())
    expected = eager.step(*batch(3)).item()
    assert compiled.step(*batch(3)).item() == pytest.approx(expected, rel=1e-5)


@check
def batches_of_the_cpu_are_moved_inside_of_the_step() -> None:
    trainer = Trainer(compiling=False)

    @flame.compile
    def step(x: Any, y: Any) -> Any:
        return trainer._step(x.to("cuda"), y.cuda())

    other = Trainer(compiling=False)
    for n in range(4):
        x, y = batch(n)
        expected = other.step(x, y).item()
        assert step(x.cpu(), y.cpu()).item() == pytest.approx(expected, rel=1e-4)
    assert step.recordings == 1


@check
def streams_are_in_order() -> None:
    eager, compiled = Trainer(compiling=False), Trainer(compiling=True)
    side = flame.cuda.Stream()
    for n in range(6):
        data = batch(n)
        expected = eager.step(*data).item()
        if n % 2:
            side.wait_stream(flame.cuda.current_stream())
            with flame.cuda.stream(side):
                found = compiled.step(*data)
                assert found.item() == pytest.approx(expected, rel=1e-4)
            flame.cuda.current_stream().wait_stream(side)
        else:
            assert compiled.step(*data).item() == pytest.approx(expected, rel=1e-4)


@check
def checkpointing_gives_the_same_gradients() -> None:
    model, (x, _) = network(dropout=0.3), batch(0)
    gradients = []
    for uses in (False, True):
        flame.manual_seed(1)
        model.zero_grad()
        run = flame.autograd.checkpoint
        y = run(model, x) if uses else model(x)
        (y**2).sum().backward()
        gradients.append([p.grad.cpu().numpy() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        np.testing.assert_allclose(recomputed, plain, rtol=1e-5, atol=1e-6)


@check
def hooks_in_place_writes_and_views_compile() -> None:
    def step(x: Any) -> Any:
        x = x.detach().requires_grad_()
        y = (x * 2).clone()
        y[:, 0] += 1
        y.view(-1)[::3].mul_(3)
        y.register_hook(lambda g: g * 0.5)
        z = y.t().exp().sum()
        (gradient,) = flame.autograd.grad(z, x)
        return z, gradient, y[1:, ::2]

    compiled = flame.compile(step)
    for n in range(2):
        x, _ = batch(n)
        for found, expected in zip(compiled(x), step(x), strict=True):
            np.testing.assert_allclose(
                found.detach().cpu().numpy(), expected.detach().cpu().numpy(), rtol=2e-5, atol=1e-5
            )


@check
def indices_out_of_range_are_told_after_a_replay() -> None:
    table = flame.ones(5, 3, device="cuda")
    step = flame.compile(lambda i: nn.functional.embedding(i, table).sum())
    good = flame.tensor([0, 4, 2], device="cuda")
    assert step(good).item() == 9
    with pytest.raises(IndexRangeError):
        step(flame.tensor([0, 5, 2], device="cuda")).item()
    assert step(good).item() == 9
    flame.cuda.synchronize()


@check
def a_module_is_compiled_with_its_gradients() -> None:
    model, (x, y) = network(), batch(0)
    compiled = flame.compile(model)
    for _ in range(2):
        model.zero_grad()
        nn.functional.cross_entropy(compiled(x), y).backward()
        found = [p.grad.cpu().numpy() for p in model.parameters()]
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for made, p in zip(found, model.parameters(), strict=True):
            np.testing.assert_allclose(made, p.grad.cpu().numpy(), rtol=1e-4, atol=1e-6)


def large_in_small(**limits: dict[str, Any]) -> contextlib.ExitStack:
    """Passes that look for large tensors take small ones, too: limits of modules by name."""
    stack = contextlib.ExitStack()
    for name, values in limits.items():
        module = sys.modules[f"flame.compiler.passes.{name}"]
        stack.enter_context(mock.patch.multiple(module, **values))
    return stack


class LanguageModel(nn.Module):
    """Tied scores behind blocks of products with gelu."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.up = nn.ModuleList([nn.Linear(16, 64) for _ in range(3)])
        self.down = nn.ModuleList([nn.Linear(64, 16) for _ in range(3)])

    def forward(self, x: Any) -> Any:
        made = self.embedding(x)
        for up, down in zip(self.up, self.down, strict=True):
            made = made + down(nn.functional.gelu(up(made), approximate="tanh"))
        return made @ self.embedding.weight.T


def language_losses(*, compiling: bool, half: bool) -> tuple[list[float], str]:
    flame.manual_seed(3)
    model = LanguageModel().cuda()
    optimizer = optim.AdamW(model.parameters(), lr=3e-3)

    def step(x: Any, y: Any) -> Any:
        with flame.autocast("cuda", dtype=flame.bfloat16, enabled=half):
            scores = model(x)
            loss = nn.functional.cross_entropy(scores.view(-1, 40), y.view(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    run = flame.compile(step) if compiling else step
    x, y = (flame.randint(0, 40, (8, 16)).cuda() for _ in range(2))
    losses = [run(x, y).item() for _ in range(5)]
    return losses, run.report() if isinstance(run, CompiledFunction) else ""


@check
def scores_in_blocks_and_activations_computed_again_train_alike() -> None:
    for half in (False, True):
        wanted, _ = language_losses(compiling=False, half=half)
        with large_in_small(
            blocks={"LEAST": 1, "SHARE": 0.0, "ROWS": 8}, recompute={"LEAST": 1},
            epilogues={"LEAST": 1}, pieces={"LEAST": 1},
        ):  # fmt: skip
            found, report = language_losses(compiling=True, half=half)
        runs = [line.split() for line in report.splitlines()]
        assert sum("cross_entropy_backward" in words for words in runs) == 4, report
        activations = [words for words in runs if "gelu_tanh" in words or "linear_gelu" in words]
        assert len(activations) >= 5, report  # three in the forward pass, and again
        np.testing.assert_allclose(found, wanted, rtol=2e-2 if half else 1e-4)
        assert wanted[-1] < 0.95 * wanted[0]


@check
def memory_running_out_is_told_and_survived() -> None:
    free, _ = flame.cuda.mem_get_info()
    small = flame.ones(1000, device="cuda")
    with pytest.raises(OutOfMemoryError, match=r"cuda:0.*float32\[1000\]|largest"):
        flame.empty(8 * free, dtype=flame.uint8, device="cuda")
    assert small.sum().item() == 1000
    trainer = Trainer(compiling=True)
    assert np.isfinite(trainer.step(*batch(0)).item())


@check
def a_step_that_mixes_devices_is_refused() -> None:
    weight = flame.ones(4, 8)
    step = flame.compile(lambda x: nn.functional.linear(x, weight))
    with pytest.raises(FlameError, match=r"cpu.*cuda:0"):
        step(batch(0)[0])
