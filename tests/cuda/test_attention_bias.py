"""Biases of attention that broadcast, as ALiBi's (1, H, 1, S), on the emulated GPU: they are read
by their strides, so that no (B, H, L, S) is made of them, in either pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
from flame.core.types import on_device, tensor_type
from flame.kernel.builder import BoundSource
from flame.nn.functional import scaled_dot_product_attention
from flame.ops.attention import library
from flame.runtime.cuda.driver import driver

pytestmark = pytest.mark.usefixtures("eager_cuda")

LENGTH, KEYS, WIDTH, HEADS = 40, 70, 64, 4
SHAPES = {  # of the bias, with the strides that a kernel gets
    (1, HEADS, 1, KEYS): (0, KEYS, 0, 1),
    (1, HEADS, LENGTH, KEYS): (0, LENGTH * KEYS, KEYS, 1),
    (2, 1, 1, KEYS): (KEYS, 0, 0, 1),
}
OPTIONS = {"causal": True, "scale": WIDTH**-0.5, "dropout": 0.0}


def run(device: str, shape: tuple[int, ...], key_heads: int) -> list[np.ndarray]:
    """Result and gradients, of heads as projections give them: (B, L, H, E) in memory."""
    random = np.random.default_rng(0)
    whole = (2, LENGTH, HEADS, WIDTH)
    sizes = (whole, *[(2, KEYS, key_heads, WIDTH)] * 2, whole)
    *made, grad = (
        flame.from_numpy(random.standard_normal(s)).half().to(device).transpose(1, 2) for s in sizes
    )
    leaves = [t.detach().requires_grad_() for t in made]
    bias = flame.from_numpy(random.standard_normal(shape).astype(np.float32)).to(device)
    made = scaled_dot_product_attention(
        *leaves, bias, is_causal=True, enable_gqa=key_heads != HEADS
    )
    made.backward(grad)
    return [t.detach().cpu().double().numpy() for t in (made, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_all_that_runs(shape: tuple[int, ...], key_heads: int) -> None:
    flame.cuda.synchronize()
    launches = driver().launches
    before = len(launches)
    found = run("cuda", shape, key_heads)
    passes = ["flash_attention_forward", "attention_delta", *["flash_attention_backward"] * 2]
    assert [name for name in launches[before:] if "attention" in name] == passes
    for made, wanted in zip(found, run("cpu", shape, key_heads), strict=True):
        assert np.linalg.norm(made - wanted) < 3e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_get_the_strides_of_the_bias(shape: tuple[int, ...]) -> None:
    def on_gpu(dtype: Any, *sizes: int) -> Any:
        return on_device(tensor_type(dtype, sizes), "cuda:0")

    query, key = (on_gpu(flame.float16, 2, HEADS, n, WIDTH) for n in (LENGTH, KEYS))
    bias, rows = on_gpu(flame.float32, *shape), on_gpu(flame.float32, 2, HEADS, LENGTH)
    forward = library.forward((query, key, key, bias), (query, rows), **OPTIONS)
    types = (query, None, query, key, key, bias, query, rows)
    backward = library.backward(types, (query, key, key), **OPTIONS)
    assert forward is not None
    assert backward is not None
    assert not forward.temporaries
    assert backward.temporaries == (4 * 2 * HEADS * LENGTH,)  # delta
    calls = [c for c in (*forward.calls, *backward.calls) if "flash" in c.name]
    assert len(calls) == 3
    for call in calls:
        assert isinstance(call, BoundSource)
        assert call.sizes[-4:] == SHAPES[shape]
