"""Losses over classes named by index: cross entropy and negative log-likelihood, as fused kernels.

Invariants: scores are (N, C, ...), targets (N, ...) of class indices, checked against C for every
element that is not ignored; the mean is weighted by the class weights of the targets. Only the
log-sum-exp of each row is kept for the backward pass, never the probabilities.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import DTypeError, IndexRangeError, ShapeError
from flame.core.types import Shape, TensorType, like_strides, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const
from flame.ops.conversion import convert
from flame.ops.elementwise import compute_dtype
from flame.ops.loops import broadcast_strides
from flame.ops.op import Arg, Joint, Op, Sample, Types
from flame.ops.reductions import sum as sum_of
from flame.ops.rows import Index, RowLoops, Rows, rows_of, type_of
from flame.ops.shapes import reshape, unsqueeze
from flame.ops.softmax import softmax_backward, softmax_op

REDUCTIONS: Final = ("none", "mean", "sum")


def row_shape(x: TensorType) -> Shape:
    """The shape of the targets: that of the scores without the classes."""
    return (x.shape[0], *x.shape[2:]) if x.ndim > 1 else ()


def class_dim(x: TensorType) -> int:
    return 1 if x.ndim > 1 else 0


def _spread(t: TensorType, x: TensorType) -> Shape:
    """Strides of a tensor over rows in the dimensions of the scores."""
    own = broadcast_strides(t, t.shape)
    at = class_dim(x)
    return (*own[:at], 0, *own[at:])


def _along(t: TensorType, x: TensorType) -> Shape:
    """Strides of a tensor over classes in the dimensions of the scores."""
    strides = [0] * x.ndim
    strides[class_dim(x)] = t.strides[0]
    return tuple(strides)


def _check(name: str, x: TensorType, target: TensorType, weight: Any) -> None:
    if x.dtype.kind != "f":
        raise DTypeError(f"{name} needs floating scores, got {x.dtype.name}")
    if target.dtype.kind not in "iu":
        raise DTypeError(
            f"{name}: a target of shape {target.shape} names classes by index and must be int64, "
            f"got {target.dtype.name}; probabilities must have the scores' shape {x.shape}"
        )
    if not x.ndim or target.shape != row_shape(x):
        raise ShapeError(
            f"{name}: scores {x.shape} need a target of shape {row_shape(x) if x.ndim else '(N,)'} "
            f"of class indices, got {target.shape}"
        )
    if weight is not None and weight.shape != (x.shape[class_dim(x)],):
        raise ShapeError(
            f"{name}: weight has shape {weight.shape}, the scores {x.shape} have "
            f"{x.shape[class_dim(x)]} classes"
        )


def _failure(name: str) -> Any:
    def failure(code: int, types: Types) -> IndexRangeError:
        x = type_of(types[0])
        return IndexRangeError(
            f"{name}: target {code} is no class; the scores {x.shape} have "
            f"{x.shape[class_dim(x)]} classes, indices from 0 (ignore_index is skipped)"
        )

    return failure


Operands = dict[str, tuple[str, int, DType, Shape]]  # role, position, dtype, strides


class ClassKernel:
    """A kernel over rows of scores: loads targets, checks them, and knows their class weights.

    operands: by name; the first one decides the order of the loops, None is left out.
    """

    def __init__(self, name: str, x: TensorType, operands: Operands) -> None:
        self.k = KernelBuilder(name)
        self.compute = compute_dtype(x.dtype)
        strides = [o[3] for o in operands.values()]
        self.rows: Rows = rows_of(x.shape, (class_dim(x),), strides)
        self.loops = RowLoops(self.k, self.rows)
        self.found: dict[str, Operand] = {}
        for which, (label, (role, position, dtype, _)) in enumerate(operands.items()):
            made = self.rows.operand(self.k, role, position, dtype, which)  # type: ignore[arg-type]
            self.found[label] = made
        self.classes = self.k.size(x.shape[class_dim(x)])

    def first(self, row: Index) -> Index:
        return (*row, *(const(0) for _ in self.rows.row.sizes))

    def at(self, row: Index, position: Value) -> Index:
        return (*row, *((position,) if self.rows.row.sizes else ()))

    def position(self, index: Index) -> Value:
        """Which class an index of the whole visits."""
        return index[-1] if self.rows.row.sizes else const(0)

    def load(self, label: str, index: Index) -> Value:
        return cast(self.found[label][index], self.compute)

    def number(self, value: float) -> Value:
        return const(value, self.compute)

    def target(self, row: Index, ignore: int, error: Operand | None = None) -> tuple[Value, Value]:
        """(a class that can be loaded, whether the row counts)."""
        given = cast(self.found["target"][self.first(row)], dtypes.int64)
        counts = values.compare("ne", given, const(ignore))
        inside = values.binary(
            "and", values.compare("ge", given, const(0)), values.compare("lt", given, self.classes)
        )
        if error is not None:
            bad = values.binary("and", counts, values.unary("not", inside))
            self.k.store_all(
                [(error, (const(0),), const(1)), (error, (const(1),), given)], where=bad
            )
        good = values.binary("and", counts, inside)
        return values.select(good, given, const(0)), good

    def weight(self, row: Index, chosen: Value) -> Value:
        if "weight" not in self.found:
            return self.number(1.0)
        return self.load("weight", self.at(row, chosen))

    def scale(self, row: Index, counts: Value, *, reduction: str) -> Value:
        """What the gradient of a row's loss is multiplied by; 0 where the row is ignored."""
        scale = self.load("grad", self.first(row))
        if reduction == "mean":
            scale = scale / self.load("total", self.first(row))
        return values.select(counts, scale, self.number(0.0))


