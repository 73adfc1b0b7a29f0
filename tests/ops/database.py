"""PyTorch's own database of operators, asked of FLAME.

For an entry of ``op_db``, each sample is called in both libraries; results, dtypes, shapes and
gradients are compared. PyTorch computes on the CPU, FLAME on the device of a `Scope`. As a program
it prints a table: ``python -m tests.ops.database [--device DEVICE] [NAME ...]``.
"""

from __future__ import annotations

import argparse
import importlib.util
import operator
import os
import pickle
import random
import sys
import time
import unittest
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, Final

import numpy as np
import torch
from torch.utils._pytree import tree_map

import flame
import flame.nn.functional
from flame.core import dtypes
from flame.runtime.cuda.driver import install_driver
from flame.tensor import Tensor

from .agreement import (
    DTYPES,
    TOLERANCE,
    WIDER,
    Unconvertible,
    compare,
    compare_gradients,
    tensors_in,
    to_flame,
    values,
)

if importlib.util.find_spec("expecttest") is None:
    # PyTorch's own tests derive from a class of that package; of the database nothing does.
    stand_in: Any = ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase
    sys.modules["expecttest"] = stand_in
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


@dataclass(frozen=True)
class Scope:
    """What is compared: on which device, in which dtypes, and in which of them with gradients."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    differentiated: tuple[torch.dtype, ...]


CPU: Final = Scope(
    "cpu",
    (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool),
    (torch.float64,),
)
_TRAINED: Final = (torch.float32, torch.float16, torch.bfloat16)
GPU: Final = Scope("cuda", (*_TRAINED, torch.int64, torch.int32, torch.uint8, torch.bool), _TRAINED)

# Entries that differ on purpose, with the reason.
KNOWN: Final[dict[str, str]] = {
    "as_strided_scatter": "PyTorch gives the overwritten elements a gradient that is not zero",
    "linalg.matrix_norm": "orders that need singular values raise UnsupportedError",
    "linalg.matrix_power": "negative powers raise UnsupportedError",
    "linalg.norm": "orders that need singular values raise UnsupportedError",
    "linalg.norm.subgradients_at_zero": "orders that need singular values raise UnsupportedError",
    "norm.nuc": "the nuclear norm raises UnsupportedError",
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


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
# What PyTorch's CPU has alone, and FLAME refuses: images of bytes.
REFUSED: Final[dict[str, frozenset[torch.dtype]]] = {
    name: frozenset({torch.uint8})
    for name in (
        "nn.functional.interpolate.bicubic", "nn.functional.interpolate.bilinear",
        "nn.functional.upsample_bilinear",
    )
}  # fmt: skip
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


# Entries whose samples hold options that only PyTorch has.
OPTIONS_OF_PYTORCH: Final = frozenset(
    {
        "nn.functional.linear_cross_entropy.chunked",
        "nn.functional.linear_cross_entropy.chunked_none",
    }
)


def function_of(entry: Entry) -> Callable[..., Any] | None:
    """FLAME's function for an entry, None where there is none."""
    name = full_name(entry)
    if name in OPTIONS_OF_PYTORCH:
        return None
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


# --- running --------------------------------------------------------------------------------------


def shared_entries() -> dict[str, Entry]:
    """By full name, the entries that FLAME has a function for."""
    return {full_name(e): e for e in op_db if function_of(e) is not None}


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


def samples_of(
    entry: Entry, dtype: torch.dtype, limit: int, *, more: bool = False, scope: Scope = CPU
) -> list[Any]:
    """Samples of one dtype, seeded; ``more``: the larger reference set too."""
    _seed()
    wanted = dtype in scope.differentiated and dtype in entry.supported_backward_dtypes("cpu")
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


