"""The emulated libraries against PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as T

from flame.core import dtypes
from flame.core.types import tensor_type
from flame.kernel.library import (
    AttentionProblem,
    Batch,
    ConvolutionProblem,
    Epilogue,
    MatmulProblem,
)

from .library_emulation import prepare

F32 = dtypes.float32


def solve(problem: Any, *operands: Any) -> None:
    function, count = prepare(problem)
    assert count == len(operands)
    function([0 if x is None else x.data_ptr() for x in operands])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("epilogue", ["none", "bias", "relu_bias", "gelu_bias", "gelu_aux_bias"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_product(epilogue: Epilogue, accumulate: bool) -> None:
    a, b, bias, d = random(2, 4, 5), random(2, 6, 5), random(6), random(2, 4, 6)
    aux = torch.zeros_like(d)
    problem = MatmulProblem(
        4, 6, 5, (Batch(2, 20, 30, 24),), F32, F32, (5, 1), (1, 5), (6, 1),
        epilogue=epilogue, accumulate=accumulate,
    )  # fmt: skip
    want = a @ b.mT + (0 if epilogue == "none" else bias)
    before = want
    if epilogue.startswith("gelu"):
        want = T.gelu(want, approximate="tanh")
    if epilogue == "relu_bias":
        want = want.relu()
    if accumulate:
        want = want + d
    solve(problem, a, b, d, *([] if epilogue == "none" else [bias]),
          *([aux] if epilogue == "gelu_aux_bias" else []))  # fmt: skip
    torch.testing.assert_close(d, want)
    if epilogue == "gelu_aux_bias":
        torch.testing.assert_close(aux, before)


def test_product_with_the_slope_of_gelu() -> None:
    a, b, aux, d = random(4, 5), random(5, 6), random(4, 6).requires_grad_(), torch.zeros(4, 6)
    solve(MatmulProblem(4, 6, 5, (), F32, F32, (5, 1), (6, 1), (6, 1), epilogue="dgelu"),
          a, b, d, aux)  # fmt: skip
    T.gelu(aux, approximate="tanh").backward(a @ b)
    torch.testing.assert_close(d, aux.grad)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("last", [False, True])
def test_convolution(groups: int, last: bool) -> None:
    x, weight, bias = random(2, 4, 7, 6), random(6, 4 // groups, 3, 2), random(6)
    options = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": groups}
    x.requires_grad_()
    weight.requires_grad_()
    want = T.conv2d(x, weight, bias, **options)
    grad = random(*want.shape)
    want.backward(grad)
    to = torch.channels_last if last else torch.contiguous_format

    def typed(t: torch.Tensor) -> tuple[torch.Tensor, Any]:
        t = t.detach().clone(memory_format=to)
        return t, tensor_type(F32, tuple(t.shape), tuple(t.stride()))

    (x0, xt), (w0, wt), (y0, yt), (g0, _) = (typed(t) for t in (x, weight, want, grad))

    def problem(direction: Any, **more: Any) -> ConvolutionProblem:
        return ConvolutionProblem(direction, xt, wt, yt, *options.values(), **more)

    y0.fill_(torch.nan)
    solve(problem("forward", bias=True), x0, w0, y0, bias)
    torch.testing.assert_close(y0, want.detach(), check_stride=False)
    solve(problem("input_gradient"), g0, w0, x0.clone(memory_format=to).copy_(x0))
    made = torch.full_like(x0, torch.nan)
    solve(problem("input_gradient"), g0, w0, made)
    torch.testing.assert_close(made, x.grad, check_stride=False)
    made = torch.full_like(w0, torch.nan)
    solve(problem("weight_gradient"), g0, x0, made)
    torch.testing.assert_close(made, weight.grad, check_stride=False)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_attention(causal: bool, masked: str | None) -> None:
    q, k, v = (random(2, h, n, 8) for h, n in ((4, 5), (2, 6), (2, 7)))
    v = v[:, :, :6].contiguous()
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    mask: Any = None
    if masked:
        mask = random(5, 6) > -0.5 if masked == "bool" else random(5, 6)
        if masked == "bool":
            mask[:, 0] = True
    scores = q @ k.repeat_interleave(2, 1).mT * 0.3
    if masked == "bool":
        scores = scores.masked_fill(~mask, -torch.inf)
    elif masked:
        scores = scores + mask
    if causal:
        scores = scores.masked_fill(torch.ones(5, 6).triu(1).bool(), -torch.inf)
    want = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    sums = scores.logsumexp(-1)
    grad, shift = random(*want.shape), random(*sums.shape)
    torch.autograd.backward([want, sums], [grad, shift])

    def typed(t: torch.Tensor) -> Any:
        dtype = dtypes.bool_ if t.dtype == torch.bool else F32
        return tensor_type(dtype, tuple(t.shape), tuple(t.stride()))

    types = [typed(t) for t in (q, k, v, want)]
    mask_type = None if mask is None else typed(mask)
    result, log_sum = torch.zeros_like(want), torch.zeros_like(sums)
    solve(AttentionProblem(False, *types, mask_type, causal, 0.3), q, k, v, mask, result, log_sum)
    torch.testing.assert_close(result, want.detach())
    torch.testing.assert_close(log_sum, sums.detach())
    made = [torch.zeros_like(t) for t in (q, k, v)]
    solve(AttentionProblem(True, *types, mask_type, causal, 0.3, shift=True),
          grad, shift, q, k, v, mask, result, log_sum, *made)  # fmt: skip
    for found, leaf in zip(made, (q, k, v), strict=True):
        torch.testing.assert_close(found, leaf.grad)


def test_dropout_of_attention_is_the_same_in_both_directions() -> None:
    """With v the identity the result is the dropped weights; with grad 1 for one element the
    gradient of v is a row of them."""
    q, k = random(1, 1, 4, 8), random(1, 1, 4, 8)
    v = torch.eye(4)[None, None].contiguous()
    types = [tensor_type(F32, tuple(t.shape)) for t in (q, k, v, v)]
    numbers = (torch.tensor(7), torch.tensor(3))
    result, log_sum = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4)
    solve(AttentionProblem(False, *types, None, False, 1.0, 0.5), q, k, v, None, result, log_sum,
          *numbers)  # fmt: skip
    assert 0 < np.count_nonzero(result.numpy()) < 16
    grad, dv = torch.zeros_like(result), torch.zeros_like(v)
    grad[0, 0, 2, 1] = 1
    solve(AttentionProblem(True, *types, None, False, 1.0, 0.5), grad, None, q, k, v, None, result,
          log_sum, torch.zeros_like(q), torch.zeros_like(k), dv, *numbers)  # fmt: skip
    torch.testing.assert_close(dv[0, 0, :, 1], result[0, 0, 2])
