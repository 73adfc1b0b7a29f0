"""The expansions of transcendental instructions, run as real kernels.

float64 is compared with mpmath at points that cover its range, and float32 with float64 at every
exponent; both in units in the last place of the exact result.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import CompileError
from flame.core.types import tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder
from flame.kernel.values import Value
from flame.render.llvm import render
from flame.render.llvm_instructions import native
from flame.render.math import expand
from flame.runtime import cpu
from flame.runtime.cpu.jit import load

Array = np.ndarray[Any, np.dtype[Any]]

# Largest error in ulp: float32, float64.
BOUNDS = {
    "exp": (1.5, 2), "exp2": (1, 1), "expm1": (2, 2), "log": (1, 1.5), "log2": (1, 1.5),
    "log10": (1, 1.5), "log1p": (2, 2), "sin": (1.5, 1.5), "cos": (1.5, 1.5), "tan": (3, 3),
    "asin": (2.5, 2.5), "acos": (1.5, 1.5), "atan": (2, 2), "sinh": (3, 3), "cosh": (2, 2),
    "tanh": (1.5, 2), "erf": (1.5, 1.5), "reciprocal": (0.5, 0.5), "rsqrt": (1.5, 1.5),
    "pow": (1, 1), "atan2": (2, 2),
}  # fmt: skip
UNARY = [op for op in BOUNDS if op not in ("pow", "atan2")]
BINARY = ["pow", "atan2"]
FLOATS = [dtypes.float32, dtypes.float64]
BLOCK = 4096
# Where the results are neither trivial nor infinite, for random float64 arguments.
RANGE = {
    "exp": (-746, 710), "exp2": (-1076, 1024), "expm1": (-40, 710), "log": (0, 20),
    "log2": (0, 20), "log10": (0, 20), "log1p": (-1, 20), "asin": (-1, 1), "acos": (-1, 1),
    "sinh": (-711, 711), "cosh": (-711, 711), "tanh": (-22, 22), "erf": (-6.2, 6.2),
    "rsqrt": (0, 20), "sin": (-1e6, 1e6), "cos": (-1e6, 1e6), "tan": (-1e6, 1e6),
}  # fmt: skip
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 3.0, -3.0, 1e-40,
           -1e-40, 5e-324, 1e-310, 1e300, -1e300, 3e38, -3e38, 4.5, 2.0**24, 2.0**53]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with np.errstate(all="ignore"), mpmath.workdps(40):
        yield


@functools.cache
def kernel(op: str, dtype: DType, count: int, vector_bytes: int = 64) -> Callable[..., Array]:
    """The compiled loop of an instruction over ``count`` arrays."""
    if count == 2:
        return compiled(lambda x, y: values.binary(op, x, y), dtype, 2, vector_bytes)
    return compiled(lambda x: values.unary(op, x), dtype, 1, vector_bytes)


def compiled(
    scalar: Callable[..., Value], dtype: DType, count: int, vector_bytes: int = 64
) -> Callable[..., Array]:
    size = 12345  # any: sizes are parameters
    k = KernelBuilder("instruction")
    flat = tensor_type(dtype, (size,))
    inputs = [k.tensor("input", i, flat) for i in range(count)]
    output = k.tensor("output", 0, flat)
    with k.parallel(1) as (block,):
        start = block * BLOCK
        extent = values.binary("min", k.size(size) - start, values.const(BLOCK))
        with k.vector(extent) as i:
            k.store(output, (start + i,), scalar(*(x[start + i] for x in inputs)))
    source = render(k.bind().kernel, vector_bytes)
    address = load(source.text, source.symbol)

    def run(*arrays: Array) -> Array:
        given = [np.ascontiguousarray(a, dtype.numpy) for a in arrays]
        made = np.empty(len(given[0]), dtype.numpy)
        pointers = [a.ctypes.data for a in (*given, made)]
        cpu.launch(address, -(-len(made) // BLOCK), 8, *pointers, len(made))
        return made

    return run


def test_the_kernels_take_sizes_as_parameters() -> None:
    x = np.linspace(0, 1, 3 * BLOCK + 5)
    np.testing.assert_allclose(kernel("exp", dtypes.float64, 1)(x), np.exp(x), rtol=1e-15)


def units(want: Array, dtype: DType) -> Array:
    """The distance of neighbours in ``dtype`` at ``want``."""
    bits, least = (24, -149) if dtype is dtypes.float32 else (53, -1074)
    exponent = np.maximum(np.frexp(want)[1] - bits, least)
    made: Array = np.ldexp(np.float64(1), exponent)
    return made


def errors(got: Array, want: Array, rest: Array | float = 0.0) -> Array:
    """|got - (want + rest)| in ulp; infinite for a wrong NaN, infinity or sign of a zero."""
    dtype = dtypes.from_numpy(got.dtype)
    rounded = want.astype(got.dtype)
    distance = np.abs((got.astype(np.float64) - want) - rest) / units(want, dtype)
    exact = np.isinf(rounded) | np.isinf(got) | ((rounded == 0) & (got == 0))
    same = (got == rounded) & (np.signbit(got) == np.signbit(rounded))
    distance = np.where(exact, np.where(same, 0.0, np.inf), distance)
    both = np.isnan(got) & np.isnan(want)
    return np.where(both, 0.0, np.where(np.isnan(distance), np.inf, distance))


def check(op: str, dtype: DType, got: Array, error: Array, *args: Array) -> None:
    worst = int(np.argmax(error))
    bound = BOUNDS[op][FLOATS.index(dtype)]
    assert error[worst] <= bound, (
        f"{op}({', '.join(repr(a[worst]) for a in args)}) = {got[worst]!r}: {error[worst]:.3f} ulp"
    )


# --- float32 against float64 ----------------------------------------------------------------------


@functools.cache
def every_exponent() -> Array:
    """About 2 million float32: 4085 mantissas of every exponent and sign, and some NaN."""
    return np.arange(0, 2**32, 2053, dtype=np.uint64).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("op", UNARY)
def test_float32_at_every_exponent(op: str) -> None:
    x = every_exponent()
    want = kernel(op, dtypes.float64, 1)(x.astype(np.float64))
    got = kernel(op, dtypes.float32, 1)(x)
    check(op, dtypes.float32, got, errors(got, want), x)


@pytest.mark.parametrize(
    ("op", "low", "high"),
    [("exp", 8, 12), ("tanh", 0.6, 0.7), ("expm1", 0.3, 0.5), ("sinh", 2, 2.1), ("erf", 0.85, 0.95),
     ("asin", 0.5, 0.55), ("atan", 0.9, 1.1), ("sin", 0.7, 0.9), ("cos", 0.7, 0.9),
     ("tan", 5423, 5424), ("rsqrt", 0.25, 0.2525), ("log", 0.7, 0.72), ("log1p", 0.4, 0.45)],
)  # fmt: skip
def test_float32_where_it_is_worst(op: str, low: float, high: float) -> None:
    ends = np.array([low, high], np.float32).view(np.uint32)
    positive = np.arange(ends[0], ends[1], 7, dtype=np.uint32).view(np.float32)
    x = positive if op in ("rsqrt", "log") else np.concatenate([positive, -positive])
    got = kernel(op, dtypes.float32, 1)(x)
    want = kernel(op, dtypes.float64, 1)(x.astype(np.float64))
    check(op, dtypes.float32, got, errors(got, want), x)


@pytest.mark.parametrize("op", BINARY)
def test_float32_pairs(op: str) -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, (2, 300_000), np.uint32).view(np.float32)
    base = np.exp(random.uniform(-88, 88, 300_000)).astype(np.float32)
    exponent = random.uniform(-150, 128, 300_000) / np.log2(base)  # results in range
    pairs = [bits, random.normal(size=(2, 300_000)), (base, exponent)]
    x, y = (np.concatenate(each).astype(np.float32) for each in zip(*pairs, strict=True))
    got = kernel(op, dtypes.float32, 2)(x, y)
    want = kernel(op, dtypes.float64, 2)(x.astype(np.float64), y.astype(np.float64))
    check(op, dtypes.float32, got, errors(got, want), x, y)


# --- float64 against mpmath -----------------------------------------------------------------------

EXACT: dict[str, Callable[..., Any]] = {
    "exp2": lambda x: mpmath.mpf(2) ** x,
    "log2": lambda x: mpmath.log(x, 2),
    "log1p": lambda x: mpmath.log1p(x) if abs(x) < 0.5 else mpmath.log(1 + x),
    "reciprocal": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / mpmath.sqrt(x),
    "pow": mpmath.power,
}


def exact(op: str, *args: Array) -> tuple[Array, Array]:
    """The results by mpmath as the sum of two float64."""
    function = EXACT.get(op) or getattr(mpmath, op)
    pairs = []
    for numbers in zip(*(a.tolist() for a in args), strict=True):
        result = function(*map(mpmath.mpf, numbers))
        high = float(result)
        pairs.append((high, float(result - high) if np.isfinite(high) else 0.0))
    high_parts, low_parts = np.array(pairs).T
    return high_parts, low_parts


@pytest.mark.parametrize("op", UNARY)
def test_float64(op: str) -> None:
    random = np.random.default_rng(1)
    low, high = RANGE.get(op, (-1e3, 1e3))
    x = np.concatenate([
        random.uniform(low, high, 800),
        random.uniform(max(low, -1.5), min(high, 1.5), 800),
        np.exp(random.uniform(-700, min(np.log(high), 700), 200)),
    ])  # fmt: skip
    if low < -1:
        x = np.concatenate([x, -x])
    got = kernel(op, dtypes.float64, 1)(x)
    check(op, dtypes.float64, got, errors(got, *exact(op, x)), x)


@pytest.mark.parametrize("op", ["sin", "cos", "tan"])
def test_float64_near_multiples_of_half_pi_and_beyond_the_reduction(op: str) -> None:
    random = np.random.default_rng(2)
    near = random.integers(1, 2**29, 400) * (np.pi / 2)
    x = np.concatenate([near, 10 ** random.uniform(8, 300, 300), [2.0**30]])
    got = kernel(op, dtypes.float64, 1)(x)
    with mpmath.workdps(360):
        check(op, dtypes.float64, got, errors(got, *exact(op, x)), x)


@pytest.mark.parametrize("op", BINARY)
def test_float64_pairs(op: str) -> None:
    random = np.random.default_rng(3)
    x, y = random.normal(size=(2, 1000))
    if op == "pow":
        near_one = random.uniform(0.9, 1.1, 1000)
        x = np.concatenate([np.exp(random.uniform(-700, 700, 1000)), near_one])
        y = random.uniform(-1074, 1024, 2000) / np.log2(x)
        x = np.concatenate([x, random.uniform(-10, 10, 500)])
        y = np.concatenate([y, random.integers(-300, 300, 500)])
    got = kernel(op, dtypes.float64, 2)(x, y)
    check(op, dtypes.float64, got, errors(got, *exact(op, x, y)), x, y)


# --- special values -------------------------------------------------------------------------------

NUMPY: dict[str, Callable[..., Array]] = {
    "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "atan2": np.arctan2, "pow": np.power,
    "rsqrt": lambda x: 1 / np.sqrt(x), "erf": np.vectorize(lambda x: float(mpmath.erf(x)) or x),
}  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", [*UNARY, *BINARY])
@pytest.mark.parametrize("vector_bytes", [16, 64])
def test_special_values(op: str, dtype: DType, vector_bytes: int) -> None:
    special = np.array(SPECIAL, dtype.numpy)
    args = np.meshgrid(special, special) if op in BINARY else [special]
    flat = [a.ravel().astype(np.float64) for a in args]
    got = kernel(op, dtype, len(flat), vector_bytes)(*flat)
    want = (NUMPY.get(op) or getattr(np, op))(*flat)
    error = errors(got, want)
    worst = int(np.argmax(error))
    assert error[worst] <= 4, f"{op}({[a[worst] for a in flat]}) = {got[worst]}, not {want[worst]}"


@pytest.mark.parametrize("op", UNARY)
def test_any_nan_stays_nan(op: str) -> None:
    payload = np.random.default_rng(4).integers(1, 2**22, 5000, np.uint32)
    quiet, negative = np.uint32(0x7FC00000), np.uint32(1 << 31)
    x = np.concatenate([payload | quiet, payload | quiet | negative]).view(np.float32)
    assert np.isnan(kernel(op, dtypes.float32, 1)(x)).all()
    wide = np.random.default_rng(5).integers(1, 2**51, 5000, np.uint64) | np.uint64(0x7FF8 << 48)
    assert np.isnan(kernel(op, dtypes.float64, 1)(wide.view(np.float64))).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_exact_results(dtype: DType) -> None:
    whole = np.arange(-100, 101, dtype=np.float64)
    powers = 2.0**whole
    np.testing.assert_array_equal(kernel("exp2", dtype, 1)(whole), powers)
    np.testing.assert_array_equal(kernel("log2", dtype, 1)(powers), whole)
    np.testing.assert_array_equal(kernel("pow", dtype, 2)(powers, np.full(201, 1.0)), powers)
    small = np.arange(-30.0, 31)
    np.testing.assert_array_equal(kernel("pow", dtype, 2)(small, np.full(61, 2.0)), small**2)


# --- pow ------------------------------------------------------------------------------------------


def integer_power(x: int, y: int, dtype: DType) -> int:
    if y < 0:
        return 1 if x == 1 else (1 if y % 2 == 0 else -1) if x == -1 else 0
    low, high = values.integer_range(dtype)
    return (pow(x, y, 1 << dtype.bits) - low) % (high - low + 1) + low


@pytest.mark.parametrize("dtype", dtypes.INTEGRAL, ids=str)
def test_integer_power(dtype: DType) -> None:
    low, high = values.integer_range(dtype)
    random = np.random.default_rng(6)
    base = [*range(max(low, -6), 7), high, low, *random.integers(low, high, 40).tolist()]
    exponent = [*range(max(low, -5), 12), high, low, *random.integers(low, high, 20).tolist()]
    x, y = np.array(list(itertools.product(base, exponent))).T
    want = [integer_power(a, b, dtype) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    assert kernel("pow", dtype, 2)(x, y).tolist() == want


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 3.0, -1.0, 0.5, -2.5])
def test_constant_exponents(exponent: float) -> None:
    run = compiled(
        lambda x: values.binary("pow", x, values.const(exponent, x.dtype)), dtypes.float64, 1
    )
    x = np.concatenate([np.array(SPECIAL), np.random.default_rng(7).uniform(-50, 50, 500)])
    error = errors(run(x), np.power(x, np.full(len(x), exponent)))
    assert error.max() <= 2, x[np.argmax(error)]


@pytest.mark.parametrize("exponent", [0, 1, 2, 7, 63])
def test_constant_integer_exponents(exponent: int) -> None:
    run = compiled(
        lambda x: values.binary("pow", x, values.const(exponent, x.dtype)), dtypes.int64, 1
    )
    x = np.arange(-50, 51)
    want = [integer_power(a, exponent, dtypes.int64) for a in x.tolist()]
    assert run(x).tolist() == want


# --- form -----------------------------------------------------------------------------------------


def instructions(roots: Sequence[Value]) -> Iterator[Value]:
    seen: set[int] = set()
    waiting = list(roots)
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            waiting += value.args


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", [*UNARY, *BINARY])
def test_expansions_are_basic_instructions(op: str, dtype: DType) -> None:
    args = tuple(values.param(name, dtype) for name in ("x", "y")[: 2 if op in BINARY else 1])
    found = list(instructions([expand(op, args)]))
    assert all(native(v) or v.op in ("const", "param") for v in found)
    assert any(v.op == "libm" for v in found) == (op in ("sin", "cos", "tan"))
    if dtype is dtypes.float32 and op != "pow":
        assert all(v.dtype is not dtypes.float64 for v in found)


@pytest.mark.parametrize(
    ("op", "dtype"), [("exp", dtypes.float16), ("erf", dtypes.int64), ("mod", dtypes.float32)]
)
def test_what_has_no_expansion_is_refused(op: str, dtype: DType) -> None:
    with pytest.raises(CompileError, match=f"{op} of .*{dtype.name}.* has no expansion"):
        expand(op, (values.param("x", dtype),))