def _operands(x: TensorType, weight: Any, target: Any, positions: tuple[int, int, int]) -> Operands:
    """Scores, target and class weights."""
    at_x, at_target, at_weight = positions
    found: Operands = {"x": ("input", at_x, x.dtype, broadcast_strides(x, x.shape))}
    found["target"] = ("input", at_target, target.dtype, _spread(target, x))
    if weight is not None:
        found["weight"] = ("input", at_weight, weight.dtype, _along(weight, x))
    return found


def _per_row(position: int, t: Any, x: TensorType) -> tuple[str, int, DType, Shape]:
    """An input with one number for each row, or one in all."""
    strides = _spread(t, x) if t.ndim and t.ndim == x.ndim - 1 else (0,) * x.ndim
    return "input", position, t.dtype, strides


def _finished(
    rows_kernel: KernelBuilder, rows: TensorType, outputs: tuple[TensorType, ...], *, reduction: str
) -> Lowering:
    """The kernel that fills the temporaries losses (or output 0) and weights, then their sums."""
    k = KernelBuilder("loss_total")
    flat = tensor_type(rows.dtype, (rows.numel,))
    result = flat_loss = None
    if reduction != "none":
        flat_loss = k.tensor("temporary", 1, flat)
        result = k.tensor("output", 0, tensor_type(outputs[0].dtype, ()))
    weight = k.tensor("temporary", 0, flat)
    whole = k.tensor("output", len(outputs) - 1, tensor_type(rows.dtype, ()))
    with k.parallel(work=rows.numel):
        mass, loss = (k.register(0.0, rows.dtype) for _ in range(2))
        with k.vector(k.size(rows.numel), 4) as i:
            k.accumulate(mass, "add", weight[i])
            if flat_loss is not None:
                k.accumulate(loss, "add", flat_loss[i])
        total = values.read(mass)
        k.store(whole, (), total)
        if result is not None:
            summed = values.read(loss)
            k.store(result, (), summed / total if reduction == "mean" else summed)
    nbytes = max(rows.numel, 1) * rows.dtype.itemsize
    return Lowering((rows_kernel.bind(), k.bind()), (nbytes, nbytes))


# --- cross entropy --------------------------------------------------------------------------------


def _infer(
    types: Types, *, ignore_index: int, smoothing: float, reduction: str
) -> tuple[TensorType, ...]:
    x, target = type_of(types[0]), type_of(types[1])
    _check("cross_entropy", x, target, types[2])
    rows = tensor_type(compute_dtype(x.dtype), target.shape, None, x.device)
    loss = tensor_type(x.dtype, target.shape if reduction == "none" else (), None, x.device)
    return loss, rows, tensor_type(rows.dtype, (), None, x.device)


