"""The models of the GPU benchmarks, each written once over a library: ``lib`` is ``flame`` or
``torch``.

Every model has two sizes: ``full``, which is measured, and ``tiny``, of the same structure, which
runs anywhere in a second, so that both libraries can be shown to compute the same.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from gpu_parts import join_heads, sinusoids, split_heads
from gpu_unet import Form, unet

Arrays = tuple[np.ndarray, ...]
SIZES = ("full", "tiny")


@dataclass(frozen=True)
class Benchmark:
    """A model, its data, its loss, how it is trained, and what we want of it."""

    build: Callable[[Any], Any]  # library -> model
    batch: Callable[[np.random.Generator], Arrays]  # inputs, then the target
    loss: Callable[[Any, Any, Any], Any]  # library, output, target -> scalar
    items: int  # what one step learns from
    unit: str = "samples"  # what the items are
    mixed: bool = True  # bfloat16 autocast, else float32
    channels_last: bool = False
    target: float = math.nan  # milliseconds
    target_memory: float = math.nan  # GiB


def weights(model: Any) -> dict[str, np.ndarray]:
    """A state_dict for ``model``, the same for every library: a value depends on its name alone.

    Matrices and kernels are uniform in ±1/sqrt(inputs). None is zero: where an initialization
    begins with zeros (adaLN-zero), products of zeros would draw less power and so run faster than
    in training.
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    with ThreadPoolExecutor() as pool:  # NumPy draws without the interpreter's lock
        return dict(zip(shapes, pool.map(_values, shapes, shapes.values()), strict=True))


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    kind = name.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    values = np.random.default_rng(zlib.crc32(name.encode())).random(shape, np.float32)
    if kind == "running_var":
        return values + 0.5
    values -= 0.5
    if len(shape) > 1:
        values *= 2 / math.sqrt(math.prod(shape[1:]))
        return values
    values *= 0.1
    return values + 1 if kind == "weight" else values


def perceptron(lib: Any, widths: tuple[int, ...], activation: str) -> Any:
    """Linear layers of these widths with ``activation`` between them."""
    nn = lib.nn
    layers: list[Any] = []
    for inside, outside in itertools.pairwise(widths):
        layers += [nn.Linear(inside, outside), getattr(nn, activation)()]
    return nn.Sequential(*layers[:-1])


def gpt2(lib: Any, layers: int, width: int, heads: int, context: int, vocabulary: int) -> Any:
    """GPT-2 (Radford et al., 2019): the head's weight is that of the token embedding."""
    nn = lib.nn
    functional = nn.functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:  # (B, T, C)
            q, k, v = split_heads(self.qkv(self.norm1(x)), 3, heads)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(join_heads(y))
            hidden = functional.gelu(self.up(self.norm2(x)), approximate="tanh")
            return x + self.down(hidden)

    class GPT2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
            self.blocks = nn.ModuleList([Block() for _ in range(layers)])
            self.norm = nn.LayerNorm(width)

        def forward(self, tokens: Any) -> Any:  # (B, T)
            places = lib.arange(tokens.shape[1], device=tokens.device)
            x = self.tokens(tokens) + self.places(places)
            for block in self.blocks:
                x = block(x)
            return functional.linear(self.norm(x), self.tokens.weight)

    return GPT2()


def resnet(lib: Any, blocks: tuple[int, ...], width: int, classes: int) -> Any:
    """ResNet of bottlenecks (He et al., 2015), strides in the 3x3 convolutions (v1.5)."""
    nn = lib.nn

    class Bottleneck(nn.Module):
        def __init__(self, inside: int, middle: int, stride: int) -> None:
            super().__init__()
            outside = 4 * middle
            self.conv1 = nn.Conv2d(inside, middle, 1, bias=False)
            self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, bias=False)
            self.conv3 = nn.Conv2d(middle, outside, 1, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm2d(middle), nn.BatchNorm2d(middle)
            self.bn3, self.relu = nn.BatchNorm2d(outside), nn.ReLU()
            self.short = nn.Identity()
            if stride != 1 or inside != outside:
                self.short = nn.Sequential(
                    nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
                )

        def forward(self, x: Any) -> Any:  # (N, inside, H, W)
            y = self.relu(self.bn1(self.conv1(x)))
            y = self.relu(self.bn2(self.conv2(y)))
            return self.relu(self.bn3(self.conv3(y)) + self.short(x))

    stages: list[Any] = []
    inside = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride = 2 if stage and not block else 1
            stages.append(Bottleneck(inside, width << stage, stride))
            inside = 4 * (width << stage)
    return nn.Sequential(
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inside, classes),
    )


