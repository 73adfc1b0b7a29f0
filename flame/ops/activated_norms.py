"""Gradients through an activation and the normalization before it, in one op, for compiled steps.

The activation's argument is computed again from the normalization's operand, so the compiler
(`passes.activated`) keeps neither it nor the gradient in between. The kernels are those of
`batch_tiles` and `group_tiles`; elsewhere, the usual ones run one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.types import TensorType, like_strides, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, Lowering, Ref
from flame.kernel.values import Value
from flame.ops import batch_tiles, group_tiles
from flame.ops.elementwise import Elementwise, compute_dtype
from flame.ops.norm_kernels import inverse_root
from flame.ops.norm_ops import (
    EPS,
    batch_form,
    batch_norm_backward,
    group_norm_backward,
    group_norm_op,
)
from flame.ops.op import NOT_DIFFERENTIABLE, OPS, Arg, Op, Sample, Types
from flame.ops.rows import rows_of, type_of

ACTIVATIONS: Final = ("relu", "silu")


def fits(grad: TensorType, x: TensorType) -> bool:
    """Whether the kernels for channels-last images on a GPU apply."""
    return x.device != "cpu" and group_tiles.fits(x, grad)


def _slope(activation: str) -> batch_tiles.Slope:
    """(grad, y) -> the gradient of y. That of relu asks for its result, and is given y as well."""
    (formula,) = OPS[activation].formulas
    assert formula is not None
    slope: batch_tiles.Slope = formula.function
    return slope


def _reference_slope(activation: str, grad: Any, y: Any) -> Any:
    op = OPS[activation]
    assert isinstance(op, Elementwise)
    backward = op.backward(
        (True,), (tensor_type(compute_dtype(dtypes.from_numpy(y.dtype)), y.shape),)
    )
    return backward.evaluate(grad.astype(y.dtype), y)


# --- where the kernels for images do not apply ----------------------------------------------------


class _Steps:
    """Kernels of other lowerings, over the operands and temporaries of one op."""

    def __init__(self, wide: TensorType) -> None:
        """wide: the type of what is between the kernels."""
        self.wide = wide
        self.kernels: list[BoundKernel] = []
        self.temporaries: list[int] = []

    def between(self) -> Ref:
        self.temporaries.append(self.wide.numel * self.wide.dtype.itemsize)
        return Ref("temporary", len(self.temporaries) - 1)

    def add(self, made: Lowering, places: Mapping[Ref, Ref]) -> None:
        """places: what operands of ``made`` are here, where they differ."""
        first, own = len(self.temporaries), range(len(made.temporaries))
        self.temporaries += made.temporaries
        known = {Ref("temporary", i): Ref("temporary", first + i) for i in own} | {**places}
        self.kernels += [kernel.over(known) for kernel in made.kernels]

    def done(self) -> Lowering:
        return Lowering(tuple(self.kernels), tuple(self.temporaries))


def _steps(types: Types) -> _Steps:
    x = type_of(types[1])
    return _Steps(tensor_type(compute_dtype(x.dtype), x.shape, like_strides(x.shape, x), x.device))


# --- batch normalization --------------------------------------------------------------------------


def _lower_batch(types: Types, outputs: tuple[TensorType, ...], *, activation: str) -> Lowering:
    grad, x = type_of(types[0]), type_of(types[1])
    slope, form = _slope(activation), batch_form(x)
    if fits(grad, x) and fits(outputs[0], x):
        rows = rows_of(form.sizes, form.rows, [form.strides(t) for t in (x, grad, outputs[0])])
        if batch_tiles.fits(rows, (0, 1, 2)):
            return batch_tiles.lower_backward(rows, types, outputs, slope)
    steps = _steps(types)
    compute, between = steps.wide.dtype, steps.between()
    # (grad, x, mean, variance, eps), then weight and bias where there are any
    places = [0, 1, 2, 3, 5, *(i for i in (4, 6) if types[i] is not None)]
    given = [types[i] for i in places]
    spread = [
        tensor_type(t.dtype, x.shape, form.scale_strides(t), x.device)
        if isinstance(t, TensorType) and i > 1 else t
        for i, t in enumerate(given)
    ]  # fmt: skip

    def scalar(
        grad: Value, x: Value, mean: Value, variance: Value, eps: Value, *others: Value
    ) -> Any:
        known = dict(zip(places[5:], others, strict=True))
        line = batch_tiles.line_of(mean, inverse_root(variance, eps), known.get(4), known.get(6))
        return slope(grad, values.fma(x, *line))

    op = Elementwise(
        "activation_backward", scalar, inputs=[f"x{i}" for i in places],
        rule=lambda _, types: ([compute] * len(types), [compute]), vjp=NOT_DIFFERENTIABLE,
        reference=None, register=False,
    )  # fmt: skip
    through = {Ref("input", i): Ref("input", p) for i, p in enumerate(places)}
    made = op.lower(tuple(spread), (steps.wide,))
    steps.add(made, {**through, Ref("output", 0): between})
    rest = batch_norm_backward.lower((steps.wide, *types[1:6]), outputs)
    steps.add(rest, {Ref("input", 0): between})
    return steps.done()


def _reference_batch(
    grad: Any, x: Any, mean: Any, variance: Any, weight: Any, eps: float, bias: Any, *,
    activation: str,
) -> Any:  # fmt: skip
    def spread(t: Any, otherwise: float) -> Any:
        return otherwise if t is None else t.reshape(-1, *[1] * (x.ndim - 2))

    normal = (x - spread(mean, 0)) / np.sqrt(spread(variance, 1) + eps)
    through = _reference_slope(activation, grad, normal * spread(weight, 1) + spread(bias, 0))
    return batch_norm_backward.reference(through, x, mean, variance, weight, eps)


batch_norm_activated_backward = Op(
    "batch_norm_activated_backward",
    inputs=(*batch_norm_backward.inputs, "bias"),
    infer=lambda types, *, activation: batch_norm_backward.infer(types[:6]),
    lower=_lower_batch, vjp=NOT_DIFFERENTIABLE, widens=True, reference=_reference_batch,
    samples=[Sample((Arg(x), Arg(x), Arg((x[1],)), Arg((x[1],), 0.5, 2.0), w, EPS, w),
                    {"activation": activation})
             for activation in ACTIVATIONS
             for x, w in (((4, 3, 5), Arg((3,))), ((6, 2), Arg((2,))), ((2, 3, 3, 19), None))],
)  # fmt: skip


# --- group normalization --------------------------------------------------------------------------


def _lower_group(
    types: Types, outputs: tuple[TensorType, ...], *, rows: int, activation: str
) -> Lowering:
    grad, x = type_of(types[0]), type_of(types[1])
    if fits(grad, x) and fits(outputs[0], x):
        slope = _slope(activation)
        return group_tiles.lower_backward(types, outputs, groups=rows, slope=slope)
    steps = _steps(types)
    wide, y, between = steps.wide, steps.between(), steps.between()
    forward = group_norm_op.lower((x, types[2], types[4], types[3]), (wide,), rows=rows)
    places = {0: 1, 1: 2, 2: 4}
    steps.add(forward, {Ref("input", a): Ref("input", b) for a, b in places.items()}
              | {Ref("output", 0): y})  # fmt: skip
    op = OPS[activation]
    assert isinstance(op, Elementwise)
    backward = op.backward((True,), (wide,)).lower((grad, wide), (wide,))
    steps.add(backward, {Ref("input", 1): y, Ref("output", 0): between})
    rest = group_norm_backward.lower((wide, *types[1:4]), outputs, rows=rows)
    steps.add(rest, {Ref("input", 0): between})
    return steps.done()


def _reference_group(
    grad: Any, x: Any, weight: Any, eps: float, bias: Any, *, rows: int, activation: str
) -> Any:
    y = group_norm_op.reference(x, weight, bias, eps, rows=rows)
    through = _reference_slope(activation, grad, y)
    return group_norm_backward.reference(through, x, weight, eps, rows=rows)


group_norm_activated_backward = Op(
    "group_norm_activated_backward",
    inputs=(*group_norm_backward.inputs, "bias"),
    infer=lambda types, *, rows, activation: group_norm_backward.infer(types[:4], rows=rows),
    lower=_lower_group, vjp=NOT_DIFFERENTIABLE, widens=True, reads=group_norm_backward.reads,
    reference=_reference_group,
    samples=[Sample((Arg(x), Arg(x), w, EPS, w), {"rows": groups, "activation": activation})
             for activation in ACTIVATIONS
             for x, w, groups in (((2, 6, 5), Arg((6,)), 3), ((3, 4, 3, 3), Arg((4,)), 2),
                                  ((2, 4, 3), None, 1))],
)  # fmt: skip
