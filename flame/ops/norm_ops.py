"""Ops of the normalizations: layer, group, RMS and batch normalization with their backward ops.

Invariants: a backward op recomputes cheap statistics of rows in cache rather than keep them; its
own derivative is the formula `second_order`, in public ops, so all orders exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from flame.core.errors import DTypeError, ShapeError
from flame.core.types import Shape, TensorType, like_strides, tensor_type
from flame.kernel.builder import Lowering
from flame.ops import batch_rows, norm_columns, norm_gradients, norm_groups, norm_kernels
from flame.ops.elementwise import compute_dtype
from flame.ops.loops import broadcast_strides
from flame.ops.op import Arg, Joint, Op, Sample, Types
from flame.ops.reductions import mean as mean_of
from flame.ops.reductions import sum_to
from flame.ops.rows import rows_of, type_of
from flame.ops.shapes import reshape

EPS: Final = 1e-5  # of the samples in tests


@dataclass(frozen=True)
class Form:
    """Where the rows of x (N, C, ...) lie, and which scale belongs to an element.

    sizes: the dimensions of x, channels split into groups where there are groups; rows: the
    dimensions that are averaged; scale: the dimensions that weight and bias span.
    """

    sizes: Shape
    rows: tuple[int, ...]
    scale: tuple[int, ...]

    def strides(self, x: TensorType) -> Shape:
        """Strides of a tensor like x in these dimensions."""
        own = broadcast_strides(x, x.shape)
        if len(self.sizes) == x.ndim:
            return own
        return (own[0], own[1] * self.sizes[2], *own[1:])

    def scale_strides(self, weight: TensorType) -> Shape:
        """Strides of a parameter in these dimensions."""
        strides = [0] * len(self.sizes)
        if len(self.scale) == weight.ndim:
            for dim, step in zip(self.scale, weight.strides, strict=True):
                strides[dim] = step
        else:  # (C,) as groups of channels
            group, channel = self.scale
            strides[group] = weight.strides[0] * self.sizes[channel]
            strides[channel] = weight.strides[0]
        return tuple(strides)

    def spread(self, weight: Any) -> Any:
        """A parameter that broadcasts over x in these dimensions."""
        shape = tuple(s if d in self.scale else 1 for d, s in enumerate(self.sizes))
        return reshape(weight, shape)


def layer_form(x: TensorType, dims: int) -> Form:
    """Rows over the last ``dims`` dimensions."""
    last = tuple(range(x.ndim - dims, x.ndim))
    return Form(x.shape, last, last)


def group_form(x: TensorType, groups: int) -> Form:
    """Rows over the channels of a group and all positions."""
    sizes = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    return Form(sizes, tuple(range(2, len(sizes))), (1, 2))


def batch_form(x: TensorType) -> Form:
    """Rows over the batch and all positions, for each channel."""
    return Form(x.shape, (0, *range(2, x.ndim)), (1,))


# --- derivatives ----------------------------------------------------------------------------------


def second_order(
    cotangents: Any, grad: Any, x: Any, weight: Any, eps: float, form: Form, *, centred: bool,
    statistics: tuple[Any, Any] | None = None,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Gradients of a backward op (dx, dweight, dbias) with respect to (grad, x, weight).

    With r = rstd, n = (x - mean) r and P(v) = r (v - mean(v) - n mean(v n)), the backward is
    dx = P(grad weight). P is symmetric; r changes with x by -r² n / count, n by P.
    statistics: mean and variance of x as they were kept; they stand for functions of x.
    """
    from flame.ops.mathematics import rsqrt

    shape = x.shape
    given = cotangents if isinstance(cotangents, tuple) else (cotangents,)
    u, grad, x = (reshape(t, form.sizes) for t in (given[0], grad, x))

    def mean(t: Any) -> Any:
        return mean_of(t, form.rows, keepdim=True)

    def kept(computed: Any, position: int) -> Any:
        if statistics is None:
            return computed
        return form.spread(statistics[position]) + (computed - computed.detach())

    difference = x - kept(mean(x), 0) if centred else x
    r = rsqrt(kept(mean(difference * difference), 1) + eps)
    normal = difference * r

    def project(v: Any) -> Any:
        inner = v - mean(v) if centred else v
        return (inner - normal * mean(v * normal)) * r

    scaled = grad if weight is None else grad * form.spread(weight)
    a, b = mean(u * normal), mean(scaled * normal)
    through = project(u)
    whole = mean(u * scaled) - a * b
    if centred:
        whole = whole - mean(u) * mean(scaled)
    bent = -(u * b + scaled * a) * r
    d_grad, d_weight = through, None
    if weight is not None:
        d_grad = through * form.spread(weight)
        d_weight = reshape(sum_to(grad * through, form.spread(weight).shape), weight.shape)
        for term, extra in zip((normal, None), given[1:], strict=False):
            spread = form.spread(extra)
            d_grad = d_grad + (spread if term is None else spread * term)
        bent = bent + form.spread(given[1]) * grad
    d_x = project(bent) - r * r * normal * whole
    return reshape(d_grad, shape), reshape(d_x, shape), d_weight


