"""What the losses over classes share: kernels over rows of scores, and checked targets.

Invariants: scores are (N, C, ...), targets (N, ...) of class indices, checked against C for every
element that is not ignored; the mean is weighted by the class weights of the targets.
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
from flame.ops.elementwise import compute_dtype
from flame.ops.loops import broadcast_strides
from flame.ops.op import Arg, Sample, Types
from flame.ops.rows import Index, RowLoops, Rows, rows_of, type_of

REDUCTIONS: Final = ("none", "mean", "sum")


def row_shape(x: TensorType) -> Shape:
    """The shape of the targets: that of the scores without the classes."""
    return (x.shape[0], *x.shape[2:]) if x.ndim > 1 else ()


def class_dim(x: TensorType) -> int:
    return 1 if x.ndim > 1 else 0


def spread_rows(t: TensorType, x: TensorType) -> Shape:
    """Strides of a tensor over rows in the dimensions of the scores."""
    own = broadcast_strides(t, t.shape)
    at = class_dim(x)
    return (*own[:at], 0, *own[at:])


def _along(t: TensorType, x: TensorType) -> Shape:
    """Strides of a tensor over classes in the dimensions of the scores."""
    strides = [0] * x.ndim
    strides[class_dim(x)] = t.strides[0]
    return tuple(strides)


def check(name: str, x: TensorType, target: TensorType, weight: Any) -> None:
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


def failure_of(name: str) -> Any:
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


def score_operands(
    x: TensorType, weight: Any, target: Any, positions: tuple[int, int, int]
) -> Operands:
    """Scores, target and class weights."""
    at_x, at_target, at_weight = positions
    found: Operands = {"x": ("input", at_x, x.dtype, broadcast_strides(x, x.shape))}
    found["target"] = ("input", at_target, target.dtype, spread_rows(target, x))
    if weight is not None:
        found["weight"] = ("input", at_weight, weight.dtype, _along(weight, x))
    return found


def per_row(position: int, t: Any, x: TensorType) -> tuple[str, int, DType, Shape]:
    """An input with one number for each row, or one in all."""
    strides = spread_rows(t, x) if t.ndim and t.ndim == x.ndim - 1 else (0,) * x.ndim
    return "input", position, t.dtype, strides


def finished(
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
        summed = [weight] if flat_loss is None else [weight, flat_loss]
        sums = [k.register(0.0, rows.dtype) for _ in summed]
        with k.vector(k.size(rows.numel), 4) as i:
            for register, operand in zip(sums, summed, strict=True):
                k.accumulate(register, "add", operand[i])
        mass, *losses = (values.read(register) for register in sums)
        k.store(whole, (), mass)
        if result is not None:
            (loss,) = losses
            k.store(result, (), loss / mass if reduction == "mean" else loss)
    nbytes = max(rows.numel, 1) * rows.dtype.itemsize
    return Lowering((rows_kernel.bind(), k.bind()), (nbytes, nbytes))


def row_operands(
    types: Types, outputs: tuple[TensorType, ...], *, reduction: str
) -> tuple[Operands, TensorType]:
    """Operands of a forward kernel: losses, weights of the targets, and their row type."""
    x, target, weight = type_of(types[0]), type_of(types[1]), types[2]
    rows = tensor_type(compute_dtype(x.dtype), target.shape)
    found = score_operands(x, weight, target, (0, 1, 2))
    if reduction == "none":
        found["loss"] = ("output", 0, outputs[0].dtype, spread_rows(outputs[0], x))
    else:
        found["loss"] = ("temporary", 1, rows.dtype, spread_rows(rows, x))
    found["mass"] = ("temporary", 0, rows.dtype, spread_rows(rows, x))
    return found, rows


def infer_backward(types: Types, **attributes: Any) -> TensorType:
    x = type_of(types[1])
    return tensor_type(x.dtype, x.shape, like_strides(x.shape, x), x.device)


def ones_like(like: Any) -> Any:
    from flame.ops.creation import ones_like

    return ones_like(like.detach())


# --- for references and tests ---------------------------------------------------------------------


def np_parts(x: Any, target: Any, weight: Any, ignore_index: int, smoothing: float) -> Any:
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


SAMPLES: Final = [
    _sample((5, 7), False, 0.0, "mean"), _sample((4, 5), True, 0.1, "sum"),
    _sample((3, 5, 4), True, 0.0, "none"), _sample((2, 3, 2, 19), False, 0.2, "mean", 1),
    _sample((6,), True, 0.0, "mean"), _sample((3, 70), True, 0.3, "mean"),
    _sample((3, 1), False, 0.0, "sum"),
    _sample((0, 4), False, 0.0, "sum"), _sample((4, 5), True, 0.0, "none", 2),
]  # fmt: skip


def backward_sample(sample: Sample) -> Sample:
    x, target, weight = sample.inputs
    rows, plain = target.shape, sample.attributes["reduction"] == "none"
    return Sample(
        (Arg(rows if plain else ()), Arg(x.shape, differentiable=False), target, weight,
         Arg(rows, 1.0, 2.0, differentiable=False), Arg((), 1.0, 4.0, differentiable=False)),
        sample.attributes,
    )  # fmt: skip
