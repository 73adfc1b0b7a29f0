"""The kind of op that computes each output element from the elements at the same place.

A scalar function declares it. The function, and the derivative formulas, are written with public
ops; handed scalar values, they become one fused kernel, handed tensors, ordinary differentiable
code. So the backward pass of an elementwise op is one kernel, and higher orders come for free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.autocast import Policy
from flame.core.dtypes import DType
from flame.core.errors import DTypeError, FlameError
from flame.core.types import TensorType, contiguous_strides, like_strides, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.evaluate import evaluate
from flame.kernel.values import Value, cast, const
from flame.ops.loops import Nest, broadcast_shapes, broadcast_strides, by_stride, coalesce
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Op, Sample, Types, Vjp
from flame.ops.schedules import block_of

LIGHT: Final = 16  # instructions up to which a vector loop is unrolled


def compute_dtype(dtype: DType) -> DType:
    """What arithmetic on ``dtype`` is done in: half-width floats in float32."""
    return dtypes.float32 if dtype.kind == "f" and dtype.bits == 16 else dtype


def common_dtype(types: Types) -> DType:
    """The promoted dtype of operands."""
    return dtypes.result_type(
        tuple(t.dtype for t in types if isinstance(t, TensorType) and t.ndim),
        tuple(t.dtype for t in types if isinstance(t, TensorType) and not t.ndim),
        tuple(t for t in types if isinstance(t, type)),
        dtypes.get_default_dtype(),
    )


def floating(dtype: DType) -> DType:
    """``dtype``, or the default floating dtype for integers and bool."""
    return dtype if dtype.kind == "f" else dtypes.get_default_dtype()


Rule = Callable[[str, Types], tuple[Sequence[DType], Sequence[DType]]]


def promote(name: str, types: Types) -> tuple[Sequence[DType], Sequence[DType]]:
    """All operands and the result in their common dtype."""
    common = common_dtype(types)
    return [common] * len(types), [common]


def to_float(name: str, types: Types) -> tuple[Sequence[DType], Sequence[DType]]:
    """As `promote`, with integers taken as the default floating dtype."""
    common = floating(common_dtype(types))
    return [common] * len(types), [common]


def to_bool(name: str, types: Types) -> tuple[Sequence[DType], Sequence[DType]]:
    """Operands in their common dtype, a bool result."""
    return [common_dtype(types)] * len(types), [dtypes.bool_]


def no_bool(name: str, types: Types) -> tuple[Sequence[DType], Sequence[DType]]:
    """As `promote`; bool is refused."""
    common = common_dtype(types)
    if common.kind == "b":
        raise DTypeError(
            f"{name} is not defined for bool tensors; convert them, or use logical ops"
        )
    return [common] * len(types), [common]


def integral(name: str, types: Types) -> tuple[Sequence[DType], Sequence[DType]]:
    """As `promote`; floats are refused."""
    common = common_dtype(types)
    if common.kind == "f":
        raise DTypeError(f"{name} takes integer or bool tensors, got {common.name}")
    return [common] * len(types), [common]


class Elementwise(Op):
    """An op given by ``scalar(*values, **attributes)``; see `elementwise`."""

    def __init__(
        self,
        name: str,
        scalar: Callable[..., Any],
        *,
        inputs: Sequence[str],
        rule: Rule,
        vjp: Vjp,
        reference: Callable[..., Any] | None,
        samples: Sequence[Sample] = (),
        register: bool = True,
        tolerance: float = 1.0,
        invalid: Callable[..., Value | None] | None = None,
        failure: Callable[..., FlameError] | None = None,
        autocast: Policy | None = None,
    ) -> None:
        self.scalar = scalar
        self.rule = rule
        self.invalid = invalid
        self.backward_ops: dict[Any, Elementwise] = {}
        super().__init__(
            name,
            inputs=inputs,
            infer=self._infer,
            lower=self._lower,
            vjp=vjp,
            failure=failure,
            reference=reference or self.evaluate,
            samples=samples,
            tolerance=tolerance,
            register=register,
            autocast=autocast,
        )

    def inline(self, inputs: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
        types = tuple(
            tensor_type(x.dtype, (1,)) if isinstance(x, Value) else type(x) for x in inputs
        )
        operand_dtypes, results = self.rule(self.name, types)
        operands = [
            _as_value(x, compute_dtype(d)) for x, d in zip(inputs, operand_dtypes, strict=True)
        ]
        made = self.scalar(*operands, **attributes)
        if isinstance(made, tuple):
            return made
        return cast(made, compute_dtype(results[0]))

    def _infer(self, types: Types, **attributes: Any) -> Any:
        tensors = [t for t in types if isinstance(t, TensorType)]
        if any(t is None for t in types):
            raise DTypeError(f"{self.name}: an operand is missing")
        shape = broadcast_shapes(self.name, [t.shape for t in tensors])
        _, results = self.rule(self.name, types)
        strides = contiguous_strides(shape)
        for t in tensors:
            if t.shape == shape and (t.dense or (t.device != "cpu" and not t.repeats)):
                strides = like_strides(shape, t)
                break
        made = tuple(tensor_type(dtype, shape, strides) for dtype in results)
        return made[0] if len(made) == 1 else made

    def _lower(self, types: Types, outputs: tuple[TensorType, ...], **attributes: Any) -> Lowering:
        operand_dtypes, _ = self.rule(self.name, types)
        k = KernelBuilder(self.name)
        nest = nest_of(types, outputs)
        bound = iter(nest.strides)
        sources: list[Operand | Value] = []
        for position, t in enumerate(types):
            if isinstance(t, TensorType):
                flat = tensor_type(t.dtype, nest.sizes, next(bound))
                sources.append(k.tensor("input", position, flat))
            else:
                assert isinstance(t, type)
                sources.append(k.number(position, t))
        targets = [
            k.tensor("output", i, tensor_type(o.dtype, nest.sizes, next(bound)))
            for i, o in enumerate(outputs)
        ]

        error = None
        leaves = [values.param(f"x{i}", compute_dtype(d)) for i, d in enumerate(operand_dtypes)]
        if self.invalid is not None and self.invalid(*leaves) is not None:
            error = k.tensor("error", 0, tensor_type(dtypes.int64, (2,)))

        def body(index: tuple[Value, ...]) -> None:
            loaded = [
                cast(s[index] if isinstance(s, Operand) else s, compute_dtype(d))
                for s, d in zip(sources, operand_dtypes, strict=True)
            ]
            made = self.scalar(*loaded, **attributes)
            results = made if isinstance(made, tuple) else (made,)
            k.store_all([(t, index, r) for t, r in zip(targets, results, strict=True)])
            if error is not None and self.invalid is not None:
                k.store(error, (const(0),), const(1), where=self.invalid(*loaded))

        light = self._instructions(operand_dtypes, attributes) <= LIGHT
        walk(k, nest, body, light=light, device=outputs[0].device)
        return k.finish()

    def _instructions(self, operand_dtypes: Sequence[DType], attributes: dict[str, Any]) -> int:
        leaves = [values.param(f"x{i}", compute_dtype(d)) for i, d in enumerate(operand_dtypes)]
        made = self.scalar(*leaves, **attributes)
        return weight(made if isinstance(made, tuple) else (made,))

    def backward(self, needs: tuple[bool, ...], types: Types) -> Elementwise:
        """The fused op (g, saved...) -> gradients of the needed inputs; see `backward_names`."""
        key = (needs, tuple(t.dtype if isinstance(t, TensorType) else t for t in types))
        found = self.backward_ops.get(key)
        if found is None:
            found = self.backward_ops[key] = self._make_backward(needs, types)
        return found

    def backward_names(self, needs: tuple[bool, ...]) -> tuple[str, ...]:
        """What the formulas of the needed inputs keep, without repeats."""
        wanted = [f.saved for f, n in zip(self.formulas, needs, strict=True) if n and f is not None]
        return tuple(dict.fromkeys(name for saved in wanted for name in saved))

    def _make_backward(self, needs: tuple[bool, ...], types: Types) -> Elementwise:
        names = self.backward_names(needs)
        formulas = [f for f, n in zip(self.formulas, needs, strict=True) if n]
        results = [
            t.dtype for t, n in zip(types, needs, strict=True) if n and isinstance(t, TensorType)
        ]
        operand_dtypes, (result, *_) = self.rule(self.name, types)
        by_name = dict(zip(self.inputs, operand_dtypes, strict=True))

        def scalar(g: Value, *saved: Value, **attributes: Any) -> tuple[Value, ...]:
            known = {"g": g, **attributes, **dict(zip(names, saved, strict=True))}
            made = []
            for formula, dtype in zip(formulas, results, strict=True):
                assert formula is not None
                value = formula.function(*(known[name] for name in formula.names))
                made.append(_as_value(value, compute_dtype(dtype)))
            return tuple(made)

        def rule(name: str, given: Types) -> tuple[Sequence[DType], Sequence[DType]]:
            first = given[0].dtype if isinstance(given[0], TensorType) else result
            kept = [by_name.get(n, first) for n in names]
            return [first, *kept], results

        return Elementwise(
            f"{self.name}_backward",
            scalar,
            inputs=("g", *names),
            rule=rule,
            vjp=NOT_DIFFERENTIABLE,
            reference=None,
            register=False,
        )

    def traced(
        self, types: Types, attributes: Mapping[str, Any]
    ) -> tuple[list[Value], list[Value]]:
        """(parameters, results): the scalar function as values, before results are stored."""
        operand_dtypes, _ = self.rule(self.name, types)
        leaves = [values.param(f"x{i}", compute_dtype(d)) for i, d in enumerate(operand_dtypes)]
        made = self.scalar(*leaves, **attributes)
        return leaves, list(made) if isinstance(made, tuple) else [made]

    def evaluate(self, *operands: Any, **attributes: Any) -> Any:
        """The op by NumPy: the meaning of ops that are derived from a function, not declared."""
        types = tuple(
            tensor_type(dtypes.from_numpy(x.dtype), x.shape)
            if isinstance(x, np.ndarray)
            else type(x)
            for x in operands
        )
        leaves, results = self.traced(types, attributes)
        found = evaluate(results, dict(zip(leaves, operands, strict=True)))
        shape = broadcast_shapes(self.name, [np.shape(x) for x in operands])
        made = tuple(
            np.broadcast_to(x, shape).astype(d.numpy)
            for x, d in zip(found, self.rule(self.name, types)[1], strict=True)
        )
        return made[0] if len(made) == 1 else made


def _as_value(x: Any, dtype: DType) -> Value:
    return cast(x, dtype) if isinstance(x, Value) else values.const(x, dtype)


_LIGHT_UNARY: Final = ("neg", "abs", "not", "sqrt", "is_nan", "floor", "ceil", "trunc", "round")
_HEAVY_BINARY: Final = ("pow", "atan2", "floordiv", "mod")


def weight(results: Sequence[Value]) -> int:
    """About how many instructions compute the values, each shared one counted once."""
    total, seen, waiting = 0, set(), list(results)
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        waiting += value.args
        heavy = value.op in values.UNARY and value.op not in _LIGHT_UNARY
        total += LIGHT if heavy or value.op in _HEAVY_BINARY else 1
    return total


def nest_of(types: Types, outputs: Sequence[TensorType]) -> Nest:
    """The loop nest over the outputs' common shape, for tensor inputs and then outputs."""
    shape = outputs[0].shape
    tensors = [t for t in types if isinstance(t, TensorType)]
    strides = [broadcast_strides(t, shape) for t in (*tensors, *outputs)]
    return coalesce(shape, strides, by_stride(outputs[0].strides, shape))


