"""Kernels of the user's own, on a driver whose kernels are Python functions."""

import ctypes
from typing import Any

import numpy as np
import pytest

import flame
from flame.core.errors import (
    ArgumentError,
    CompileError,
    DeviceError,
    DTypeError,
    GradientError,
    TraceError,
)
from flame.core.types import tensor_type
from flame.cuda import RawKernel
from flame.runtime.cuda.nvrtc import compile_text, text_options
from flame.runtime.cuda.streams import Stream, stream_context
from flame.runtime.storage import Storage
from flame.tensor import Tensor

from .fake import FakeDriver

AXPY = r"""
extern "C" __global__ void axpy(const float* __restrict__ x, float* y, float a, long long n) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) y[i] += a * x[i];
}"""


def on_gpu(values: Any, dtype: flame.DType = flame.float32, device: str = "cuda:0") -> Tensor:
    data = np.asarray(values, dtype.numpy)
    storage = Storage.allocate(data.nbytes, device)
    ctypes.memmove(storage.pointer, np.ascontiguousarray(data).ctypes.data, data.nbytes)
    return Tensor.wrap(storage, storage.pointer, tensor_type(dtype, data.shape, None, device))


def numbers(pointer: int, count: int) -> np.ndarray[Any, Any]:
    return np.frombuffer((ctypes.c_float * count).from_address(int(pointer)), np.float32)


def value(raw: bytes, kind: str) -> Any:
    return np.frombuffer(raw, kind)[0]


def values(tensor: Tensor) -> list[float]:
    return [float(x) for x in numbers(tensor.pointer, tensor.numel())]


@pytest.fixture
def axpy(fake: FakeDriver) -> RawKernel:
    def body(grid: Any, block: Any, x: bytes, y: bytes, a: bytes, n: bytes) -> None:
        count = int(value(n, "i8"))
        target = numbers(value(y, "u8"), count)
        target += value(a, "f4") * numbers(value(x, "u8"), count)

    fake.kernels["axpy"] = (8, 8, 4, 8), body
    return RawKernel(AXPY, "axpy")


def test_a_launch(fake: FakeDriver, axpy: RawKernel) -> None:
    x, y = on_gpu([1, 2, 3]), on_gpu([10, 20, 30])
    axpy((1,), (256,), (x, y, 2.0, 3), shared_mem=64)
    assert values(y) == [12, 24, 36]
    _, *launched = fake.named("launch")[-1]
    assert launched[:4] == ["axpy", (1, 1, 1), (256, 1, 1), 64]
    assert (x._version, y._version) == (0, 1)  # a pointer to const is not written
    axpy(1, (16, 16), (x, y, np.float32(1), np.int64(2)))
    assert values(y) == [13, 26, 36]


def test_the_current_stream(fake: FakeDriver, axpy: RawKernel) -> None:
    x, y = on_gpu([1.0]), on_gpu([0.0])
    side = Stream(0)
    with stream_context(side):
        axpy(1, 1, (x, y, 1.0, 1))
    assert fake.named("launch")[-1][5] == side.cuda_stream
    del y
    assert fake.named("free")[-1][3] == side.cuda_stream  # only after the kernel


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({3: None}, ArgumentError, r"takes 4 arguments \(const float\* __restrict__ x, .*got 3"),
        ({2: np.float64(2)}, DTypeError, r"argument 2 takes float32, got numpy.float64"),
        ({3: np.int32(2)}, DTypeError, r"argument 3 takes int64, got numpy.int32"),
        ({3: 2.0}, DTypeError, r"argument 3 takes int64, got the float 2.0"),
        ({3: 2**63}, DTypeError, r"int64, which 9223372036854775808 does not fit"),
        ({0: 5}, DTypeError, r"argument 0 \(const float\* __restrict__ x\) takes a tensor or N"),
        ({3: "n"}, DTypeError, r"argument 3: tensors, numbers and None are taken, got 'n'"),
    ],
)
def test_arguments_that_do_not_fit(
    fake: FakeDriver,
    axpy: RawKernel,
    change: dict[int, Any],
    error: type[Exception],
    words: str,
) -> None:
    args: list[Any] = [on_gpu([1.0]), on_gpu([0.0]), 1.0, 1]
    ((place, given),) = change.items()
    args[place] = given
    if given is None:
        del args[place]
    with pytest.raises(error, match=words):
        axpy(1, 1, args)
    assert not fake.named("launch")


