"""Random tensors. Each draw is one kernel in which every element makes its own bits, see `philox`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError, FlameError, ShapeError
from flame.core.types import Shape, TensorType, contiguous_strides, like_strides, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const, select, unary
from flame.ops import philox
from flame.ops.creation import shape_of
from flame.ops.elementwise import compute_dtype, walk
from flame.ops.generator import (
    Generator, default_generator, get_rng_state, initial_seed, manual_seed, seed, set_rng_state,
)  # fmt: skip
from flame.ops.loops import by_stride, coalesce
from flame.ops.op import NOT_DIFFERENTIABLE, Arg, Op, Sample, Types, Vjp
from flame.ops.sorting import argsort

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "Generator", "bernoulli", "default_generator", "dropout", "feature_dropout", "get_rng_state",
    "initial_seed", "manual_seed", "multinomial", "normal", "rand", "rand_like", "randint",
    "randint_like", "randn", "randn_like", "randperm", "seed", "set_rng_state",
]  # fmt: skip
METHODS = (
    "bernoulli", "bernoulli_", "exponential_", "multinomial", "normal_", "random_", "uniform_",
)  # fmt: skip


class Draw(Op):
    """An op that makes each element from the block of its position; seed and offset come last.

    value(words, operands, dtype): the element, in scalar instructions.
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
    ) -> None:
        self.value, self.invalid = value, invalid
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

        def body(index: tuple[Value, ...]) -> None:
            loaded = [
                cast(o[index], compute_dtype(o.dtype)) if isinstance(o, Operand) else o
                for o in operands
            ]
            *rest, key, block = loaded
            for i, step in zip(index, steps, strict=True):
                block = block + i * step
            made = self.value(philox.words(key, block), rest, out.dtype, **attributes)
            k.store(target, index, cast(made, compute_dtype(out.dtype)))
            if error is not None and self.invalid is not None:
                k.store(error, (const(0),), const(1), where=self.invalid(*rest))

        walk(k, nest, body, light=False)
        return k.finish()


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


