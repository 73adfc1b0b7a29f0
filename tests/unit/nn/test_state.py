"""state_dict and load_state_dict."""

from __future__ import annotations

import numpy as np
import pytest

import flame
from flame import nn
from flame.core.errors import ArgumentError, StateError


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


KEYS = [
    "0.weight",
    "0.bias",
    "1.weight",
    "1.bias",
    "1.running_mean",
    "1.running_var",
    "1.num_batches_tracked",
]


def test_state_is_named_detached_and_shared() -> None:
    model = net()
    state = model.state_dict()
    assert list(state) == KEYS
    assert not any(value.requires_grad for value in state.values())
    with flame.no_grad():
        model[0].weight.fill_(7.0)
    assert float(state["0.weight"][0, 0]) == 7.0
    assert model.state_dict(keep_vars=True)["0.weight"] is model[0].weight
    assert next(iter(model.state_dict(prefix="net."))) == "net.0.weight"
    destination: dict[str, object] = {"other": 1}
    assert model.state_dict(destination=destination) is destination
    assert len(destination) == len(KEYS) + 1


def test_non_persistent_buffers_and_none_are_left_out() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.register_buffer("scratch", flame.zeros(1), persistent=False)
    model.register_buffer("nothing", None)
    assert list(model.state_dict()) == ["weight"]


def test_round_trip_keeps_parameters() -> None:
    source, target = net(), net()
    weight = target[0].weight
    result = target.load_state_dict(source.state_dict())
    assert str(result) == "<All keys matched successfully>"
    assert target[0].weight is weight
    for name, value in source.state_dict().items():
        np.testing.assert_array_equal(target.state_dict()[name].numpy(), value.numpy())
    with flame.no_grad():
        source[0].weight.zero_()
    assert float(target[0].weight.detach().abs().sum()) > 0


def test_arrays_and_other_dtypes_are_converted() -> None:
    target = net()
    state = {name: value.numpy().astype(np.float64) for name, value in net().state_dict().items()}
    state["1.num_batches_tracked"] = np.array(5)
    state["0.bias"].flags.writeable = False
    target.load_state_dict(state)
    assert target[0].weight.dtype is flame.float32
    assert int(target[1].num_batches_tracked) == 5


def test_all_problems_are_listed_and_nothing_is_loaded() -> None:
    target = net()
    before = target[0].weight.detach().clone().numpy()
    state = net().state_dict()
    del state["0.bias"], state["1.weight"]
    state["extra"] = state["more"] = flame.zeros(1)
    state["1.bias"] = flame.zeros(5)
    state["1.running_mean"] = flame.zeros(1, 4)
    with pytest.raises(StateError) as caught:
        target.load_state_dict(state)
    message = str(caught.value)
    for part in (
        "Sequential",
        "missing (2): 0.bias, 1.weight",
        "unexpected (2): extra, more",
        "shape mismatch (2)",
        "1.bias: the module has (4,), the state has (5,)",
        "1.running_mean: the module has (4,), the state has (1, 4)",
    ):
        assert part in message
    np.testing.assert_array_equal(target[0].weight.detach().numpy(), before)
    with pytest.raises(StateError, match="shape mismatch"):
        target.load_state_dict(state, strict=False)


def test_not_strict() -> None:
    target = net()
    state = {"0.weight": flame.ones(4, 3), "extra": flame.zeros(1)}
    missing, unexpected = target.load_state_dict(state, strict=False)
    assert missing == KEYS[1:]
    assert unexpected == ["extra"]
    assert float(target[0].weight.detach()[0, 0]) == 1.0


def test_assign_takes_the_given_tensors() -> None:
    target = net()
    target[0].weight.requires_grad_(False)
    state = {
        name: value.to(flame.float64) if value.is_floating_point() else value
        for name, value in net().state_dict().items()
    }
    target.load_state_dict(state, assign=True)
    assert target[0].weight.dtype is flame.float64
    assert isinstance(target[0].weight, nn.Parameter)
    assert not target[0].weight.requires_grad
    assert target[0].bias.requires_grad
    assert target[1].running_mean is state["1.running_mean"]


def test_shared_parameters_have_all_their_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    assert list(model.state_dict()) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert len(list(model.parameters())) == 3
    model.load_state_dict({name: flame.ones(v.shape) for name, v in model.state_dict().items()})
    assert model["a"].weight is model["b"].weight


def test_bad_states() -> None:
    with pytest.raises(ArgumentError, match="mapping"):
        net().load_state_dict([1, 2])
    with pytest.raises(ArgumentError, match=r"'0\.weight' is a list"):
        net().load_state_dict({"0.weight": [1.0]}, strict=False)


def test_layouts_of_pytorch() -> None:
    """Keys, their order and shapes for every layer with parameters."""
    torch = pytest.importorskip("torch")

    def layouts(library: object) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
        n = library
        layers = {
            "linear": n.Linear(3, 4),
            "bilinear": n.Bilinear(3, 4, 5),
            "conv": n.Conv2d(4, 6, (3, 2), groups=2),
            "conv transpose": n.ConvTranspose2d(4, 6, (3, 2), groups=2),
            "batch norm": n.BatchNorm2d(3),
            "instance norm": n.InstanceNorm2d(3, affine=True, track_running_stats=True),
            "layer norm": n.LayerNorm((2, 3)),
            "rms norm": n.RMSNorm(3),
            "group norm": n.GroupNorm(2, 4),
            "embedding": n.Embedding(5, 3),
            "prelu": n.PReLU(3),
            "attention": n.MultiheadAttention(8, 2, add_bias_kv=True),
            "attention sizes": n.MultiheadAttention(8, 2, kdim=3, vdim=5),
            "encoder layer": n.TransformerEncoderLayer(8, 2, 16),
            "lstm": n.LSTM(3, 5, 2, bidirectional=True, proj_size=2),
            "gru": n.GRU(3, 5, 2, bias=False),
            "lstm cell": n.LSTMCell(3, 5),
            "cross entropy": n.CrossEntropyLoss(),
            "parameters": n.ParameterList([n.Parameter(n.Linear(2, 3).weight)]),
        }
        return {
            name: [(key, tuple(v.shape)) for key, v in layer.state_dict().items()]
            for name, layer in layers.items()
        }

    assert layouts(nn) == layouts(torch.nn)
