"""PyTorch's own database of operators, asked of FLAME.

For an entry of ``op_db``, each sample is called in both libraries; results, dtypes, shapes and
float64 gradients are compared. As a program it prints a table:
``python tests/ops/database.py [NAME ...]``.
"""

from __future__ import annotations

import argparse
import operator
import os
import pickle
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

import flame
import flame.nn.functional
from flame.core import dtypes
from flame.tensor import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal import common_utils
    from torch.testing._internal.common_methods_invocations import op_db


def _seed(seed: int = 0) -> None:
    """Seed the generators of the CPU. `torch.manual_seed` also writes down the whole stack for each
    device that it does not find, and the database seeds before every sample."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


common_utils.set_rng_seed = _seed

Entry = Any
Array = np.ndarray[Any, Any]

DTYPES: Final[dict[torch.dtype, dtypes.DType]] = {
    torch.float64: dtypes.float64, torch.float32: dtypes.float32, torch.float16: dtypes.float16,
    torch.bfloat16: dtypes.bfloat16, torch.int64: dtypes.int64, torch.int32: dtypes.int32,
    torch.int16: dtypes.int16, torch.int8: dtypes.int8, torch.uint8: dtypes.uint8,
    torch.bool: dtypes.bool_,
}  # fmt: skip
TESTED: Final = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool)
TOLERANCE: Final = {  # (relative, absolute)
    torch.float64: (1e-7, 1e-9), torch.float32: (1e-4, 2e-5), torch.float16: (1e-2, 4e-3),
    torch.bfloat16: (4e-2, 3e-2),
}  # fmt: skip


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


HALF: Final = (torch.float16, torch.bfloat16)

# Entries whose order of equal elements PyTorch leaves open; FLAME's sorts are stable.
UNSTABLE: Final = frozenset({"sort", "argsort"})
# Entries whose index results may name any of several equal elements, and where dim stands in args.
TIED: Final = {"kthvalue": 1, "topk": 1, "mode": 0, "median": 0, "nanmedian": 0}

# Entries whose values are drawn at random, or are whatever the memory held: dtype and shape count.
WITHOUT_VALUES: Final = _names(
    """
    bernoulli cauchy empty empty_like empty_permuted empty_strided exponential geometric log_normal
    multinomial new_empty new_empty_strided nn.functional.alpha_dropout nn.functional.dropout
    nn.functional.dropout2d nn.functional.dropout3d nn.functional.feature_alpha_dropout
    nn.functional.fractional_max_pool2d nn.functional.fractional_max_pool3d nn.functional.rrelu
    normal pca_lowrank rand_like randint randint_like randn randn_like svd_lowrank uniform
    """
)

OPERATORS: Final[dict[str, Callable[..., Any]]] = {
    "__getitem__": operator.getitem,
    "__radd__": lambda x, y: y + x,
    "__rand__": lambda x, y: y & x,
    "__rdiv__": lambda x, y: y / x,
    "__rmatmul__": lambda x, y: y @ x,
    "__rmod__": lambda x, y: y % x,
    "__rmul__": lambda x, y: y * x,
    "__ror__": lambda x, y: y | x,
    "__rpow__": lambda x, y: y**x,
    "__rsub__": lambda x, y: y - x,
    "__rxor__": lambda x, y: y ^ x,
    "H": lambda x: x.H,
    "T": lambda x: x.T,
    "mH": lambda x: x.mH,
    "mT": lambda x: x.mT,
    "where": lambda x, condition, other: flame.where(condition, x, other),
    "einsum": lambda operands, equation: flame.einsum(equation, operands),
    "nn.functional.embedding": lambda weight, index, **options: flame.nn.functional.embedding(
        index, weight, **options
    ),
    "nn.functional.embedding_bag": lambda weight, index, **options: (
        flame.nn.functional.embedding_bag(index, weight, **options)
    ),
    "slice": lambda x, dim=0, start=None, end=None, step=1: x[
        (slice(None),) * (dim % x.ndim) + (slice(start, end, step),)
    ],
    "zero_": lambda x: x.clone().zero_(),
    "uniform": lambda x, *args, **options: x.clone().uniform_(*args, **options),
    "exponential": lambda x, *args, **options: x.clone().exponential_(*args, **options),
    "cauchy": lambda x, *args, **options: x.clone().cauchy_(*args, **options),
    "geometric": lambda x, *args, **options: x.clone().geometric_(*args, **options),
    "log_normal": lambda x, *args, **options: x.clone().log_normal_(*args, **options),
    "resize_": lambda x, *args, **options: x.clone().resize_(*args, **options),
    "resize_as_": lambda x, *args, **options: x.clone().resize_as_(*args, **options),
}
# Entries that go by another name than the public function.
RENAMED: Final = {
    "normal.in_place": "Tensor.normal_",
    "normal.number_mean": "normal",
    "max.binary": "max",
    "min.binary": "min",
}
METHODS_BEHIND: Final = {
    name: f"{name}_" for name in ("uniform", "exponential", "cauchy", "geometric", "log_normal")
}
METHODS: Final = _names(
    """
    bfloat16 bool byte char double float half int long short to item
    contiguous expand expand_as view view_as repeat new_empty new_empty_strided new_full new_ones
    new_zeros reshape_as sum_to_size resize_ resize_as_ unfold
    """
)


def full_name(entry: Entry) -> str:
    """The entry's name, with its variant."""
    variant = entry.variant_test_name
    return f"{entry.name}.{variant}" if variant else str(entry.name)


