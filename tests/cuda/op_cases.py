"""Ops of the table, lowered and rendered for a GPU, run on the host and compared with NumPy."""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import flame.ops
from flame.compiler.executor import array_at
from flame.compiler.gpu.steps import KernelSpec, specs_of
from flame.compiler.pipeline import lower, results, unreadable
from flame.core.dtypes import DType
from flame.core.types import TensorType, on_device
from flame.graph import one_op
from flame.kernel.builder import BoundKernel, Lowering
from flame.kernel.geometry import Geometry, KernelLaunch
from flame.kernel.program import Gemm, SplitProduct
from flame.ops.op import OPS, Op, Sample
from flame.ops.views import ViewOp
from flame.render.cuda import render
from flame.render.cuda_geometry import SHARED_BYTES, scratch_bytes
from flame.render.cuda_index import walk
from flame.tensor import Tensor
from flame.testing import LAYOUTS, dtypes_of, make_inputs
from flame.testing.references import TOLERANCE, _precision, _widened

from .host_compiler import HostLibrary

for module in pkgutil.walk_packages(flame.ops.__path__, "flame.ops."):
    importlib.import_module(module.name)

# Every geometry is right for every kernel. None: the one that the sizes suggest.
GEOMETRIES = (
    None,
    Geometry(32, 64),
    Geometry(128, 128),
    Geometry(4, 64, wide=True),
    Geometry(64, 64, shared=False, by_pointer=True),
    Geometry(1, 32),
)
GUARD = 64  # bytes around what a kernel writes
POISON = 0xFF


@dataclass(frozen=True)
class Case:
    """One sample of an op in one dtype and layout, with the launches of its kernels."""

    op: Op
    sample: Sample
    dtype: DType
    layout: str
    geometry: Geometry | None
    outputs: tuple[TensorType, ...]
    lowering: Lowering
    launches: tuple[KernelLaunch | None, ...]  # None: nothing to do

    @property
    def label(self) -> str:
        return f"{self.op.name} {self.dtype.name} {self.layout} {self.geometry or ''}"

    @property
    def texts(self) -> list[str]:
        return [launch.text for launch in self.launches if launch is not None]


def ops_with_kernels() -> list[Op]:
    """Ops that lower to kernels: neither views nor functions of the host alone."""
    return [op for op in OPS.values() if not isinstance(op, ViewOp)]


def is_for_cpu_alone(bound: BoundKernel) -> bool:
    """Whether a kernel calls a library of the processor."""
    return any(isinstance(s, (Gemm, SplitProduct)) for s in walk(bound.kernel.body.body))


def choices(op: Op) -> Iterator[tuple[Sample, DType, str]]:
    """Samples with dtypes and layouts: three dtypes of the first sample, one of each later one, so
    that all dtypes and layouts come up over the table."""
    for number, sample in enumerate(op.samples):
        dtypes, turn = dtypes_of(sample), number + len(op.name)
        if number == 0:
            few = dict.fromkeys((dtypes[0], dtypes[turn % len(dtypes)], dtypes[-1]))
            yield from ((sample, d, "contiguous") for d in few)
            yield sample, dtypes[0], LAYOUTS[1 + turn % 4]
        else:
            yield sample, dtypes[turn % len(dtypes)], LAYOUTS[turn % len(LAYOUTS)]


def cases_of(op: Op) -> list[Case]:
    """The cases of an op, for those samples whose kernels run on a GPU."""
    made = (
        make_case(op, *choice, GEOMETRIES[(number + len(op.name)) % len(GEOMETRIES)])
        for number, choice in enumerate(choices(op))
    )
    return [case for case in made if case is not None]


def make_case(
    op: Op, sample: Sample, dtype: DType, layout: str, geometry: Geometry | None
) -> Case | None:
    operands, _ = make_inputs(sample, dtype, layout=layout)
    types = tuple(_type_of(x) for x in operands)
    if unreadable(op, types):  # such operands are copied before the op sees them
        return None
    graph = one_op(op, types, sample.attributes)
    outputs = results(graph, None)
    lowering = lower(graph, outputs)
    if lowering.host is not None or any(is_for_cpu_alone(b) for b in lowering.kernels):
        return None
    if geometry is not None and any(not _fits(b, geometry) for b in lowering.kernels):
        geometry = replace(geometry, shared=False)
    launches = tuple(render(b, geometry) if b.extent else None for b in lowering.kernels)
    return Case(op, sample, dtype, layout, geometry, outputs, lowering, launches)


def launches_on_gpu(op: Op) -> Iterator[KernelSpec]:
    """What the samples of an op launch on a GPU, by eager calls and by compiled steps."""
    for sample, dtype, layout in choices(op):
        operands, _ = make_inputs(sample, dtype, layout=layout)
        found = [_type_of(x) for x in operands]
        types = tuple(on_device(t, "cuda:0") if isinstance(t, TensorType) else t for t in found)
        if unreadable(op, types):
            continue
        graph = one_op(op, types, sample.attributes)
        lowering = lower(graph, results(graph, None))
        for by_pointer in (False, True):
            for spec in specs_of(lowering.steps, by_pointer=by_pointer):
                if isinstance(spec, KernelSpec):
                    yield spec


def _fits(bound: BoundKernel, geometry: Geometry) -> bool:
    return scratch_bytes(bound.kernel) * geometry.teams <= SHARED_BYTES


