"""Does it work at all? A network learns, a convolutional one takes a step. Under five seconds."""

from __future__ import annotations

import numpy as np

import flame
from flame import nn, optim


def test_a_network_learns_to_tell_two_moons_apart() -> None:
    flame.manual_seed(0)
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, np.pi, 200)
    upper = np.arange(200) % 2
    points = np.stack([np.cos(angle) + upper, (1 - 2 * upper) * np.sin(angle) + upper / 2], 1)
    x = flame.from_numpy((points + rng.normal(0, 0.1, points.shape)).astype(np.float32))
    y = flame.from_numpy(upper)
    model = nn.Sequential(
        nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
    )
    optimizer = optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with flame.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean().item()
    assert losses[-1] < 0.2 * losses[0]
    assert accuracy > 0.97


def test_a_convolutional_network_takes_steps() -> None:
    flame.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4 * 4 * 4, 3),
    )  # fmt: skip
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels = flame.rand(6, 1, 8, 8), flame.tensor([0, 1, 2, 0, 1, 2])
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in model.parameters())
