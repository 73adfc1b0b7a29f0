"""Sequential, ModuleList, ModuleDict, ParameterList, ParameterDict."""

from __future__ import annotations

import numpy as np
import pytest

import flame
from flame import nn
from flame.core.errors import ArgumentError, IndexRangeError


def test_sequential() -> None:
    first, second = nn.Linear(2, 3), nn.ReLU()
    net = nn.Sequential(first, second)
    assert len(net) == 2
    assert net[-1] is second
    assert list(net) == [first, second]
    assert isinstance(net[:1], nn.Sequential)
    assert net[:1][0] is first
    x = flame.randn(4, 2)
    np.testing.assert_array_equal(net(x).detach().numpy(), second(first(x)).detach().numpy())
    net.append(nn.Linear(3, 1)).insert(0, nn.Identity())
    assert [type(m).__name__ for m in net] == ["Identity", "Linear", "ReLU", "Linear"]
    del net[0]
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    net[1] = nn.Tanh()
    assert isinstance(net.pop(1), nn.Tanh)
    assert [name for name, _ in net.named_children()] == ["0", "1"]
    net.extend([nn.ReLU()])
    assert len(net) == 3
    with pytest.raises(IndexRangeError, match="out of range for 3"):
        net[3]
    with pytest.raises(ArgumentError, match="must be a Module"):
        nn.Sequential(3)


def test_sequential_with_names() -> None:
    net = nn.Sequential({"in": nn.Linear(2, 3), "out": nn.Linear(3, 1)})
    assert list(net.state_dict()) == ["in.weight", "in.bias", "out.weight", "out.bias"]
    assert net(flame.ones(1, 2)).shape == (1, 1)
    del net[0]
    assert list(net._modules) == ["out"]
    assert nn.Sequential()(3) == 3


def test_module_list() -> None:
    layers = nn.ModuleList([nn.Linear(1, 1) for _ in range(3)])
    layers += [nn.ReLU()]
    assert len(layers) == 4
    assert len(layers[1:3]) == 2
    assert len(layers + nn.ModuleList([nn.ReLU()])) == 5
    assert layers.pop(0) is not None
    assert [name for name, _ in layers.named_children()] == ["0", "1", "2"]
    layers.insert(1, nn.Tanh())
    assert isinstance(layers[1], nn.Tanh)
    del layers[1:]
    assert len(layers) == 1
    assert repr(nn.ModuleList()) == "ModuleList()"
    with pytest.raises(IndexRangeError):
        layers.insert(5, nn.ReLU())


def test_module_dict() -> None:
    layers = nn.ModuleDict({"a": nn.Linear(1, 2)})
    layers["b"] = nn.ReLU()
    layers.update([("c", nn.Tanh())])
    assert list(layers) == ["a", "b", "c"]
    assert "b" in layers
    assert list(layers.keys()) == [name for name, _ in layers.items()]
    assert isinstance(layers.pop("c"), nn.Tanh)
    del layers["b"]
    assert len(layers) == 1
    assert list(layers.state_dict()) == ["a.weight", "a.bias"]
    layers.update(nn.ModuleDict({"d": nn.ReLU()}))
    assert len(list(layers.values())) == 2
    layers.clear()
    assert len(layers) == 0


def test_parameter_list() -> None:
    values = nn.ParameterList([flame.ones(2), nn.Parameter(flame.zeros(3))])
    values.append(flame.ones(1)).extend([flame.ones(4)])
    assert len(values) == 4
    assert all(isinstance(value, nn.Parameter) for value in values)
    assert list(values.state_dict()) == ["0", "1", "2", "3"]
    assert values[-1].shape == (4,)
    assert len(values[1:3]) == 2
    values[0] = flame.zeros(7)
    assert values[0].shape == (7,)
    assert "size 7" in repr(values)
    with pytest.raises(IndexRangeError):
        values[4]
    with pytest.raises(ArgumentError, match="list"):
        values.append([1.0])


def test_parameter_dict() -> None:
    values = nn.ParameterDict({"a": flame.ones(2)})
    values["b"] = nn.Parameter(flame.zeros(3))
    values.update({"c": flame.ones(1)})
    assert list(values) == ["a", "b", "c"]
    assert list(values.state_dict()) == ["a", "b", "c"]
    assert "a" in values
    assert [value.shape for value in values.values()] == [(2,), (3,), (1,)]
    del values["a"]
    assert values.pop("b").shape == (3,)
    assert "size 1" in repr(values)
    assert [name for name, _ in values.items()] == list(values.keys()) == ["c"]
    values.clear()
    assert len(values) == 0