def _attribute(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = getattr(root, part, None)
        if root is None:
            return None
    return root


def function_of(entry: Entry) -> Callable[..., Any] | None:
    """FLAME's function for an entry, None where there is none."""
    name = full_name(entry)
    if entry.name in OPERATORS:
        method = METHODS_BEHIND.get(entry.name)
        return OPERATORS[entry.name] if method is None or hasattr(Tensor, method) else None
    path = RENAMED.get(name, RENAMED.get(entry.name, entry.name))
    if path in METHODS:
        path = f"Tensor.{path}"
    found: Any = _attribute(flame, path)
    if not callable(found) or isinstance(found, dtypes.DType):
        found = getattr(Tensor, path, None) if "." not in path else None
    return found if callable(found) else None


# --- conversion -----------------------------------------------------------------------------------


class Unconvertible(Exception):
    """A sample holds what FLAME has no counterpart of: a complex tensor, a module."""


def from_torch(x: torch.Tensor) -> Tensor:
    """A copy with the same strides where they can be kept."""
    x = x.detach()
    if x.dtype not in DTYPES or x.layout is not torch.strided:
        raise Unconvertible(f"{x.dtype} {x.layout}")
    if x._is_zerotensor():
        x = torch.zeros(x.shape, dtype=x.dtype)
    x = x.resolve_neg()
    count = x.untyped_storage().nbytes() // x.element_size()
    memory = torch.as_strided(x, (count,), (1,), 0).clone()
    if x.dtype is torch.bfloat16:
        array = memory.view(torch.int16).numpy().view(dtypes.bfloat16.numpy)
    else:
        array = memory.numpy()
    whole = flame.from_numpy(array)
    offset = x.storage_offset()
    return flame.as_strided(whole, tuple(x.shape), x.stride(), offset).detach()


def to_flame(x: Any) -> Any:
    """An argument of a sample as FLAME's."""
    if isinstance(x, torch.Tensor):
        made = from_torch(x)
        return made.requires_grad_() if x.requires_grad else made
    if isinstance(x, torch.dtype):
        if x not in DTYPES:
            raise Unconvertible(str(x))
        return DTYPES[x]
    if isinstance(x, (torch.device, torch.memory_format)):
        name = str(x).removeprefix("torch.")
        return getattr(flame, name, name)
    if isinstance(x, torch.Size):
        return tuple(x)
    if isinstance(x, (list, tuple)):
        return type(x)(map(to_flame, x))
    if isinstance(x, dict):
        return {key: to_flame(value) for key, value in x.items()}
    if isinstance(x, (complex, torch.nn.Module)) or type(x).__module__.startswith("torch"):
        raise Unconvertible(type(x).__name__)
    return x


def tensors_in(x: Any) -> Iterator[Any]:
    """Tensors inside nested sequences, in order."""
    if isinstance(x, (Tensor, torch.Tensor)):
        yield x
    elif isinstance(x, (list, tuple)):
        for item in x:
            yield from tensors_in(item)
    elif isinstance(x, dict):
        for item in x.values():
            yield from tensors_in(item)


def values(x: Any) -> Array:
    """The values as an array; half-width floats as float32."""
    x = x.detach()
    if isinstance(x, Tensor):
        found: Array = (x.to(dtypes.float32) if x.dtype is dtypes.bfloat16 else x).numpy()
        return found
    if x._is_zerotensor():
        return np.zeros(tuple(x.shape), DTYPES[x.dtype].numpy)
    x = x.resolve_neg()
    return np.asarray((x.float() if x.dtype is torch.bfloat16 else x).numpy())


# --- comparison -----------------------------------------------------------------------------------


def compare(
    ours: Any, theirs: Any, label: str, *, with_values: bool = True,
    precision: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Raise AssertionError where a result differs from PyTorch's.

    precision: the narrowest floating dtype of the arguments.
    """
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, Tensor), f"{label}: a {type(ours).__name__}, not a tensor"
        if theirs.dtype not in DTYPES:
            raise Unconvertible(str(theirs.dtype))
        assert tuple(ours.shape) == tuple(theirs.shape), (
            f"{label}: shape {ours.shape}, expected {tuple(theirs.shape)}"
        )
        assert ours.dtype is DTYPES[theirs.dtype], f"{label}: {ours.dtype}, expected {theirs.dtype}"
        if with_values:
            want = values(theirs)
            relative, absolute = TOLERANCE.get(theirs.dtype, (0, 0))
            if theirs.is_floating_point() and precision is not None:
                relative, absolute = max(TOLERANCE[precision], (relative, absolute))
            if theirs.dtype in HALF and want.size:  # PyTorch rounds some sums after each step
                finite = np.abs(want[np.isfinite(want)])
                absolute *= max(1.0, float(finite.max(initial=0.0)))
            np.testing.assert_allclose(
                values(ours), want, rtol=relative, atol=absolute, err_msg=label
            )
        return
    if isinstance(theirs, (list, tuple)):
        assert isinstance(ours, (list, tuple)), f"{label}: a {type(ours).__name__}, not a sequence"
        assert len(ours) == len(theirs), f"{label}: {len(ours)} results, expected {len(theirs)}"
        for position, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            compare(a, b, f"{label} [{position}]", with_values=with_values, precision=precision)
        return
    if isinstance(theirs, torch.dtype):
        assert ours is DTYPES[theirs], label
    elif isinstance(theirs, float) and with_values:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=label)
    elif with_values:
        assert ours == theirs, f"{label}: {ours!r}, expected {theirs!r}"


def _differentiable(results: Any) -> list[Any]:
    return [t for t in tensors_in(results) if t.requires_grad]


def compare_gradients(
    ours: Any, theirs: Any, leaves: Sequence[Any], their_leaves: Sequence[Any], label: str,
    precision: torch.dtype | None,
) -> None:  # fmt: skip
    """Gradients of weighted sums of the results with respect to every leaf."""
    pairs = [
        (a, b) for a, b in zip(tensors_in(ours), tensors_in(theirs), strict=True)
        if b.requires_grad and b.dtype in DTYPES
    ]  # fmt: skip
    if not pairs:
        return
    weights = [
        torch.linspace(0.5, 1.5, b.numel(), dtype=b.dtype).reshape(b.shape) for _, b in pairs
    ]
    expected = torch.autograd.grad([b for _, b in pairs], their_leaves, weights, allow_unused=True)
    for a, _ in pairs:
        assert a.requires_grad, f"{label}: the result does not require grad"
    found = flame.autograd.grad(
        [a for a, _ in pairs], leaves, [from_torch(w) for w in weights], allow_unused=True
    )
    for position, (a, b) in enumerate(zip(found, expected, strict=True)):
        if b is None:
            assert a is None or not np.any(values(a)), f"{label}: gradient {position} is not None"
        elif a is None:
            assert not np.any(values(b)), f"{label}: no gradient {position}"
        else:
            compare(a, b, f"{label}: gradient {position}", precision=precision)


# --- running --------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the samples of one entry."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    errors: list[str] = field(default_factory=list)

    def fail(self, message: str) -> None:
        self.failed += 1
        self.errors.append(message)


def _call(function: Callable[..., Any], sample: Any, convert: Callable[[Any], Any]) -> Any:
    operands = [convert(sample.input), *map(convert, sample.args)]
    options = {key: convert(value) for key, value in sample.kwargs.items()}
    leaves = [t for t in tensors_in([operands, options]) if t.requires_grad]
    return function(*operands, **options), leaves


def _own(x: Any) -> Any:
    """PyTorch's operand; a fresh leaf, as some entries write in place."""
    if isinstance(x, (list, tuple)) and not isinstance(x, torch.Size):
        return type(x)(map(_own, x))
    return x


def spread(samples: list[Any], limit: int) -> list[Any]:
    """At most ``limit`` of the samples, spread evenly over them."""
    if len(samples) <= limit:
        return samples
    return [samples[round(i * (len(samples) - 1) / (limit - 1))] for i in range(limit)]


def samples_of(entry: Entry, dtype: torch.dtype, limit: int, *, more: bool = False) -> list[Any]:
    """Samples of one dtype, seeded; ``more``: the larger reference set too."""
    _seed()
    wanted = dtype is torch.float64 and entry.supports_autograd
    found = []
    for sample in entry.sample_inputs("cpu", dtype, requires_grad=wanted):
        found.append(sample)
        if len(found) >= 400:
            break
    if more:
        for number, sample in enumerate(entry.reference_inputs("cpu", dtype, requires_grad=wanted)):
            if number >= 400:
                break
            found.append(sample)
    return spread(found, limit)


def run_sample(entry: Entry, function: Callable[..., Any], sample: Any, label: str) -> bool:
    """Compare on one sample; False where PyTorch or the conversion refuses it."""
    try:
        ours_first = _prepared(sample)
    except Unconvertible:
        return False
    try:
        if sample.kwargs.get("dropout_p"):
            return False
        if entry.name in UNSTABLE:
            sample.kwargs = {"stable": True, **sample.kwargs}
        theirs, their_leaves = _call(entry.op, sample, _own)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError):
        return False
    if any(t.dtype not in DTYPES for t in tensors_in(theirs)):
        return False
    operands, options, leaves = ours_first
    ours = function(*operands, **options)
    if entry.name in TIED and isinstance(theirs, tuple):
        theirs = _with_indices_of(ours, theirs, sample, TIED[entry.name], label)
    floats = [
        t.dtype for t in tensors_in([sample.input, sample.args, sample.kwargs])
        if t.dtype in TOLERANCE
    ]  # fmt: skip
    precision = max(floats, key=lambda d: TOLERANCE[d], default=None)
    with_values = entry.name not in WITHOUT_VALUES
    compare(ours, theirs, label, with_values=with_values, precision=precision)
    if their_leaves and entry.name not in WITHOUT_VALUES and _differentiable(theirs):
        compare_gradients(ours, theirs, leaves, their_leaves, label, precision)
    return True


def _with_indices_of(ours: Any, theirs: Any, sample: Any, place: int, label: str) -> Any:
    """(values, indices) with our indices, if they name elements of these values."""
    found, indices = theirs
    dim = sample.kwargs.get("dim", sample.args[place] if len(sample.args) > place else -1)
    where = torch.from_numpy(values(ours[1]).copy())
    kept = sample.input.ndim == where.ndim
    if sample.input.ndim:
        where = where if kept else where.unsqueeze(dim)
        taken = sample.input.detach().gather(dim, where)
        taken = taken if kept else taken.squeeze(dim)
        assert torch.equal(taken.nan_to_num(), found.detach().nan_to_num()), f"{label}: indices"
        indices = where if kept else where.squeeze(dim)
    return found, indices


def _prepared(sample: Any) -> tuple[list[Any], dict[str, Any], list[Any]]:
    operands = [to_flame(sample.input), *map(to_flame, sample.args)]
    options = {key: to_flame(value) for key, value in sample.kwargs.items()}
    leaves = [t for t in tensors_in([operands, options]) if t.requires_grad]
    return operands, options, leaves


def short(x: Any) -> str:
    """An argument in few characters."""
    if isinstance(x, torch.Tensor):
        layout = "" if x.is_contiguous() else f"~{tuple(x.stride())}"
        return f"{str(x.dtype)[6:]}{list(x.shape)}{layout}"
    if isinstance(x, (list, tuple)):
        return f"({', '.join(map(short, x))})"
    return repr(x)


def describe(sample: Any) -> str:
    parts = [short(sample.input), *map(short, sample.args)]
    parts += [f"{key}={short(value)}" for key, value in sample.kwargs.items()]
    return ", ".join(parts)


def run_entry(entry: Entry, limit: int, *, more: bool = False) -> Tally:
    """Compare on samples of every tested dtype that PyTorch supports for the entry."""
    tally = Tally()
    function = function_of(entry)
    assert function is not None
    supported = entry.supported_dtypes("cpu")
    for dtype in TESTED:
        if dtype not in supported:
            continue
        for sample in samples_of(entry, dtype, limit, more=more):
            label = f"{full_name(entry)}({describe(sample)})"
            try:
                if run_sample(entry, function, sample, label):
                    tally.passed += 1
                else:
                    tally.skipped += 1
            except Exception as error:  # noqa: BLE001 - whatever goes wrong is the result
                text = " ".join(str(error).split())
                tally.fail(f"{type(error).__name__}: {label}: {text}")
    return tally


def _in_a_child(entry: Entry, limit: int, *, more: bool) -> Tally:
    """`run_entry` in a process of its own, so that a crash is told and the rest goes on."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(run_entry(entry, limit, more=more), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        sent = pipe.read()
    _, status = os.waitpid(child, 0)
    if status or not sent:
        return Tally(failed=1, errors=[f"the process ended with status {status}"])
    tally: Tally = pickle.loads(sent)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="entries (all, without); a prefix with *")
    parser.add_argument("--limit", type=int, default=20, help="samples of a dtype")
    parser.add_argument("--more", action="store_true", help="the reference inputs too")
    parser.add_argument("--errors", type=int, default=1, help="errors shown for an entry")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    totals, missing = Tally(), []
    complete = 0
    for entry in op_db:
        name = full_name(entry)
        if options.names and not any(
            n in (name, entry.name) or (n.endswith("*") and name.startswith(n[:-1]))
            for n in options.names
        ):
            continue
        if function_of(entry) is None:
            missing.append(name)
            continue
        start = time.perf_counter()
        tally = _in_a_child(entry, options.limit, more=options.more)
        took = time.perf_counter() - start
        complete += tally.failed == 0 and tally.passed > 0
        totals.passed += tally.passed
        totals.failed += tally.failed
        totals.skipped += tally.skipped
        mark = "ok  " if not tally.failed else "FAIL"
        print(f"{mark} {name:50} passed {tally.passed:4} failed {tally.failed:4} "
              f"skipped {tally.skipped:4} {took:6.1f} s", flush=True)  # fmt: skip
        for message in tally.errors[: options.errors]:
            print(f"       {message[:400]}", flush=True)
    print(f"\nmissing ({len(missing)}): {' '.join(missing)}")
    print(f"\nsamples: {totals.passed} passed, {totals.failed} failed, {totals.skipped} skipped; "
          f"entries without a failure: {complete}")  # fmt: skip


if __name__ == "__main__":
    main()
