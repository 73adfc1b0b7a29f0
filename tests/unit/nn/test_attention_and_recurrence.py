"""Attention, transformer and recurrent layers against PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
from flame import nn
from flame.core.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


@DTYPES
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_self_attention(
    batch_first: bool, need_weights: bool, dtype: str, same_as_torch: Any, random: Any
) -> None:
    x = random.standard_normal((3, 5, 8))
    same_as_torch(
        lambda nn: self_attention(nn, batch_first=batch_first, need_weights=need_weights),
        [x],
        dtype,
        text=False,
    )


def self_attention(library: Any, **options: Any) -> Any:
    """A module that attends to its own input, so that gradients of the three uses add up."""
    need_weights = options.pop("need_weights")

    class Layer(library.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.attention = library.MultiheadAttention(8, 2, **options)

        def forward(self, x: Any) -> Any:
            return self.attention(x, x, x, need_weights=need_weights)

    return Layer()


@DTYPES
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 6, "vdim": 4},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"batch_first": True},
    ],
)
def test_cross_attention(options: Any, dtype: str, same_as_torch: Any, random: Any) -> None:
    query = random.standard_normal((3, 3, 8))
    key = random.standard_normal((5, 3, options.get("kdim", 8)))
    value = random.standard_normal((5, 3, options.get("vdim", 8)))
    if options.get("batch_first"):
        key, value = key.swapaxes(0, 1), value.swapaxes(0, 1)
    same_as_torch(lambda nn: nn.MultiheadAttention(8, 2, **options), [query, key, value], dtype)
    same_as_torch(
        lambda nn: nn.MultiheadAttention(8, 2, **options),
        [query, key, value],
        dtype,
        average_attn_weights=False,
    )


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("extra", [False, True])
def test_attention_masks(need_weights: bool, extra: bool, same_as_torch: Any, random: Any) -> None:
    query, key = random.standard_normal((4, 2, 8)), random.standard_normal((5, 2, 8))
    boolean = np.triu(np.ones((4, 5), dtype=bool), 1)
    padding = np.array([[False, False, True, False, True], [False, False, False, True, True]])
    floating = np.where(boolean, -np.inf, 0.3)
    options = {"add_bias_kv": extra, "add_zero_attn": extra}
    for masks in (
        {"attn_mask": boolean},
        {"attn_mask": boolean, "key_padding_mask": padding},
        {"key_padding_mask": padding},
        {"attn_mask": np.tile(boolean, (4, 1, 1))},
    ):
        same_as_torch(
            lambda nn: nn.MultiheadAttention(8, 2, **options),
            [query, key, key],
            "float64",
            need_weights=need_weights,
            **masks,
        )
    if not extra:
        torch = pytest.importorskip("torch")
        theirs = torch.nn.MultiheadAttention(8, 2).double()
        ours = nn.MultiheadAttention(8, 2).double()
        ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
        expected, _ = theirs(
            *(torch.from_numpy(x) for x in (query, key, key)),
            attn_mask=torch.from_numpy(floating),
            need_weights=need_weights,
        )
        found, _ = ours(
            *(flame.from_numpy(x) for x in (query, key, key)),
            attn_mask=flame.from_numpy(floating),
            need_weights=need_weights,
        )
        np.testing.assert_allclose(found.detach().numpy(), expected.detach().numpy(), 1e-10, 1e-12)


def test_attention_without_a_batch(same_as_torch: Any, random: Any) -> None:
    query, key = random.standard_normal((4, 8)), random.standard_normal((5, 8))
    same_as_torch(lambda nn: nn.MultiheadAttention(8, 2), [query, key, key], "float64")


def test_attention_refuses() -> None:
    attention = nn.MultiheadAttention(8, 2)
    x = flame.zeros(4, 3, 8)
    with pytest.raises(ArgumentError, match="embed_dim=8"):
        nn.MultiheadAttention(8, 3)
    with pytest.raises(ArgumentError, match="attn_mask"):
        attention(x, x, x, is_causal=True)
    with pytest.raises(ShapeError, match=r"MultiheadAttention.*\(4, 3, 7\)"):
        attention(x, x[..., :7], x)
    with pytest.raises(DTypeError, match="boolean or floating"):
        attention(x, x, x, attn_mask=flame.zeros(4, 4, dtype=flame.int64))
    with pytest.raises(ShapeError, match=r"attn_mask must be \(4, 4\)"):
        attention(x, x, x, attn_mask=flame.zeros(3, 3))
    with pytest.raises(ShapeError, match=r"key_padding_mask must be \(3, 4\)"):
        attention(x, x, x, key_padding_mask=flame.zeros(4, 3))


@DTYPES
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoder(
    norm_first: bool, activation: str, dtype: str, same_as_torch: Any, random: Any
) -> None:
    def build(library: Any) -> Any:
        layer = library.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, activation=activation, norm_first=norm_first, batch_first=True
        )
        return library.TransformerEncoder(
            layer, 2, norm=library.LayerNorm(8), enable_nested_tensor=False
        )

    x = random.standard_normal((3, 5, 8))
    same_as_torch(build, [x], dtype)
    mask = np.triu(np.ones((5, 5), dtype=bool), 1)
    same_as_torch(build, [x], dtype, mask=mask, is_causal=True)


RECURRENT = [
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu", "bias": False}),
    ("RNN", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("LSTM", {"proj_size": 3, "num_layers": 2}),
    ("LSTM", {"bias": False}),
    ("GRU", {}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("GRU", {"bias": False, "batch_first": True}),
]


@DTYPES
@pytest.mark.parametrize(("name", "options"), RECURRENT)
def test_recurrent(name: str, options: Any, dtype: str, same_as_torch: Any, random: Any) -> None:
    def build(library: Any) -> Any:
        return getattr(library, name)(4, 5, **options)

    x = random.standard_normal((3, 6, 4))
    same_as_torch(build, [x], dtype)
    layers = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    batch = 3 if options.get("batch_first") else 6
    hidden = random.standard_normal((layers, batch, options.get("proj_size", 5)))
    state = (hidden, random.standard_normal((layers, batch, 5))) if name == "LSTM" else hidden
    same_as_torch(build, [x, state], dtype)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_recurrent_without_a_batch(name: str, same_as_torch: Any, random: Any) -> None:
    x, hidden = random.standard_normal((6, 4)), random.standard_normal((1, 5))
    state = (hidden, hidden + 1) if name == "LSTM" else hidden
    same_as_torch(lambda nn: getattr(nn, name)(4, 5), [x], "float64")
    same_as_torch(lambda nn: getattr(nn, name)(4, 5), [x, state], "float64")


@DTYPES
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_cells(
    name: str, bias: bool, batch: Any, dtype: str, same_as_torch: Any, random: Any
) -> None:
    def build(library: Any) -> Any:
        return getattr(library, name)(4, 5, bias)

    x, hidden = random.standard_normal((*batch, 4)), random.standard_normal((*batch, 5))
    state = (hidden, hidden + 1) if name == "LSTMCell" else hidden
    same_as_torch(build, [x], dtype)
    same_as_torch(build, [x, state], dtype)


def test_recurrent_dropout_between_layers_only() -> None:
    layer = nn.LSTM(4, 5, num_layers=2, dropout=1.0)
    x = flame.randn(3, 2, 4)
    # With everything dropped, the second layer sees zeros: every sample gives the same.
    output, _ = layer(x)
    np.testing.assert_array_equal(output[:, 0].detach().numpy(), output[:, 1].detach().numpy())
    output, _ = layer.eval()(x)
    assert not np.allclose(output[:, 0].detach().numpy(), output[:, 1].detach().numpy())


def test_recurrent_refuses() -> None:
    layer = nn.LSTM(4, 5)
    with pytest.raises(ShapeError, match=r"LSTM\(4, 5\).*\(3, 2, 6\)"):
        layer(flame.zeros(3, 2, 6))
    with pytest.raises(ShapeError, match=r"\(1, 2, 5\)"):
        layer(flame.zeros(3, 2, 4), (flame.zeros(1, 2, 4), flame.zeros(1, 2, 5)))
    with pytest.raises(UnsupportedError, match="packed"):
        layer(object())
    with pytest.warns(UserWarning, match="dropout=0.5"):
        nn.GRU(4, 5, dropout=0.5)
    with pytest.raises(ArgumentError, match="proj_size"):
        nn.LSTM(4, 5, proj_size=5)
    with pytest.raises(ShapeError, match=r"GRUCell\(4, 5\)"):
        nn.GRUCell(4, 5)(flame.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"LSTMCell\(4, 5\)"):
        nn.LSTMCell(4, 5)(flame.zeros(2, 4), (flame.zeros(2, 5), flame.zeros(3, 5)))


def test_a_long_sequence_costs_linear_time() -> None:
    """Backward hands the gradients of all steps over at once, not as a full-size tensor each."""
    layer = nn.RNN(3, 4)
    x = flame.randn(2000, 1, 3, requires_grad=True)
    layer(x)[0].sum().backward()
    assert x.grad.shape == (2000, 1, 3)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "MultiheadAttention"])
def test_gradients_of_gradients(name: str, random: Any) -> None:
    """A gradient penalty: the pieces of gates and projections can be differentiated twice."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(4, 2).double()
    ours = getattr(nn, name)(4, 2).double()
    ours.load_state_dict({key: value.numpy() for key, value in theirs.state_dict().items()})
    x = random.standard_normal((3, 2, 4))
    found = []
    for lib, layer in ((flame, ours), (torch, theirs)):
        given = lib.from_numpy(x).requires_grad_()
        output = layer(given, given, given)[0] if "Attention" in name else layer(given)[0]
        (slope,) = lib.autograd.grad((output**2).sum(), [given], create_graph=True)
        (slope**2).sum().backward()
        found.append([p.grad.numpy() for p in layer.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, 1e-8, 1e-10)
