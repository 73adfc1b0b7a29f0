"""The public names are PyTorch's, and so are their arguments: names, order and defaults."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from flame import nn
from flame.nn import functional, init, utils

# Arguments that PyTorch deprecates; what follows them in PyTorch takes its name only here.
DEPRECATED = {"size_average", "reduce", "min_value", "max_value"}
# Arguments of PyTorch's that nothing here could honour.
ABSENT = {"always_call"}
# Helpers of our own in `init`.
OWN = {"default_bias_", "fan_in_and_fan_out"}


def signature(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in DEPRECATED | ABSENT
    }


def compare(ours: Any, theirs: Any, name: str) -> None:
    mine, expected = signature(ours), signature(theirs)
    if not expected or not mine:  # takes anything
        return
    assert list(mine) == list(expected), name
    for argument, default in expected.items():
        if not callable(default):
            assert mine[argument] == default, f"{name}: {argument}"


@pytest.mark.parametrize(
    "name", [n for n in nn.__all__ if inspect.isclass(getattr(nn, n)) and n != "Parameter"]
)
def test_layers(name: str) -> None:
    torch = pytest.importorskip("torch")
    if name in ("RNN", "LSTM", "GRU"):  # PyTorch's take (*args, **kwargs)
        return
    compare(getattr(nn, name).__init__, getattr(torch.nn, name).__init__, name)
    theirs = getattr(torch.nn, name).forward
    if name not in ("Sequential", "Identity", "Module", "RNNBase"):
        mine = list(signature(getattr(nn, name).forward))
        assert mine == [n for n in signature(theirs) if n != "padding_mask"], name


@pytest.mark.parametrize("name", [n for n in init.__all__ if n not in OWN])
def test_init(name: str) -> None:
    torch = pytest.importorskip("torch")
    compare(getattr(init, name), getattr(torch.nn.init, name), name)


@pytest.mark.parametrize("name", utils.__all__)
def test_utils(name: str) -> None:
    torch = pytest.importorskip("torch")
    compare(getattr(utils, name), getattr(torch.nn.utils, name), name)


MODULE_METHODS = [
    n for n in dir(nn.Module) if not n.startswith("_") and n not in ("training", "state_dict")
]


@pytest.mark.parametrize("name", MODULE_METHODS)
def test_module_methods(name: str) -> None:
    torch = pytest.importorskip("torch")
    compare(getattr(nn.Module, name), getattr(torch.nn.Module, name), name)


def test_functional_names_exist_in_pytorch() -> None:
    torch = pytest.importorskip("torch")
    for name in functional.__all__:
        assert hasattr(torch.nn.functional, name), name