_uniform = Draw(
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


_normal = Draw(
    "normal", _gaussian, inputs=("mean", "std"), reference=_reference_normal,
    samples=_samples((1.0, 2.0), _FLOATS),
)  # fmt: skip


def _decay(words: philox.Words, numbers: list[Value], dtype: DType) -> Value:
    compute = compute_dtype(dtype)
    chance = philox.unit_above_zero(words[0], words[1], compute)
    return unary("log", chance) / -cast(numbers[0], compute)


_exponential = Draw(
    "exponential", _decay, inputs=("rate",),
    reference=lambda rate, seed, offset, *, shape, dtype, **_: (
        -np.log(_reference_positive(_reference_words(shape, seed, offset), 0, dtype)) / rate
    ).astype(dtype.numpy),
    samples=_samples((1.5,), _FLOATS),
)  # fmt: skip


def _whole(words: philox.Words, numbers: list[Value], dtype: DType, *, wide: bool) -> Value:
    """low + the upper half of a 64-bit word times count; of a remainder where that needs more bits."""
    low, count = (cast(n, dtypes.uint64) for n in numbers)
    first, second = (cast(w, dtypes.uint64) for w in words[:2])
    if wide:
        joined = ((first << 32) | second) >> 1
        made = values.binary("urem", joined, count)
    else:
        made = (first * count + ((second * count) >> 32)) >> 32
    return cast(low + made, dtypes.int64)


_integers = Draw(
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


_bernoulli = Draw(
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


_trial = Draw(
    "trial", _success, inputs=("p",),  # one probability, known at run time
    reference=lambda p, seed, offset, *, shape, dtype, **_: (
        _reference_unit(_reference_words(shape, seed, offset), dtypes.float64) < p
    ).astype(dtype.numpy),
    samples=_samples((0.3,), (dtypes.float32, dtypes.bool_)),
)  # fmt: skip


def _kept(words: philox.Words, operands: list[Value], dtype: DType) -> Value:
    x, p, scale = operands
    keep = philox.unit(words, dtypes.float32) >= cast(p, dtypes.float32)
    return select(keep, x * cast(scale, x.dtype), const(0, x.dtype))


# Dropping is linear and each element sees itself alone, so it is its own transpose: backward draws the
# same bits again from the saved seed and offset, and no mask is stored.
_dropout = Draw(
    "dropout", _kept, inputs=("x", "p", "scale"),
    vjp=(
        lambda g, p, scale, seed, offset: _dropout(g, p, scale, seed, offset),
        None, None, None, None,
    ),
    reference=lambda x, p, scale, seed, offset: np.where(
        _reference_unit(_reference_words(x.shape, seed, offset), dtypes.float32) >= np.float32(p),
        x * scale, 0,
    ).astype(x.dtype),
    samples=[Sample((Arg(s), 0.3, 1 / 0.7, 11, 5)) for s in ((5, 7), (), (0, 3), (2, 3, 19))],
)  # fmt: skip


# --- public functions -----------------------------------------------------------------------------


def _place(generator: Generator | None, shape: Shape) -> tuple[int, int]:
    return (generator or default_generator).reserve(math.prod(shape))


def _create(
    op: Draw, numbers: tuple[Any, ...], shape: Shape, dtype: DType | None, device: Any,
    generator: Generator | None, requires_grad: bool, **attributes: Any,
) -> Tensor:  # fmt: skip
    from flame.tensor import check_device

    dtype = dtype or dtypes.get_default_dtype()
    made: Tensor = op(
        *numbers, *_place(generator, shape), shape=shape, dtype=dtype, device=check_device(device),
        **attributes,
    )  # fmt: skip
    return made.requires_grad_() if requires_grad else made


def _floating_only(name: str, dtype: DType | None) -> None:
    if dtype is not None and dtype.kind != "f":
        raise DTypeError(f"{name} makes floating tensors, got dtype {dtype.name}; see randint")


def rand(
    *size: Any, generator: Generator | None = None, dtype: DType | None = None, device: Any = None,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """Numbers from [0, 1), uniformly."""
    _floating_only("rand", dtype)
    return _create(_uniform, (0.0, 1.0), shape_of(*size), dtype, device, generator, requires_grad)


def randn(
    *size: Any, generator: Generator | None = None, dtype: DType | None = None, device: Any = None,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """Numbers from the normal distribution of mean 0 and variance 1."""
    _floating_only("randn", dtype)
    return _create(_normal, (0.0, 1.0), shape_of(*size), dtype, device, generator, requires_grad)


def rand_like(
    input: Tensor, *, generator: Generator | None = None, dtype: DType | None = None,
    device: Any = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """As `rand`, with the shape, layout and dtype of ``input``."""
    return _like(_uniform, (0.0, 1.0), input, dtype, device, generator, requires_grad)


def randn_like(
    input: Tensor, *, generator: Generator | None = None, dtype: DType | None = None,
    device: Any = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """As `randn`, with the shape, layout and dtype of ``input``."""
    return _like(_normal, (0.0, 1.0), input, dtype, device, generator, requires_grad)


def _like(
    op: Draw, numbers: tuple[Any, ...], input: Tensor, dtype: DType | None, device: Any,
    generator: Generator | None, requires_grad: bool, **attributes: Any,
) -> Tensor:  # fmt: skip
    if op is not _integers:
        _floating_only(op.name, dtype or input.dtype)
    strides = like_strides(input.shape, input.type)
    return _create(
        op, numbers, input.shape, dtype or input.dtype, device, generator, requires_grad,
        strides=strides, **attributes,
    )  # fmt: skip


def _range(name: str, low: int, high: int) -> tuple[tuple[int, int], dict[str, bool]]:
    """The numbers and attributes of a draw from [low, high)."""
    if not high > low:
        raise ArgumentError(f"{name}: needs low < high, got [{low}, {high})")
    count = int(high) - int(low)
    if count > 2**63:
        raise ArgumentError(f"{name}: a range of {count} numbers does not fit 63 bits")
    return (int(low), count - 2**64 if count == 2**63 else count), {"wide": count > 2**32}


def randint(
    low: int, high: Any = None, size: Any = None, *, generator: Generator | None = None,
    dtype: DType | None = None, device: Any = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """Whole numbers from [low, high), uniformly; ``randint(high, size)`` starts at 0. int64."""
    if size is None:
        low, high, size = 0, low, high
    if size is None:
        raise ArgumentError("randint: give the size, as in randint(10, (3, 4))")
    numbers, attributes = _range("randint", low, high)
    return _create(
        _integers, numbers, shape_of(size), dtype or dtypes.int64, device, generator, requires_grad,
        **attributes,
    )  # fmt: skip


def randint_like(
    input: Tensor, low: int, high: int | None = None, *, generator: Generator | None = None,
    dtype: DType | None = None, device: Any = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """As `randint`, with the shape, layout and dtype of ``input``."""
    if high is None:
        low, high = 0, low
    numbers, attributes = _range("randint_like", low, high)
    return _like(
        _integers, numbers, input, dtype, device, generator, requires_grad, **attributes
    )


def randperm(
    n: int, *, generator: Generator | None = None, dtype: DType | None = None, device: Any = None,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """The numbers 0 to n - 1 in random order, by sorting n random keys; int64."""
    if n < 0:
        raise ArgumentError(f"randperm: n must not be negative, got {n}")
    keys = randint(0, 2**63 - 1, (n,), generator=generator, device=device)
    made: Tensor = argsort(keys).to(dtype or dtypes.int64)
    return made.requires_grad_() if requires_grad else made


def bernoulli(
    input: Tensor, p: float | None = None, *, generator: Generator | None = None
) -> Tensor:
    """1 with the probability that ``input`` gives (or the number ``p``), else 0.

    Raises ArgumentError for probabilities outside [0, 1].
    """
    if p is not None:
        return input.clone().bernoulli_(p, generator=generator)  # type: ignore[no-any-return]
    if input.dtype.kind != "f":
        raise DTypeError(f"bernoulli takes floating probabilities, got {input.dtype.name}")
    made: Tensor = _bernoulli(input, *_place(generator, input.shape))
    return made


def normal(
    mean: Any, std: Any = 1.0, size: Any = None, *, generator: Generator | None = None,
    dtype: DType | None = None, device: Any = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """Normal numbers. mean, std: tensors that broadcast, or numbers (both: then give ``size``)."""
    tensors = [x for x in (mean, std) if hasattr(x, "storage")]
    if not tensors:
        if size is None:
            raise ArgumentError("normal: give the size, as in normal(0.0, 1.0, (3, 4))")
        _check_std(std)
        numbers = (float(mean), float(std))
        return _create(_normal, numbers, shape_of(size), dtype, device, generator, requires_grad)
    if size is not None:
        raise ArgumentError("normal: size goes with numbers only; tensors give the shape")
    if std is not tensors[-1]:
        _check_std(std)
    elif bool((std < 0).any()):
        raise ArgumentError("normal: every std must be at least 0")
    shape = (mean + std).shape
    made: Tensor = mean + std * randn(shape, generator=generator, dtype=tensors[0].dtype)
    return made


def _check_std(std: float) -> None:
    if not std >= 0:
        raise ArgumentError(f"normal: std must be at least 0, got {std}")


def multinomial(
    input: Tensor, num_samples: int, replacement: bool = False, *,
    generator: Generator | None = None,
) -> Tensor:  # fmt: skip
    """Indices drawn with the probabilities of the rows of ``input``, which need not sum to 1.

    input: (n,) or (m, n), not negative. Result: int64, (num_samples,) or (m, num_samples). With
    replacement by the inverse of the distribution function; without, the num_samples largest of
    weight / exponential number. Raises ArgumentError for weights that are negative, not finite, or 0
    in a whole row, and for more samples than weights above 0 allow without replacement.
    """
    from flame.ops import multinomials

    return multinomials.draw(input, num_samples, replacement, generator)


# --- in place -------------------------------------------------------------------------------------


def _fill(
    op: Draw, input: Tensor, numbers: tuple[Any, ...], generator: Generator | None,
    **attributes: Any,
) -> Tensor:  # fmt: skip
    shape = input.shape
    place = _place(generator, shape)
    op.into((input,), *numbers, *place, shape=shape, dtype=input.dtype, **attributes)
    return input


def uniform_(
    input: Tensor, from_: float = 0.0, to: float = 1.0, *, generator: Generator | None = None,
    **named: float,
) -> Tensor:  # fmt: skip
    """Fill with numbers from [from, to), uniformly. Raises ArgumentError for from > to."""
    low = named.pop("from", from_)
    if named:
        raise ArgumentError(f"uniform_() has no argument {next(iter(named))!r}")
    if not low <= to:
        raise ArgumentError(f"uniform_: needs from <= to, got [{low}, {to})")
    _floating_only("uniform_", input.dtype)
    return _fill(_uniform, input, (float(low), float(to)), generator)


def normal_(
    input: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Generator | None = None
) -> Tensor:
    """Fill with normal numbers. Raises ArgumentError for a negative std."""
    _check_std(std)
    _floating_only("normal_", input.dtype)
    return _fill(_normal, input, (float(mean), float(std)), generator)


def exponential_(
    input: Tensor, lambd: float = 1.0, *, generator: Generator | None = None
) -> Tensor:
    """Fill with numbers of density lambd * exp(-lambd * x), all above 0."""
    if not lambd > 0:
        raise ArgumentError(f"exponential_: lambd must be above 0, got {lambd}")
    _floating_only("exponential_", input.dtype)
    return _fill(_exponential, input, (float(lambd),), generator)


def bernoulli_(input: Tensor, p: Any = 0.5, *, generator: Generator | None = None) -> Tensor:
    """Fill with 1 with probability ``p`` (a number, or a tensor that broadcasts), else 0."""
    if hasattr(p, "storage"):
        return input.copy_(bernoulli(p.expand(input.shape), generator=generator))  # type: ignore[no-any-return]
    if not 0 <= p <= 1:
        raise ArgumentError(f"bernoulli_: p must lie in [0, 1], got {p}")
    return _fill(_trial, input, (float(p),), generator)


_LARGEST_WHOLE: Final = {"float16": 2**11, "bfloat16": 2**8, "float32": 2**24, "float64": 2**53,
                         "bool": 1}  # fmt: skip


def random_(
    input: Tensor, from_: int = 0, to: int | None = None, *, generator: Generator | None = None
) -> Tensor:
    """Fill with whole numbers from [from, to), ``random_(to)`` from 0.

    Without an end, up to the largest number below which the dtype holds all of them.
    """
    if to is None and from_:
        from_, to = 0, from_
    if to is None:
        dtype = input.dtype
        held = _LARGEST_WHOLE.get(dtype.name)
        to = 1 + (values.integer_range(dtype)[1] if held is None else held)
    numbers, attributes = _range("random_", from_, to)
    return _fill(_integers, input, numbers, generator, **attributes)


# --- dropout --------------------------------------------------------------------------------------


def _check_chance(name: str, p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ArgumentError(f"{name}: p must lie in [0, 1], got {p}")


def dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Zero each element with probability ``p`` and scale the others by 1 / (1 - p), in training.

    Source: Srivastava et al., "Dropout", 2014. Raises ArgumentError for p outside [0, 1].
    """
    _check_chance("dropout", p)
    _floating_only("dropout", input.dtype)
    if not training or p == 0:
        return input
    scale = 0.0 if p == 1 else 1.0 / (1.0 - p)
    place = default_generator.reserve(input.type.numel)
    if inplace:
        _dropout.into((input,), input, float(p), scale, *place)
        return input
    result: Tensor = _dropout(input, float(p), scale, *place)
    return result


def feature_dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Zero whole channels (dimension 1) with probability ``p`` and scale the others.

    input: (N, C, ...). Source: Tompson et al., "Efficient object localization", 2015.
    """
    _check_chance("feature_dropout", p)
    if input.ndim < 2:
        raise ShapeError(f"feature_dropout needs (N, C, ...), got shape {input.shape}")
    if not training or p == 0:
        return input
    from flame.ops.creation import ones

    shape = input.shape[:2] + (1,) * (input.ndim - 2)
    noise = dropout(ones(shape, dtype=input.dtype), p)
    if inplace:
        return input.mul_(noise)  # type: ignore[no-any-return]
    return input * noise  # type: ignore[no-any-return]


def _channels(name: str, batched: int) -> Callable[..., Tensor]:
    def function(
        input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if input.ndim == batched - 1:  # without a batch
            return feature_dropout(input.unsqueeze(0), p, training, inplace).squeeze(0)
        return feature_dropout(input, p, training, inplace)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = "Zero whole channels with probability ``p``, see `feature_dropout`."
    return function


dropout1d = _channels("dropout1d", 3)
dropout2d = _channels("dropout2d", -1)  # PyTorch's takes (C, L) rows of a batch as channels too
dropout3d = _channels("dropout3d", 5)
