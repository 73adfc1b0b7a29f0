"""Optimizers over parameters of many kinds, for tests of calls that share launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

import flame
from flame import optim
from flame.eager import Eager
from flame.ops.op import Interpreter

SHAPES = ((1,), (7,), (33, 3), (), (64,), (500,), (513,), (40, 50), (2, 3, 4, 5), (1, 600))
NORMED = ((1,), (), (33, 3), (500,), (40, 50), (2, 3, 4, 5), (3, 7000))
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda p: optim.AdamW(p, lr=0.01),
    "AdamW-amsgrad": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True, maximize=True),
    "Adam": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.1),
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD-momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "SGD-nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Lion": lambda p: optim.Lion(p, lr=0.01),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01),
    "RMSprop-centered": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.01, lr_decay=0.1),
}


def numbers(shape: Sequence[int], seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def unaligned(array: Any, dtype: Any, device: str) -> Any:
    """A tensor one element behind an aligned address."""
    buffer = flame.zeros(array.size + 1, dtype=dtype, device=device)
    view = buffer[1:].reshape(array.shape)
    view.copy_(flame.from_numpy(array))
    return view.detach()


def made(
    shapes: Sequence[Sequence[int]] = SHAPES, dtypes: Sequence[Any] = (flame.float32,),
    devices: Sequence[str] = ("cuda:0",),
) -> list[Any]:  # fmt: skip
    """Parameters with gradients: some unaligned, some turned, some without a gradient."""
    parameters = []
    for i, shape in enumerate(shapes):
        dtype, device = dtypes[i % len(dtypes)], devices[i % len(devices)]
        array = numbers(shape, i)
        if i % 3 == 1:
            p = unaligned(array, dtype, device)
        elif i % 4 == 3 and len(shape) > 1:
            p = flame.from_numpy(array.swapaxes(0, 1).copy()).to(device).to(dtype).transpose(0, 1)
        else:
            p = flame.from_numpy(array).to(device).to(dtype)
        parameters.append(p.detach().requires_grad_())
    set_gradients(parameters, 0)
    return parameters


def set_gradients(parameters: Sequence[Any], step: int) -> None:
    for i, p in enumerate(parameters):
        missing = (i + step) % 5 == 4
        g = flame.from_numpy(numbers(p.shape, 100 * step + i)).to(p.device).to(p.dtype)
        p.grad = None if missing else g


def bits(tensors: Sequence[Any]) -> list[bytes]:
    return [np.ascontiguousarray(t.detach().cpu().to(flame.float64).numpy()).tobytes()
            for t in tensors]  # fmt: skip


def trained(make: Callable[[Any], Any], parameters: list[Any], steps: int = 3) -> Any:
    optimizer = make(parameters)
    for step in range(steps):
        set_gradients(parameters, step)
        optimizer.step()
    return optimizer


def clipped(order: float) -> tuple[Any, list[Any]]:
    """The norm of gradients before they are clipped, and their parameters."""
    parameters = made(NORMED)
    return flame.nn.utils.clip_grad_norm_(parameters, 0.5, order), parameters


@contextmanager
def one_by_one() -> Iterator[None]:
    """Every call alone."""
    with mock.patch.object(Eager, "foreach", Interpreter.foreach):
        yield


def state_of(optimizer: Any) -> list[Any]:
    held = [optimizer.state[p] for g in optimizer.param_groups for p in g["params"]]
    tensors = [s[k] for s in held for k in sorted(s) if isinstance(s[k], flame.Tensor)]
    return [*(p for g in optimizer.param_groups for p in g["params"]), *tensors]


def check_same(make: Callable[[Any], Any], steps: int = 3, **options: Any) -> None:
    together = trained(make, made(**options), steps)
    with one_by_one():
        apart = trained(make, made(**options), steps)
    found, wanted = state_of(together), state_of(apart)
    assert len(found) == len(wanted) > 0
    assert bits(found) == bits(wanted)
    assert [t.storage.version for t in found] == [t.storage.version for t in wanted]
