"""`varlen_attn` on a GPU, as calls that assert: against the CPU, where sequences are padded, and
against attention of each sequence by itself; compiled steps; gradients of gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import flame
from flame.core.errors import IndexRangeError
from flame.nn.attention import varlen_attn
from flame.nn.functional import scaled_dot_product_attention

CHECKS: list[Callable[[], None]] = []
LIMITS = {"float64": 1e-12, "float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}
LENGTHS = (40, 1, 0, 23)


def check(function: Callable[[], None]) -> Callable[[], None]:
    """One of the checks that both kinds of device go through."""
    CHECKS.append(function)
    return function


def starts(lengths: Sequence[int], device: str = "cuda") -> Any:
    return flame.tensor(np.cumsum((0, *lengths)).astype(np.int32)).to(device)


def operands(
    device: str = "cuda", dtype: str = "float16", heads: int = 2, key_heads: int = 2,
    width: int = 16, rows: int = sum(LENGTHS), keys: int | None = None,
) -> list[Any]:  # fmt: skip
    """Query, key and value, which are leaves, and the gradient of the result."""
    random = np.random.default_rng(rows)
    others = rows if keys is None else keys
    shapes = [(rows, heads, width), *[(others, key_heads, width)] * 2, (rows, heads, width)]
    made = [
        flame.from_numpy(random.standard_normal(s)).to(getattr(flame, dtype)).to(device)
        for s in shapes
    ]
    return [t.detach().requires_grad_() for t in made[:3]] + made[3:]


def numbers(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().to(flame.float64).numpy()


def distance(made: np.ndarray, wanted: np.ndarray) -> float:
    """Relative to the norm of what is wanted."""
    return float(np.linalg.norm(made - wanted) / max(float(np.linalg.norm(wanted)), 1e-300))


def run(
    device: str, dtype: str, *, lengths: Sequence[int] = LENGTHS,
    key_lengths: Sequence[int] | None = None, slopes: bool = False, heads: int = 2,
    key_heads: int = 2, width: int = 16, **options: Any,
) -> list[np.ndarray]:  # fmt: skip
    """Result and gradients, as float64."""
    others = lengths if key_lengths is None else key_lengths
    *leaves, grad = operands(device, dtype, heads, key_heads, width, sum(lengths), sum(others))
    bias = flame.tensor([0.5 ** (n + 1) for n in range(heads)]).to(device) if slopes else None
    places = None if key_lengths is None else starts(others, device)
    made = varlen_attn(
        *leaves, starts(lengths, device), places, max(lengths), max(others),
        enable_gqa=key_heads != heads, alibi_slopes=bias, **options,
    )  # fmt: skip
    made.backward(grad)
    return [numbers(t) for t in (made, *(leaf.grad for leaf in leaves))]


def same_as_the_cpu(dtype: str, **options: Any) -> None:
    for name, made, wanted in zip(
        ("result", "query", "key", "value"), run("cuda", dtype, **options),
        run("cpu", dtype, **options), strict=True,
    ):  # fmt: skip
        assert distance(made, wanted) < LIMITS[dtype], name


# --- results --------------------------------------------------------------------------------------


@check
def tensor_cores_agree_with_the_cpu() -> None:
    same_as_the_cpu("float16", window_size=(-1, 0))
    same_as_the_cpu("float16", window_size=(5, 2), key_lengths=(30, 9, 4, 20), slopes=True)


@check
def plain_kernels_agree_with_the_cpu() -> None:
    same_as_the_cpu("float32", key_heads=1, window_size=(-1, 0), slopes=True)
    same_as_the_cpu("float64", width=5, window_size=(3, -1))


@check
def heads_that_no_kernel_holds_agree_with_the_cpu() -> None:
    same_as_the_cpu("float32", width=264, lengths=(3, 4), window_size=(-1, 0))


@check
def each_sequence_is_as_if_alone() -> None:
    *leaves, grad = operands(heads=4, key_heads=2)
    made = varlen_attn(*leaves, starts(LENGTHS), None, 64, 64, window_size=(-1, 0), enable_gqa=True)
    found = [made, *flame.autograd.grad(made, leaves, grad)]
    alone: list[list[Any]] = [[], [], [], []]
    ends = np.cumsum((0, *LENGTHS))
    for begin, end in itertools.pairwise(ends):
        own = [t.detach()[begin:end].transpose(0, 1)[None].requires_grad_() for t in leaves]
        result = scaled_dot_product_attention(*own, is_causal=True, enable_gqa=True)
        slopes = flame.autograd.grad(result, own, grad[begin:end].transpose(0, 1)[None])
        for part, tensor in zip(alone, (result, *slopes), strict=True):
            part.append(numbers(tensor[0].transpose(0, 1)))
    for made, parts in zip(found, alone, strict=True):
        assert distance(numbers(made), np.concatenate(parts)) < LIMITS["float16"]


@check
def autocast_takes_half_width() -> None:
    *leaves, _ = operands(dtype="float32")
    with flame.autocast("cuda", dtype=flame.float16):
        made = varlen_attn(*leaves, starts(LENGTHS), None, 64, 64)
    assert made.dtype is flame.float16
    half = varlen_attn(*(t.half() for t in leaves), starts(LENGTHS), None, 64, 64)
    np.testing.assert_array_equal(numbers(made), numbers(half))


@check
def wrong_places_raise_at_the_next_wait() -> None:
    *leaves, _ = operands()
    for lengths, longest, words in (
        ((20, 44), 40, "sequence 1 of cu_seq_q"),
        ((20, 30), 64, "sequence 1 of cu_seq_q"),
    ):
        varlen_attn(*leaves, starts(lengths), None, longest, longest)
        with pytest.raises(IndexRangeError, match=words):
            flame.cuda.synchronize()
    varlen_attn(*leaves, starts((32, 32)), starts((30, 20)), 64, 64)
    with pytest.raises(IndexRangeError, match="sequence 1 of cu_seq_k"):
        flame.cuda.synchronize()
    varlen_attn(*leaves, starts((32, 32)), None, 64, 64)
    flame.cuda.synchronize()


# --- gradients of gradients, compiled steps -------------------------------------------------------


def _second(device: str, **options: Any) -> list[np.ndarray]:
    *leaves, grad = operands(device, "float64", 4, 2, rows=9, width=4)
    slopes = flame.tensor([0.5, 0.25, 0.125, 0.1]).to(device)
    made = varlen_attn(
        *leaves, starts((4, 0, 5), device), None, 6, 6, enable_gqa=True, alibi_slopes=slopes,
        **options,
    )  # fmt: skip
    grads = flame.autograd.grad((made * grad).sum(), leaves, create_graph=True)
    return [numbers(t) for t in flame.autograd.grad(sum((g**2).sum() for g in grads), leaves)]


@check
def gradients_of_gradients_agree_with_the_cpu() -> None:
    for window in ((-1, 0), (2, 1)):
        found, wanted = (_second(device, window_size=window) for device in ("cuda", "cpu"))
        for made, other in zip(found, wanted, strict=True):
            assert distance(made, other) < LIMITS["float64"]


def compiled_steps_serve_all_lengths(dtype: str) -> None:
    """A step is recorded once; the lengths of its later runs are data on the device."""

    def step(query: Any, key: Any, value: Any, grad: Any, places: Any, slopes: Any) -> Any:
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        made = varlen_attn(*leaves, places, None, 64, 64, window_size=(-1, 0), alibi_slopes=slopes)
        return made.detach(), *flame.autograd.grad(made, leaves, grad)

    given = [t.detach() for t in operands(dtype=dtype)]
    compiled, slopes = flame.compile(step), flame.tensor([0.5, 0.25]).to("cuda")
    results = []
    for lengths in (LENGTHS, (10, 20, 30, 4), (0, 0, 0, 64), (1, 62, 1, 0)):
        places = starts(lengths)
        found, wanted = (f(*given, places, slopes) for f in (compiled, step))
        for made, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(numbers(made), numbers(other), rtol=1e-6, atol=1e-7)
        results.append(numbers(found[0]).tobytes())
    assert compiled.recordings == 1
    assert len(set(results)) == 4


@check
def compiled_steps_serve_all_lengths_on_tensor_cores() -> None:
    compiled_steps_serve_all_lengths("float16")


@check
def compiled_steps_serve_all_lengths_in_float32() -> None:
    compiled_steps_serve_all_lengths("float32")


@check
def compiled_steps_report_wrong_places() -> None:
    compiled = flame.compile(lambda q, k, v, places: varlen_attn(q, k, v, places, None, 40, 40))
    given = [t.detach() for t in operands()[:3]]
    compiled(*given, starts(LENGTHS))
    flame.cuda.synchronize()
    compiled(*given, starts((20, 1, 0, 43)))
    with pytest.raises(IndexRangeError, match="sequence 3 of cu_seq_q"):
        flame.cuda.synchronize()
