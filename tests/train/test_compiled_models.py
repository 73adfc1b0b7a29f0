"""Every model of the zoo trained compiled and uncompiled, from the same weights, data and seeds.

Tolerances: a compiled step may sum in another order, so losses and weights agree as float32 sums
of another order do after twenty steps: losses to 1e-4, weights, statistics, optimizer state and
gradients to 2e-3 of the norm of the tensor (for weights: of how far training has moved it).
ResNet-18 doubles a difference of rounding every few steps (batch norm over few positions), so its
ten steps are taken in float64, and five in float32.
AdamW has a large eps, for otherwise gradients that are zero but for rounding (biases of keys, of
layers before a normalization) move their weights by the sign of the rounding.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flame
import flame.nn as nn
import flame.optim as optim
from flame.optim import lr_scheduler

STEPS = {"resnet18": 10}
MANY, FEW = 20, 5
DOUBLE = ("resnet18",)
LOSS = 1e-4
DISTANCE = 2e-3


def _load_zoo() -> Any:
    path = Path(__file__).parents[1] / "models" / "zoo.py"
    specification = importlib.util.spec_from_file_location("model_zoo_compiled", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["model_zoo_compiled"] = module
    specification.loader.exec_module(module)
    return module.ZOO


ZOO = _load_zoo()


def build(name: str) -> Any:
    """The model with dropout wherever it has a place for it."""
    model = with_dropout(name)
    return model.double() if name in DOUBLE else model


def with_dropout(name: str) -> Any:
    flame.manual_seed(1)
    model = ZOO[name].build(flame)
    if name == "mlp":
        model[3].p = 0.2
    elif name in ("lenet", "resnet18"):
        model[-1] = nn.Sequential(nn.Dropout(0.2), model[-1])
    elif name == "gpt":
        for block in model.blocks:
            block.mlp = nn.Sequential(block.mlp, nn.Dropout(0.1))
            block.attention.out = nn.Sequential(block.attention.out, nn.Dropout(0.1))
    elif name == "unet":
        for module in list(model.modules()):
            if hasattr(module, "conv1"):
                module.conv1 = nn.Sequential(module.conv1, nn.Dropout(0.1))
    elif name == "lstm":
        model.lstm.dropout = 0.2
    return model


def batches(name: str, count: int, seed: int = 0) -> Iterator[list[Any]]:
    random = np.random.default_rng(seed)
    for _ in range(count):
        arrays = [np.ascontiguousarray(a) for a in ZOO[name].batch(random)]
        wide = [a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays]
        yield [flame.from_numpy(a) for a in (wide if name in DOUBLE else arrays)]


@dataclass
class Way:
    """An optimizer with what else a step does."""

    optimizer: Any
    clip: float | None = None
    schedule: Any = None


WAYS = {
    "sgd": Way(
        lambda entry, p: optim.SGD(p, lr=entry.sgd_rate, momentum=0.9, weight_decay=1e-3),
        schedule=lambda o: lr_scheduler.CosineAnnealingLR(o, 15),
    ),
    "adamw": Way(
        lambda entry, p: optim.AdamW(p, lr=entry.adamw_rate, weight_decay=0.01, eps=1e-4),
        clip=0.5,
        schedule=lambda o: lr_scheduler.OneCycleLR(
            o, max_lr=o.param_groups[0]["lr"], total_steps=25
        ),
    ),
}


class Run:
    """A model in training."""

    def __init__(self, name: str, way: Way, *, compiling: bool) -> None:
        entry = ZOO[name]
        model = self.model = build(name)
        optimizer = self.optimizer = way.optimizer(entry, model.parameters())
        schedule = None if way.schedule is None else way.schedule(optimizer)

        def step(*batch: Any) -> Any:
            *inputs, target = batch
            optimizer.zero_grad()
            loss = entry.loss(flame, model(*inputs), target)
            loss.backward()
            norm = None
            if way.clip is not None:
                norm = nn.utils.clip_grad_norm_(model.parameters(), way.clip)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            return {"loss": loss, "norm": norm}

        self.start = copies(model.state_dict())
        self.step = flame.compile(step) if compiling else step
        flame.manual_seed(7)
        self.losses: list[float] = []
        self.norms: list[float] = []
        for batch in batches(name, STEPS.get(name, MANY)):
            found = self.step(*batch)
            self.losses.append(found["loss"].item())
            self.norms += [] if found["norm"] is None else [found["norm"].item()]
        self.draws = flame.get_rng_state().numpy().copy()
        self.rates = [group["lr"] for group in optimizer.param_groups]


def copies(tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: t.numpy(force=True).copy() for name, t in tensors.items()}


def assert_close(found: np.ndarray, expected: np.ndarray, scale: float, label: str) -> None:
    """As whole tensors: where a ReLU's input is zero but for rounding, single elements differ."""
    if expected.dtype.kind != "f":
        np.testing.assert_array_equal(found, expected, label)
        return
    assert np.isfinite(found).all(), label
    distance = np.linalg.norm(found.astype(float) - expected)
    assert distance <= DISTANCE * scale + 1e-6, f"{label}: {distance} of {scale}"


