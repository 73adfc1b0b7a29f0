"""Ops that draw: each is one kernel in which every element makes its own bits, see `philox`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, FlameError, ShapeError
from flame.core.types import Shape, TensorType, contiguous_strides, like_strides, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const, read, select, unary
from flame.ops import philox
from flame.ops.elementwise import compute_dtype, walk
from flame.ops.loops import BLOCK, by_stride, coalesce
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Op, Sample, Types, Vjp
from flame.ops.schedules import on_gpu

__all__ = ["Draw", "bernoulli", "drop", "exponential", "integers", "normal", "trial", "uniform"]


class Draw(Op):
    """An op that makes each element from the block of its position; seed and offset come last.

    value(words, operands, dtype): the element, in scalar instructions. shared: four elements share
        a block, and ``words`` are all the one that is the element's own.
    """

    def __init__(
        self,
        name: str,
        value: Callable[..., Value],
        *,
        inputs: Sequence[str],
        reference: Callable[..., Any],
        samples: Sequence[Sample],
        vjp: Vjp = NOT_DIFFERENTIABLE,
        invalid: Callable[..., Value] | None = None,
        failure: Callable[..., FlameError] | None = None,
        shared: bool = False,
    ) -> None:
        self.value, self.invalid, self.shared = value, invalid, shared
        super().__init__(
            name, inputs=(*inputs, "seed", "offset"), infer=self._infer, lower=self._lower, vjp=vjp,
            reference=reference, samples=samples, failure=failure,
        )  # fmt: skip

    def _infer(
        self, types: Types, *, shape: Shape | None = None, dtype: DType | None = None,
        strides: Shape | None = None, device: str = "cpu", **attributes: Any,
    ) -> TensorType:  # fmt: skip
        given = types[0]
        if isinstance(given, TensorType):
            strides = like_strides(given.shape, given)
            return tensor_type(dtype or given.dtype, given.shape, strides, given.device)
        assert shape is not None
        assert dtype is not None
        if any(size < 0 for size in shape):
            raise ShapeError(f"{self.name}: sizes must not be negative, got {shape}")
        return tensor_type(dtype, shape, strides, device)

    def _lower(
        self, types: Types, outputs: tuple[TensorType, ...], *, shape: Shape | None = None,
        dtype: DType | None = None, strides: Shape | None = None, device: str = "cpu",
        **attributes: Any,
    ) -> Lowering:  # fmt: skip
        (out,) = outputs
        k = KernelBuilder(self.name)
        tensors = [t for t in types if isinstance(t, TensorType)]
        layouts = [*(t.strides for t in tensors), out.strides, contiguous_strides(out.shape)]
        nest = coalesce(out.shape, layouts, by_stride(out.strides, out.shape))
        bound = iter(nest.strides)
        operands: list[Operand | Value] = [
            k.tensor("input", position, tensor_type(t.dtype, nest.sizes, next(bound)))
            if isinstance(t, TensorType) else k.number(position, _kind(t))
            for position, t in enumerate(types)
        ]  # fmt: skip
        target = k.tensor("output", 0, tensor_type(out.dtype, nest.sizes, next(bound)))
        steps = [k.stride(s) for s in next(bound)]
        error = k.tensor("error", 0, tensor_type(dtypes.int64, (2,))) if self.invalid else None
        *_, key, offset = operands
        assert isinstance(key, Value)
        assert isinstance(offset, Value)

        def load(index: tuple[Value, ...], where: Value | None = None) -> list[Value]:
            return [
                o.load(*index, where=where) if isinstance(o, Operand) else o for o in operands[:-2]
            ]

        def element(
            index: tuple[Value, ...], words: philox.Words, loaded: list[Value],
            where: Value | None = None,
        ) -> None:  # fmt: skip
            numbers = [
                cast(v, compute_dtype(v.dtype)) if isinstance(o, Operand) else v
                for o, v in zip(operands[:-2], loaded, strict=True)
            ]
            made = self.value(words, numbers, out.dtype, **attributes)
            k.store(target, index, cast(made, compute_dtype(out.dtype)), where=where)
            if error is not None and self.invalid is not None:
                k.store(error, (const(0),), const(1), where=self.invalid(*numbers))

        def body(index: tuple[Value, ...]) -> None:
            position = const(0)
            for i, step in zip(index, steps, strict=True):
                position = position + i * step
            if self.shared:
                words = (philox.shared_word(key, offset, position),) * 4
            else:
                words = philox.words(key, offset + position)
            element(index, words, load(index))

        if self.shared and len(nest.sizes) == 1 and nest.strides[-1] == (1,):
            by_groups = _by_packs if on_gpu(out) else _by_groups
            by_groups(k, nest.sizes[0], key, offset, load, element)
        else:
            walk(k, nest, body, light=False, device=out.device)
        return k.finish()


def _by_groups(
    k: KernelBuilder, count: int, key: Value, offset: Value, load: Callable[..., list[Value]],
    element: Callable[..., None],
) -> None:  # fmt: skip
    """Each block is computed once, for its four elements; the last group is cut off by a mask."""
    total = -(-count // philox.GROUP)
    step = BLOCK // philox.GROUP
    limit = k.size(count)
    with k.parallel(-(-total // step), work=BLOCK) as (part,):
        start = part * step
        extent = values.binary("min", k.size(total) - start, const(step))
        with k.loop(extent) as group, k.vector(philox.RUN) as lane:
            first = (start + group) * philox.GROUP
            words = philox.words(key, offset + (start + group) * philox.RUN + lane)
            for number, word in enumerate(words):
                place = first + number * philox.RUN + lane
                where = place < limit
                element((place,), (word,) * 4, load((place,), where), where)


def _by_packs(
    k: KernelBuilder, count: int, key: Value, offset: Value, load: Callable[..., list[Value]],
    element: Callable[..., None],
) -> None:  # fmt: skip
    """As `_by_groups`, whole groups without masks, so that a thread takes neighbouring blocks, and
    what it reads and writes moves in packs. All is read before anything is drawn."""
    limit = k.size(count)

    def draw(group: Value, lane: Value, *, whole: bool) -> None:
        places = [group * philox.GROUP + number * philox.RUN + lane for number in range(4)]
        inside = [None if whole else place < limit for place in places]
        ahead = [
            [read(k.register(v)) if v.op == "load" else v for v in load((place,), where)]
            for place, where in zip(places, inside, strict=True)
        ]
        words = philox.words(key, offset + group * philox.RUN + lane)
        for place, where, given, word in zip(places, inside, ahead, words, strict=True):
            element((place,), (word,) * 4, given, where)

    with k.parallel(-(-count // philox.GROUP), work=philox.GROUP) as (group,):
        whole = group * philox.GROUP + philox.GROUP <= limit
        with k.when(whole), k.vector(philox.RUN) as lane:
            draw(group, lane, whole=True)
        if count % philox.GROUP:
            with k.when(~whole), k.vector(philox.RUN) as lane:
                draw(group, lane, whole=False)


def _kind(given: Any) -> type:
    assert isinstance(given, type)
    return given


# --- references -----------------------------------------------------------------------------------


def _reference_words(shape: Shape, seed: int, offset: int) -> Any:
    count = math.prod(shape)
    return philox.reference_words(seed, offset, count).reshape(*shape, 4).astype(np.uint64)


def _reference_unit(words: Any, dtype: DType) -> Any:
    if dtype is dtypes.float64:
        return ((words[..., 0] << np.uint64(21)) + (words[..., 1] >> np.uint64(11))) * 2.0**-53
    bits = philox.UNIFORM_BITS[dtype.name]
    return (words[..., 0] >> np.uint64(32 - bits)) * 2.0**-bits


def _reference_positive(words: Any, at: int, dtype: DType) -> Any:
    first, second = words[..., at].astype(float), words[..., at + 1] >> np.uint64(11)
    if dtype is dtypes.float64:
        return first * 2.0**-32 + (second * 2.0**-53 + 2.0**-54)
    return first * 2.0**-32 + 2.0**-33


def _reference_normal(mean: Any, std: Any, seed: int, offset: int, *, shape: Shape, dtype: DType,
                      **_: Any) -> Any:  # fmt: skip
    words = _reference_words(shape, seed, offset)
    angle_words = words[..., 2:] if dtype is dtypes.float64 else words[..., 1:]
    angle = _reference_unit(angle_words, dtype if dtype is dtypes.float64 else dtypes.float32)
    radius = np.sqrt(-2 * np.log(_reference_positive(words, 0, dtype)))
    return (mean + std * radius * np.cos(2 * np.pi * angle)).astype(dtype.numpy)


def _reference_integers(low: int, count: int, seed: int, offset: int, *, shape: Shape, dtype: DType,
                        wide: bool, **_: Any) -> Any:  # fmt: skip
    words = _reference_words(shape, seed, offset)
    whole = words[..., 0].astype(object) * 2**32 + words[..., 1].astype(object)
    made = (whole // 2) % count if wide else (whole * count) // 2**64
    return np.asarray(low + made, object).astype(np.int64).astype(dtype.numpy)


def _samples(numbers: tuple[Any, ...], kinds: tuple[DType, ...], **attributes: Any) -> list[Sample]:
    shapes = ((5, 7), (), (0, 3), (2, 3, 19))
    return [
        Sample((*numbers, 2**40 + 7, 2**32 - 3), {"shape": s, "dtype": d, **attributes})
        for s in shapes for d in kinds
    ]  # fmt: skip


# --- draws ----------------------------------------------------------------------------------------

_FLOATS: Final = (dtypes.float32, dtypes.float64)


def _between(words: philox.Words, numbers: list[Value], dtype: DType) -> Value:
    low, high = (cast(n, compute_dtype(dtype)) for n in numbers)
    return philox.unit(words, dtype) * (high - low) + low


uniform = Draw(
    "uniform", _between, inputs=("low", "high"),
    reference=lambda low, high, seed, offset, *, shape, dtype, **_: (
        _reference_unit(_reference_words(shape, seed, offset), dtype) * (high - low) + low
    ).astype(dtype.numpy),
    samples=_samples((-1.0, 3.0), _FLOATS),
)  # fmt: skip


def _gaussian(words: philox.Words, numbers: list[Value], dtype: DType) -> Value:
    """The cosine half of Box and Muller's pair (1958)."""
    compute = compute_dtype(dtype)
    mean, std = (cast(n, compute) for n in numbers)
    turn = words[2:] if dtype is dtypes.float64 else words[1:]
    angle = philox.unit(turn, compute) * (2 * math.pi)  # type: ignore[arg-type]
    radius = unary("sqrt", unary("log", philox.unit_above_zero(words[0], words[1], compute)) * -2.0)
    return mean + std * (radius * unary("cos", angle))


