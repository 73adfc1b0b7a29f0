"""Operations whose kernels are the user's own: eager, differentiated, compiled."""

from typing import Any

import numpy as np
import pytest

import flame
from flame.core.errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    GradientError,
    UnsupportedError,
)
from flame.core.types import tensor_type
from flame.cuda import RawKernel, raw_op
from flame.cuda._signature import as_device_function
from flame.runtime.cuda.nvrtc import compile_text

from .emulation import EmulatedDriver

SQUARE = r"""
static __device__ float squared(float x) { return x * x; }
extern "C" __global__ void square(const float* x, float* y, long long n) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) y[i] = squared(x[i]);
}
"""
SCALED = r"""
extern "C" __global__ void __launch_bounds__(128) scaled(
    const float* __restrict__ x, float factor, int shift, double bias, float* __restrict__ y,
    float* sums, const float* nothing, int n
) {
    extern __shared__ float held[];
    const int i = threadIdx.x;
    if (i < n) {
        held[i] = x[i] * factor + shift + (float)bias + (nothing ? nothing[i] : 0.0f);
        y[i] = held[i];
    }
    __syncthreads();
    if (i == 0) {
        float sum = 0;
        for (int k = 0; k < n; k++) sum += held[k];
        *sums = sum;
    }
}
"""


@pytest.fixture(autouse=True)
def gpu(
    emulated_cuda: EmulatedDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> EmulatedDriver:
    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path))
    return emulated_cuda