def _row_operands(
    types: Types, outputs: tuple[TensorType, ...], *, reduction: str
) -> tuple[Operands, TensorType]:
    """Operands of a forward kernel: losses, weights of the targets, and their row type."""
    x, target, weight = type_of(types[0]), type_of(types[1]), types[2]
    rows = tensor_type(compute_dtype(x.dtype), target.shape)
    found = _operands(x, weight, target, (0, 1, 2))
    if reduction == "none":
        found["loss"] = ("output", 0, outputs[0].dtype, _spread(outputs[0], x))
    else:
        found["loss"] = ("temporary", 1, rows.dtype, _spread(rows, x))
    found["mass"] = ("temporary", 0, rows.dtype, _spread(rows, x))
    return found, rows


def _lower(
    types: Types, outputs: tuple[TensorType, ...], *, ignore_index: int, smoothing: float,
    reduction: str,
) -> Lowering:  # fmt: skip
    """Outputs: loss; log-sum-exp of each row; the targets' weights summed."""
    x = type_of(types[0])
    operands, rows = _row_operands(types, outputs, reduction=reduction)
    operands["log_sum"] = ("output", 1, rows.dtype, _spread(outputs[1], x))
    kernel = ClassKernel("cross_entropy", x, operands)
    error = kernel.k.tensor("error", 0, tensor_type(dtypes.int64, (2,)))
    with kernel.loops.each_row(passes=6) as row:
        chosen, counts = kernel.target(row, ignore_index, error)
        _row_loss(kernel, row, chosen, counts, smoothing=smoothing)
    return _finished(kernel.k, rows, outputs, reduction=reduction)


def _row_loss(
    kernel: ClassKernel, row: Index, chosen: Value, counts: Value, *, smoothing: float
) -> None:
    k, first = kernel.k, kernel.first(row)
    peak = k.register(float("-inf"), kernel.compute)
    with kernel.loops.each(row) as index:
        k.accumulate(peak, "max", kernel.load("x", index))
    top = values.read(peak)
    sums = [k.register(0.0, kernel.compute) for _ in range(3)]  # of exp, weight, weight * score
    with kernel.loops.each(row) as index:
        score = kernel.load("x", index)
        k.accumulate(sums[0], "add", values.unary("exp", score - top))
        if smoothing:
            weight = kernel.weight(row, kernel.position(index))
            k.accumulate(sums[1], "add", weight)
            k.accumulate(sums[2], "add", weight * (top - score))
    log_sum = values.unary("log", values.read(sums[0]))
    own = kernel.weight(row, chosen)
    loss = own * (log_sum + (top - kernel.load("x", kernel.at(row, chosen))))
    if smoothing:
        spread = values.read(sums[1]) * log_sum + values.read(sums[2])
        share = kernel.number(smoothing) / cast(kernel.classes, kernel.compute)
        loss = loss * kernel.number(1 - smoothing) + spread * share
    zero = kernel.number(0.0)
    k.store(kernel.found["loss"], first, values.select(counts, loss, zero))
    k.store(kernel.found["mass"], first, values.select(counts, own, zero))
    k.store(kernel.found["log_sum"], first, log_sum + top)


def _infer_backward(types: Types, **attributes: Any) -> TensorType:
    x = type_of(types[1])
    return tensor_type(x.dtype, x.shape, like_strides(x.shape, x), x.device)


def _lower_backward(
    types: Types, outputs: tuple[TensorType, ...], *, ignore_index: int, smoothing: float,
    reduction: str,
) -> Lowering:  # fmt: skip
    """Of (grad, x, target, weight, log_sum, total): one pass over the scores."""
    grad, x, target, weight, log_sum, total = types
    x = type_of(x)
    operands = _operands(x, weight, target, (1, 2, 3))
    operands["out"] = ("output", 0, x.dtype, broadcast_strides(outputs[0], x.shape))
    for label, position, t in (("grad", 0, grad), ("log_sum", 4, log_sum), ("total", 5, total)):
        operands[label] = _per_row(position, t, x)
    kernel = ClassKernel("cross_entropy_backward", x, operands)
    with kernel.loops.each_row(passes=4) as row:
        chosen, counts = kernel.target(row, ignore_index)
        _row_gradient(kernel, row, chosen, counts, smoothing=smoothing, reduction=reduction)
    return kernel.k.finish()


