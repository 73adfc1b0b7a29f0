"""Module: registration, iteration, modes, conversion, text."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import flame
from flame import nn
from flame.core.errors import (
    ArgumentError,
    DTypeError,
    FlameError,
    ShapeError,
    StateError,
    UnsupportedError,
)


class Net(nn.Module):
    """One of everything: a parameter, both kinds of buffers, children, a shared module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.scale = nn.Parameter(flame.ones(4))
        self.register_buffer("count", flame.zeros((), dtype=flame.int64))
        self.register_buffer("scratch", flame.zeros(2), persistent=False)
        self.register_parameter("absent", None)
        self.again = self.first
        self.tail = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, x: Any) -> Any:
        return self.tail(self.first(x) * self.scale)


def test_names_and_order() -> None:
    net = Net()
    parameters = ["scale", "first.weight", "first.bias", "tail.0.weight", "tail.0.bias"]
    assert [name for name, _ in net.named_parameters()] == parameters
    assert [name for name, _ in net.named_parameters(prefix="net", recurse=False)] == ["net.scale"]
    assert len(list(net.parameters())) == 5
    duplicated = [name for name, _ in net.named_parameters(remove_duplicate=False)]
    assert "again.weight" in duplicated
    assert len(duplicated) == 7
    statistics = ["tail.0.running_mean", "tail.0.running_var", "tail.0.num_batches_tracked"]
    assert [name for name, _ in net.named_buffers()] == ["count", "scratch", *statistics]
    assert len(list(net.buffers(recurse=False))) == 2
    modules = ["", "first", "tail", "tail.0", "tail.1"]
    assert [name for name, _ in net.named_modules()] == modules
    assert [name for name, _ in net.named_children()] == ["first", "tail"]
    assert next(iter(net.modules())) is net
    assert next(iter(net.children())) is net.first


def test_get_by_name() -> None:
    net = Net()
    assert net.get_submodule("tail.0") is net.tail[0]
    assert net.get_submodule("") is net
    assert net.get_parameter("first.weight") is net.first.weight
    assert net.get_buffer("tail.0.running_var") is net.tail[0].running_var
    for get, name in (
        (net.get_submodule, "tail.7"),
        (net.get_parameter, "first.nothing"),
        (net.get_parameter, "absent"),
        (net.get_buffer, "first.weight"),
    ):
        with pytest.raises(AttributeError, match=name.rpartition(".")[2]):
            get(name)


def test_attributes_live_in_one_place() -> None:
    net = Net()
    net.absent = nn.Parameter(flame.ones(1))
    assert "absent" in dict(net.named_parameters())
    net.first = nn.Identity()  # a module takes the place of a module
    net.scale = None
    assert net.scale is None
    assert "scale" not in dict(net.named_parameters())
    net.scratch = flame.ones(3)
    assert net.get_buffer("scratch").shape == (3,)
    del net.scratch
    assert not hasattr(net, "scratch")
    del net.tail
    assert "tail" not in dir(net)
    net.plain = 3
    net.plain = nn.Parameter(flame.ones(2))
    assert "plain" not in net.__dict__
    net.plain = nn.Linear(1, 1)
    assert "plain" not in net._parameters
    with pytest.raises(AttributeError, match="nowhere"):
        net.nowhere  # noqa: B018
    with pytest.raises(AttributeError):
        del net.nowhere


def test_refusals() -> None:
    net = Net()
    with pytest.raises(ArgumentError, match="takes another one or None"):
        net.scale = flame.ones(4)
    with pytest.raises(ArgumentError, match="is a module"):
        net.tail = 3
    with pytest.raises(ArgumentError, match="register_parameter"):
        net.register_parameter("x", flame.ones(1))
    with pytest.raises(ArgumentError, match="register_buffer"):
        net.register_buffer("x", [1])
    with pytest.raises(ArgumentError, match="attribute"):
        net.register_buffer("scale", flame.ones(1))
    with pytest.raises(ArgumentError, match="non-empty"):
        net.add_module("a.b", nn.Identity())
    with pytest.raises(ArgumentError, match="class attribute 'forward'"):
        net.register_parameter("forward", nn.Parameter(flame.ones(1)))
    with pytest.raises(ArgumentError, match="must be a Module"):
        net.add_module("x", 3)

    class NotReady(nn.Module):
        def __init__(self) -> None:
            self.weight = nn.Parameter(flame.ones(1))

    with pytest.raises(StateError, match=r"super\(\).__init__"):
        NotReady()
    with pytest.raises(UnsupportedError, match="no forward"):
        nn.Module()(1)
    with pytest.raises(DTypeError, match=r"flame\.Tensor"):
        nn.Parameter([1.0])


