"""Checks derivatives of first and second order against finite differences in float64.

Along random directions: for random u and v, v . J u by central differences must equal u . (J^T v)
by the backward pass. A wrong element of the gradient changes the product almost surely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from flame.autograd import engine
from flame.autograd.mode import no_grad
from flame.core import dtypes
from flame.ops.op import Op, Sample
from flame.ops.transfer import move
from flame.tensor import Tensor, from_array
from flame.testing.sampling import is_differentiable, make_inputs

STEP: Final = 1e-6
FIRST: Final = 2e-6  # relative error allowed, of float64 differences
SECOND: Final = 2e-5

Array = np.ndarray[Any, Any]
Function = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def check_gradients(op: Op, sample: Sample, layout: str = "contiguous", device: str = "cpu") -> int:
    """Check an op's derivatives on a sample; returns how many operands were checked (maybe 0)."""
    operands, _ = make_inputs(sample, dtypes.float64, layout=layout, device=device)
    places = [i for i, x in enumerate(sample.inputs) if is_differentiable(op, x)]
    if not places or not op.differentiable:
        return 0

    def function(points: Sequence[Tensor]) -> Sequence[Tensor]:
        inputs = list(operands)
        for place, point in zip(places, points, strict=True):
            inputs[place] = point
        made = op(*inputs, **sample.attributes)
        outputs = made if isinstance(made, tuple) else (made,)
        return outputs[: len(outputs) - op.extras]

    check_function(function, [operands[i] for i in places], op.name)
    return len(places)


def gradcheck(function: Callable[..., Any], inputs: Sequence[Tensor]) -> bool:
    """Check first and second derivatives of ``function(*inputs)`` at float64 inputs.

    Returns True. Raises AssertionError naming the input and both numbers where they differ.
    """

    def as_sequence(points: Sequence[Tensor]) -> Sequence[Tensor]:
        made = function(*points)
        return made if isinstance(made, (tuple, list)) else (made,)

    check_function(as_sequence, list(inputs), getattr(function, "__name__", "function"))
    return True


def check_function(function: Function, inputs: Sequence[Tensor], name: str) -> None:
    """First order with the fused and with the differentiable backward, then second order."""
    rng = np.random.default_rng(7)
    points = [_array(x) for x in inputs]
    outputs = _floats(function(_leaves(inputs, points)))
    directions = [np.asarray(rng.standard_normal(p.shape)) for p in points]
    weights = [np.asarray(rng.standard_normal(o.shape)) for o in outputs]
    numeric = _difference(
        lambda at: _dot(_values(function, inputs, at), weights), points, directions
    )
    for differentiable in (False, True):
        grads = _gradients(function, inputs, points, weights, differentiable)
        found = [float(np.sum(g * u)) for g, u in zip(grads, directions, strict=True)]
        kind = "formula" if differentiable else "fused backward"
        _compare(found, numeric, FIRST, f"{name}: first derivative ({kind})")
    _check_second(function, inputs, points, weights, directions, name, rng)


def _check_second(
    function: Function,
    inputs: Sequence[Tensor],
    points: list[Array],
    weights: list[Array],
    directions: list[Array],
    name: str,
    rng: np.random.Generator,
) -> None:
    """Derivatives of u . gradient(x, v) in x and in v."""
    probes = [np.asarray(rng.standard_normal(p.shape)) for p in points]
    turns = [np.asarray(rng.standard_normal(w.shape)) for w in weights]

    def value(at: list[Array]) -> float:
        return _dot(
            _gradients(function, inputs, at[: len(points)], at[len(points) :], False), probes
        )

    numeric = _difference(value, [*points, *weights], [*directions, *turns])
    leaves = _leaves(inputs, points)
    outputs = _floats(function(leaves))
    cotangents = [
        _beside(o, w.copy()).requires_grad_() for o, w in zip(outputs, weights, strict=True)
    ]
    used = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not used:
        return
    grads = engine.grad(
        [o for o, _ in used], leaves, [c for _, c in used], True, True, allow_unused=True
    )
    pairs = [
        (g, _beside(g, p))
        for g, p in zip(grads, probes, strict=True)
        if g is not None and g.requires_grad
    ]
    if not pairs:
        found: list[Any] = [None] * len(numeric)
    else:
        found = engine.grad(
            [g for g, _ in pairs],
            [*leaves, *cotangents],
            [p for _, p in pairs],
            None,
            False,
            allow_unused=True,
        )
    totals = [
        0.0 if g is None else float(np.sum(_array(g) * u))
        for g, u in zip(found, [*directions, *turns], strict=True)
    ]
    _compare(totals, numeric, SECOND, f"{name}: second derivative")


def _leaves(inputs: Sequence[Tensor], points: Sequence[Array]) -> list[Tensor]:
    """Leaves with the values of ``points`` in the layout of ``inputs``."""
    made = []
    for model, point in zip(inputs, points, strict=True):
        dense = model.type.dense and not model.type.contiguous
        leaf = _beside(model, point.copy())
        if dense:
            order = sorted(range(model.ndim), key=lambda d: -model.type.strides[d])
            base = _beside(model, np.ascontiguousarray(point.transpose(order)))
            leaf = base.permute([order.index(d) for d in range(model.ndim)]).detach()
        made.append(leaf.requires_grad_())
    return made


def _beside(model: Tensor, array: Array) -> Tensor:
    """An array as a tensor on the device of another one."""
    return move(from_array(array), model.type.device)


def _array(x: Tensor) -> Array:
    """A copy of the values."""
    return x.detach().cpu().numpy().copy()


def _floats(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [o for o in outputs if o.dtype.kind == "f"]


def _values(function: Function, inputs: Sequence[Tensor], points: Sequence[Array]) -> list[Array]:
    with no_grad():
        made = function([_beside(x, p.copy()) for x, p in zip(inputs, points, strict=True)])
        return [_array(o) for o in _floats(made)]


def _gradients(
    function: Function,
    inputs: Sequence[Tensor],
    points: Sequence[Array],
    weights: Sequence[Array],
    differentiable: bool,
) -> list[Array]:
    leaves = _leaves(inputs, points)
    outputs = _floats(function(leaves))
    used = [(o, _beside(o, w)) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    if not used:
        return [np.zeros(p.shape) for p in points]
    grads = engine.grad(
        [o for o, _ in used], leaves, [w for _, w in used], None, differentiable, allow_unused=True
    )
    return [
        np.zeros(p.shape) if g is None else _array(g) for g, p in zip(grads, points, strict=True)
    ]


def _dot(arrays: Sequence[Array], weights: Sequence[Array]) -> float:
    return float(sum(np.sum(a * w) for a, w in zip(arrays, weights, strict=True)))


def _difference(
    value: Callable[[list[Array]], float], points: list[Array], directions: list[Array]
) -> list[float]:
    """The derivative of ``value`` along each direction alone, by central differences."""
    found = []
    for i, direction in enumerate(directions):
        ends = []
        for sign in (1.0, -1.0):
            moved = list(points)
            moved[i] = np.asarray(points[i] + sign * STEP * direction)
            ends.append(value(moved))
        found.append((ends[0] - ends[1]) / (2 * STEP))
    return found


def _compare(found: list[float], numeric: list[float], tolerance: float, label: str) -> None:
    for position, (got, want) in enumerate(zip(found, numeric, strict=True)):
        scale = max(1.0, abs(want), abs(got))
        assert abs(got - want) <= tolerance * scale, (
            f"{label} of operand {position}: backward gives {got!r}, differences give {want!r}"
        )