def walk(
    k: KernelBuilder, nest: Nest, body: Callable[[tuple[Value, ...]], None], *, light: bool,
    device: str,
) -> None:  # fmt: skip
    """Run ``body`` for every index of ``nest``: parallel outside, vectors inside."""
    unroll = 4 if light else 1
    if len(nest.sizes) <= 1:
        count = nest.sizes[0] if nest.sizes else 1
        size = block_of(count, device)
        with k.parallel(-(-count // size), work=size) as (block,):
            start = block * size
            extent = values.binary("min", k.size(count) - start, values.const(size))
            with k.vector(extent, unroll) as i:
                body((start + i,) if nest.sizes else ())
        return
    inner = nest.sizes[-1]
    with k.parallel(*nest.sizes[:-1], work=inner) as outer, k.vector(k.size(inner), unroll) as i:
        body((*outer, i))


def elementwise(
    name: str,
    scalar: Callable[..., Any],
    *,
    vjp: Vjp,
    reference: Callable[..., Any],
    inputs: Sequence[str] = ("x",),
    rule: Rule = promote,
    domain: tuple[float, float] = (-3.0, 3.0),
    avoid: tuple[float, ...] = (),
    samples: Sequence[Sample] | None = None,
    tolerance: float = 1.0,
    invalid: Callable[..., Value | None] | None = None,
    failure: Callable[..., FlameError] | None = None,
    autocast: Policy | None = None,
) -> Elementwise:
    """Declare an elementwise op.

    scalar: its meaning on scalar values, written with `flame.kernel.values` or with other
        elementwise ops. vjp: one formula an input, see `Formula`. domain, avoid: where tests draw.
    invalid: gives the condition on which the operands of a place are refused, None for dtypes of
    which
        none is; ``failure`` then makes the error.
    """
    if samples is None:
        samples = default_samples(len(inputs), domain, avoid, rule)
    return Elementwise(
        name,
        scalar,
        inputs=inputs,
        rule=rule,
        vjp=vjp,
        reference=reference,
        samples=samples,
        tolerance=tolerance,
        invalid=invalid,
        failure=failure,
        autocast=autocast,
    )


def default_samples(
    count: int, domain: tuple[float, float], avoid: tuple[float, ...], rule: Rule
) -> list[Sample]:
    """Shapes with broadcasting, ranks 0 to 3, and sizes 0 and 1."""
    kind = "int" if rule is integral else "any" if rule is to_bool else "float"

    def arg(shape: tuple[int, ...]) -> Arg:
        return Arg(shape, *domain, kind=kind, avoid=avoid)

    shapes: list[list[tuple[int, ...]]] = [
        [(5, 7)] * count,
        [()] * count,
        [(0, 3)] * count,
        [(2, 3, 19)] * count,
    ]
    if count > 1:
        shapes += [[(3, 1, 5), (4, 1)] + [(1,)] * (count - 2), [(2, 6), ()] + [(6,)] * (count - 2)]
    return [Sample(tuple(arg(s) for s in each)) for each in shapes]


def scalar_unary(op: str) -> Callable[[Value], Value]:
    return lambda x: values.unary(op, x)


def scalar_binary(op: str) -> Callable[[Value, Value], Value]:
    return lambda x, y: values.binary(op, x, y)


def scalar_compare(op: str) -> Callable[[Value, Value], Value]:
    return lambda x, y: values.compare(op, x, y)