def test_modes_and_gradients() -> None:
    net = Net()
    assert net.training
    assert net.eval() is net
    assert not any(module.training for module in net.modules())
    assert all(module.training for module in net.train().modules())
    with pytest.raises(ArgumentError, match="bool"):
        net.train("yes")
    net.eval()(flame.ones(2, 3)).sum().backward()
    assert net.scale.grad is not None
    net.zero_grad(set_to_none=False)
    assert float(net.scale.grad.abs().sum()) == 0.0
    net.zero_grad()
    assert net.scale.grad is None
    net.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert not net(flame.ones(2, 3)).requires_grad


def test_conversion_keeps_parameters_and_integers() -> None:
    net = Net()
    scale = net.scale
    net.eval()(flame.ones(2, 3)).sum().backward()
    net.double()
    assert net.scale is scale
    assert scale.dtype is flame.float64
    assert scale.grad.dtype is flame.float64
    assert net.first is net.again
    assert net.count.dtype is flame.int64
    assert net.tail[0].running_mean.dtype is flame.float64
    assert net.tail[0].num_batches_tracked.dtype is flame.int64
    for convert, dtype in (
        (lambda: net.half(), flame.float16),
        (lambda: net.bfloat16(), flame.bfloat16),
        (lambda: net.float(), flame.float32),
        (lambda: net.to(flame.float64), flame.float64),
        (lambda: net.to("cpu", flame.float32), flame.float32),
        (lambda: net.to(dtype=flame.float64), flame.float64),
        (lambda: net.to(flame.ones(1)), flame.float32),
    ):
        assert convert() is net
        assert net.first.weight.dtype is dtype
    net.to("cpu")
    net.cpu()
    with pytest.raises(DTypeError, match="floating"):
        net.to(flame.int64)
    with pytest.raises(ArgumentError, match="unknown"):
        net.to(colour="red")


def test_a_memory_format_is_that_of_images_and_their_weights() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    weight = net[0].weight
    before = weight.detach().numpy().copy()
    assert net.to("cpu", flame.float64, memory_format=flame.channels_last) is net
    assert net[0].weight is weight
    assert weight.stride() == (27, 1, 9, 3)
    assert weight.dtype is flame.float64
    np.testing.assert_array_equal(weight.detach().numpy(), before)
    assert net[3].weight.is_contiguous()
    net.to(memory_format=flame.contiguous_format)
    assert weight.is_contiguous()


def test_apply_visits_children_first() -> None:
    seen: list[str] = []
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    assert net.apply(lambda module: seen.append(type(module).__name__)) is net
    assert seen == ["Linear", "ReLU", "Sequential"]


def test_copies_are_independent() -> None:
    net = Net()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert isinstance(twin.first.weight, nn.Parameter)
        assert twin.first is twin.again
        assert twin.first.weight is not net.first.weight
        np.testing.assert_array_equal(
            twin.first.weight.detach().numpy(), net.first.weight.detach().numpy()
        )
        with flame.no_grad():
            twin.first.weight.zero_()
        assert float(net.first.weight.detach().abs().sum()) > 0
        assert [name for name, _ in twin.named_parameters()] == [
            name for name, _ in net.named_parameters()
        ]


def test_parameters() -> None:
    data = flame.ones(2, 3)
    parameter = nn.Parameter(data)
    assert isinstance(parameter, flame.Tensor)
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert not data.requires_grad
    with flame.no_grad():
        parameter.add_(1.0)
    assert float(data[0, 0]) == 2.0  # the memory is shared
    assert not isinstance(parameter * 2, nn.Parameter)
    assert nn.Parameter(parameter * 2).is_leaf
    assert not nn.Parameter(data, requires_grad=False).requires_grad
    assert repr(parameter).startswith("Parameter containing:\ntensor(")


def test_text() -> None:
    class Plain(nn.Module):
        pass

    class Lines(nn.Module):
        def extra_repr(self) -> str:
            return "one\ntwo"

    assert repr(Plain()) == "Plain()"
    assert repr(Lines()) == "Lines(\n  one\n  two\n)"
    net = nn.Sequential(nn.Linear(2, 3), nn.ModuleList([nn.ReLU(), nn.ReLU(), nn.Tanh()]))
    assert repr(net) == (
        "Sequential(\n"
        "  (0): Linear(in_features=2, out_features=3, bias=True)\n"
        "  (1): ModuleList(\n"
        "    (0-1): 2 x ReLU()\n"
        "    (2): Tanh()\n"
        "  )\n"
        ")"
    )


