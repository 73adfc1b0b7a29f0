"""Random tensors: creation, and filling in place. What is drawn follows from seed and position."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from flame.core import dtypes
from flame.core.device import check_device
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DeviceError, DTypeError
from flame.core.types import Shape, like_strides
from flame.kernel import values
from flame.ops import draws
from flame.ops.creation import shape_of
from flame.ops.generator import (
    Generator,
    default_generator,
    get_rng_state,
    initial_seed,
    manual_seed,
    seed,
    set_rng_state,
)
from flame.ops.sorting import argsort

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "Generator", "bernoulli", "default_generator", "get_rng_state",
    "initial_seed", "manual_seed", "multinomial", "normal", "rand", "rand_like", "randint",
    "randint_like", "randn", "randn_like", "randperm", "seed", "set_rng_state",
]  # fmt: skip
METHODS = (
    "bernoulli", "bernoulli_", "exponential_", "multinomial", "normal_", "random_", "uniform_",
)  # fmt: skip


# --- public functions -----------------------------------------------------------------------------


def _place(generator: Generator | None, shape: Shape, device: str) -> tuple[int, int]:
    """(seed, offset) of the numbers of a tensor. The numbers do not depend on the device; as in
    PyTorch a generator draws on its own device alone, but for the default one, which serves all."""
    if generator is None or generator is default_generator:
        return default_generator.reserve(math.prod(shape))
    if generator.device != device:
        raise DeviceError(
            f"a generator of {generator.device} cannot draw on {device}; make one by "
            f"flame.Generator(device={device!r})"
        )
    return generator.reserve(math.prod(shape))


def _create(
    op: draws.Draw, numbers: tuple[Any, ...], shape: Shape, dtype: DType | None, device: Any,
    generator: Generator | None, requires_grad: bool, **attributes: Any,
) -> Tensor:  # fmt: skip
    dtype = dtype or dtypes.get_default_dtype()
    place = check_device(device)
    made: Tensor = op(
        *numbers, *_place(generator, shape, place), shape=shape, dtype=dtype, device=place,
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
    return _create(
        draws.uniform, (0.0, 1.0), shape_of(*size), dtype, device, generator, requires_grad
    )


def randn(
    *size: Any, generator: Generator | None = None, dtype: DType | None = None, device: Any = None,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """Numbers from the normal distribution of mean 0 and variance 1."""
    _floating_only("randn", dtype)
    return _create(
        draws.normal, (0.0, 1.0), shape_of(*size), dtype, device, generator, requires_grad
    )


def rand_like(
    input: Tensor, *, generator: Generator | None = None, dtype: DType | None = None,
    device: Any = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """As `rand`, with the shape, layout and dtype of ``input``."""
    return _like(draws.uniform, (0.0, 1.0), input, dtype, device, generator, requires_grad)


def randn_like(
    input: Tensor, *, generator: Generator | None = None, dtype: DType | None = None,
    device: Any = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """As `randn`, with the shape, layout and dtype of ``input``."""
    return _like(draws.normal, (0.0, 1.0), input, dtype, device, generator, requires_grad)


def _like(
    op: draws.Draw, numbers: tuple[Any, ...], input: Tensor, dtype: DType | None, device: Any,
    generator: Generator | None, requires_grad: bool, **attributes: Any,
) -> Tensor:  # fmt: skip
    if op is not draws.integers:
        _floating_only(op.name, dtype or input.dtype)
    strides = like_strides(input.shape, input.type)
    place = input.type.device if device is None else device
    return _create(
        op, numbers, input.shape, dtype or input.dtype, place, generator, requires_grad,
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
    dtype = dtype or dtypes.int64
    return _create(
        draws.integers,
        numbers,
        shape_of(size),
        dtype,
        device,
        generator,
        requires_grad,
        **attributes,
    )


def randint_like(
    input: Tensor, low: int, high: int | None = None, *, generator: Generator | None = None,
    dtype: DType | None = None, device: Any = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """As `randint`, with the shape, layout and dtype of ``input``."""
    if high is None:
        low, high = 0, low
    numbers, attributes = _range("randint_like", low, high)
    return _like(
        draws.integers, numbers, input, dtype, device, generator, requires_grad, **attributes
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
        return bernoulli_(input.detach().clone(), p, generator=generator)
    if input.dtype.kind != "f":
        raise DTypeError(f"bernoulli takes floating probabilities, got {input.dtype.name}")
    made: Tensor = draws.bernoulli(input, *_place(generator, input.shape, input.type.device))
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
        return _create(
            draws.normal, numbers, shape_of(size), dtype, device, generator, requires_grad
        )
    if size is not None:
        raise ArgumentError("normal: size goes with numbers only; tensors give the shape")
    if std is not tensors[-1]:
        _check_std(std)
    elif bool((std < 0).any()):
        raise ArgumentError("normal: every std must be at least 0")
    sized = mean + std
    noise = randn(sized.shape, generator=generator, dtype=tensors[0].dtype, device=sized.device)
    made: Tensor = mean + std * noise
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
    weight / exponential number. Raises ArgumentError for weights that are negative, not finite, or
    0 in a whole row, and for more samples than weights above 0 allow without replacement.
    """
    from flame.ops import multinomials

    return multinomials.draw(input, num_samples, replacement, generator)


# --- in place -------------------------------------------------------------------------------------


def _fill(
    op: draws.Draw, input: Tensor, numbers: tuple[Any, ...], generator: Generator | None,
    **attributes: Any,
) -> Tensor:  # fmt: skip
    shape = input.shape
    place = _place(generator, shape, input.type.device)
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
    return _fill(draws.uniform, input, (float(low), float(to)), generator)


def normal_(
    input: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Generator | None = None
) -> Tensor:
    """Fill with normal numbers. Raises ArgumentError for a negative std."""
    _check_std(std)
    _floating_only("normal_", input.dtype)
    return _fill(draws.normal, input, (float(mean), float(std)), generator)


def exponential_(
    input: Tensor, lambd: float = 1.0, *, generator: Generator | None = None
) -> Tensor:
    """Fill with numbers of density lambd * exp(-lambd * x), all above 0."""
    if not lambd > 0:
        raise ArgumentError(f"exponential_: lambd must be above 0, got {lambd}")
    _floating_only("exponential_", input.dtype)
    return _fill(draws.exponential, input, (float(lambd),), generator)


def bernoulli_(input: Tensor, p: Any = 0.5, *, generator: Generator | None = None) -> Tensor:
    """Fill with 1 with probability ``p`` (a number, or a tensor that broadcasts), else 0."""
    if hasattr(p, "storage"):
        return input.copy_(bernoulli(p.expand(input.shape), generator=generator))
    if not 0 <= p <= 1:
        raise ArgumentError(f"bernoulli_: p must lie in [0, 1], got {p}")
    return _fill(draws.trial, input, (float(p),), generator)


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
    return _fill(draws.integers, input, numbers, generator, **attributes)
