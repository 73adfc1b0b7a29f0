"""Recurrent cells: one time step of RNN, LSTM or GRU, for loops that the user writes.

A cell has `weight_ih` (gates, input_size), `weight_hh` (gates, hidden_size), `bias_ih` and
`bias_hh` (gates,).
"""

from __future__ import annotations

import math
from typing import Any

import flame
import flame.nn.functional as F
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, ShapeError
from flame.nn import init
from flame.nn._arguments import Device, wrong_input
from flame.nn._recurrent_steps import GATES, State, StepWeights, combined_bias, step_of
from flame.nn.module import Module
from flame.nn.parameter import Parameter
from flame.ops.autocast import autocasts
from flame.tensor import Tensor

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]


class _Cell(Module):
    mode = ""
    states = 1
    weight_ih: Parameter
    weight_hh: Parameter
    bias_ih: Parameter | None
    bias_hh: Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: DType | None = None,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias

        def parameter(*shape: int) -> Parameter:
            return Parameter(flame.empty(shape, device=device, dtype=dtype))

        gates = GATES[self.mode] * hidden_size
        self.weight_ih = parameter(gates, input_size)
        self.weight_hh = parameter(gates, hidden_size)
        self.register_parameter("bias_ih", parameter(gates) if bias else None)
        self.register_parameter("bias_hh", parameter(gates) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new values for all parameters: uniform within ±1/sqrt(hidden_size)."""
        bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0.0
        for parameter in self.parameters():
            init.uniform_(parameter, -bound, bound)

    def _step(self, input: Tensor, given: State | None) -> State:
        if input.ndim not in (1, 2) or input.shape[-1] != self.input_size:
            raise wrong_input(
                self,
                f"(N, {self.input_size}) or ({self.input_size},)",
                input.shape,
                f"the weight is {tuple(self.weight_ih.shape)}",
            )
        batched = input.ndim == 2
        if not batched:
            input = input.unsqueeze(0)
            given = None if given is None else tuple(state.unsqueeze(0) for state in given)
        shape = (input.shape[0], self.hidden_size)
        if given is None:
            zeros = flame.zeros(shape, dtype=input.dtype, device=input.device)
            given = (zeros,) * self.states
        if [tuple(state.shape) for state in given] != [shape] * self.states:
            raise ShapeError(
                f"{self._get_name()}({self.extra_repr()}): an input {tuple(input.shape)} needs "
                f"{self.states} "
                f"state(s) of shape {shape}, got {[tuple(state.shape) for state in given]}"
            )
        result = _run_step(
            self.mode, input, given, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        )
        return result if batched else tuple(state.squeeze(0) for state in result)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        return text if self.bias is True else f"{text}, bias={self.bias}"


@autocasts("lower")
def _run_step(
    mode: str, input: Tensor, state: State, weight_ih: Tensor, weight_hh: Tensor,
    bias_ih: Tensor | None, bias_hh: Tensor | None,
) -> State:  # fmt: skip
    """The state after one step."""
    from_input = F.linear(input, weight_ih, combined_bias(mode, bias_ih, bias_hh))
    return step_of(mode)(from_input, state, StepWeights(weight_hh, bias_hh))


class RNNCell(_Cell):
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu of it: (N, input_size), (N,
    hidden_size) -> (N, hidden_size).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: DType | None = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ArgumentError(
                f"RNNCell: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}"
            )
        # Known before the parameters exist, as their number of rows depends on it.
        self.__dict__["mode"] = f"RNN_{nonlinearity.upper()}"
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self._step(input, None if hx is None else (hx,))[0]

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.nonlinearity == "tanh" else f"{text}, nonlinearity={self.nonlinearity}"


class LSTMCell(_Cell):
    """One step of LSTM: (N, input_size), ((N, hidden_size), (N, hidden_size)) -> the same pair,
    one step on.
    """

    mode = "LSTM"
    states = 2

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Tensor]:
        hidden, cell = self._step(input, None if hx is None else tuple(hx))
        return hidden, cell


class GRUCell(_Cell):
    """One step of GRU: (N, input_size), (N, hidden_size) -> (N, hidden_size)."""

    mode = "GRU"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self._step(input, None if hx is None else (hx,))[0]