def _row_gradient(
    kernel: ClassKernel, row: Index, chosen: Value, counts: Value, *, smoothing: float,
    reduction: str,
) -> None:  # fmt: skip
    k, out, zero = kernel.k, kernel.found["out"], kernel.number(0.0)
    scale = kernel.scale(row, counts, reduction=reduction)
    base = kernel.load("log_sum", kernel.first(row))
    own = kernel.weight(row, chosen) * kernel.number(1 - smoothing)
    share = kernel.number(smoothing) / cast(kernel.classes, kernel.compute)
    mass = own
    if smoothing:
        weights = k.register(0.0, kernel.compute)
        with kernel.loops.each(row) as index:
            k.accumulate(weights, "add", kernel.weight(row, kernel.position(index)))
        mass = own + values.read(weights) * share

    def gradient(index: Index, position: Value) -> Value:
        made = values.unary("exp", kernel.load("x", index) - base) * mass
        return made - kernel.weight(row, position) * share if smoothing else made

    with kernel.loops.each(row) as index:
        made = gradient(index, kernel.position(index)) * scale
        k.store(out, index, values.select(counts, made, zero))
    here = kernel.at(row, chosen)
    k.store(out, here, (gradient(here, chosen) - own) * scale, where=counts)


def _np_parts(x: Any, target: Any, weight: Any, ignore_index: int, smoothing: float) -> Any:
    """(log-probabilities, the distribution aimed at, the targets' weights), classes last."""
    at = 1 if x.ndim > 1 else 0
    scores = np.moveaxis(np.asarray(x, np.float64), at, -1)
    classes = scores.shape[-1]
    peak = scores.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(scores - peak).sum(axis=-1)) + peak[..., 0]
    w = np.ones(classes) if weight is None else np.asarray(weight, np.float64)
    counts = target != ignore_index
    known = np.where(counts, target, 0)
    aim = (1 - smoothing) * np.eye(classes)[known] * w[known][..., None]
    aim = (aim + smoothing / classes * w) * counts[..., None]
    return scores, log_sum, aim, w[known] * counts


def _reference(
    x: Any, target: Any, weight: Any, *, ignore_index: int, smoothing: float, reduction: str
) -> Any:
    scores, log_sum, aim, own = _np_parts(x, target, weight, ignore_index, smoothing)
    loss = (aim * (log_sum[..., None] - scores)).sum(axis=-1)
    if reduction == "mean":
        loss = loss.sum() / own.sum()
    elif reduction == "sum":
        loss = loss.sum()
    return loss, log_sum, own.sum()


def _reference_backward(
    grad: Any, x: Any, target: Any, weight: Any, log_sum: Any, total: Any, *, ignore_index: int,
    smoothing: float, reduction: str,
) -> Any:  # fmt: skip
    scores, _, aim, _ = _np_parts(x, target, weight, ignore_index, smoothing)
    scale = np.asarray(grad, np.float64) / (total if reduction == "mean" else 1.0)
    scale = scale[..., None] if reduction == "none" else scale
    power = np.exp(scores - np.asarray(log_sum, np.float64)[..., None])
    dx = (power * aim.sum(axis=-1, keepdims=True) - aim) * scale
    return np.moveaxis(dx, -1, 1 if x.ndim > 1 else 0)


def _second(
    g: Any, grad: Any, x: Any, target: Any, weight: Any, log_sum: Any, total: Any,
    ignore_index: int, smoothing: float, reduction: str,
) -> Any:  # fmt: skip
    """dx = s (Q p - q): linear in s, and through the probabilities p in x."""
    dim = class_dim(x.type)
    options = {"ignore_index": ignore_index, "smoothing": smoothing, "reduction": reduction}
    ones = _ones(grad)
    slope = cross_entropy_backward(ones, x, target, weight, log_sum, total, **options)
    d_grad = sum_of(g * slope, dim if reduction == "none" else None)
    p = softmax_op(x, dim=dim)
    mass = row_mass(x, target, weight, ignore_index=ignore_index, smoothing=smoothing)
    scale = grad / total if reduction == "mean" else grad
    if reduction == "none" and x.ndim > 1:
        scale = unsqueeze(scale, dim)
    d_x = softmax_backward(g, p, dim=dim) * (unsqueeze(mass, dim) * scale)
    return reshape(d_grad, grad.shape), d_x, None, None, None, None


def _ones(like: Any) -> Any:
    from flame.ops.creation import ones_like

    return ones_like(like.detach())