def square_op(vjp: Any, **changes: Any) -> Any:
    given = {
        "outputs": lambda x: (x.shape, x.dtype),
        "launch": lambda inputs, outputs: (-(-inputs[0].numel() // 256), 256),
        "arguments": lambda inputs, outputs: (*inputs, *outputs, inputs[0].numel()),
        "vjp": vjp,
    }
    return raw_op(RawKernel(SQUARE, "square"), **{**given, **changes})


def scaled_op(**changes: Any) -> Any:
    """(x * factor + shift + bias, its sum), for the static number ``shift``."""
    given = {
        "outputs": lambda x, factor, bias, shift: [(x.shape, x.dtype), ((), x.dtype)],
        "launch": lambda inputs, outputs, shift: (1, 128, 4 * inputs[0].numel()),
        "arguments": lambda inputs, outputs, shift: (
            inputs[0],
            inputs[1],
            shift,
            inputs[2],
            *outputs,
            None,
            inputs[0].numel(),
        ),
        "vjp": lambda grads, inputs, outputs, shift: (
            (grads[0] + grads[1]) * inputs[1],
            None,
            None,
        ),
    }
    return raw_op(RawKernel(SCALED, "scaled"), **{**given, **changes})


def test_derivatives_of_first_and_second_order() -> None:
    square = square_op(lambda grads, inputs, outputs: 2 * inputs[0] * grads[0])
    x = flame.randn(30, 7).cuda().requires_grad_()
    y = square(x.t())  # not contiguous: copied first
    values = x.detach().cpu().numpy()
    assert y.device == "cuda:0"
    assert y.node.name == "square"
    assert np.allclose(y.detach().cpu().numpy(), values.T**2)
    (first,) = flame.autograd.grad([(y * 3).sum()], [x], create_graph=True)
    assert np.allclose(first.detach().cpu().numpy(), 6 * values)
    (second,) = flame.autograd.grad([first.sum()], [x])
    assert np.allclose(second.cpu().numpy(), 6)


def test_a_derivative_by_another_kernel() -> None:
    text = r"""extern "C" __global__ void product(const float* x, const float* g, float* y, int n) {
        const int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < n) y[i] = 2 * x[i] * g[i];
    }"""
    product = raw_op(
        RawKernel(text, "product"),
        outputs=lambda x, g: (x.shape, x.dtype),
        launch=lambda inputs, outputs: (-(-inputs[0].numel() // 256), 256),
        arguments=lambda inputs, outputs: (*inputs, *outputs, inputs[0].numel()),
    )
    square = square_op(lambda grads, inputs, outputs: product(inputs[0], grads[0]))
    x = flame.randn(300).cuda().requires_grad_()
    square(x).sum().backward()
    assert np.allclose(x.grad.cpu().numpy(), 2 * x.detach().cpu().numpy())
    # The inner one has no derivative of its own, and says so.
    (first,) = flame.autograd.grad([square(x).sum()], [x], create_graph=True)
    with pytest.raises(GradientError, match="raw_op product has no derivative; give it a vjp"):
        first.sum().backward()


def test_numbers_and_several_results() -> None:
    scaled = scaled_op()
    x = flame.randn(100).cuda().requires_grad_()
    values = x.detach().cpu().numpy()
    for factor, bias, shift in ((2.0, 0.5, 3), (-1, 7, -4), (1.5, -2.25, 3)):
        y, total = scaled(x, factor, bias, shift=shift)
        expected = values * factor + shift + bias
        assert np.allclose(y.detach().cpu().numpy(), expected, atol=1e-5)
        assert total.item() == pytest.approx(expected.sum(), rel=1e-4)
    (gradient,) = flame.autograd.grad([y.sum() + 10 * total], [x])
    assert np.allclose(gradient.cpu().numpy(), 11 * 1.5)


def test_a_compiled_step_trains_as_the_eager_one() -> None:
    square = square_op(lambda grads, inputs, outputs: 2 * inputs[0] * grads[0])
    scaled = scaled_op()
    start = np.random.default_rng(0).standard_normal(100, np.float32)

    def losses(*, compiled: bool) -> list[float]:
        w = flame.from_numpy(start.copy()).cuda().requires_grad_()

        def step(x: Any, rate: float) -> Any:
            y, total = scaled(square(w * x), 0.5, 1, shift=2)
            loss = (y * y).sum() + total
            loss.backward()
            with flame.no_grad():
                w.sub_(w.grad * rate)
            w.grad = None
            return loss

        run = flame.compile(step) if compiled else step
        x = flame.from_numpy(start[::-1].copy()).cuda()
        return [run(x, 1e-3).item() for _ in range(4)]

    eager = losses(compiled=False)
    assert eager[-1] < eager[0]
    assert losses(compiled=True) == pytest.approx(eager, rel=1e-5)


def test_an_empty_tensor_launches_nothing() -> None:
    square = square_op(None)
    assert square(flame.zeros(0, 5).cuda()).shape == (0, 5)


def test_what_is_known_late_decides_nothing() -> None:
    scaled = scaled_op(launch=lambda inputs, outputs, shift: (int(inputs[1]), 128))
    with pytest.raises(ArgumentError, match="pass numbers that decide shapes or launches as keyw"):
        scaled(flame.ones(10).cuda(), 2.0, 1.0, shift=1)
    scaled = scaled_op(outputs=lambda x, factor, bias, shift: ((x.numel() * factor,), x.dtype))
    with pytest.raises(ArgumentError, match="pass numbers that decide shapes"):
        scaled(flame.ones(10).cuda(), 2.0, 1.0, shift=1)
    with pytest.raises(ArgumentError, match="must be hashable"):
        scaled(flame.ones(10).cuda(), 2.0, 1.0, shift=[1])


def test_mistakes_are_told() -> None:
    x = flame.ones(10).cuda()
    with pytest.raises(DeviceError, match=r"raw_op square .*\.to\('cuda'\)"):
        square_op(None)(flame.ones(3))
    with pytest.raises(DTypeError, match=r"argument 0 \(const float\* x\) takes flame\.float32, g"):
        square_op(None)(x.double())
    with pytest.raises(ArgumentError, match=r"takes 3 arguments .*, got 2"):
        square_op(None, arguments=lambda inputs, outputs: (*inputs, *outputs))(x)
    with pytest.raises(ArgumentError, match=r"may be written, but an operation leaves its inputs"):
        square_op(None, arguments=lambda inputs, outputs: (*inputs, *inputs, 10))(x)
    with pytest.raises(DTypeError, match=r"argument 2 \(long long n\) takes int64, got the float"):
        square_op(None, arguments=lambda inputs, outputs: (*inputs, *outputs, 1.5))(x)
    with pytest.raises(DTypeError, match=r"argument 2 \(long long n\) takes a number, got a tens"):
        square_op(None, arguments=lambda inputs, outputs: (*inputs, *outputs, *inputs))(x)
    with pytest.raises(DTypeError, match=r"argument 1 \(float\* y\) takes a tensor, got 5"):
        square_op(None, arguments=lambda inputs, outputs: (*inputs, 5, 10))(x)
    with pytest.raises(ArgumentError, match=r"launch gives \(grid, block\)"):
        square_op(None, launch=lambda inputs, outputs: (1,))(x)
    with pytest.raises(ArgumentError, match=r"block .* has more than 1024 threads"):
        square_op(None, launch=lambda inputs, outputs: (1, 2048))(x)
    with pytest.raises(ArgumentError, match=r"outputs gives \(shape, dtype\)"):
        square_op(None, outputs=lambda x: x.shape)(x)
    with pytest.raises(ArgumentError, match="parameters cannot be read from its text"):
        raw_op(RawKernel("KERNEL(k)", "k"), outputs=lambda x: x, launch=lambda i, o: (1, 1))
    y = square_op(lambda grads, inputs, outputs: (None, None))(x.requires_grad_())
    with pytest.raises(GradientError, match="vjp gave 2 gradients for 1 inputs"):
        y.sum().backward()


def test_what_it_means_on_the_cpu_is_not_known() -> None:
    with pytest.raises(UnsupportedError, match="on a GPU alone"):
        square_op(None).op.reference(np.ones(3))


@pytest.mark.parametrize("block", [False, True])
def test_nvrtc_takes_the_text(block: bool) -> None:
    """``extern "C"`` before the kernel or around it."""
    text = SCALED
    if block:
        text = 'extern "C" {\n' + SCALED.replace('extern "C" ', "") + "}\n"
    scaled = scaled_op()
    scaled.kernel = RawKernel(text, "scaled", ("-DN=4",))
    type_ = tensor_type(flame.float32, (10,), None, "cuda:0")
    types = (type_, float, float)
    outputs = scaled.op.infer(types, static=(("shift", 2),))
    (bound,) = scaled.op.lower_cuda(types, outputs, static=(("shift", 2),)).calls
    assert (bound.symbol, bound.sizes, bound.shared) == ("scaled_called", (2, 10), 40)
    image = compile_text(bound.text, "scaled_called", (9, 0))
    assert b"scaled_called" in image


def test_a_kernel_as_a_device_function() -> None:
    text, bounds = as_device_function(SCALED, "scaled")
    assert bounds == "__launch_bounds__(128)"
    assert "__global__" not in text
    assert "__device__ __forceinline__ void  scaled(" in text
    assert as_device_function("nothing", "k") == ("nothing", "")
