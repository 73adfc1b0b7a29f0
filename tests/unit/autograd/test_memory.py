"""Graphs as long as one likes, and memory that goes with the last reference."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import flame
from flame import nn


@pytest.fixture
def without_collector() -> Iterator[None]:
    """What is freed here is freed by reference counts alone."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def chain(length: int) -> tuple[Any, Any]:
    x = flame.ones(2, dtype=flame.float64, requires_grad=True)
    y = x
    for _ in range(length):
        y = y + x
    return x, y


def test_a_chain_of_100_000_operations() -> None:
    x, y = chain(100_000)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [100_001.0, 100_001.0]
    del y


def test_freeing_a_long_chain_that_was_never_used() -> None:
    def work() -> None:
        x = flame.ones(1, requires_grad=True)
        y = x
        for _ in range(100_000):
            y = y * x  # keeps its operands
        del y

    before = threading.stack_size(256 * 1024)  # recursion by depth would end the process
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)


def test_a_long_chain_of_writes_into_views() -> None:
    x = flame.ones(3, dtype=flame.float64, requires_grad=True)
    y = x * 1
    for i in range(2000):
        y[i % 3].add_(x[0])
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2001.0, 1.0, 1.0]


def test_a_graph_goes_with_its_result(without_collector: None) -> None:
    flame.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(18, 4), nn.LayerNorm(4), nn.Dropout(0.5),
    )  # fmt: skip
    nodes: list[Any] = []

    def walk(node: Any) -> None:
        if hasattr(node, "next_functions"):
            nodes.append(weakref.ref(node))
            for edge in node.next_functions:
                if edge is not None:
                    walk(edge[0])

    labels = flame.tensor([0, 1, 2, 3, 0])
    for use in ("nothing", "backward", "create_graph"):
        loss = nn.functional.cross_entropy(model(flame.rand(5, 1, 8, 8)), labels)
        walk(loss.grad_fn)
        assert len(nodes) >= 8
        if use == "backward":
            loss.backward()
        if use == "create_graph":
            grads = flame.autograd.grad(loss, list(model.parameters()), create_graph=True)
            sum((g * g).sum() for g in grads).backward()
            del grads
        del loss
        model.zero_grad()
        assert [r() for r in nodes if r() is not None] == [], use
        nodes.clear()


def test_tensors_go_without_the_collector(without_collector: None) -> None:
    x = flame.ones(4, requires_grad=True)
    made = []

    def kept(tensor: Any) -> Any:
        made.append(weakref.ref(tensor))
        return tensor

    y = kept(x * 2)
    v = kept(y[1:])
    kept(v.mul_(3))
    y.mul_(kept(x.exp()))
    z = kept(y.sum())
    z.backward()
    del y, v, z
    assert all(r() is None for r in made)


def test_backward_frees_what_was_kept(without_collector: None) -> None:
    x = flame.ones(4, requires_grad=True)
    hidden = x * 2
    kept = weakref.ref(hidden)
    y = (hidden * hidden).sum()
    del hidden
    assert kept() is not None
    y.backward()
    assert kept() is None
    assert y.item() == 16


def test_gradients_do_not_hold_the_graph(without_collector: None) -> None:
    x = flame.ones(4, requires_grad=True)
    y = (x * x).sum()
    node = weakref.ref(y.grad_fn)
    y.backward()
    assert x.grad is not None
    assert not x.grad.requires_grad
    del y
    assert node() is None
    np.testing.assert_array_equal(x.grad.numpy(), 2)