def run_sample(
    entry: Entry, function: Callable[..., Any], sample: Any, label: str, device: str = "cpu"
) -> bool:
    """Compare on one sample; False where PyTorch or the conversion refuses it."""
    try:
        operands, options, leaves = prepared(sample, device)
    except Unconvertible:
        return False
    try:
        if sample.kwargs.get("dropout_p"):
            return False
        if entry.name in UNSTABLE:
            sample.kwargs = {"stable": True, **sample.kwargs}
            options = {"stable": True, **options}
        theirs, their_leaves = _call(entry.op, sample, _own)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError):
        return False
    if any(t.dtype not in DTYPES for t in tensors_in(theirs)):
        return False
    ours = function(*operands, **options)
    if "device" in options or any(t.device != "cpu" for t in tensors_in([operands, options])):
        for made in tensors_in(ours):
            assert made.device.type == device, f"{label}: the result is on {made.device}"
    floats = [
        t.dtype for t in tensors_in([sample.input, sample.args, sample.kwargs])
        if t.dtype in TOLERANCE
    ]  # fmt: skip
    precision = max(floats, key=lambda d: TOLERANCE[d], default=None)

    def agree(theirs: Any) -> None:
        with_values, same = entry.name not in WITHOUT_VALUES, True
        if entry.name in TIED and isinstance(theirs, tuple):
            found, indices = _with_indices_of(ours, theirs, sample, TIED[entry.name], label)
            same = torch.equal(indices, theirs[1])  # else the gradient is that of another element
            theirs = found, indices
        compare(ours, theirs, label, with_values=with_values, precision=precision)
        if their_leaves and with_values and same:
            compare_gradients(ours, theirs, leaves, their_leaves, label, precision)

    try:
        agree(theirs)
    except AssertionError:
        if precision not in WIDER:
            raise
        agree(_rounded_once(entry, sample, theirs))
    return True


def _rounded_once(entry: Entry, sample: Any, theirs: Any) -> Any:
    """What PyTorch computes in the next wider dtype, rounded to that of ``theirs``: its own kernels
    round half-width sums after each step, and lose digits in some float32 gradients."""

    def wide(x: Any) -> Any:
        return x.to(WIDER.get(x.dtype, x.dtype)) if isinstance(x, torch.Tensor) else x

    input_, args, kwargs = tree_map(wide, (sample.input, sample.args, sample.kwargs))
    made = entry.op(input_, *args, **kwargs)
    return tree_map(lambda x, t: x.to(t.dtype) if isinstance(t, torch.Tensor) else x, made, theirs)


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


def prepared(sample: Any, device: str = "cpu") -> tuple[list[Any], dict[str, Any], list[Any]]:
    """FLAME's operands and options of a sample, and the leaves among them."""
    operands = [to_flame(x, device) for x in (sample.input, *sample.args)]
    options = {key: to_flame(value, device) for key, value in sample.kwargs.items()}
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


def checks_of(
    entry: Entry, limit: int, *, more: bool = False, scope: Scope = CPU
) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Label and `run_sample` of samples of every dtype in scope that PyTorch supports."""
    function = function_of(entry)
    assert function is not None
    supported = entry.supported_dtypes("cpu") - REFUSED.get(full_name(entry), frozenset())
    for dtype in (d for d in scope.dtypes if d in supported):
        for sample in samples_of(entry, dtype, limit, more=more, scope=scope):
            label = f"{full_name(entry)}({describe(sample)})"
            yield label, partial(run_sample, entry, function, sample, label, scope.device)


def run_entry(entry: Entry, limit: int, *, more: bool = False, scope: Scope = CPU) -> Tally:
    """Compare on samples of an entry."""
    return tally_of(checks_of(entry, limit, more=more, scope=scope))


def tally_of(checks: Iterable[tuple[str, Callable[[], bool]]]) -> Tally:
    """What becomes of checks, all of which are made."""
    tally = Tally()
    for label, check in checks:
        try:
            if check():
                tally.passed += 1
            else:
                tally.skipped += 1
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is the result
            text = " ".join(str(error).split())
            tally.fail(f"{type(error).__name__}: {label}: {text}")
    return tally


def _in_a_child(run: Callable[[], Tally]) -> Tally:
    """A tally made in a process of its own, so that a crash is told and the rest goes on."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(run(), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        sent = pipe.read()
    _, status = os.waitpid(child, 0)
    if status or not sent:
        return Tally(failed=1, errors=[f"the process ended with status {status}"])
    tally: Tally = pickle.loads(sent)
    return tally


def _run_on(device: str, entry: Entry, limit: int, *, more: bool) -> Tally:
    if device == "cpu":
        return run_entry(entry, limit, more=more)
    from tests.cuda.dry import get_ready
    from tests.cuda.emulation import EmulatedDriver

    if device == "emulated":
        install_driver(EmulatedDriver())
    checks = list(checks_of(entry, limit, more=more, scope=GPU))
    get_ready([check for _, check in checks])
    return tally_of(checks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="entries (all, without); a prefix with *")
    parser.add_argument("--limit", type=int, default=20, help="samples of a dtype")
    parser.add_argument("--more", action="store_true", help="the reference inputs too")
    parser.add_argument("--device", choices=("cpu", "cuda", "emulated"), default="cpu")
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
        tally = _in_a_child(
            partial(_run_on, options.device, entry, options.limit, more=options.more)
        )
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
