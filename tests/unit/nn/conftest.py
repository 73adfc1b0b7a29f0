"""Layers against PyTorch: one builder makes the layer in both libraries, with the same weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import flame
import flame.nn

TOLERANCES = {"float32": (2e-4, 2e-5), "float64": (1e-9, 1e-10)}  # relative, absolute


def leaves(value: Any) -> list[Any]:
    """The tensors in nested tuples, in order."""
    if value is None:
        return []
    if isinstance(value, tuple | list):
        return [leaf for part in value for leaf in leaves(part)]
    return [value]


def load_weights(ours: Any, theirs: Any) -> None:
    """PyTorch's state into ours, by name, every name."""
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    ours.load_state_dict(state)


def arguments(lib: Any, values: Sequence[Any], dtype: str) -> list[Any]:
    """Arrays as tensors of `lib`: floating ones in `dtype` and requiring gradients."""

    def convert(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(convert(part) for part in value)
        if not isinstance(value, np.ndarray):
            return value
        if value.dtype.kind != "f":
            return lib.from_numpy(value.copy())
        return lib.from_numpy(value.astype(dtype)).requires_grad_()

    return [convert(value) for value in values]


def run(lib: Any, layer: Any, inputs: list[Any], kwargs: dict[str, Any]) -> list[np.ndarray]:
    """Outputs, then the gradients of inputs and parameters, of a fixed weighted sum of the
    outputs.
    """
    outputs = leaves(layer(*inputs, **kwargs))
    total = None
    for output in outputs:
        if not output.is_floating_point() or not output.requires_grad:
            continue
        weights = np.cos(np.arange(output.numel())).reshape(tuple(output.shape))
        weights = lib.from_numpy(weights).to(output.dtype)
        part = (output * weights).sum()
        total = part if total is None else total + part
    if total is not None:
        total.backward()
    results = [output.detach().numpy() for output in outputs]
    for leaf in [*leaves(inputs), *leaves(list(kwargs.values())), *layer.parameters()]:
        gradient = getattr(leaf, "grad", None)
        if gradient is not None:
            results.append(gradient.numpy())
    return results


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def same_as_torch() -> Callable[..., None]:
    """check(build, inputs, dtype, **kwargs): both libraries' layers agree in all that can be
    seen.
    """
    torch = pytest.importorskip("torch")

    def check(
        build: Callable[[Any], Any],
        inputs: Sequence[Any],
        dtype: str = "float32",
        *,
        training: bool = True,
        text: bool = True,
        **kwargs: Any,
    ) -> None:
        torch.manual_seed(0)
        theirs = build(torch.nn).to(getattr(torch, dtype)).train(training)
        ours = build(flame.nn).to(getattr(flame, dtype)).train(training)
        load_weights(ours, theirs)
        if text:
            # PyTorch marks one linear layer for its quantization, which does not exist here.
            expected = repr(theirs).replace("NonDynamicallyQuantizableLinear", "Linear")
            assert repr(ours) == expected
        results = []
        for lib, layer in ((flame, ours), (torch, theirs)):
            given = arguments(lib, inputs, dtype)
            named = dict(zip(kwargs, arguments(lib, list(kwargs.values()), dtype), strict=True))
            with warnings.catch_warnings():
                if lib is torch:  # its remarks on slow paths
                    warnings.simplefilter("ignore")
                results.append(run(lib, layer, given, named))
        mine, expected = results
        assert len(mine) == len(expected)
        relative, absolute = TOLERANCES[dtype]
        for one, other in zip(mine, expected, strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other, relative, absolute)
        for name, value in theirs.state_dict().items():  # running statistics among them
            np.testing.assert_allclose(
                ours.state_dict()[name].numpy(), value.numpy(), relative, absolute
            )

    return check
