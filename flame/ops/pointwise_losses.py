"""The pointwise parts of losses: one kernel forward, one backward."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from flame.core.errors import DataError
from flame.kernel.values import Value, unary
from flame.ops.comparison import maximum, minimum, where
from flame.ops.elementwise import elementwise, to_float
from flame.ops.mathematics import abs as magnitude
from flame.ops.mathematics import exp, log, log1p, sigmoid, sign
from flame.ops.op import Arg, Sample, Types

TAU: Final = 2 * math.pi
HALF_LOG_TAU: Final = 0.5 * math.log(TAU)
FLOOR: Final = -100.0  # of logarithms of probabilities
TINY: Final = 1e-12  # of p (1 - p) in a denominator


def _spread_samples(*numbers: float, low: float = -3.0, high: float = 3.0) -> list[Sample]:
    return [
        Sample((Arg(a, low, high), Arg(b, low, high), *numbers))
        for a, b in (((5, 7), (5, 7)), ((), ()), ((0, 3), (0, 3)), ((2, 19), (19,)), ((1,), (4, 1)))
    ]


squared_difference = elementwise(
    "squared_difference", lambda x, y: (x - y) * (x - y), inputs=("x", "y"),
    vjp=(lambda g, x, y: g * (x - y) * 2, lambda g, x, y: g * (y - x) * 2),
    reference=lambda x, y: (x - y) ** 2,
)  # fmt: skip

absolute_difference = elementwise(
    "absolute_difference", lambda x, y: magnitude(x - y), inputs=("x", "y"),
    vjp=(lambda g, x, y: g * sign(x - y), lambda g, x, y: g * sign(y - x)),
    reference=lambda x, y: np.abs(x - y),
)  # fmt: skip


def _bounded(d: Any, bound: Any) -> Any:
    return minimum(maximum(d, -bound), bound)


def _smooth(x: Any, y: Any, beta: Any) -> Any:
    d = magnitude(x - y)
    return where(d < beta, d * d * 0.5 / beta, d - beta * 0.5)


smooth_absolute = elementwise(
    "smooth_absolute_difference", _smooth, inputs=("x", "y", "beta"),
    vjp=(
        lambda g, x, y, beta: g * _bounded((x - y) / beta, 1.0),
        lambda g, x, y, beta: g * _bounded((y - x) / beta, 1.0),
        None,
    ),
    reference=lambda x, y, beta: np.where(
        np.abs(x - y) < beta, (x - y) ** 2 / 2 / beta, np.abs(x - y) - beta / 2
    ),
    samples=_spread_samples(0.7),
)  # fmt: skip


def _huber(x: Any, y: Any, delta: Any) -> Any:
    d = magnitude(x - y)
    return where(d <= delta, d * d * 0.5, (d - delta * 0.5) * delta)


huber = elementwise(
    "huber", _huber, inputs=("x", "y", "delta"),
    vjp=(
        lambda g, x, y, delta: g * _bounded(x - y, delta),
        lambda g, x, y, delta: g * _bounded(y - x, delta),
        None,
    ),
    reference=lambda x, y, delta: np.where(
        np.abs(x - y) <= delta, (x - y) ** 2 / 2, delta * (np.abs(x - y) - delta / 2)
    ),
    samples=_spread_samples(0.7),
)  # fmt: skip


def _logs(p: Any) -> tuple[Any, Any]:
    return maximum(log(p), FLOOR), maximum(log1p(-p), FLOOR)


def not_a_label(*operands: Value) -> Value:
    """Whether the target, the second operand of a loss, is NaN."""
    return unary("is_nan", operands[1])


def label_failure(code: int, types: Types) -> DataError:
    return DataError("a target of the loss is NaN; labels and target probabilities must be numbers")


soft_target = elementwise(
    "soft_target", lambda logs, target: logs * target, inputs=("logs", "target"), rule=to_float,
    vjp=(lambda g, target: g * target, lambda g, logs: g * logs),
    reference=np.multiply, invalid=not_a_label, failure=label_failure,
)  # fmt: skip


def _binary_entropy(p: Any, target: Any) -> Any:
    yes, no = _logs(p)
    return (target - 1) * no - target * yes


def _binary_entropy_target(g: Any, p: Any) -> Any:
    yes, no = _logs(p)
    return g * (no - yes)


binary_entropy = elementwise(
    "binary_entropy", _binary_entropy, inputs=("p", "target"), rule=to_float,
    vjp=(
        lambda g, p, target: g * (p - target) / maximum(p * (1 - p), TINY),
        lambda g, p: _binary_entropy_target(g, p),
    ),
    reference=lambda p, t: -(t * np.log(p) + (1 - t) * np.log1p(-p)), domain=(0.1, 0.9),
    invalid=not_a_label, failure=label_failure,
)  # fmt: skip


def _softplus_minus(x: Any) -> Any:
    """log(1 + exp(-x))."""
    return maximum(-x, 0.0) + log1p(exp(-magnitude(x)))


binary_entropy_logits = elementwise(
    "binary_entropy_logits",
    lambda x, target, p: (1 - target) * x + (1 + (p - 1) * target) * _softplus_minus(x),
    inputs=("x", "target", "p"), rule=to_float,
    vjp=(
        lambda g, x, target, p: g * ((1 - target) - (1 + (p - 1) * target) * sigmoid(-x)),
        lambda g, x, p: g * ((p - 1) * _softplus_minus(x) - x),
        lambda g, x, target: g * target * _softplus_minus(x),
    ),
    reference=lambda x, t, p: (1 - t) * x + (1 + (p - 1) * t) * np.logaddexp(0, -x),
    samples=[Sample((Arg((5, 7)), Arg((5, 7)), 1.0)),
             Sample((Arg((2, 19)), Arg((2, 19)), Arg((19,)))),
             Sample((Arg(()), Arg(()), 2.0)), Sample((Arg((0, 3)), Arg((0, 3)), Arg((3,))))],
    invalid=not_a_label, failure=label_failure,
)  # fmt: skip


def _times_log(t: Any) -> Any:
    """t log(t), 0 at 0."""
    return where(t == 0, t * 0.0, t * log(t))


divergence = elementwise(
    "divergence", lambda x, target: _times_log(target) - target * x, inputs=("x", "target"),
    rule=to_float,
    vjp=(lambda g, target: -g * target, lambda g, x, target: g * (log(target) + 1 - x)),
    reference=lambda x, t: t * (np.log(t) - x), domain=(0.1, 3.0),
)  # fmt: skip

divergence_log = elementwise(
    "divergence_log", lambda x, target: exp(target) * (target - x), inputs=("x", "target"),
    rule=to_float,
    vjp=(
        lambda g, target: -g * exp(target),
        lambda g, x, target: g * exp(target) * (target - x + 1),
    ),
    reference=lambda x, t: np.exp(t) * (t - x),
)  # fmt: skip

gaussian = elementwise(
    "gaussian_nll", lambda x, y, v: (log(v) + (x - y) * (x - y) / v) * 0.5,
    inputs=("x", "y", "variance"), rule=to_float,
    vjp=(
        lambda g, x, y, variance: g * (x - y) / variance,
        lambda g, x, y, variance: g * (y - x) / variance,
        lambda g, x, y, variance: (
            g * 0.5 * (1 - (x - y) * (x - y) / variance) / variance
        ),
    ),
    reference=lambda x, y, v: (np.log(v) + (x - y) ** 2 / v) / 2, domain=(0.5, 3.0),
)  # fmt: skip

soft_margin = elementwise(
    "soft_margin", lambda x, target: _softplus_minus(x * target), inputs=("x", "target"),
    rule=to_float,
    vjp=(
        lambda g, x, target: -g * target * sigmoid(-x * target),
        lambda g, x, target: -g * x * sigmoid(-x * target),
    ),
    reference=lambda x, t: np.logaddexp(0, -x * t),
)  # fmt: skip