normal = Draw(
    "normal", _gaussian, inputs=("mean", "std"), reference=_reference_normal,
    samples=_samples((1.0, 2.0), _FLOATS),
)  # fmt: skip


def _decay(words: philox.Words, numbers: list[Value], dtype: DType) -> Value:
    compute = compute_dtype(dtype)
    chance = philox.unit_above_zero(words[0], words[1], compute)
    return unary("log", chance) / -cast(numbers[0], compute)


exponential = Draw(
    "exponential", _decay, inputs=("rate",),
    reference=lambda rate, seed, offset, *, shape, dtype, **_: (
        -np.log(_reference_positive(_reference_words(shape, seed, offset), 0, dtype)) / rate
    ).astype(dtype.numpy),
    samples=_samples((1.5,), _FLOATS),
)  # fmt: skip


def _whole(words: philox.Words, numbers: list[Value], dtype: DType, *, wide: bool) -> Value:
    """low + the upper half of a 64-bit word times count; wide ranges take a remainder instead."""
    low, count = (cast(n, dtypes.uint64) for n in numbers)
    first, second = (cast(w, dtypes.uint64) for w in words[:2])
    if wide:
        joined = ((first << 32) | second) >> 1
        made = values.binary("urem", joined, count)
    else:
        made = (first * count + ((second * count) >> 32)) >> 32
    return cast(low + made, dtypes.int64)