def row_mass(x: Any, target: Any, weight: Any, *, ignore_index: int, smoothing: float) -> Any:
    """The sum of the distribution that each row aims at."""
    from flame.ops.comparison import ne, where
    from flame.ops.indexing import index_select

    counts = ne(target, ignore_index)
    if weight is None:
        return convert(counts, dtype=x.dtype)
    known = reshape(where(counts, target, 0), (-1,))
    own = reshape(index_select(weight, 0, known), target.shape)
    mass = own * (1 - smoothing) + sum_of(weight) * (smoothing / weight.shape[0])
    return where(counts, mass, 0.0)


def _vjp(
    g: Any, x: Any, target: Any, weight: Any, out: Any, ignore_index: int, smoothing: float,
    reduction: str,
) -> Any:  # fmt: skip
    _, log_sum, total = out
    dx = cross_entropy_backward(
        g, x, target, weight, log_sum, total,
        ignore_index=ignore_index, smoothing=smoothing, reduction=reduction,
    )  # fmt: skip
    return dx, None, None


def _sample(
    shape: Shape, weighted: bool, smoothing: float, reduction: str, ignore: int = -100
) -> Sample:
    classes = shape[1] if len(shape) > 1 else shape[0]
    target = Arg((shape[0], *shape[2:]) if len(shape) > 1 else (), 0, classes, kind="index")
    weight = Arg((classes,), 0.5, 2.0, differentiable=False) if weighted else None
    return Sample(
        (Arg(shape), target, weight),
        {"ignore_index": ignore, "smoothing": smoothing, "reduction": reduction},
    )


_SAMPLES: Final = [
    _sample((5, 7), False, 0.0, "mean"), _sample((4, 5), True, 0.1, "sum"),
    _sample((3, 5, 4), True, 0.0, "none"), _sample((2, 3, 2, 19), False, 0.2, "mean", 1),
    _sample((6,), True, 0.0, "mean"), _sample((3, 70), True, 0.3, "mean"), _sample((3, 1), False, 0.0, "sum"),
    _sample((0, 4), False, 0.0, "sum"), _sample((4, 5), True, 0.0, "none", 2),
]  # fmt: skip


def _backward_sample(sample: Sample) -> Sample:
    x, target, weight = sample.inputs
    rows, plain = target.shape, sample.attributes["reduction"] == "none"
    fixed = {"differentiable": False}
    return Sample(
        (Arg(rows if plain else ()), Arg(x.shape, **fixed), target, weight,
         Arg(rows, 1.0, 2.0, **fixed), Arg((), 1.0, 4.0, **fixed)),
        sample.attributes,
    )  # fmt: skip


cross_entropy_backward: Op = Op(
    "cross_entropy_backward", inputs=("grad", "x", "target", "weight", "log_sum", "total"),
    infer=_infer_backward, lower=_lower_backward, vjp=Joint(_second),
    reference=_reference_backward, samples=[_backward_sample(s) for s in _SAMPLES],
)  # fmt: skip

cross_entropy_op = Op(
    "cross_entropy", inputs=("x", "target", "weight"), infer=_infer, lower=_lower, extras=2,
    vjp=Joint(_vjp), reference=_reference, samples=_SAMPLES, failure=_failure("cross_entropy"),
)  # fmt: skip


# --- negative log-likelihood ----------------------------------------------------------------------


def _infer_nll(types: Types, *, ignore_index: int, reduction: str) -> tuple[TensorType, ...]:
    x, target = type_of(types[0]), type_of(types[1])
    _check("nll_loss", x, target, types[2])
    loss = tensor_type(x.dtype, target.shape if reduction == "none" else (), None, x.device)
    return loss, tensor_type(compute_dtype(x.dtype), (), None, x.device)


def _lower_nll(
    types: Types, outputs: tuple[TensorType, ...], *, ignore_index: int, reduction: str
) -> Lowering:
    """Outputs: loss; the targets' weights summed."""
    x = type_of(types[0])
    operands, rows = _row_operands(types, outputs, reduction=reduction)
    kernel = ClassKernel("nll_loss", x, operands)
    k, zero = kernel.k, kernel.number(0.0)
    error = k.tensor("error", 0, tensor_type(dtypes.int64, (2,)))
    with kernel.loops.each_row() as row:
        first = kernel.first(row)
        chosen, counts = kernel.target(row, ignore_index, error)
        own = kernel.weight(row, chosen)
        loss = -own * kernel.load("x", kernel.at(row, chosen))
        k.store(kernel.found["loss"], first, values.select(counts, loss, zero))
        k.store(kernel.found["mass"], first, values.select(counts, own, zero))
    return _finished(k, rows, outputs, reduction=reduction)


