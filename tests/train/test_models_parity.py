"""Whole models against PyTorch: its weights loaded by name, five steps of training, the same
losses.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flame
import flame.nn
import flame.optim

torch = pytest.importorskip("torch")

STEPS = 5
# In float64 the computation alone decides; in float32 rounding, too, by a few steps' worth.
RELATIVE = {"float32": 2e-4, "float64": 1e-10}


def _load_zoo() -> Any:
    path = Path(__file__).parents[1] / "models" / "zoo.py"
    specification = importlib.util.spec_from_file_location("model_zoo", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["model_zoo"] = module
    specification.loader.exec_module(module)
    return module.ZOO


ZOO = _load_zoo()
OPTIMIZERS = {
    "sgd": lambda lib, parameters, entry: lib.optim.SGD(
        parameters, lr=entry.sgd_rate, momentum=0.9
    ),
    "adamw": lambda lib, parameters, entry: lib.optim.AdamW(
        parameters, lr=entry.adamw_rate, weight_decay=0.01
    ),
}


def pair(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Both libraries' model, with PyTorch's weights."""
    torch.manual_seed(0)
    theirs = ZOO[name].build(torch).to(getattr(torch, dtype))
    ours = ZOO[name].build(flame).to(getattr(flame, dtype))
    ours.load_state_dict({key: value.numpy() for key, value in theirs.state_dict().items()})
    return ours, theirs


def tensors(lib: Any, arrays: tuple[np.ndarray, ...]) -> list[Any]:
    return [lib.from_numpy(np.ascontiguousarray(array)) for array in arrays]


def train(
    lib: Any, entry: Any, model: Any, arrays: tuple[np.ndarray, ...], kind: str
) -> list[float]:
    *inputs, target = tensors(lib, arrays)
    optimizer = OPTIMIZERS[kind](lib, model.parameters(), entry)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = entry.loss(lib, model(*inputs), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
@pytest.mark.parametrize("name", list(ZOO))
def test_five_steps(name: str, kind: str, dtype: str) -> None:
    ours, theirs = pair(name, dtype)
    arrays = tuple(
        array.astype(dtype) if array.dtype.kind == "f" else array
        for array in ZOO[name].batch(np.random.default_rng(0))
    )
    expected = train(torch, ZOO[name], theirs, arrays, kind)
    found = train(flame, ZOO[name], ours, arrays, kind)
    assert expected[-1] < expected[0]  # the comparison is of models that learn
    np.testing.assert_allclose(found, expected, rtol=RELATIVE[dtype])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", list(ZOO))
def test_forward_and_gradients(name: str, training: bool) -> None:
    ours, theirs = (model.train(training) for model in pair(name))
    assert repr(ours) == repr(theirs)
    arrays = ZOO[name].batch(np.random.default_rng(1))
    outputs = []
    for lib, model in ((flame, ours), (torch, theirs)):
        *inputs, target = tensors(lib, arrays)
        output = model(*inputs)
        ZOO[name].loss(lib, output, target).backward()
        outputs.append(output.detach().numpy())
    np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-4)
    wanted = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        expected = wanted[key].grad.numpy()
        # As a whole: where a ReLU's input is zero but for rounding, single elements may differ.
        distance = np.linalg.norm(parameter.grad.numpy() - expected)
        assert distance <= 5e-3 * np.linalg.norm(expected) + 1e-6, key


def test_resnet_running_statistics_and_evaluation_after_training() -> None:
    ours, theirs = pair("resnet18")
    arrays = ZOO["resnet18"].batch(np.random.default_rng(2))
    outputs = []
    for lib, model in ((flame, ours), (torch, theirs)):
        (images, _) = tensors(lib, arrays)
        with lib.no_grad():
            for _ in range(3):
                model.train()(images)
            outputs.append(model.eval()(images).numpy())
    np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-3)
    for (key, mine), (_, expected) in zip(
        ours.named_buffers(), theirs.named_buffers(), strict=True
    ):
        np.testing.assert_allclose(mine.numpy(), expected.numpy(), 1e-3, 1e-4, err_msg=key)
