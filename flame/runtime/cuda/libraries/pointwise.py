"""Convolutions with kernels of one element, which are products: by cuDNN or cuBLASLt.

    y (N H W, K) = x (N H W, C) @ weightᵀ (C, K)        and so both gradients

where tensors are channels-last. The operands are in the same order. Which of the two libraries is
faster depends on the sizes; a problem with enough work times both once (see `tuning`), and the
choice is kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from flame.core.dtypes import float32
from flame.core.errors import CublasError, CudnnError, OutOfMemoryError
from flame.core.types import TensorType
from flame.kernel.library import ConvolutionProblem, Epilogue, MatmulProblem, operands_of
from flame.runtime.cuda.driver import Prepared
from flame.runtime.cuda.libraries import cublaslt, cudnn, tuning
from flame.runtime.cuda.libraries import device as gpu
from flame.runtime.cuda.libraries.matmul_layout import describe
from flame.runtime.cuda.libraries.store import Store

_store: Final = Store()


def product_of(problem: ConvolutionProblem) -> MatmulProblem | None:
    """The product that a convolution of half-width floats is; None where it is none."""
    x, weight, y = problem.x, problem.weight, problem.y
    (first, _), (second, _), (result, _), *_ = operands_of(problem)
    assert first is not None
    assert second is not None
    assert result is not None
    pointwise = all(n == 1 for n in weight.shape[2:]) and problem.groups == 1
    plain = all(n == 1 for n in problem.stride) and not any(problem.padding)
    half = first.dtype is second.dtype and first.dtype.bits == 16
    if not pointwise or not plain or not half or result.dtype not in (first.dtype, float32):
        return None
    if not (_rows(x) and _rows(y) and weight.dense and weight.numel):
        return None
    rows, (out, into) = x.numel // x.shape[1], weight.shape[:2]
    wide = weight.strides[0] if out > 1 else into
    if (into > 1 and weight.strides[1] != 1) or wide != into:
        return None
    m, n, k, a, b = {
        "forward": (rows, out, into, (into, 1), (1, into)),
        "input_gradient": (rows, into, out, (out, 1), (into, 1)),
        "weight_gradient": (out, into, rows, (1, out), (into, 1)),
    }[problem.direction]
    epilogue: Epilogue = "bias" if problem.bias else "none"
    return MatmulProblem(m, n, k, (), first.dtype, result.dtype, a, b, (n, 1), epilogue=epilogue)


def _rows(type_: TensorType) -> bool:
    """Whether a tensor (N, C, ...) is in memory a row of C elements for each place."""
    step = type_.shape[1]
    if not type_.numel or (step > 1 and type_.strides[1] != 1):
        return False
    for dim in (*reversed(range(2, type_.ndim)), 0):
        if type_.shape[dim] > 1 and type_.strides[dim] != step:
            return False
        step *= type_.shape[dim]
    return True


def prepare(problem: ConvolutionProblem, device: int) -> Prepared | None:
    """A plan; None where no library takes the problem."""
    convolution = cudnn.prepare(problem, device)
    product = product_of(problem)
    description = None if product is None else describe(product)
    if product is None or description is None:
        return convolution
    if convolution is not None and not tuning.worth(cublaslt.seconds(description)):
        return convolution
    other = cublaslt.prepare(product, device)
    if convolution is None or other is None:
        return convolution or other
    versions = f"{cudnn.library(device).version} cublasLt {cublaslt.library(device).version}"
    key = f"1x1 {versions} {cublaslt.library(device).device_name} {problem}"
    chosen = _store.read(key)
    if chosen is None:
        try:
            faster = _faster(problem, (convolution, other), device)
        except OutOfMemoryError:
            return convolution  # nothing is kept, so that a later run may try
        chosen = (b"convolution", b"product")[faster]
        _store.write(key, chosen)
    return other if chosen == b"product" else convolution


def _faster(problem: ConvolutionProblem, plans: tuple[Prepared, Prepared], device: int) -> int:
    """The index of the faster plan, on operands made for the trial."""
    library = cudnn.library(device)
    with gpu.on_device(device), gpu.Scratch() as scratch:
        types = [type_ for type_, _ in operands_of(problem)]
        pointers = [scratch.random(t.dtype, t.span) for t in types if t is not None]
        workspace = scratch.allocate(max(plan.workspace for plan in plans))

        def runner(plan: Prepared) -> Callable[[], None]:
            return lambda: plan.enqueue(pointers, workspace, scratch.stream)

        try:
            return gpu.fastest(scratch, [runner(p) for p in plans], (CublasError, CudnnError))
        finally:
            with library.lock:
                library.set_stream(0)  # the stream of the trial is about to end
