"""The single operations of `gpu_ops.py`, each written once over a library: ``flame`` or ``torch``.

``bytes`` and ``flops`` are what an operation cannot do without: every tensor read once and written
once, where it is larger than the caches and its statistics are needed first, read twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BYTES = {"bfloat16": 2, "float32": 4, "int64": 8}


@dataclass(frozen=True)
class Input:
    """One tensor: normal values, or integers below ``below``."""

    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    grad: bool = False  # whether the backward is asked for its gradient
    below: int = 0
    channels_last: bool = False

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True)
class Case:
    """An operation on some tensors; it has a backward where one of them has ``grad``."""

    name: str
    inputs: tuple[Input, ...]
    call: Callable[..., Any]  # library, tensors -> one tensor
    forward_bytes: float = 0
    backward_bytes: float = 0
    flops: float = 0  # of the forward
    backward_flops: float = 0
    forward: bool = True  # whether the forward is of interest
    exact: bool = True  # False where the result is random


def memory_cases(size: str) -> list[Case]:
    """What moves data: copies, elementwise functions, normalizations, reductions."""
    full = size == "full"
    rows = 32768 if full else 48
    return [
        *_elementwise(rows, 3072 if full else 24),
        *_by_row(rows, 768 if full else 24),
        *_losses(16384 if full else 48, 50304 if full else 40),
        *_images(full),
        *_sums(rows, 3072 if full else 24),
        *_orders(rows, 1024 if full else 16),
        _embedding(rows, 50304 if full else 40, 768 if full else 16),
    ]


def _elementwise(rows: int, width: int) -> list[Case]:
    x = Input((rows, width), grad=True)
    n = x.bytes
    plain = Input((4 * rows, width))
    return [
        Case("copy", (plain,), lambda lib, x: x.clone(), 2 * plain.bytes),
        Case("add", (Input(x.shape), Input(x.shape)), lambda lib, x, y: x + y, 3 * n),
        Case(
            "gelu, tanh",
            (x,),
            lambda lib, x: lib.nn.functional.gelu(x, approximate="tanh"),
            2 * n,
            3 * n,
        ),
        Case(
            "dropout 0.1",
            (x,),
            lambda lib, x: lib.nn.functional.dropout(x, 0.1),
            2 * n,
            2 * n,
            exact=False,
        ),
    ]


def _by_row(rows: int, width: int) -> list[Case]:
    x, scale = Input((rows, width), grad=True), Input((width,), grad=True)
    n = x.bytes
    return [
        Case(
            "layer_norm",
            (x, scale, scale),
            lambda lib, x, w, b: lib.nn.functional.layer_norm(x, (width,), w, b),
            2 * n,
            3 * n,
        ),
        Case("softmax", (x,), lambda lib, x: lib.nn.functional.softmax(x, -1), 2 * n, 3 * n),
    ]


def _losses(rows: int, classes: int) -> list[Case]:
    logits = Input((rows, classes), grad=True)
    labels = Input((rows,), "int64", below=classes)
    return [
        Case(
            "cross_entropy",
            (logits, labels),
            lambda lib, x, t: lib.nn.functional.cross_entropy(x, t),
            logits.bytes,
            2 * logits.bytes,
        )
    ]


def _images(full: bool) -> list[Case]:
    shape = (16, 320, 64, 64) if full else (2, 8, 4, 4)
    x = Input(shape, grad=True, channels_last=True)
    scale = Input((shape[1],), grad=True)
    batch_shape = (256, 64, 112, 112) if full else (4, 8, 6, 6)
    y = Input(batch_shape, grad=True, channels_last=True)
    batch_scale = Input((batch_shape[1],), "float32", grad=True)
    groups = 32 if full else 4
    return [
        Case(
            "group_norm, channels-last",
            (x, scale, scale),
            lambda lib, x, w, b: lib.nn.functional.group_norm(x, groups, w, b),
            3 * x.bytes,
            5 * x.bytes,
        ),
        Case(
            "batch_norm, channels-last",
            (y, batch_scale, batch_scale),
            lambda lib, x, w, b: lib.nn.functional.batch_norm(x, None, None, w, b, True),
            3 * y.bytes,
            5 * y.bytes,
        ),
    ]


def _sums(rows: int, width: int) -> list[Case]:
    x = Input((rows, width))
    return [
        Case("sum of rows", (x,), lambda lib, x: x.sum(1), x.bytes),
        Case("sum of columns", (x,), lambda lib, x: x.sum(0), x.bytes),
    ]


def _orders(rows: int, width: int) -> list[Case]:
    x = Input((rows, width), "float32")
    return [
        Case("cumsum", (x,), lambda lib, x: lib.cumsum(x, 1), 2 * x.bytes),
        Case("sort", (x,), lambda lib, x: lib.sort(x, 1)[0], 4 * x.bytes),  # int64 indices too
    ]


def _embedding(tokens: int, words: int, width: int) -> Case:
    table = Input((words, width), grad=True)
    given = Input((tokens,), "int64", below=words)
    rows = 2 * tokens * width
    return Case(
        "embedding",
        (given, table),
        lambda lib, t, w: lib.nn.functional.embedding(t, w),
        2 * rows,
        rows + table.bytes,
    )


def product_cases(size: str) -> list[Case]:
    """Matrix products, convolutions and attention: what tensor cores do."""
    full = size == "full"
    sides = (4096, 8192) if full else (16,)
    return [
        *(_matmul(side) for side in sides),
        *_linears(32768 if full else 32, 768 if full else 16, 50304 if full else 40),
        *_convolutions(full),
        *_attentions(full),
    ]


def _matmul(side: int) -> Case:
    square = Input((side, side))
    return Case(
        f"matmul {side}", (square, square), lambda lib, a, b: lib.matmul(a, b), flops=2 * side**3
    )


def _linears(rows: int, width: int, words: int) -> list[Case]:
    """The products of GPT-2; the backward makes the gradients of input and weight."""
    pairs = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    return [
        Case(
            f"linear {rows} x {inside} to {outside}",
            (Input((rows, inside), grad=True), Input((outside, inside), grad=True)),
            lambda lib, x, w: lib.nn.functional.linear(x, w),
            flops=2 * rows * inside * outside,
            backward_flops=4 * rows * inside * outside,
        )
        for inside, outside in [*pairs, (width, words)]
    ]


def _convolutions(full: bool) -> list[Case]:
    """(batch, channels in and out, side, kernel, stride); channels-last."""
    forms = [
        (16, 640, 640, 32, 3, 1),
        (16, 320, 320, 64, 3, 1),
        (256, 64, 64, 56, 3, 1),
        (256, 64, 256, 56, 1, 1),
        (256, 128, 128, 56, 3, 2),
        (256, 3, 64, 224, 7, 2),
    ]
    small = [(2, 8, 8, 6, 3, 1), (2, 3, 8, 8, 7, 2)]
    return [_convolution(*form) for form in (forms if full else small)]


def _convolution(batch: int, inside: int, outside: int, side: int, kernel: int, step: int) -> Case:
    made = -(-side // step)
    x = Input((batch, inside, side, side), grad=inside > 3, channels_last=True)
    w = Input((outside, inside, kernel, kernel), grad=True, channels_last=True)
    flops = 2 * batch * outside * made**2 * inside * kernel**2
    return Case(
        f"conv {kernel}x{kernel}/{step}, {inside} to {outside} at {side}², batch {batch}",
        (x, w),
        lambda lib, x, w: lib.nn.functional.conv2d(x, w, None, step, kernel // 2),
        flops=flops,
        backward_flops=2 * flops if x.grad else flops,
    )


def _attentions(full: bool) -> list[Case]:
    forms = [
        (length, head, causal)
        for length in ((1024, 4096) if full else (16,))
        for head in ((64, 128) if full else (8,))
        for causal in (True, False)
    ]
    return [_attention(16384 if full else 32, *form) for form in forms]


def _attention(tokens: int, length: int, head: int, causal: bool) -> Case:
    """16 or 32 heads; the flops of the two products, of which a causal mask leaves half."""
    heads = 2048 // head if tokens > 32 else 2
    batch = tokens // length
    x = Input((batch, heads, length, head), grad=True)
    flops = 4 * batch * heads * length**2 * head / (2 if causal else 1)

    def call(lib: Any, q: Any, k: Any, v: Any) -> Any:
        return lib.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    kind = "causal" if causal else "full"
    return Case(
        f"attention {kind}, {batch} x {heads} heads x {length} x {head}",
        (x, x, x),
        call,
        flops=flops,
        backward_flops=2.5 * flops,
    )
