"""Kernels of the user's own on a real GPU."""

from typing import Any

import numpy as np
import pytest

import flame
from flame.core.errors import CompileError, DTypeError

AXPY = r"""
extern "C" __global__ void axpy(const float* x, float* y, float a, long long n) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) y[i] += a * x[i];
}"""
SQUARE = r"""
extern "C" __global__ void square(const float* x, float* y, long long n) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] * x[i];
}"""
TWICE = r"""
extern "C" __global__ void twice_product(const float* x, const float* g, float* y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = 2 * x[i] * g[i];
}"""


def test_a_launch() -> None:
    kernel = flame.cuda.RawKernel(AXPY, "axpy")
    x, y = flame.arange(1000.0).cuda(), flame.ones(1000).cuda()
    kernel((4,), (256,), (x, y, 2.0, 1000))
    kernel(4, 256, (x, y, np.float32(1), np.int64(500)))
    expected = 1 + 2 * np.arange(1000.0)
    expected[:500] += np.arange(500)
    assert np.array_equal(y.cpu().numpy(), expected.astype(np.float32))
    with pytest.raises(DTypeError, match=r"takes flame\.float32, got flame\.float64"):
        kernel(4, 256, (x.double(), y, 2.0, 1000))


def test_a_wrong_text() -> None:
    with pytest.raises(CompileError, match=r"> +3 \|"):
        flame.cuda.RawKernel(AXPY.replace("const long long i", "long i ="), "axpy").compile()


def square_op(vjp: Any) -> Any:
    return flame.cuda.raw_op(
        flame.cuda.RawKernel(SQUARE, "square"),
        outputs=lambda x: (x.shape, x.dtype),
        launch=lambda inputs, outputs: (-(-inputs[0].numel() // 256), 256),
        arguments=lambda inputs, outputs: (*inputs, *outputs, inputs[0].numel()),
        vjp=vjp,
    )


def test_gradients_written_with_operations() -> None:
    square = square_op(lambda grads, inputs, outputs: 2 * inputs[0] * grads[0])
    x = flame.randn(30, 7).cuda().requires_grad_()
    y = square(x.t())  # not contiguous: copied, and the copy is differentiated
    assert np.allclose(y.detach().cpu().numpy(), x.detach().cpu().numpy().T ** 2)
    (first,) = flame.autograd.grad([(y * 3).sum()], [x], create_graph=True)
    assert np.allclose(first.detach().cpu().numpy(), 6 * x.detach().cpu().numpy())
    (second,) = flame.autograd.grad([first.sum()], [x])
    assert np.allclose(second.cpu().numpy(), 6)


def test_gradients_by_another_kernel() -> None:
    product = flame.cuda.raw_op(
        flame.cuda.RawKernel(TWICE, "twice_product"),
        outputs=lambda x, g: (x.shape, x.dtype),
        launch=lambda inputs, outputs: (-(-inputs[0].numel() // 256), 256),
        arguments=lambda inputs, outputs: (*inputs, *outputs, inputs[0].numel()),
    )
    square = square_op(lambda grads, inputs, outputs: product(inputs[0], grads[0]))
    x = flame.randn(1000).cuda().requires_grad_()
    square(x).sum().backward()
    assert x.grad is not None
    assert np.allclose(x.grad.cpu().numpy(), 2 * x.detach().cpu().numpy())