def assert_equal_runs(eager: Run, compiled: Run) -> None:
    np.testing.assert_allclose(compiled.losses, eager.losses, rtol=LOSS)
    np.testing.assert_allclose(compiled.norms, eager.norms, rtol=DISTANCE)
    assert compiled.rates == eager.rates
    np.testing.assert_array_equal(compiled.draws, eager.draws)
    wanted = copies(eager.model.state_dict())
    for name, value in copies(compiled.model.state_dict()).items():
        moved = np.linalg.norm(wanted[name].astype(float) - eager.start[name])
        assert_close(value, wanted[name], moved, name)
    pairs = zip(compiled.model.named_parameters(), eager.model.parameters(), strict=True)
    largest = max(np.linalg.norm(p.grad.numpy()) for p in eager.model.parameters())
    for (name, p), q in pairs:
        expected = q.grad.numpy()
        scale = np.linalg.norm(expected) + 1e-3 * largest
        assert_close(p.grad.numpy(), expected, scale, f"{name}.grad")
        mine, theirs = compiled.optimizer.state[p], eager.optimizer.state[q]
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            if not isinstance(value, flame.Tensor):
                assert mine[key] == value, f"{name} {key}"
                continue
            scale = np.linalg.norm(value.numpy()) + 1e-3 * largest
            assert_close(mine[key].numpy(), value.numpy(), scale, f"{name} {key}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ZOO)
def test_many_steps(name: str, way: str) -> None:
    eager = Run(name, WAYS[way], compiling=False)
    compiled = Run(name, WAYS[way], compiling=True)
    assert compiled.step.recordings == 1
    assert_equal_runs(eager, compiled)


def learning(model: Any, optimizer: Any, entry: Any) -> Any:
    """A plain step of training."""

    def step(*batch: Any) -> Any:
        *inputs, target = batch
        optimizer.zero_grad()
        loss = entry.loss(flame, model(*inputs), target)
        loss.backward()
        optimizer.step()
        return loss

    return step


def test_a_few_steps_of_resnet_in_float32() -> None:
    losses = []
    for compiling in (False, True):
        model, entry = with_dropout("resnet18"), ZOO["resnet18"]
        optimizer = optim.SGD(model.parameters(), lr=entry.sgd_rate, momentum=0.9)
        random = np.random.default_rng(0)

        step = learning(model, optimizer, entry)
        run = flame.compile(step) if compiling else step
        flame.manual_seed(3)
        arrays = [ZOO["resnet18"].batch(random) for _ in range(FEW)]
        losses.append([run(*map(flame.from_numpy, batch)).item() for batch in arrays])
    np.testing.assert_allclose(losses[1], losses[0], rtol=LOSS)


@pytest.mark.parametrize("name", [name for name in ZOO if name != "resnet18"])
def test_a_compiled_model_with_the_loss_outside(name: str) -> None:
    entry, runs = ZOO[name], []
    for compiling in (False, True):
        model = build(name)
        forward = flame.compile(model) if compiling else model
        optimizer = optim.SGD(model.parameters(), lr=entry.sgd_rate, momentum=0.9)
        flame.manual_seed(5)
        losses = []
        for *inputs, target in batches(name, 4, seed=3):
            optimizer.zero_grad()
            loss = entry.loss(flame, forward(*inputs), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append((losses, model))
    assert forward.recordings == 1
    np.testing.assert_allclose(runs[1][0], runs[0][0], rtol=LOSS)
    largest = max(np.linalg.norm(p.grad.numpy()) for p in runs[0][1].parameters())
    for (key, q), p in zip(runs[0][1].named_parameters(), runs[1][1].parameters(), strict=True):
        scale = np.linalg.norm(q.grad.numpy()) + 1e-3 * largest
        assert_close(p.grad.numpy(), q.grad.numpy(), scale, key)


@pytest.mark.parametrize("name", ZOO)
def test_inference(name: str) -> None:
    """In evaluation mode without gradients; weights that change between calls are seen."""
    model = build(name).eval()
    compiled = flame.compile(model)
    with flame.no_grad():
        for *inputs, _ in batches(name, 3, seed=9):
            expected = model(*inputs).numpy()
            found = compiled(*inputs)
            assert not found.requires_grad
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5 * scale)
            for p in model.parameters():
                p.mul_(1.01)
    assert compiled.recordings == 1


class Modulated(nn.Module):
    """A block whose normalization is scaled and shifted by a condition, as in DiT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.condition = nn.Linear(width, 3 * width)

    def forward(self, x: Any, c: Any) -> Any:
        shift, scale, gate = self.condition(c)[:, None].chunk(3, dim=-1)
        y = self.norm(x) * (1 + scale) + shift
        return x + gate * self.outer(nn.functional.gelu(self.inner(y)))


def test_modulated_norms_train_alike() -> None:
    random = np.random.default_rng(0)
    x, c = (flame.from_numpy(random.standard_normal(s)) for s in ((8, 64, 64), (8, 64)))
    losses = []
    for compiling in (False, True):
        flame.manual_seed(0)
        blocks = nn.ModuleList([Modulated(64).double() for _ in range(4)])
        optimizer = optim.SGD(blocks.parameters(), lr=0.1)

        def step(x: Any, c: Any, blocks: Any = blocks, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            for block in blocks:
                x = block(x, c)
            loss = (x * x).mean()
            loss.backward()
            optimizer.step()
            return loss

        run = flame.compile(step) if compiling else step
        losses.append([run(x, c).item() for _ in range(FEW)])
        assert not compiling or "modulated_norm_backward" in run.report()
    np.testing.assert_allclose(*losses, rtol=1e-12)