def _lower_nll_backward(
    types: Types, outputs: tuple[TensorType, ...], *, ignore_index: int, reduction: str
) -> Lowering:
    """Of (grad, x, target, weight, total); of x only the type counts."""
    grad, x, target, weight, total = types
    x = type_of(x)
    operands = _operands(x, weight, target, (1, 2, 3))
    operands["out"] = ("output", 0, x.dtype, broadcast_strides(outputs[0], x.shape))
    operands["grad"], operands["total"] = _per_row(0, grad, x), _per_row(4, total, x)
    kernel = ClassKernel("nll_loss_backward", x, operands)
    k, out = kernel.k, kernel.found["out"]
    with kernel.loops.each_row() as row:
        chosen, counts = kernel.target(row, ignore_index)
        scale = kernel.scale(row, counts, reduction=reduction)
        with kernel.loops.each(row) as index:
            k.store(out, index, kernel.number(0.0))
        value = -kernel.weight(row, chosen) * scale
        k.store(out, kernel.at(row, chosen), value, where=counts)
    return k.finish()


def _nll_parts(x: Any, target: Any, weight: Any, ignore_index: int) -> Any:
    """(one-hot targets times weights, the targets' weights), classes last."""
    _, _, aim, own = _np_parts(x, target, weight, ignore_index, 0.0)
    return aim, own


def _reference_nll(x: Any, target: Any, weight: Any, *, ignore_index: int, reduction: str) -> Any:
    aim, own = _nll_parts(x, target, weight, ignore_index)
    scores = np.moveaxis(np.asarray(x, np.float64), 1 if x.ndim > 1 else 0, -1)
    loss = -(aim * scores).sum(axis=-1)
    if reduction == "mean":
        loss = loss.sum() / own.sum()
    elif reduction == "sum":
        loss = loss.sum()
    return loss, own.sum()


def _reference_nll_backward(
    grad: Any, x: Any, target: Any, weight: Any, total: Any, *, ignore_index: int, reduction: str
) -> Any:
    aim, _ = _nll_parts(x, target, weight, ignore_index)
    scale = np.asarray(grad, np.float64) / (total if reduction == "mean" else 1.0)
    scale = scale[..., None] if reduction == "none" else scale
    return np.moveaxis(-aim * scale, -1, 1 if x.ndim > 1 else 0)


def _second_nll(
    g: Any, grad: Any, x: Any, target: Any, weight: Any, total: Any, ignore_index: int,
    reduction: str,
) -> Any:  # fmt: skip
    slope = nll_loss_backward(
        _ones(grad), x, target, weight, total, ignore_index=ignore_index, reduction=reduction
    )
    d_grad = sum_of(g * slope, class_dim(x.type) if reduction == "none" else None)
    return reshape(d_grad, grad.shape), None, None, None, None


def _vjp_nll(
    g: Any, x: Any, target: Any, weight: Any, out: Any, ignore_index: int, reduction: str
) -> Any:
    dx = nll_loss_backward(
        g, x, target, weight, out[1], ignore_index=ignore_index, reduction=reduction
    )
    return dx, None, None


def _plain(sample: Sample, drop: tuple[int, ...] = ()) -> Sample:
    attributes = {k: v for k, v in sample.attributes.items() if k != "smoothing"}
    return Sample(tuple(x for i, x in enumerate(sample.inputs) if i not in drop), attributes)


nll_loss_backward: Op = Op(
    "nll_loss_backward", inputs=("grad", "x", "target", "weight", "total"),
    infer=_infer_backward, lower=_lower_nll_backward, vjp=Joint(_second_nll),
    reference=_reference_nll_backward,
    samples=[_plain(_backward_sample(s), drop=(4,)) for s in _SAMPLES],
)  # fmt: skip

nll_loss_op = Op(
    "nll_loss", inputs=("x", "target", "weight"), infer=_infer_nll, lower=_lower_nll, extras=1,
    vjp=Joint(_vjp_nll), reference=_reference_nll, samples=[_plain(s) for s in _SAMPLES],
    failure=_failure("nll_loss"),
)  # fmt: skip