def dit(lib: Any, layers: int, width: int, heads: int, side: int, classes: int) -> Any:
    """DiT (Peebles and Xie, 2022), patches of 2x2 of 4 x ``side`` x ``side`` latents.

    Each block is modulated by the embeddings of timestep and class (adaLN-zero).
    """
    nn, functional = lib.nn, lib.nn.functional
    tokens = (side // 2) ** 2

    def norm() -> Any:
        return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)

    def modulate(x: Any, shift: Any, scale: Any) -> Any:
        return x * (1 + scale[:, None]) + shift[:, None]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = norm(), norm()
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.modulation = nn.Linear(width, 6 * width)

        def forward(self, x: Any, c: Any) -> Any:  # (N, T, C), (N, C)
            shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, 1)
            q, k, v = split_heads(self.qkv(modulate(self.norm1(x), shift1, scale1)), 3, heads)
            y = functional.scaled_dot_product_attention(q, k, v)
            x = x + gate1[:, None] * self.out(join_heads(y))
            hidden = self.up(modulate(self.norm2(x), shift2, scale2))
            return x + gate2[:, None] * self.down(functional.gelu(hidden, approximate="tanh"))

    class DiT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.classes = nn.Conv2d(4, width, 2, 2), nn.Embedding(classes + 1, width)
            self.time1, self.time2 = nn.Linear(256, width), nn.Linear(width, width)
            self.register_buffer("places", lib.zeros(1, tokens, width))
            self.blocks = nn.ModuleList([Block() for _ in range(layers)])
            self.norm, self.modulation = norm(), nn.Linear(width, 2 * width)
            self.out = nn.Linear(width, 2 * 2 * 4)

        def forward(self, x: Any, time: Any, labels: Any) -> Any:  # (N, 4, side, side), (N,), (N,)
            n, cells = x.shape[0], side // 2
            c = self.time2(functional.silu(self.time1(sinusoids(lib, time, 256))))
            c = functional.silu(c + self.classes(labels))
            h = self.patch(x).flatten(2).transpose(1, 2) + self.places
            for block in self.blocks:
                h = block(h, c)
            shift, scale = self.modulation(c).chunk(2, 1)
            h = self.out(modulate(self.norm(h), shift, scale))
            h = h.reshape(n, cells, cells, 2, 2, 4).permute(0, 5, 1, 3, 2, 4)
            return h.reshape(n, 4, side, side)

    return DiT()


def _normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape, dtype=np.float32)


def _times(random: np.random.Generator, count: int) -> np.ndarray:
    return random.integers(0, 1000, count).astype(np.float32)


def _mse(lib: Any, output: Any, target: Any) -> Any:
    return lib.nn.functional.mse_loss(output, target)


def _cross_entropy(lib: Any, output: Any, target: Any) -> Any:
    return lib.nn.functional.cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1))


def tiny_benchmark(size: str) -> Benchmark:
    """MLP 16-64-64-1 with tanh, batch 32, float32."""
    del size  # it is tiny
    return Benchmark(
        lambda lib: perceptron(lib, (16, 64, 64, 1), "Tanh"),
        lambda r: (_normal(r, 32, 16), _normal(r, 32, 1)),
        _mse,
        items=32,
        mixed=False,
        target=0.05,
    )


def mlp_benchmark(size: str) -> Benchmark:
    """MLP 784-512-512-10 with relu, batch 128, float32."""
    widths, batch = ((784, 512, 512, 10), 128) if size == "full" else ((49, 32, 32, 10), 16)
    return Benchmark(
        lambda lib: perceptron(lib, widths, "ReLU"),
        lambda r: (_normal(r, batch, widths[0]), r.integers(0, 10, batch)),
        _cross_entropy,
        items=batch,
        mixed=False,
        target=0.08,
    )


def gpt2_benchmark(size: str) -> Benchmark:
    """GPT-2 124M, vocabulary 50304, batch 32 x 1024 tokens."""
    full = size == "full"
    layers, width, heads, vocabulary = (12, 768, 12, 50304) if full else (2, 32, 4, 96)
    batch, length = (32, 1024) if full else (2, 16)
    return Benchmark(
        lambda lib: gpt2(lib, layers, width, heads, length, vocabulary),
        lambda r: tuple(r.integers(0, vocabulary, (batch, length)) for _ in range(2)),
        _cross_entropy,
        items=batch * length,
        unit="tokens",
        target=50,
        target_memory=12,
    )


def resnet_benchmark(size: str) -> Benchmark:
    """ResNet-50, batch 256 of 3x224x224, channels-last."""
    full = size == "full"
    blocks, width, classes = ((3, 4, 6, 3), 64, 1000) if full else ((2, 1), 8, 10)
    batch, side = (256, 224) if full else (4, 32)
    return Benchmark(
        lambda lib: resnet(lib, blocks, width, classes),
        lambda r: (_normal(r, batch, 3, side, side), r.integers(0, classes, batch)),
        _cross_entropy,
        items=batch,
        unit="images",
        channels_last=True,
        target=32,
    )


def dit_benchmark(size: str) -> Benchmark:
    """DiT-XL/2 on 4x32x32 latents, that is 256 tokens, batch 64."""
    full = size == "full"
    layers, width, heads, side = (28, 1152, 16, 32) if full else (2, 32, 4, 8)
    batch, classes = (64, 1000) if full else (3, 10)
    return Benchmark(
        lambda lib: dit(lib, layers, width, heads, side, classes),
        lambda r: (
            _normal(r, batch, 4, side, side),
            _times(r, batch),
            r.integers(0, classes, batch),
            _normal(r, batch, 4, side, side),
        ),
        _mse,
        items=batch,
        unit="images",
        target=90,
    )


def unet_benchmark(size: str) -> Benchmark:
    """UNet 320-640-1280 on 4x64x64 latents with a context of 77x768, batch 16, channels-last."""
    full = size == "full"
    form = (
        Form((320, 640, 1280), (True, True, True), depth=1, head=64, groups=32, context=768)
        if full
        else Form((16, 32), (True, True), depth=1, head=8, groups=4, context=12)
    )
    batch, side, words = (16, 64, 77) if full else (2, 8, 5)
    return Benchmark(
        lambda lib: unet(lib, form),
        lambda r: (
            _normal(r, batch, 4, side, side),
            _times(r, batch),
            _normal(r, batch, words, form.context),
            _normal(r, batch, 4, side, side),
        ),
        _mse,
        items=batch,
        unit="images",
        channels_last=True,
        target=50,
    )


BENCHMARKS: dict[str, Callable[[str], Benchmark]] = {
    "tiny": tiny_benchmark,
    "mlp": mlp_benchmark,
    "gpt2": gpt2_benchmark,
    "resnet": resnet_benchmark,
    "dit": dit_benchmark,
    "unet": unet_benchmark,
}