def _bias_gradient(grad: Any, form: Form, bias: TensorType) -> Any:
    """For a bias that stands without a weight."""
    shape = tuple(s if d in form.scale else 1 for d, s in enumerate(form.sizes))
    return reshape(sum_to(reshape(grad, form.sizes), shape), bias.shape)


# --- references -----------------------------------------------------------------------------------


def _reference_parts(x: Any, form: Form, eps: float, *, centred: bool) -> Any:
    split = np.asarray(x).reshape(form.sizes)
    mean = split.mean(axis=form.rows, keepdims=True) if centred else 0.0
    rstd = 1 / np.sqrt(((split - mean) ** 2).mean(axis=form.rows, keepdims=True) + eps)
    return split, (split - mean) * rstd, rstd


def _np_spread(weight: Any, form: Form) -> Any:
    if weight is None:
        return np.ones((1,) * len(form.sizes))
    return weight.reshape([s if d in form.scale else 1 for d, s in enumerate(form.sizes)])


def _reference(x: Any, weight: Any, bias: Any, eps: float, form: Form, *, centred: bool) -> Any:
    _, normal, _ = _reference_parts(x, form, eps, centred=centred)
    made = normal * _np_spread(weight, form)
    if bias is not None:
        made = made + _np_spread(bias, form)
    return made.reshape(x.shape).astype(x.dtype)


def _reference_backward(
    grad: Any, x: Any, weight: Any, eps: float, form: Form, *, centred: bool
) -> Any:
    _, normal, rstd = _reference_parts(x, form, eps, centred=centred)
    split = np.asarray(grad).reshape(form.sizes)
    through = split * _np_spread(weight, form)

    def mean(t: Any) -> Any:
        return t.mean(axis=form.rows, keepdims=True)

    inner = through - mean(through) if centred else through
    dx = ((inner - normal * mean(through * normal)) * rstd).reshape(x.shape).astype(x.dtype)
    if weight is None:
        return dx
    others = tuple(d for d in range(len(form.sizes)) if d not in form.scale)
    dweight = (split * normal).sum(axis=others).reshape(weight.shape).astype(weight.dtype)
    dbias = split.sum(axis=others).reshape(weight.shape).astype(weight.dtype)
    return (dx, dweight, dbias) if centred else (dx, dweight)


# --- layer, RMS and group normalization -----------------------------------------------------------


def _check(name: str, x: TensorType, form: Form, *parameters: Any) -> None:
    if x.dtype.kind != "f":
        raise DTypeError(f"{name} needs a floating input, got {x.dtype.name}; convert it first")
    wanted = 1
    for d in form.scale:
        wanted *= form.sizes[d]
    for label, p in zip(("weight", "bias"), parameters, strict=False):
        if p is not None and p.numel != wanted:
            raise ShapeError(
                f"{name}: {label} of shape {p.shape} does not fit an input of shape {x.shape}; it "
                f"needs {wanted} elements"
            )


FormOf = Callable[[TensorType, int], Form]


