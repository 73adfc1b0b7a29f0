"""Elementwise ops against PyTorch: values, dtypes and gradients on PyTorch's own samples."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import flame
from flame.core import dtypes
from flame.core.errors import FlameError
from flame.ops import activations
from flame.tensor import Tensor

from .database import op_db

DTYPES = {
    torch.float64: dtypes.float64, torch.float32: dtypes.float32, torch.float16: dtypes.float16,
    torch.bfloat16: dtypes.bfloat16, torch.int64: dtypes.int64, torch.int32: dtypes.int32,
    torch.int16: dtypes.int16, torch.int8: dtypes.int8, torch.uint8: dtypes.uint8,
    torch.bool: dtypes.bool_,
}  # fmt: skip
RARER = (torch.float16, torch.int32, torch.int16, torch.int8, torch.uint8)
FEW = 3  # or so samples of rarer dtypes
TOLERANCE = {
    torch.float64: (1e-9, 1e-11), torch.float32: (2e-5, 2e-6), torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (2e-2, 2e-2),
}  # fmt: skip

FUNCTIONS = [
    "abs", "acos", "acosh", "add", "addcdiv", "addcmul", "allclose", "asin", "asinh", "atan",
    "atan2", "atanh", "bitwise_and", "bitwise_left_shift", "bitwise_not", "bitwise_or",
    "bitwise_right_shift", "bitwise_xor", "ceil", "clamp", "clamp_max", "clamp_min", "copysign",
    "cos", "cosh", "deg2rad", "div.no_rounding_mode", "div.floor_rounding",
    "div.trunc_rounding", "eq", "equal", "erf", "erfc", "exp", "exp2", "expm1", "float_power",
    "floor", "floor_divide", "fmax", "fmin", "fmod", "frac", "ge", "gt", "hypot", "isclose",
    "isfinite", "isinf", "isnan", "isneginf", "isposinf", "le", "lerp", "log", "log10", "log1p",
    "log2", "logaddexp", "logaddexp2", "logical_and", "logical_not", "logical_or",
    "logical_xor", "logit", "lt", "max.binary", "maximum", "min.binary", "minimum", "mul",
    "nan_to_num", "ne", "neg", "positive", "pow", "rad2deg", "reciprocal", "remainder", "round",
    "round.decimals_0", "round.decimals_3", "round.decimals_neg_3", "rsqrt", "rsub", "sgn",
    "sigmoid", "sign", "signbit", "sin", "sinc", "sinh", "sqrt", "square", "sub", "tan", "tanh",
    "true_divide", "trunc", "where", "xlogy", "__radd__", "__rand__", "__rdiv__", "__rmod__",
    "__rmul__", "__ror__", "__rpow__", "__rsub__", "__rxor__",
]  # fmt: skip
NEURAL = [
    "celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu",
    "logsigmoid", "mish", "prelu", "relu", "relu6", "selu", "silu", "softplus", "softshrink",
    "softsign", "tanhshrink", "threshold",
]  # fmt: skip

OPERATORS: dict[str, Callable[..., Any]] = {
    "__radd__": operator.add, "__rand__": operator.and_, "__rdiv__": operator.truediv,
    "__rmod__": operator.mod, "__rmul__": operator.mul, "__ror__": operator.or_,
    "__rpow__": operator.pow, "__rsub__": operator.sub, "__rxor__": operator.xor,
}  # fmt: skip


def _entries() -> Iterator[Any]:
    wanted = {*FUNCTIONS, *(f"nn.functional.{n}" for n in NEURAL)}
    found = set()
    for entry in op_db:
        name = entry.name + (f".{entry.variant_test_name}" if entry.variant_test_name else "")
        plain = entry.name if entry.variant_test_name and name not in wanted else name
        if plain in wanted and not (entry.variant_test_name and name not in wanted):
            found.add(name)
            yield pytest.param(entry, id=name)
    missing = wanted - found
    assert not missing, f"not in op_db: {sorted(missing)}"


def _function(entry: Any) -> Callable[..., Any]:
    """Our function of the same name."""
    name = entry.name
    if name in OPERATORS:
        return lambda x, other: OPERATORS[name](other, x)
    if name == "where":
        return lambda x, condition, other: flame.where(condition, x, other)
    if name in ("max", "min"):
        return getattr(flame, f"{name}imum")
    if name.startswith("nn.functional."):
        return getattr(activations, name.removeprefix("nn.functional."))
    return getattr(flame, name)


def to_flame(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        made = from_torch(x)
        return made.requires_grad_() if x.requires_grad else made
    if isinstance(x, torch.dtype):
        return DTYPES[x]
    if isinstance(x, (list, tuple)):
        return type(x)(map(to_flame, x))
    return x


def from_torch(x: torch.Tensor) -> Tensor:
    x = x.detach().clone()  # keeps dense layouts
    if x.dtype is torch.bfloat16:
        return flame.from_numpy(x.view(torch.int16).numpy().view(dtypes.bfloat16.numpy))
    return flame.from_numpy(x.numpy())


def values(x: Any) -> np.ndarray[Any, Any]:
    if isinstance(x, Tensor):
        x = x.detach()
        return (x.to(dtypes.float32) if x.dtype is dtypes.bfloat16 else x).numpy()
    x = x.detach()
    x = x.clone() if x._is_zerotensor() else x
    return (x.float() if x.dtype is torch.bfloat16 else x).numpy()


def assert_same(ours: Any, theirs: Any, what: str) -> None:
    if not isinstance(theirs, torch.Tensor):
        assert ours == theirs, what
        return
    assert ours.shape == tuple(theirs.shape), what
    assert ours.dtype is DTYPES[theirs.dtype], f"{what}: {ours.dtype} but {theirs.dtype}"
    relative, absolute = TOLERANCE.get(theirs.dtype, (0, 0))
    if "hardsigmoid" in what and theirs.dtype is torch.float64:
        relative = 1e-7  # PyTorch's sixth is of float32
    if "'trunc'" in what and theirs.dtype.itemsize == 2:
        absolute = 1  # PyTorch rounds the quotient to 16 bits before it truncates
    np.testing.assert_allclose(
        values(ours), values(theirs), rtol=relative, atol=absolute, err_msg=what
    )


def _tensors(x: Any) -> Iterator[Any]:
    if isinstance(x, (Tensor, torch.Tensor)):
        yield x
    elif isinstance(x, (list, tuple)):
        for item in x:
            yield from _tensors(item)


def _cases(entry: Any) -> Iterator[tuple[torch.dtype, Any, str]]:
    """All samples in float64, with gradients; a few in the dtypes that `test_op_database` omits."""
    supported = entry.supported_dtypes("cpu")
    for dtype in (d for d in (torch.float64, *RARER) if d in supported):
        wanted = dtype is torch.float64 and entry.supports_autograd
        samples = list(entry.sample_inputs("cpu", dtype, requires_grad=wanted))
        step = max(1, len(samples) // FEW) if dtype in RARER else 1
        for number, sample in enumerate(samples[::step]):
            yield dtype, sample, f"{entry.name} {dtype} sample {step * number}: {sample.summary()}"


def _call(function: Callable[..., Any], sample: Any, convert: Callable[[Any], Any]) -> Any:
    operands = [convert(sample.input), *map(convert, sample.args)]
    options = {k: convert(v) for k, v in sample.kwargs.items()}
    leaves = [t for x in (*operands, *options.values()) for t in _tensors(x) if t.requires_grad]
    return function(*operands, **options), leaves


ENTRIES = list(_entries())


@pytest.mark.ops
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", ENTRIES)
def test_as_pytorch(entry: Any) -> None:
    count = 0
    for _, sample, what in _cases(entry):
        theirs, their_leaves = _call(entry.op, sample, lambda x: x)
        ours, leaves = _call(_function(entry), sample, to_flame)
        assert_same(ours, theirs, what)
        if isinstance(theirs, torch.Tensor) and theirs.requires_grad:
            _compare_gradients(ours, theirs, leaves, their_leaves, what)
        count += 1
    assert count


def _compare_gradients(
    ours: Any, theirs: Any, leaves: list[Any], their_leaves: list[Any], what: str
) -> None:
    """First order, and second order through the sum of the squares of the first."""
    weight = torch.linspace(0.5, 1.5, theirs.numel(), dtype=theirs.dtype).reshape(theirs.shape)
    expected = torch.autograd.grad(
        theirs, their_leaves, weight, create_graph=True, allow_unused=True
    )
    found = flame.autograd.engine.grad(
        [ours],
        leaves,
        [from_torch(weight)],
        retain_graph=True,
        create_graph=True,
        allow_unused=True,
    )
    total, their_total = None, None
    for a, b in zip(found, expected, strict=True):
        if b is None:
            assert a is None or not np.any(values(a)), what
            continue
        assert_same(a, b, f"gradient of {what}")
        if a.requires_grad and b.requires_grad:
            total = (a * a).sum() if total is None else total + (a * a).sum()
            their_total = (b * b).sum() if their_total is None else their_total + (b * b).sum()
    if their_total is None or not bool(torch.isfinite(their_total)):
        return
    assert total is not None, what
    expected = torch.autograd.grad(their_total, their_leaves, allow_unused=True)
    found = flame.autograd.engine.grad([total], leaves, [None], None, False, True)
    for a, b in zip(found, expected, strict=True):
        if b is None:
            assert a is None or not np.any(values(a)), what
        elif a is None:
            assert not np.any(values(b)), what
        else:
            assert_same(a, b, f"second gradient of {what}")


# --- in place -------------------------------------------------------------------------------------

IN_PLACE = [
    param for param in ENTRIES
    if param.values[0].inplace_variant is not None and param.values[0].name != "where"
]  # fmt: skip
IN_PLACE_DTYPES = (torch.float32, torch.int64, torch.bool)


def _method(entry: Any) -> Callable[..., Any]:
    name = getattr(entry.inplace_variant, "__name__", "")
    neural = entry.name.removeprefix("nn.functional.")
    if neural != entry.name:
        return lambda x, *args, **options: getattr(activations, neural)(
            x, *args, **{"inplace": True, **options}
        )
    return lambda x, *args, **options: getattr(x, name)(*args, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", IN_PLACE)
def test_in_place_as_pytorch(entry: Any) -> None:
    for dtype in IN_PLACE_DTYPES:
        if dtype not in entry.supported_dtypes("cpu"):
            continue
        for number, sample in enumerate(entry.sample_inputs("cpu", dtype)):
            if not isinstance(sample.input, torch.Tensor) or sample.broadcasts_input:
                continue
            what = f"{entry.name}_ {dtype} sample {number}: {sample.summary()}"
            ours = to_flame(sample.input)
            version = ours._version
            arguments = [to_flame(a) for a in sample.args]
            options = {k: to_flame(v) for k, v in sample.kwargs.items()}
            theirs = sample.input.clone()
            try:
                entry.inplace_variant(theirs, *sample.args, **sample.kwargs)
            except (RuntimeError, NotImplementedError):
                with pytest.raises(FlameError):
                    _method(entry)(ours, *arguments, **options)
                continue
            made = _method(entry)(ours, *arguments, **options)
            assert made is ours, what
            assert ours._version > version, what
            assert_same(ours, theirs, what)


# --- promotion ------------------------------------------------------------------------------------

BINARY = [
    "add", "sub", "mul", "div", "floor_divide", "remainder", "fmod", "pow", "eq", "lt",
    "maximum", "bitwise_and", "atan2",
]  # fmt: skip
NUMBERS = (True, 2, 1.5)
MIXED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8,
         torch.int8, torch.bool)  # fmt: skip
SOME = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def _operands(mixed: tuple[torch.dtype, ...]) -> list[Any]:
    made: list[Any] = list(NUMBERS)
    for dtype in mixed:
        made += [torch.ones(3, dtype=dtype), torch.ones((), dtype=dtype)]
    return made


@pytest.mark.parametrize("name", BINARY)
def test_promotes_as_pytorch(name: str) -> None:
    theirs_of, ours_of = getattr(torch, name), getattr(flame, name)
    operands = _operands(MIXED if name == "add" else SOME)
    for a in operands:
        for b in operands:
            if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
                continue
            if not isinstance(a, torch.Tensor) and name not in ("pow", "remainder", "bitwise_and"):
                continue
            if name in ("maximum", "atan2") and not isinstance(b, torch.Tensor):
                continue
            what = f"{name}({a!r}, {b!r})"
            try:
                theirs = theirs_of(a, b)
            except (RuntimeError, NotImplementedError):
                with pytest.raises(FlameError):
                    ours_of(to_flame(a), to_flame(b))
                continue
            assert_same(ours_of(to_flame(a), to_flame(b)), theirs, what)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x + 1.5, lambda x: 2 - x, lambda x: 2 * x, lambda x: 1 / x, lambda x: 7 // x,
        lambda x: 7 % x, lambda x: 2**x, lambda x: x**2, lambda x: x**-1.0, lambda x: x**0.5,
        lambda x: x**3, lambda x: x + True, lambda x: -x, lambda x: abs(x), lambda x: x == 2,
        lambda x: x > 2, lambda x: x != 2.5, lambda x: x // 2, lambda x: x % 1.5,
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.uint8])
def test_operators_with_numbers(call: Callable[[Any], Any], dtype: torch.dtype) -> None:
    x = torch.tensor([1, 2, 5], dtype=dtype)
    assert_same(call(to_flame(x)), call(x), "operator")


def test_gradients_at_kinks() -> None:
    """Where one-sided slopes differ, the choice is PyTorch's."""
    calls: list[tuple[Callable[[Any, Any], Any], list[float]]] = [
        (lambda m, x: m.maximum(x, x * 1), [1.0]), (lambda m, x: m.minimum(x, x * 1), [1.0]),
        (lambda m, x: m.clamp(x, 0.0, 1.0), [0.0, 1.0]), (lambda m, x: m.abs(x), [0.0, -0.0]),
        (lambda m, x: x**2, [0.0]), (lambda m, x: x**0, [0.0]), (lambda m, x: x**0.5, [0.0]),
        (lambda m, x: m.fmax(x, x * 1), [1.0]), (lambda m, x: m.relu(x), [0.0]),
        (lambda m, x: m.sinc(x), [0.0]), (lambda m, x: m.where(x > 0, x, x * 0), [0.0, 1.0]),
        (lambda m, x: m.sign(x), [0.0]), (lambda m, x: m.atan2(x, x), [0.0, 1.0]),
    ]  # fmt: skip
    for call, points in calls:
        theirs = torch.tensor(points, dtype=torch.float64, requires_grad=True)
        ours = to_flame(theirs)
        call(torch, theirs).sum().backward()
        call(flame, ours).sum().backward()
        assert_same(ours.grad, theirs.grad, str(points))


