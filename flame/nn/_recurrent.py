"""Recurrent layers RNN, LSTM and GRU over whole sequences, with PyTorch's parameter layout.

Layer k has `weight_ih_lk` (gates, input), `weight_hh_lk` (gates, hidden), `bias_ih_lk`,
`bias_hh_lk` (gates,) and, with
a projection, `weight_hr_lk` (proj, hidden); names of the backward direction end in `_reverse`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import flame
import flame.nn.functional as F
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, ShapeError, UnsupportedError
from flame.nn import init
from flame.nn._arguments import Device, wrong_input
from flame.nn._pieces import time_steps
from flame.nn._recurrent_steps import GATES, State, StepWeights, combined_bias, step_of
from flame.nn.module import Module
from flame.nn.parameter import Parameter
from flame.ops.autocast import autocasts
from flame.tensor import Tensor

__all__ = ["GRU", "LSTM", "RNN", "RNNBase"]


class RNNBase(Module):
    """What the recurrent layers share.

    input (L, N, input_size), or (N, L, input_size) with `batch_first`, or (L, input_size)
    without a batch
    -> output (L, N, directions * hidden) laid out as the input, and the last states (layers *
    directions, N, hidden).
    """

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: DType | None = None,
    ) -> None:
        super().__init__()
        self.mode = mode
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self._check()
        self._suffixes = [
            f"_l{layer}{direction}"
            for layer in range(num_layers)
            for direction in (("", "_reverse") if bidirectional else ("",))
        ]
        gates = GATES[mode] * hidden_size
        for suffix in self._suffixes:
            inputs = input_size if suffix.startswith("_l0") else self._directions * self._output
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (gates, inputs),
                "weight_hh": (gates, self._output),
            }
            if bias:
                shapes |= {"bias_ih": (gates,), "bias_hh": (gates,)}
            if proj_size > 0:
                shapes |= {"weight_hr": (proj_size, hidden_size)}
            for name, shape in shapes.items():
                values = flame.empty(shape, device=device, dtype=dtype)
                self.register_parameter(name + suffix, Parameter(values))
        self.reset_parameters()

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _output(self) -> int:
        """The size of one direction's output, and of its state h."""
        return self.proj_size if self.proj_size > 0 else self.hidden_size

    def _check(self) -> None:
        name = self._get_name()
        if self.input_size <= 0 or self.hidden_size <= 0 or self.num_layers <= 0:
            raise ArgumentError(
                f"{name}: input_size, hidden_size and num_layers must be positive, got "
                f"{self.input_size}, {self.hidden_size} and {self.num_layers}"
            )
        if not 0.0 <= self.dropout <= 1.0:
            raise ArgumentError(f"{name}: dropout must lie in [0, 1], got {self.dropout}")
        if self.dropout > 0.0 and self.num_layers == 1:
            warnings.warn(
                f"{name}: dropout={self.dropout} acts between layers, and there is only one",
                stacklevel=4,
            )
        if self.proj_size < 0 or self.proj_size >= self.hidden_size:
            raise ArgumentError(
                f"{name}: proj_size={self.proj_size} must be 0 or less than "
                f"hidden_size={self.hidden_size}"
            )
        if self.proj_size > 0 and self.mode != "LSTM":
            raise ArgumentError(f"{name}: only an LSTM can have a proj_size, got {self.proj_size}")

    def reset_parameters(self) -> None:
        """Draw new values for all parameters: uniform within ±1/sqrt(hidden_size)."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            init.uniform_(parameter, -bound, bound)

    def flatten_parameters(self) -> None:
        """Does nothing: parameters need no common memory here. Present for code written for
        PyTorch.
        """

    @property
    def all_weights(self) -> list[list[Parameter]]:
        """The parameters of each layer and direction."""
        return [
            [p for name, p in self._parameters.items() if name.endswith(suffix) and p is not None]
            for suffix in self._suffixes
        ]

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """Run over the sequence from the state `hx` (zeros if None); returns the output and
        the last state.

        Raises:
            ShapeError: the input or a state has the wrong shape.
            UnsupportedError: the input is no plain tensor (packed sequences do not exist here).
        """
        if not isinstance(input, Tensor):
            raise UnsupportedError(
                f"{self._get_name()}: takes a tensor, got {type(input).__name__}; packed sequences "
                "do not exist "
                "here: pad the sequences and mask the loss"
            )
        if input.ndim not in (2, 3) or input.shape[-1] != self.input_size:
            batched_shape = "(N, L, {0})" if self.batch_first else "(L, N, {0})"
            raise wrong_input(
                self,
                f"{batched_shape} or (L, {{0}})".format(self.input_size),
                input.shape,
                f"input_size is {self.input_size}",
            )
        batched = input.ndim == 3
        if not batched:
            input = input.unsqueeze(1)
        elif self.batch_first:
            input = input.transpose(0, 1)
        states = self._states(hx, input, batched=batched)
        output, last = self._run(input, states)
        if not batched:
            output, last = output.squeeze(1), tuple(state.squeeze(1) for state in last)
        elif self.batch_first:
            output = output.transpose(0, 1)
        return output, last if self.mode == "LSTM" else last[0]

    def _states(self, hx: Any, input: Tensor, *, batched: bool) -> State:
        """The first states, each (layers * directions, N, size)."""
        layers, batch = len(self._suffixes), input.shape[1]
        sizes = [self._output, self.hidden_size] if self.mode == "LSTM" else [self._output]
        if hx is None:
            return tuple(
                flame.zeros((layers, batch, size), dtype=input.dtype, device=input.device)
                for size in sizes
            )
        given = tuple(hx) if self.mode == "LSTM" else (hx,)
        expected = [(layers, batch, size) if batched else (layers, size) for size in sizes]
        if [tuple(state.shape) for state in given] != expected:
            raise ShapeError(
                f"{self._get_name()}({self.extra_repr()}): expected first states of shapes "
                f"{expected}, "
                f"got {[tuple(state.shape) for state in given]}"
            )
        return given if batched else tuple(state.unsqueeze(1) for state in given)

    def _run(self, input: Tensor, states: State) -> tuple[Tensor, State]:
        """All layers over (L, N, input_size)."""
        last: list[State] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0.0 and self.training:
                input = F.dropout(input, self.dropout)
            outputs = []
            for direction in range(self._directions):
                index = layer * self._directions + direction
                first = tuple(state[index] for state in states)
                output, final = self._run_direction(input, first, index, reverse=direction == 1)
                outputs.append(output)
                last.append(final)
            input = outputs[0] if len(outputs) == 1 else flame.cat(outputs, dim=-1)
        return input, tuple(flame.stack(list(parts)) for parts in zip(*last, strict=True))

    def _run_direction(
        self, input: Tensor, state: State, index: int, *, reverse: bool
    ) -> tuple[Tensor, State]:
        """One layer in one direction: (L, N, inputs) -> (L, N, output)."""
        suffix = self._suffixes[index]
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        weights = [self._parameters.get(name + suffix) for name in names]
        return _run_sequence(self.mode, input, state, *weights, reverse=reverse)

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        if self.proj_size != 0:
            parts.append(f"proj_size={self.proj_size}")
        if self.num_layers != 1:
            parts.append(f"num_layers={self.num_layers}")
        if self.bias is not True:
            parts.append(f"bias={self.bias}")
        if self.batch_first is not False:
            parts.append(f"batch_first={self.batch_first}")
        if self.dropout != 0:
            parts.append(f"dropout={self.dropout}")
        if self.bidirectional is not False:
            parts.append(f"bidirectional={self.bidirectional}")
        return ", ".join(parts)


@autocasts("lower")
def _run_sequence(
    mode: str, input: Tensor, state: State, weight_ih: Any, weight_hh: Any, bias_ih: Tensor | None,
    bias_hh: Tensor | None, weight_hr: Tensor | None, *, reverse: bool,
) -> tuple[Tensor, State]:  # fmt: skip
    """All steps: (L, N, inputs) -> (L, N, output), and the state after the last."""
    weights = StepWeights(weight_hh, bias_hh, weight_hr)
    projected = F.linear(input, weight_ih, combined_bias(mode, bias_ih, bias_hh))
    step = step_of(mode)
    outputs: list[Tensor] = []
    from_inputs = time_steps(projected)
    for from_input in reversed(from_inputs) if reverse else from_inputs:
        state = step(from_input, state, weights)
        outputs.append(state[0])
    if reverse:
        outputs.reverse()
    if not outputs:
        shape = (0, *state[0].shape)
        return flame.empty(shape, dtype=input.dtype, device=input.device), state
    return flame.stack(outputs), state


class RNN(RNNBase):
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu of it.

    Source: Elman, "Finding Structure in Time", 1990.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: DType | None = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ArgumentError(f"RNN: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.nonlinearity = nonlinearity


class LSTM(RNNBase):
    """i, f, o = sigmoid, g = tanh of the gates (in the order i, f, g, o); c' = f c + i g; h' =
    o tanh(c').

    States are pairs (h, c). Source: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997;
    forget gates by Gers,
    Schmidhuber and Cummins, 2000; projections by Sak, Senior and Beaufays, 2014.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: DType | None = None,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
        )


class GRU(RNNBase):
    """r, z = sigmoid, n = tanh(W_in x + b_in + r (W_hn h + b_hn)) (in the order r, z, n); h' =
    (1 - z) n + z h.

    Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: DType | None = None,
    ) -> None:
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