def _declare(name: str, form_of: FormOf, samples: list[Any], *, centred: bool) -> tuple[Op, Op]:
    """The forward op and the backward op of one normalization within samples.

    Attribute ``rows``: how many last dimensions, or how many groups, see ``form_of``.
    """

    def infer(types: Types, *, rows: int) -> TensorType:
        x = type_of(types[0])
        _check(name, x, form_of(x, rows), *types[1:3])
        return tensor_type(x.dtype, x.shape, like_strides(x.shape, x), x.device)

    def lower(types: Types, outputs: tuple[TensorType, ...], *, rows: int) -> Lowering:
        if form_of is group_form and norm_groups.fits(type_of(types[0])):
            return norm_groups.lower_forward(types, outputs, groups=rows)
        form = form_of(type_of(types[0]), rows)
        strides = [form.strides(type_of(types[0]))]
        strides += [None if t is None else form.scale_strides(type_of(t)) for t in types[1:3]]  # type: ignore[misc]
        return norm_kernels.lower_forward(
            name, form.sizes, form.rows, types, outputs, [*strides, form.strides(outputs[0])],
            centred=centred,
        )  # fmt: skip

    def infer_backward(types: Types, *, rows: int) -> Any:
        x, weight = type_of(types[1]), types[2]
        _check(f"{name}_backward", x, form_of(x, rows), weight)
        follows = form_of is group_form and norm_groups.fits(x)
        dx = tensor_type(x.dtype, x.shape, like_strides(x.shape, x) if follows else None, x.device)
        if weight is None:
            return dx
        weight = type_of(weight)
        dweight = tensor_type(weight.dtype, weight.shape, None, x.device)
        return (dx, dweight, dweight) if centred else (dx, dweight)

    def lower_backward(types: Types, outputs: tuple[TensorType, ...], *, rows: int) -> Lowering:
        row_major = all(type_of(t).contiguous for t in types[:2])
        if form_of is group_form and not row_major:
            return norm_groups.lower_backward(types, outputs, groups=rows)
        if form_of is group_form:
            return norm_gradients.lower_group_backward(types, outputs, groups=rows)
        x = type_of(types[1])
        length = 1
        for size in x.shape[x.ndim - rows :]:
            length *= size
        return norm_gradients.lower_layer_backward(types, outputs, length=length, centred=centred)

    def reads(type_: TensorType) -> bool:
        follows = form_of is group_form and norm_groups.fits(type_) and type_.dense
        return type_.contiguous or follows

    def second(g: Any, grad: Any, x: Any, weight: Any, eps: float, rows: int) -> Any:
        form = form_of(x.type, rows)
        return (*second_order(g, grad, x, weight, eps, form, centred=centred), None)

    backward = Op(
        f"{name}_backward", inputs=("grad", "x", "weight", "eps"), infer=infer_backward,
        lower=lower_backward, vjp=Joint(second), reads=reads, widens=True,
        reference=lambda grad, x, weight, eps, *, rows: _reference_backward(
            grad, x, weight, eps, form_of(x, rows), centred=centred
        ),
        samples=[Sample((Arg(x), Arg(x), None if w is None else Arg(w), EPS), {"rows": rows})
                 for x, w, rows in samples],
    )  # fmt: skip

    def vjp(
        g: Any, x: Any, weight: Any, bias_type: Any, eps: float, rows: int, needs: Any
    ) -> tuple[Any, Any, Any, None]:
        made = backward(g, x, weight, eps, rows=rows)
        dx, dweight, dbias = (
            (*made, None, None)[:3] if isinstance(made, tuple) else (made, None, None)
        )
        if needs[2] and dbias is None:
            dbias = _bias_gradient(g, form_of(x.type, rows), bias_type)
        return dx, dweight, dbias, None

    forward = Op(
        name, inputs=("x", "weight", "bias", "eps"), infer=infer, lower=lower, vjp=Joint(vjp),
        reference=lambda x, weight, bias, eps, *, rows: _reference(
            x, weight, bias, eps, form_of(x, rows), centred=centred
        ),
        samples=_forward_samples(samples, shifted=centred), widens=True,
    )  # fmt: skip
    return forward, backward


def _forward_samples(samples: list[Any], *, shifted: bool) -> list[Sample]:
    made = []
    for x, w, rows in samples:
        weight = None if w is None else Arg(w)
        made.append(Sample((Arg(x), weight, weight if shifted else None, EPS), {"rows": rows}))
        if shifted and w is not None:
            made.append(Sample((Arg(x), None, Arg(w), EPS), {"rows": rows}))
    return made


_LAYER: Final[list[Any]] = [
    ((5, 19), (19,), 1), ((2, 3, 70), (3, 70), 2), ((4, 3), None, 1), ((150, 5), (5,), 1),
    ((0, 4), (4,), 1), ((3, 1), (1,), 1), ((7,), (7,), 1),
]  # fmt: skip
_GROUP: Final[list[Any]] = [
    ((2, 6, 5), (6,), 3), ((3, 4, 3, 3), (4,), 2), ((2, 4), (4,), 2), ((2, 4, 3), None, 1),
    ((0, 4, 3), (4,), 2), ((2, 3, 17), (3,), 3),
]  # fmt: skip

layer_norm_op, layer_norm_backward = _declare("layer_norm", layer_form, _LAYER, centred=True)
rms_norm_op, rms_norm_backward = _declare("rms_norm", layer_form, _LAYER, centred=False)
group_norm_op, group_norm_backward = _declare("group_norm", group_form, _GROUP, centred=True)


# --- batch normalization --------------------------------------------------------------------------


def _infer_batch(types: Types) -> tuple[TensorType, ...]:
    x = type_of(types[0])
    _check("batch_norm", x, batch_form(x), *types[1:3])
    y = tensor_type(x.dtype, x.shape, like_strides(x.shape, x), x.device)
    each = tensor_type(compute_dtype(x.dtype), (x.shape[1],), None, x.device)
    return y, each, each


