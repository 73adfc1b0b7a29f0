"""One time step of each recurrent layer, shared by the layers and their cells.

A step takes the input's part of the gates, `from_input` (N, gates), already projected for all steps
at once, the state
before it, and the weights for the state; it gives the state after it. Every step's first state is
its output.
"""

from __future__ import annotations

from collections.abc import Callable

import flame
import flame.nn.functional as F
from flame.nn._pieces import chunks
from flame.tensor import Tensor

__all__ = ["GATES", "State", "Step", "StepWeights", "combined_bias", "step_of"]

# (h,) for RNN and GRU, (h, c) for LSTM; each (N, hidden).
State = tuple[Tensor, ...]

# How many blocks of hidden_size rows the weights of each mode have.
GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "LSTM": 4, "GRU": 3}


class StepWeights:
    """The weights for the state: `recurrent` (gates, hidden), a bias (gates,), a projection
    (proj, hidden).
    """

    __slots__ = ("bias", "projection", "recurrent")

    def __init__(
        self, recurrent: Tensor, bias: Tensor | None, projection: Tensor | None = None
    ) -> None:
        # Transposed once, not in every step: (hidden, gates).
        self.recurrent = recurrent.t()
        self.bias = bias
        self.projection = None if projection is None else projection.t()


Step = Callable[[Tensor, State, StepWeights], State]


def combined_bias(mode: str, bias_ih: Tensor | None, bias_hh: Tensor | None) -> Tensor | None:
    """The bias that can be added to the input's projection; GRU's state bias cannot, as it is
    scaled by a gate.
    """
    if bias_ih is None or bias_hh is None or mode == "GRU":
        return bias_ih
    total: Tensor = bias_ih + bias_hh
    return total


def _tanh_step(from_input: Tensor, state: State, weights: StepWeights) -> State:
    return (flame.addmm(from_input, state[0], weights.recurrent).tanh(),)


def _relu_step(from_input: Tensor, state: State, weights: StepWeights) -> State:
    return (F.relu(flame.addmm(from_input, state[0], weights.recurrent)),)


def _lstm_step(from_input: Tensor, state: State, weights: StepWeights) -> State:
    hidden, cell = state
    gates = flame.addmm(from_input, hidden, weights.recurrent)
    admit, forget, candidate, emit = chunks(gates, 4, dim=1)
    cell = forget.sigmoid() * cell + admit.sigmoid() * candidate.tanh()
    hidden = emit.sigmoid() * cell.tanh()
    if weights.projection is not None:
        hidden = hidden @ weights.projection
    return hidden, cell


def _gru_step(from_input: Tensor, state: State, weights: StepWeights) -> State:
    (hidden,) = state
    if weights.bias is None:
        from_state = hidden @ weights.recurrent
    else:
        from_state = flame.addmm(weights.bias, hidden, weights.recurrent)
    reset_input, update_input, new_input = chunks(from_input, 3, dim=1)
    reset_state, update_state, new_state = chunks(from_state, 3, dim=1)
    reset = (reset_input + reset_state).sigmoid()
    update = (update_input + update_state).sigmoid()
    new = (new_input + reset * new_state).tanh()
    return (new + update * (hidden - new),)


_STEPS: dict[str, Step] = {
    "RNN_TANH": _tanh_step,
    "RNN_RELU": _relu_step,
    "LSTM": _lstm_step,
    "GRU": _gru_step,
}


def step_of(mode: str) -> Step:
    """The step function of RNN_TANH, RNN_RELU, LSTM or GRU."""
    return _STEPS[mode]