integers = Draw(
    "integers", _whole, inputs=("low", "count"), reference=_reference_integers,
    samples=[*_samples((-3, 10), (dtypes.int64, dtypes.float32), wide=False),
             *_samples((0, 2**62), (dtypes.int64,), wide=True)],
)  # fmt: skip


def _success(words: philox.Words, numbers: list[Value], dtype: DType) -> Value:
    (chance,) = numbers
    compute = dtypes.float64 if chance.dtype is dtypes.float64 else dtypes.float32
    return philox.unit(words, compute) < cast(chance, compute)


def _no_chance(chance: Value) -> Value:
    return (chance < 0) | (chance > 1) | unary("is_nan", chance)


bernoulli = Draw(
    "bernoulli", _success, inputs=("p",),
    reference=lambda p, seed, offset, **_: (
        _reference_unit(
            _reference_words(p.shape, seed, offset),
            dtypes.float64 if p.dtype == np.float64 else dtypes.float32,
        )
        < p
    ).astype(p.dtype),
    samples=[Sample((Arg(s, 0.0, 1.0), 11, 5)) for s in ((5, 7), (), (0, 3), (2, 3, 19))],
    invalid=_no_chance,
    failure=lambda code, types: ArgumentError("bernoulli: every probability must lie in [0, 1]"),
)  # fmt: skip


trial = Draw(
    "trial", _success, inputs=("p",),  # one probability, known at run time
    reference=lambda p, seed, offset, *, shape, dtype, **_: (
        _reference_unit(_reference_words(shape, seed, offset), dtypes.float64) < p
    ).astype(dtype.numpy),
    samples=_samples((0.3,), (dtypes.float32, dtypes.bool_)),
)  # fmt: skip


def _kept(words: philox.Words, operands: list[Value], dtype: DType) -> Value:
    x, p, scale = operands
    return select(philox.at_least(words, p), x * cast(scale, x.dtype), const(0, x.dtype))


# Dropping is linear and each element sees itself alone, so it is its own transpose: backward draws
# the same bits again from the saved seed and offset, and no mask is stored.
drop: Draw = Draw(
    "dropout", _kept, inputs=("x", "p", "scale"),
    vjp=(
        lambda g, p, scale, seed, offset: drop(g, p, scale, seed, offset),
        None, None, None, None,
    ),
    reference=lambda x, p, scale, seed, offset: np.where(
        (philox.reference_shared(seed, offset, x.size) >> 8).reshape(x.shape) * 2.0**-24
        >= np.float32(p),
        x * scale, 0,
    ).astype(x.dtype),
    samples=[
        Sample((Arg(s), 0.3, 1 / 0.7, 11, 5)) for s in ((5, 7), (), (0, 3), (2, 3, 19), (300,))
    ],
    shared=True,
)  # fmt: skip