def _lower_batch(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    if batch_rows.fits(type_of(types[0]), outputs[0]):
        return batch_rows.lower_forward(types, outputs)
    form = batch_form(type_of(types[0]))
    strides: list[Shape | None] = [form.strides(type_of(types[0]))]
    strides += [None if t is None else form.scale_strides(type_of(t)) for t in types[1:3]]
    strides += [form.strides(outputs[0]), *(form.scale_strides(o) for o in outputs[1:])]
    rows = rows_of(form.sizes, form.rows, [s for s in strides if s is not None])
    if norm_columns.fits(rows):
        return norm_columns.lower_columns(rows, types, outputs)
    return norm_kernels.lower_forward(
        "batch_norm", form.sizes, form.rows, types, outputs, strides, centred=True
    )


def _infer_batch_backward(types: Types) -> Any:
    x, weight = type_of(types[1]), types[4]
    dx = tensor_type(x.dtype, x.shape, like_strides(x.shape, x), x.device)
    if weight is None:
        return dx
    dweight = tensor_type(type_of(weight).dtype, type_of(weight).shape, None, x.device)
    return dx, dweight, dweight


def _lower_batch_backward(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    if batch_rows.fits(type_of(types[1]), type_of(types[0]), outputs[0]):
        return batch_rows.lower_backward(types, outputs)
    form = batch_form(type_of(types[1]))
    strides: list[Shape | None] = [form.strides(type_of(t)) for t in types[:2]]
    strides += [None if t is None else form.scale_strides(type_of(t)) for t in types[2:5]]
    strides += [None, form.strides(outputs[0]), *(form.scale_strides(o) for o in outputs[1:])]
    leading = [strides[1], strides[0], strides[6]]  # x decides the order of the loops
    rows = rows_of(form.sizes, form.rows, [s for s in leading if s is not None])
    if norm_columns.fits(rows):
        return norm_columns.lower_columns_backward(rows, types, outputs)
    return norm_kernels.lower_batch_backward(form.sizes, form.rows, types, outputs, strides)


def _reference_batch(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    form = batch_form(x)
    y = _reference(x, weight, bias, eps, form, centred=True)
    return y, x.mean(axis=form.rows), x.var(axis=form.rows)


def _reference_batch_backward(
    grad: Any, x: Any, mean: Any, variance: Any, weight: Any, eps: float
) -> Any:
    """With the statistics as given, though they are those of x wherever FLAME calls it."""
    form = batch_form(x)
    rstd = 1 / np.sqrt(_np_spread(variance, form) + eps)
    normal = (x - _np_spread(mean, form)) * rstd
    shift = grad.mean(axis=form.rows, keepdims=True)
    slope = (grad * normal).mean(axis=form.rows, keepdims=True)
    dx = ((grad - shift - normal * slope) * rstd * _np_spread(weight, form)).astype(x.dtype)
    if weight is None:
        return dx
    return dx, (grad * normal).sum(axis=form.rows), grad.sum(axis=form.rows)


def _second_batch(
    g: Any, grad: Any, x: Any, mean: Any, variance: Any, weight: Any, eps: float
) -> Any:
    d_grad, d_x, d_weight = second_order(
        g, grad, x, weight, eps, batch_form(x.type), centred=True, statistics=(mean, variance)
    )
    return d_grad, d_x, None, None, d_weight, None


batch_norm_backward = Op(
    "batch_norm_backward", inputs=("grad", "x", "mean", "variance", "weight", "eps"),
    infer=_infer_batch_backward, lower=_lower_batch_backward, vjp=Joint(_second_batch),
    widens=True,
    reference=_reference_batch_backward,
    # x is not differentiable here, as its statistics are drawn apart from it
    samples=[Sample((Arg(x), Arg(x, differentiable=False), Arg((x[1],), differentiable=False),
                     Arg((x[1],), 0.5, 2.0, differentiable=False),
                     None if bare else Arg((x[1],)), EPS))
             for x, bare in (((4, 3, 5), False), ((6, 2), False), ((2, 3, 3, 19), True))],
)  # fmt: skip


def _batch_vjp(
    g: Any, x: Any, weight: Any, bias_type: Any, eps: float, out: Any, needs: Any
) -> tuple[Any, Any, Any, None]:
    _, mean, variance = out
    made = batch_norm_backward(g, x, mean, variance, weight, eps)
    dx, dweight, dbias = made if isinstance(made, tuple) else (made, None, None)
    if needs[2] and dbias is None:
        dbias = _bias_gradient(g, batch_form(x.type), bias_type)
    return dx, dweight, dbias, None


batch_norm_op = Op(
    "batch_norm", inputs=("x", "weight", "bias", "eps"), infer=_infer_batch, lower=_lower_batch,
    extras=2, vjp=Joint(_batch_vjp), reference=_reference_batch, widens=True,
    samples=[Sample((Arg(x), w, w, EPS))
             for x, w in (((4, 3, 5), Arg((3,))), ((6, 2), Arg((2,))), ((2, 3, 3, 19), None),
                          ((5, 70), Arg((70,))))],
)  # fmt: skip