def test_shape_errors_name_module_and_shapes() -> None:
    for layer, shape, parts in (
        (nn.Linear(4, 3), (2, 5), ["Linear(in_features=4", "(..., 4)", "(2, 5)", "(3, 4)"]),
        (nn.Conv2d(3, 8, 3), (2, 4, 6, 6), ["Conv2d(3, 8", "(N, 3, H, W)", "(2, 4, 6, 6)"]),
        (nn.Conv1d(3, 8, 3), (4,), ["Conv1d(3, 8", "(4,)"]),
        (nn.ConvTranspose2d(3, 8, 3), (2, 4, 6, 6), ["ConvTranspose2d(3, 8", "(2, 4, 6, 6)"]),
        (nn.BatchNorm2d(3), (2, 4, 6, 6), ["BatchNorm2d(3", "(N, 3, H, W)", "(2, 4, 6, 6)"]),
        (nn.BatchNorm2d(3), (2, 3), ["BatchNorm2d(3", "(2, 3)"]),
        (nn.InstanceNorm2d(3), (2, 4, 6, 6), ["InstanceNorm2d(3", "(2, 4, 6, 6)"]),
        (nn.LayerNorm((2, 3)), (4, 3), ["LayerNorm((2, 3)", "(..., 2, 3)", "(4, 3)"]),
        (nn.RMSNorm(3), (4, 2), ["RMSNorm((3,)", "(4, 2)"]),
        (nn.GroupNorm(2, 4), (2, 3, 5), ["GroupNorm(2, 4", "(N, 4, ...)", "(2, 3, 5)"]),
        (nn.PReLU(3), (2, 4), ["PReLU(num_parameters=3)", "(2, 4)"]),
        (nn.Unflatten(1, (2, 3)), (2, 5), ["Unflatten", "(2, 5)"]),
    ):
        with pytest.raises(ShapeError) as caught:
            layer(flame.zeros(*shape))
        for part in parts:
            assert part in str(caught.value)


def test_errors_of_ops_are_noted_with_the_innermost_module() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Flatten(3, 4))
    with pytest.raises(FlameError) as caught:
        net[1](flame.zeros(2, 4))
    assert "in Flatten(start_dim=3" in caught.value.__notes__[0]


def test_arguments_out_of_range() -> None:
    for build, part in (
        (lambda: nn.Conv2d(3, 4, 3, groups=2), "divisible by groups"),
        (lambda: nn.Conv2d(4, 4, 3, groups=0), "positive"),
        (lambda: nn.Conv2d(3, 4, 3, padding="full"), "or 'same' or 'valid'"),
        (lambda: nn.ConvTranspose2d(3, 4, 3, padding="same"), "padding must be numbers, got"),
        (lambda: nn.Conv2d(3, 4, 3, stride=2, padding="same"), "stride 1"),
        (lambda: nn.Conv2d(3, 4, 3, padding_mode="mirror"), "padding_mode"),
        (lambda: nn.Conv2d(3, 4, (3, 3, 3)), "kernel_size"),
        (lambda: nn.ConvTranspose2d(3, 4, 3, padding_mode="reflect"), "padding_mode"),
        (lambda: nn.GroupNorm(2, 3), "divisible"),
        (lambda: nn.Dropout(1.5), "p must lie"),
        (lambda: nn.GELU("fast"), "approximate"),
        (lambda: nn.Hardtanh(1.0, -1.0), "greater"),
        (lambda: nn.Softmax(), "dimension"),
        (lambda: nn.MSELoss(reduction="average"), "reduction"),
        (lambda: nn.CrossEntropyLoss(label_smoothing=2.0), "label_smoothing"),
        (lambda: nn.Embedding(3, 2, padding_idx=3), "padding_idx"),
        (lambda: nn.RNN(3, 4, nonlinearity="sin"), "nonlinearity"),
    ):
        with pytest.raises(ArgumentError, match=part):
            build()
    with pytest.raises(UnsupportedError, match="max_norm"):
        nn.Embedding(3, 2, max_norm=1.0)
    with pytest.raises(ShapeError, match="out of reach"):
        nn.ConvTranspose2d(1, 1, 3, 2)(flame.zeros(1, 1, 4, 4), output_size=(20, 20))
