"""Attention with dropout on a GPU, as calls that assert: against the CPU, which draws the same bits
where the number of keys is a multiple of 64; gradients of both orders; compiled steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import flame
from flame import nn
from flame.core.errors import ArgumentError
from flame.nn.functional import scaled_dot_product_attention

CHECKS: list[Callable[[], None]] = []
LIMITS = {"float32": 1e-5, "float64": 1e-12, "float16": 3e-3, "bfloat16": 2e-2}


def check(function: Callable[[], None]) -> Callable[[], None]:
    """One of the checks that both kinds of device go through."""
    CHECKS.append(function)
    return function


def operands(
    device: str, dtype: str = "float32", heads: int = 2, key_heads: int = 2, length: int = 20,
    keys: int = 64, width: int = 16,
) -> list[Any]:  # fmt: skip
    """Query, key, value and the gradient of the result; the first three are leaves."""
    random = np.random.default_rng(length + keys)
    shapes = [(2, heads, length, width), *[(2, key_heads, keys, width)] * 2]
    made = [
        flame.from_numpy(random.standard_normal(s)).to(getattr(flame, dtype)).to(device)
        for s in (*shapes, shapes[0])
    ]
    return [t.detach().requires_grad_() for t in made[:3]] + made[3:]


def numbers(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().to(flame.float64).numpy()


def run(device: str, dropout: float = 0.3, mask: Any = None, seed: int = 3, **options: Any) -> Any:
    """Result and gradients, as float64."""
    flame.manual_seed(seed)
    known = {k: options.pop(k) for k in ("is_causal", "enable_gqa") if k in options}
    *leaves, grad = operands(device, **options)
    given = None if mask is None else flame.from_numpy(mask).to(device)
    made = scaled_dot_product_attention(*leaves, given, dropout, **known)
    made.backward(grad)
    place = flame.initial_seed(), flame.get_rng_state().numpy().tobytes()
    return [numbers(t) for t in (made, *(leaf.grad for leaf in leaves))], place


def same_as_the_cpu(dtype: str = "float32", **options: Any) -> None:
    """Results, gradients, and how far the generator went on."""
    (made, place), (wanted, other) = (run(d, dtype=dtype, **options) for d in ("cuda", "cpu"))
    assert place == other
    for name, a, b in zip(("result", "query", "key", "value"), made, wanted, strict=True):
        distance = np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-300)
        assert distance < LIMITS[dtype], f"{name}: {distance}"


# --- results --------------------------------------------------------------------------------------


@check
def plain_kernels_agree_with_the_cpu() -> None:
    mask = np.random.default_rng(0).random((20, 64)) > 0.3
    mask[:, 0] = True
    same_as_the_cpu(mask=mask)


@check
def tensor_cores_agree_with_the_cpu() -> None:
    same_as_the_cpu("float16", key_heads=1, is_causal=True, enable_gqa=True)


@check
def what_own_kernels_do_not_take_agrees_with_the_cpu() -> None:
    same_as_the_cpu(width=264, length=3)
    same_as_the_cpu(dropout=1.0)


@check
def one_seed_gives_the_same_run() -> None:
    """Whatever the number of keys; another seed, and the next call, drop other elements."""
    once, again, other = (run("cuda", keys=50, seed=s)[0] for s in (3, 3, 4))
    for a, b, c in zip(once, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)
    *leaves, _ = operands("cuda", keys=50)
    first, second = (scaled_dot_product_attention(*leaves, dropout_p=0.3) for _ in range(2))
    assert not np.array_equal(numbers(first), numbers(second))


@check
def autocast_takes_half_width() -> None:
    *leaves, _ = operands("cuda", keys=64)
    flame.manual_seed(3)
    with flame.autocast("cuda", dtype=flame.float16):
        made = scaled_dot_product_attention(*leaves, dropout_p=0.3)
    assert made.dtype is flame.float16
    expected, _ = run("cuda", dtype="float16")
    np.testing.assert_array_equal(numbers(made), expected[0])


@check
def probabilities_outside_of_0_and_1_are_refused() -> None:
    *leaves, _ = operands("cuda")
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ArgumentError, match=r"dropout_p must lie in \[0, 1\]"):
            scaled_dot_product_attention(*leaves, dropout_p=wrong)


# --- gradients ------------------------------------------------------------------------------------


def _loss(leaves: list[Any], weights: Any) -> Any:
    flame.manual_seed(5)
    return (scaled_dot_product_attention(*leaves, dropout_p=0.4, is_causal=True) * weights).sum()


def _norm(leaves: list[Any], weights: Any) -> Any:
    grads = flame.autograd.grad(_loss(leaves, weights), leaves, create_graph=True)
    return sum((g**2).sum() for g in grads)


@check
def both_orders_agree_with_finite_differences() -> None:
    """Of a number made of the result, and of one made of its gradients."""
    *leaves, weights = operands("cuda", "float64", length=5, keys=7, width=3)
    for function in (_loss, _norm):
        grads = flame.autograd.grad(function(leaves, weights), leaves)
        for place, grad in enumerate(grads):
            turn = flame.from_numpy(np.random.default_rng(place).standard_normal(grad.shape))
            turn = turn.to("cuda")
            ends = []
            for step in (1e-5, -1e-5):
                moved = [t.detach() for t in leaves]
                moved[place] = moved[place] + step * turn
                moved = [t.requires_grad_() for t in moved]
                ends.append(function(moved, weights).item())
            slope = (ends[0] - ends[1]) / 2e-5
            assert (grad * turn).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-7)


@check
def checkpoints_draw_the_same_bits_again() -> None:
    found = []
    for uses in (False, True):
        flame.manual_seed(1)
        *leaves, grad = operands("cuda", "float64", keys=30)

        def attend(q: Any, k: Any, v: Any) -> Any:
            return scaled_dot_product_attention(q, k, v, dropout_p=0.3).exp()

        made = flame.autograd.checkpoint(attend, *leaves) if uses else attend(*leaves)
        scaled_dot_product_attention(*(t.detach() for t in leaves), dropout_p=0.3)
        made.backward(grad)
        found.append([numbers(leaf.grad) for leaf in leaves])
    for plain, again in zip(*found, strict=True):
        np.testing.assert_allclose(again, plain, rtol=1e-12)


# --- steps and models -----------------------------------------------------------------------------


@check
def compiled_steps_draw_as_eager_ones_do() -> None:
    """One recording; every step has bits of its own, those of the eager step."""

    def step(query: Any, key: Any, value: Any, grad: Any) -> Any:
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        made = scaled_dot_product_attention(*leaves, dropout_p=0.3)
        return made.detach(), *flame.autograd.grad(made, leaves, grad)

    given = [t.detach() for t in operands("cuda", keys=50)]
    compiled, runs = flame.compile(step), []
    for function in (step, compiled):
        flame.manual_seed(9)
        runs.append([[numbers(t) for t in function(*given)] for _ in range(3)])
    assert compiled.recordings == 1
    for eager, made in zip(*runs, strict=True):
        for a, b in zip(eager, made, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    assert len({made[0].tobytes() for made in runs[1]}) == 3


def _trained(device: str, *, compiling: bool = False) -> list[np.ndarray]:
    """A layer's losses over three steps, and its parameters."""
    flame.manual_seed(2)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.2, batch_first=True).to(device)
    batch = flame.from_numpy(np.random.default_rng(1).standard_normal((2, 64, 16))).to(device)
    batch = batch.to(flame.float32)
    optimizer = flame.optim.SGD(layer.parameters(), lr=0.1)

    def step(x: Any) -> Any:
        optimizer.zero_grad()
        loss = (layer(x) ** 3).mean()
        loss.backward()
        optimizer.step()
        return loss

    step = flame.compile(step) if compiling else step
    losses = [numbers(step(batch)) for _ in range(3)]
    return [*losses, *(numbers(p) for p in layer.parameters())]


@check
def a_transformer_layer_trains_as_on_the_cpu() -> None:
    wanted = _trained("cpu")
    for made in (_trained("cuda"), _trained("cuda", compiling=True)):
        for a, b in zip(made, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