def test_integers_over_zero_raise() -> None:
    whole = flame.tensor([1, 2])
    for call in (lambda z: whole // z, lambda z: whole % z, lambda z: flame.fmod(whole, z)):
        for zero in (0, flame.tensor([1, 0])):
            with pytest.raises(FlameError, match="by zero"):
                call(zero)


SPECIAL = [
    math.nan, math.inf, -math.inf, 0.0, -0.0, 3e38, -3e38, 2e-38, -2e-38, 1e-39, 1e-3, -1e-3, 88.0,
    -88.0, 1000.0, -1000.0, 0.5, -0.5, 1.0, -1.0, 2.0, 3.0, 20.0, 20.5, -20.0,
]  # fmt: skip
UNARY = [
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "erf", "erfc",
    "exp", "exp2", "expm1", "floor", "frac", "isfinite", "isinf", "isnan", "log", "log10", "log1p",
    "log2", "logit", "nan_to_num", "reciprocal", "round", "rsqrt", "sigmoid", "sign", "signbit",
    "sin", "sinc", "sinh", "sqrt", "square", "tan", "tanh", "trunc",
]  # fmt: skip
PAIRED = [
    "add", "sub", "mul", "div", "atan2", "pow", "maximum", "minimum", "fmax", "fmin", "hypot",
    "copysign", "logaddexp", "logaddexp2", "xlogy", "eq", "lt", "isclose", "floor_divide",
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values(dtype: torch.dtype) -> None:
    """NaN, infinities, signed zeros, subnormal and huge numbers."""
    x = torch.tensor(SPECIAL, dtype=dtype)
    for name in UNARY:
        assert_same(getattr(flame, name)(to_flame(x)), getattr(torch, name)(x), name)
    column, row = x[:, None].clone(), x[None].clone()
    for name in PAIRED:
        made = getattr(flame, name)(to_flame(column), to_flame(row))
        assert_same(made, getattr(torch, name)(column, row), name)
    smooth = [n for n in NEURAL if n not in ("prelu", "threshold", "gelu")]
    for name in smooth:
        theirs = getattr(torch.nn.functional, name)(x)
        assert_same(getattr(activations, name)(to_flame(x)), theirs, name)


def test_remainder_of_a_huge_quotient_is_exact_or_nan() -> None:
    x = np.array([1e12, 123456789.0, 3e38, -7.5e9, 1e30], np.float32)
    y = np.array([0.7, 3.0, 1e-30, 0.1, 3.0], np.float32)
    made = flame.fmod(flame.from_numpy(x.copy()), flame.from_numpy(y.copy())).numpy()
    known = np.abs(x.astype(np.float64) / y) < 2**46
    exact = np.fmod(x, y)
    np.testing.assert_array_equal(made[known], exact[known])
    assert np.all(np.isnan(made) | (made == exact))


@pytest.mark.parametrize("name", ["xlogy", "xlog1py"])
def test_gradients_of_products_with_logarithms_at_zeros(name: str) -> None:
    """A factor of 0 hides the logarithm's value, but not the slope, which the logarithm is."""
    x, y = np.zeros(6), np.array([-1.5, -1.0, 0.0, 0.5, 2.0, np.nan])
    found, expected = [], []
    for library, kept in ((flame, found), (torch, expected)):
        a, b = (library.from_numpy(v.copy()).requires_grad_() for v in (x, y))
        made = getattr(library.special, name)(a, b)
        made.backward(library.ones_like(made))
        kept += [t.detach().numpy() for t in (made, a.grad, b.grad)]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