def _type_of(x: Any) -> Any:
    if x is None:
        return None
    return x.type if isinstance(x, Tensor) else type(x)


class Memory:
    """Poisoned bytes between guards."""

    def __init__(self, nbytes: int, fill: int = POISON) -> None:
        self.nbytes = nbytes
        self.raw = np.full(nbytes + 2 * GUARD + 256, fill, np.uint8)
        self.start = -(self.raw.ctypes.data + GUARD) % 256 + GUARD
        self.pointer = self.raw.ctypes.data + self.start

    def check(self, label: str) -> None:
        before, after = self.raw[: self.start], self.raw[self.start + self.nbytes :]
        assert (before == POISON).all(), f"{label}: a write before its memory"
        assert (after == POISON).all(), f"{label}: a write after its memory"


def execute(case: Case, library: HostLibrary, *, descending: bool = False) -> list[Any]:
    """The outputs, as arrays. Raises AssertionError for writes out of bounds."""
    operands, _ = make_inputs(case.sample, case.dtype, layout=case.layout)
    outputs = [Memory(t.span * t.dtype.itemsize) for t in case.outputs]
    temporaries = [Memory(n) for n in case.lowering.temporaries]
    errors = np.zeros(8, np.int64)
    constants = [np.ascontiguousarray(c) for c in case.lowering.constants]
    for bound, launch in zip(case.lowering.kernels, case.launches, strict=True):
        if launch is None:
            continue
        words: list[Any] = []
        kept: list[Any] = []  # numbers that words point to
        for ref in bound.operands:
            if ref.role == "input":
                word = _word(operands[ref.position])
                kept.append(word)
                number = isinstance(operands[ref.position], (bool, int, float))
                if number and case.geometry is not None and case.geometry.by_pointer:
                    word = ctypes.c_int64(ctypes.addressof(word))
                words.append(word)
            elif ref.role == "output":
                words.append(ctypes.c_int64(outputs[ref.position].pointer))
            elif ref.role == "temporary":
                words.append(ctypes.c_int64(temporaries[ref.position].pointer))
            elif ref.role == "constant":
                words.append(ctypes.c_int64(constants[ref.position].ctypes.data))
            else:
                words.append(ctypes.c_int64(errors.ctypes.data))
        scratch = Memory(launch.scratch)
        words += [ctypes.c_int64(scratch.pointer)] if launch.scratch else []
        words += [ctypes.c_int64(n) for n in (*bound.sizes, bound.extent)]
        run_words(library, launch, words, descending=descending)
        scratch.check(f"{case.label}: scratch")
    for memory in (*outputs, *temporaries):
        memory.check(case.label)
    assert not errors.any(), f"{case.label}: an error was reported"
    return [np.array(array_at(m.pointer, t)) for m, t in zip(outputs, case.outputs, strict=True)]


def run_words(
    library: HostLibrary, launch: KernelLaunch, words: Sequence[Any], *, descending: bool = False
) -> None:
    """Launch a kernel on argument words."""
    addresses = (ctypes.c_void_p * len(words))(*(ctypes.addressof(w) for w in words))
    library.launch(
        launch.symbol, launch.grid, launch.block, launch.shared, ctypes.addressof(addresses),
        descending=descending,
    )  # fmt: skip


def run_bound(
    launch: KernelLaunch, bound: BoundKernel, *arrays: Any, library: HostLibrary | None = None,
    descending: bool = False,
) -> None:  # fmt: skip
    """Run a kernel on arrays in the order of its operands."""
    words = [ctypes.c_int64(a.ctypes.data) for a in arrays]
    scratch = np.full(max(launch.scratch, 1), 0xFF, np.uint8)
    words += [ctypes.c_int64(scratch.ctypes.data)] if launch.scratch else []
    words += [ctypes.c_int64(n) for n in (*bound.sizes, bound.extent)]
    run_words(library or HostLibrary.of([launch.text]), launch, words, descending=descending)


def _word(x: Any) -> Any:
    if x is None:
        return ctypes.c_int64(0)
    if isinstance(x, Tensor):
        return ctypes.c_int64(x.pointer)
    return ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int64(int(x))


def expected(case: Case) -> list[Any]:
    """The outputs by the op's reference."""
    _, arrays = make_inputs(case.sample, case.dtype, layout=case.layout)
    with np.errstate(all="ignore"):
        made = case.op.reference(*[_widened(a) for a in arrays], **case.sample.attributes)
    return [np.asarray(x) for x in (made if isinstance(made, tuple) else (made,))]


def compare(case: Case, got: Sequence[Any], want: Sequence[Any]) -> None:
    """Raise AssertionError where results are not those of the reference."""
    assert len(got) == len(want), f"{case.label}: {len(got)} results"
    for made, wanted, type_ in zip(got, want, case.outputs, strict=True):
        assert made.shape == wanted.shape, f"{case.label}: {made.shape}, expected {wanted.shape}"
        if type_.dtype.kind != "f":
            np.testing.assert_array_equal(made, wanted.astype(made.dtype), err_msg=case.label)
            continue
        relative, absolute = TOLERANCE[min((type_.dtype, case.dtype), key=_precision)]
        factor = case.op.tolerance
        np.testing.assert_allclose(
            made.astype(np.float64), wanted.astype(np.float64),
            rtol=relative * factor, atol=absolute * factor, err_msg=case.label,
        )  # fmt: skip