def test_tensors_that_do_not_fit(fake: FakeDriver, axpy: RawKernel) -> None:
    x, y = on_gpu([[1.0, 2.0], [3.0, 4.0]]), on_gpu([0.0])
    wide = on_gpu([1.0], flame.float64)
    with pytest.raises(DTypeError, match=r"argument 0 .* takes flame.float32, got flame.float64"):
        axpy(1, 1, (wide, y, 1.0, 1))
    with pytest.raises(DTypeError, match=r"argument 2 \(float a\) takes a number, got a tensor"):
        axpy(1, 1, (x, y, y, 1))
    with pytest.raises(DeviceError, match=r"one CUDA device, got \['cpu', 'cuda:0'\]"):
        axpy(1, 1, (flame.ones(1), y, 1.0, 1))
    with pytest.raises(DeviceError, match=r"one CUDA device, got \['cuda:0', 'cuda:1'\]"):
        axpy(1, 1, (x, on_gpu([0.0], device="cuda:1"), 1.0, 1))
    turned = Tensor.wrap(x.storage, x.pointer, tensor_type(flame.float32, (2, 2), (1, 2), "cuda:0"))
    with pytest.raises(ArgumentError, match=r"strides \(1, 2\); pass tensor.contiguous\(\)"):
        axpy(1, 1, (turned, y, 1.0, 1))
    RawKernel(AXPY, "axpy", strided=True)(1, 1, (turned, y, 1.0, 1))
    y.requires_grad_()
    with pytest.raises(GradientError, match=r"has no derivative; .*raw_op"):
        axpy(1, 1, (x, y, 1.0, 1))
    with flame.no_grad():
        axpy(1, 1, (x, y, 1.0, 1))


@pytest.mark.parametrize("grid", [0, (1, 2, 3, 4), (), 1.5, "x", (1, 70000)])
def test_grids_that_cannot_be(fake: FakeDriver, axpy: RawKernel, grid: Any) -> None:
    with pytest.raises(ArgumentError, match="grid"):
        axpy(grid, 1, (on_gpu([1.0]), on_gpu([0.0]), 1.0, 1))


def test_blocks_that_are_too_large(fake: FakeDriver, axpy: RawKernel) -> None:
    with pytest.raises(ArgumentError, match=r"block \(64, 32, 1\) has more than 1024 threads"):
        axpy(1, (64, 32), (on_gpu([1.0]), on_gpu([0.0]), 1.0, 1))


def test_parameters_behind_a_macro_go_by_size(fake: FakeDriver) -> None:
    seen = []
    fake.kernels["hidden"] = (8, 4, 8), lambda grid, block, *raw: seen.append(raw)
    kernel = RawKernel("KERNEL(hidden)", "hidden")
    assert kernel.parameters is None
    y = on_gpu([0.0])
    kernel(1, 1, (y, np.int32(7), 9))
    assert [value(r, k) for r, k in zip(seen[0], ("u8", "i4", "i8"), strict=True)] == [
        y.pointer,
        7,
        9,
    ]
    assert y._version == 1  # what is not known may be written
    with pytest.raises(DTypeError, match=r"argument 1 has 8 bytes \(int\), the kernel's parameter"):
        kernel(1, 1, (y, 7, 9))
    with pytest.raises(ArgumentError, match="takes 3 arguments, got 2"):
        kernel(1, 1, (y, 7))


def test_options(fake: FakeDriver) -> None:
    kernel = RawKernel(AXPY, "axpy", ("-DN=4", "--use_fast_math"))
    assert text_options(kernel.text) == ("--fmad=true", "-DN=4", "--use_fast_math")
    plain = RawKernel(AXPY, "axpy", ("--fmad=false",))
    assert text_options(plain.text) == ("--fmad=false",)
    with pytest.raises(ArgumentError, match="each a string without spaces"):
        RawKernel(AXPY, "axpy", ("-D N=4",))
    with pytest.raises(ArgumentError, match="each a string without spaces"):
        RawKernel(AXPY, "axpy", "-DN=4")


@pytest.mark.parametrize("options", [(), ("--fmad=false",), ("-DN=4", "--use_fast_math")])
def test_real_compilation(fake: FakeDriver, options: tuple[str, ...]) -> None:
    kernel = RawKernel(AXPY, "axpy", options)
    assert compile_text(kernel.text, "axpy", (9, 0))[:4] == b"\x7fELF"


def test_a_wrong_text(fake: FakeDriver) -> None:
    with pytest.raises(CompileError, match="kernel k is wrong"):
        RawKernel("wrong", "k").compile()


def test_recording_refuses(fake: FakeDriver, axpy: RawKernel) -> None:
    x, y = on_gpu([1.0]), on_gpu([0.0])

    @flame.compile
    def step() -> None:
        axpy(1, 1, (x, y, 1.0, 1))

    with pytest.raises(TraceError, match=r"RawKernel axpy cannot be a part of a function under"):
        step()
    assert not fake.named("launch")
